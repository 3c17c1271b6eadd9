"""A Keras architecture as a chain of layers: Sequential, nested ones, and functional models that are a chain.

Only names and numbers are read here; what each layer means is the matter of `keras_layers`.

Sources: the configurations that keras.Model.to_json writes, keras.saving (how layers are called in a weights file).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from xprnn.arrays.namespace import InputError

__all__ = ["Spec", "chain_of", "inner_spec", "snake"]

MODELS = ("Sequential", "Functional", "Model")
_DEEPEST = 20


class Spec(NamedTuple):
    """One layer: its Keras class, its name, its configuration, and where its arrays stand in a weights file."""

    kind: str  # "" where it is not Keras's own, which has been said
    name: str
    options: dict[str, Any]
    path: str


def snake(name: str) -> str:
    """A class name as it stands in the paths of a weights file.

    >>> [snake(name) for name in ("LSTM", "SimpleRNN", "StackedRNNCells", "TimeDistributed")]
    ['lstm', 'simple_rnn', 'stacked_rnn_cells', 'time_distributed']
    """
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def inner_spec(entry: Any, path: str) -> Spec:
    """The layer or cell that an entry of a configuration describes.

    Raises:
        InputError: no such description, or a class that is not Keras's own: its code is not run.
    """
    if not isinstance(entry, dict):
        raise InputError("expected a layer's class_name and config")
    kind, home, own = entry.get("class_name"), str(entry.get("module", "keras")), entry.get("registered_name")
    options = entry.get("config")
    name = str(options.get("name", kind) if isinstance(options, dict) else kind)[:80]
    if not isinstance(kind, str) or home.partition(".")[0] != "keras" or own not in (None, kind):
        raise InputError(f"{name} ({own or kind}) is not a layer of Keras's own, and code is never run")
    if not isinstance(options, dict):
        raise InputError(f"{name}: expected a layer's class_name and config")
    return Spec(kind, name, options, path)


def chain_of(config: dict[str, Any], problems: list[str]) -> list[Spec]:
    """The layers of a model in the order in which they run; nested models are opened.

    Args:
        config: as `model.to_json()` says.
        problems: what has no place in a chain is added here.
    """
    found: list[Spec] = []
    _open(config, "", "", found, problems, 0)
    return found


def _open(entry: Any, path: str, lead: str, found: list[Spec], problems: list[str], depth: int) -> None:
    """Append the layers of a model whose arrays stand under `path`, their names behind `lead`."""
    try:
        model = inner_spec(entry, path)
        if model.kind not in MODELS or depth > _DEEPEST:
            raise InputError(f"{model.name} ({model.kind}): expected a Sequential or a functional model")
        layers = _named(model, path, problems)
        if model.kind != "Sequential":
            layers = _sorted(model.options, layers, problems)
    except InputError as error:
        problems.append(str(error))
        return
    for entry_, spec in layers:
        if spec.kind in MODELS:
            _open(entry_, spec.path, f"{lead}{spec.name}_", found, problems, depth + 1)
        elif spec.kind != "InputLayer":
            found.append(spec._replace(name=lead + spec.name))


def _named(model: Spec, path: str, problems: list[str]) -> list[tuple[Any, Spec]]:
    """Every layer with its path: classes are counted in the order in which a model has its layers."""
    entries = model.options.get("layers")
    if not isinstance(entries, list):
        raise InputError(f"{model.name} ({model.kind}) has no list of layers")
    counts: dict[str, int] = {}
    out = []
    for entry in entries:
        if _is_operation(entry):
            continue
        try:
            spec = inner_spec(entry, "")
        except InputError as error:
            problems.append(str(error))
            spec = Spec("", str(entry.get("name")) if isinstance(entry, dict) else "", {}, "")
        key = snake(spec.kind)
        number, counts[key] = counts.get(key, 0), counts.get(key, 0) + 1
        where = f"{path}/layers/{key}" if path else f"layers/{key}"
        out.append((entry, spec._replace(path=f"{where}_{number}" if number else where)))
    return out


def _is_operation(entry: Any) -> bool:
    return isinstance(entry, dict) and str(entry.get("module", "")).startswith("keras.src.ops")


class _Tensor(NamedTuple):
    """Where a tensor comes from: which output of which call of which layer."""

    layer: str
    node: int
    output: int


def _tensors(value: Any) -> list[_Tensor]:
    """All tensors in an argument, or in the lists of a model's inputs and outputs."""
    if isinstance(value, dict):
        if value.get("class_name") == "__keras_tensor__":
            return _tensors(value.get("config", {}).get("keras_history"))
        return [t for v in value.values() for t in _tensors(v)]
    if not isinstance(value, list):
        return []
    if len(value) == 3 and isinstance(value[0], str) and all(isinstance(v, int) for v in value[1:]):
        return [_Tensor(*value)]
    return [t for v in value for t in _tensors(v)]


def _sorted(options: dict[str, Any], layers: list[tuple[Any, Spec]], problems: list[str]) -> list[tuple[Any, Spec]]:
    """The layers of a functional model from its input to its output, if they are one chain."""
    known = {str(entry.get("name", spec.name)): (entry, spec) for entry, spec in layers}
    graph = _Graph({str(e.get("name")): e for e in options["layers"] if isinstance(e, dict)})
    inputs, outputs = _tensors(options.get("input_layers")), _tensors(options.get("output_layers"))
    if len(inputs) != 1 or not outputs or outputs[0].output:
        raise InputError(f"a chain has one input and a layer's output first, found {len(inputs)} and {outputs[:1]}")
    chain: list[str] = []
    at = outputs[0].layer
    while at != inputs[0].layer:
        if at not in known or at in chain:
            raise InputError(f"{at}: a chain runs from the input to the output, through every layer once")
        chain.append(at)
        at = graph.before(at, problems)
    chain.reverse()
    extra = [t.layer for t in outputs[1:] if t.layer not in chain or t.output == 0]
    extra += [name for name in known if name not in chain and known[name][1].kind != "InputLayer"]
    if extra:
        problems.append(f"{', '.join(dict.fromkeys(extra))}: not on the chain from the input to the first output")
    graph.check_masks(inputs[0].layer, [known[name][1] for name in chain], chain, problems)
    return [known[name] for name in chain]


class _Graph:
    """The calls in a functional model."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self.entries = entries
        self.masks: dict[str, _Tensor] = {}  # layer -> the mask that its call was given

    def _call(self, name: str) -> tuple[list[Any], dict[str, Any]]:
        nodes = self.entries[name].get("inbound_nodes")
        if not isinstance(nodes, list) or len(nodes) != 1:
            count = len(nodes) if isinstance(nodes, list) else 0
            raise InputError(f"{name} is called {count} times: each layer of a chain is called once")
        node = nodes[0]
        if not isinstance(node, dict) or not isinstance(node.get("args"), list):
            raise InputError(f"{name}: its calls are not written as Keras 3 does")
        return node["args"], node.get("kwargs") or {}

    def before(self, name: str, problems: list[str]) -> str:
        """The layer whose output this one takes."""
        args, kwargs = self._call(name)
        first, others = _tensors(args[:1]), _tensors(args[1:])
        masks = _tensors(kwargs.get("mask"))
        others += _tensors({k: v for k, v in kwargs.items() if k != "mask"})
        if len(first) != 1 or first[0].output:
            raise InputError(f"{name} takes something else than the one output of a layer")
        if others:
            problems.append(f"{name} takes {', '.join(t.layer for t in others)} beside its input (an initial state?)")
        if masks:
            self.masks[name] = masks[0]
        return first[0].layer

    def check_masks(self, start: str, specs: list[Spec], chain: list[str], problems: list[str]) -> None:
        """A mask that stands in the graph must be the one that a layer of the chain makes of its input."""
        makers: list[tuple[str, float]] = []
        before = start
        for name, spec in zip(chain, specs, strict=True):
            if name in self.masks and self._made_of(self.masks[name].layer) not in makers[-1:]:
                problems.append(f"{name} is given a mask that no Masking or Embedding before it makes")
            if spec.kind == "Masking":
                makers.append((before, spec.options.get("mask_value", 0.0)))
            elif spec.kind == "Embedding" and spec.options.get("mask_zero"):
                makers.append((before, 0))
            before = name

    def _made_of(self, name: str) -> tuple[str, float] | None:
        """(layer, value) of a mask `any(output != value)`, or None for another one."""
        entry = self.entries.get(name, {})
        if entry.get("class_name") == "Any":
            name = _tensors(self._call(name)[0])[0].layer
            entry = self.entries.get(name, {})
        if entry.get("class_name") != "NotEqual" or not _is_operation(entry):
            return None
        args, _ = self._call(name)
        source = _tensors(args[:1])
        return (source[0].layer, args[1]) if len(source) == 1 and len(args) == 2 else None
