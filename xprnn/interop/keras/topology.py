"""A Keras architecture as a chain of layers: Sequential, nested ones, and functional models that are a chain.

Only names and numbers are read here; what each layer means is the matter of `keras_layers`.

Sources: the configurations that keras.Model.to_json writes, keras.saving (how layers are called in a weights file).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from xprnn.arrays.namespace import InputError

__all__ = ["KerasLayerSpec", "linear_topology", "parse_layer_spec", "to_snake_case"]

MODEL_CLASSES = ("Sequential", "Functional", "Model")
_MAX_DEPTH = 20


class KerasLayerSpec(NamedTuple):
    """One layer: its Keras class, its name, its configuration, and where its arrays stand in a weights file."""

    class_name: str  # "" where it is not Keras's own, which has been said
    name: str
    config: dict[str, Any]
    h5_path: str


def to_snake_case(name: str) -> str:
    """A class name as it stands in the paths of a weights file.

    >>> [to_snake_case(name) for name in ("LSTM", "SimpleRNN", "StackedRNNCells", "TimeDistributed")]
    ['lstm', 'simple_rnn', 'stacked_rnn_cells', 'time_distributed']
    """
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def parse_layer_spec(entry: Any, h5_path: str) -> KerasLayerSpec:
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
    return KerasLayerSpec(kind, name, options, h5_path)


def linear_topology(config: dict[str, Any], problems: list[str]) -> list[KerasLayerSpec]:
    """The layers of a model in the order in which they run; nested models are opened.

    Args:
        config: as `model.to_json()` says.
        problems: what has no place in a chain is added here.
    """
    found: list[KerasLayerSpec] = []
    _flatten_model(config, "", "", found, problems, 0)
    return found


def _flatten_model(
    entry: Any, path: str, lead: str, found: list[KerasLayerSpec], problems: list[str], depth: int
) -> None:
    """Append the layers of a model whose arrays stand under `path`, their names behind `lead`."""
    try:
        model = parse_layer_spec(entry, path)
        if model.class_name not in MODEL_CLASSES or depth > _MAX_DEPTH:
            raise InputError(f"{model.name} ({model.class_name}): expected a Sequential or a functional model")
        layers = _layer_specs(model, path, problems)
        if model.class_name != "Sequential":
            layers = _topological_order(model.config, layers, problems)
    except InputError as error:
        problems.append(str(error))
        return
    for entry_, spec in layers:
        if spec.class_name in MODEL_CLASSES:
            _flatten_model(entry_, spec.h5_path, f"{lead}{spec.name}_", found, problems, depth + 1)
        elif spec.class_name != "InputLayer":
            found.append(spec._replace(name=lead + spec.name))


def _layer_specs(model: KerasLayerSpec, path: str, problems: list[str]) -> list[tuple[Any, KerasLayerSpec]]:
    """Every layer with its path: classes are counted in the order in which a model has its layers."""
    entries = model.config.get("layers")
    if not isinstance(entries, list):
        raise InputError(f"{model.name} ({model.class_name}) has no list of layers")
    counts: dict[str, int] = {}
    out = []
    for entry in entries:
        if _is_operation(entry):
            continue
        try:
            spec = parse_layer_spec(entry, "")
        except InputError as error:
            problems.append(str(error))
            spec = KerasLayerSpec("", str(entry.get("name")) if isinstance(entry, dict) else "", {}, "")
        key = to_snake_case(spec.class_name)
        number, counts[key] = counts.get(key, 0), counts.get(key, 0) + 1
        where = f"{path}/layers/{key}" if path else f"layers/{key}"
        out.append((entry, spec._replace(h5_path=f"{where}_{number}" if number else where)))
    return out


def _is_operation(entry: Any) -> bool:
    return isinstance(entry, dict) and str(entry.get("module", "")).startswith("keras.src.ops")


class _TensorRef(NamedTuple):
    """Where a tensor comes from: which output of which call of which layer."""

    layer: str
    node: int
    output: int


def _tensor_refs(value: Any) -> list[_TensorRef]:
    """All tensors in an argument, or in the lists of a model's inputs and outputs."""
    if isinstance(value, dict):
        if value.get("class_name") == "__keras_tensor__":
            return _tensor_refs(value.get("config", {}).get("keras_history"))
        return [t for v in value.values() for t in _tensor_refs(v)]
    if not isinstance(value, list):
        return []
    if len(value) == 3 and isinstance(value[0], str) and all(isinstance(v, int) for v in value[1:]):
        return [_TensorRef(*value)]
    return [t for v in value for t in _tensor_refs(v)]


def _topological_order(
    options: dict[str, Any], layers: list[tuple[Any, KerasLayerSpec]], problems: list[str]
) -> list[tuple[Any, KerasLayerSpec]]:
    """The layers of a functional model from its input to its output, if they are one chain."""
    known = {str(entry.get("name", spec.name)): (entry, spec) for entry, spec in layers}
    graph = _CallGraph({str(e.get("name")): e for e in options["layers"] if isinstance(e, dict)})
    inputs, outputs = _tensor_refs(options.get("input_layers")), _tensor_refs(options.get("output_layers"))
    if len(inputs) != 1 or not outputs or outputs[0].output:
        raise InputError(f"a chain has one input and a layer's output first, found {len(inputs)} and {outputs[:1]}")
    chain: list[str] = []
    at = outputs[0].layer
    while at != inputs[0].layer:
        if at not in known or at in chain:
            raise InputError(f"{at}: a chain runs from the input to the output, through every layer once")
        chain.append(at)
        at = graph.input_layer(at, problems)
    chain.reverse()
    extra = [t.layer for t in outputs[1:] if t.layer not in chain or t.output == 0]
    extra += [name for name in known if name not in chain and known[name][1].class_name != "InputLayer"]
    if extra:
        problems.append(f"{', '.join(dict.fromkeys(extra))}: not on the chain from the input to the first output")
    graph.check_masks(inputs[0].layer, [known[name][1] for name in chain], chain, problems)
    return [known[name] for name in chain]


class _CallGraph:
    """The calls in a functional model."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self.raw_configs = entries
        self.masks: dict[str, _TensorRef] = {}  # layer -> the mask that its call was given

    def _call_arguments(self, name: str) -> tuple[list[Any], dict[str, Any]]:
        nodes = self.raw_configs[name].get("inbound_nodes")
        if not isinstance(nodes, list) or len(nodes) != 1:
            count = len(nodes) if isinstance(nodes, list) else 0
            raise InputError(f"{name} is called {count} times: each layer of a chain is called once")
        node = nodes[0]
        if not isinstance(node, dict) or not isinstance(node.get("args"), list):
            raise InputError(f"{name}: its calls are not written as Keras 3 does")
        return node["args"], node.get("kwargs") or {}

    def input_layer(self, name: str, problems: list[str]) -> str:
        """The layer whose output this one takes."""
        args, kwargs = self._call_arguments(name)
        first, others = _tensor_refs(args[:1]), _tensor_refs(args[1:])
        masks = _tensor_refs(kwargs.get("mask"))
        others += _tensor_refs({k: v for k, v in kwargs.items() if k != "mask"})
        if len(first) != 1 or first[0].output:
            raise InputError(f"{name} takes something else than the one output of a layer")
        if others:
            problems.append(f"{name} takes {', '.join(t.layer for t in others)} beside its input (an initial state?)")
        if masks:
            self.masks[name] = masks[0]
        return first[0].layer

    def check_masks(self, start: str, specs: list[KerasLayerSpec], chain: list[str], problems: list[str]) -> None:
        """A mask that stands in the graph must be the one that a layer of the chain makes of its input."""
        makers: list[tuple[str, float]] = []
        before = start
        for name, spec in zip(chain, specs, strict=True):
            if name in self.masks and self._mask_source(self.masks[name].layer) not in makers[-1:]:
                problems.append(f"{name} is given a mask that no Masking or Embedding before it makes")
            if spec.class_name == "Masking":
                makers.append((before, spec.config.get("mask_value", 0.0)))
            elif spec.class_name == "Embedding" and spec.config.get("mask_zero"):
                makers.append((before, 0))
            before = name

    def _mask_source(self, name: str) -> tuple[str, float] | None:
        """(layer, value) of a mask `any(output != value)`, or None for another one."""
        entry = self.raw_configs.get(name, {})
        if entry.get("class_name") == "Any":
            name = _tensor_refs(self._call_arguments(name)[0])[0].layer
            entry = self.raw_configs.get(name, {})
        if entry.get("class_name") != "NotEqual" or not _is_operation(entry):
            return None
        args, _ = self._call_arguments(name)
        source = _tensor_refs(args[:1])
        return (source[0].layer, args[1]) if len(source) == 1 and len(args) == 2 else None
