"""Flattening of a Keras architecture to a list of layers: Sequential, functional chains, and nested models.

This module reads only the structure. `xprnn.interop.keras.layers` interprets the options of each layer.

Sources: the configurations that keras.Model.to_json writes; keras.saving (the paths of layers in a weights file).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from xprnn.arrays.namespace import InputError

__all__ = ["KerasLayerSpec", "linear_topology", "parse_layer_spec", "to_snake_case"]

MODEL_CLASSES = ("Sequential", "Functional", "Model")
_MAX_DEPTH = 20


class KerasLayerSpec(NamedTuple):
    """One Keras layer: class, name, configuration, and the path of its arrays in the weights file."""

    class_name: str  # "" for a class that is not part of Keras, which is already reported as a problem
    name: str
    config: dict[str, Any]
    h5_path: str


def to_snake_case(name: str) -> str:
    """Return a class name as it is written in the paths of a weights file.

    >>> [to_snake_case(name) for name in ("LSTM", "SimpleRNN", "StackedRNNCells", "TimeDistributed")]
    ['lstm', 'simple_rnn', 'stacked_rnn_cells', 'time_distributed']
    """
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def parse_layer_spec(entry: Any, h5_path: str) -> KerasLayerSpec:
    """Parse the entry of a configuration that describes a layer or cell.

    Raises:
        InputError: the entry has no class_name and config, or the class is not part of Keras (its code is never run).
    """
    if not isinstance(entry, dict):
        raise InputError("expected a layer's class_name and config")
    class_name, registered_name, config = (entry.get(key) for key in ("class_name", "registered_name", "config"))
    package = str(entry.get("module", "keras")).partition(".")[0]
    name = str(config.get("name", class_name) if isinstance(config, dict) else class_name)[:80]
    if not isinstance(class_name, str) or package != "keras" or registered_name not in (None, class_name):
        raise InputError(
            f"{name} ({registered_name or class_name}) is not a Keras layer; user-defined code is never run"
        )
    if not isinstance(config, dict):
        raise InputError(f"{name}: expected a layer's class_name and config")
    return KerasLayerSpec(class_name, name, config, h5_path)


def linear_topology(config: dict[str, Any], problems: list[str]) -> list[KerasLayerSpec]:
    """Return the layers of a model in execution order; a nested model is replaced by its layers.

    Args:
        config: the architecture, as from `model.to_json()`.
        problems: a message is appended for each layer or call that cannot be part of a chain.
    """
    specs: list[KerasLayerSpec] = []
    _flatten_model(config, "", "", specs, problems, 0)
    return specs


def _flatten_model(
    entry: Any, path: str, prefix: str, specs: list[KerasLayerSpec], problems: list[str], depth: int
) -> None:
    """Append the layers of a model to `specs`; its arrays are under `path`, `prefix` is prepended to the names."""
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
    for layer_entry, spec in layers:
        if spec.class_name in MODEL_CLASSES:
            _flatten_model(layer_entry, spec.h5_path, f"{prefix}{spec.name}_", specs, problems, depth + 1)
        elif spec.class_name != "InputLayer":
            specs.append(spec._replace(name=prefix + spec.name))


def _layer_specs(model: KerasLayerSpec, path: str, problems: list[str]) -> list[tuple[Any, KerasLayerSpec]]:
    """Return (entry, spec) of every layer of a model.

    The path of a layer in the weights file is its class name, with a suffix that counts the layers of that class.
    """
    entries = model.config.get("layers")
    if not isinstance(entries, list):
        raise InputError(f"{model.name} ({model.class_name}) has no list of layers")
    counts: dict[str, int] = {}
    specs = []
    for entry in entries:
        if _is_operation(entry):
            continue
        try:
            spec = parse_layer_spec(entry, "")
        except InputError as error:
            problems.append(str(error))
            spec = KerasLayerSpec("", str(entry.get("name")) if isinstance(entry, dict) else "", {}, "")
        key = to_snake_case(spec.class_name)
        index, counts[key] = counts.get(key, 0), counts.get(key, 0) + 1
        base_path = f"{path}/layers/{key}" if path else f"layers/{key}"
        specs.append((entry, spec._replace(h5_path=f"{base_path}_{index}" if index else base_path)))
    return specs


def _is_operation(entry: Any) -> bool:
    return isinstance(entry, dict) and str(entry.get("module", "")).startswith("keras.src.ops")


class _TensorRef(NamedTuple):
    """The origin of a tensor: layer name, index of the call of the layer, index of the output of the call."""

    layer: str
    node: int
    output: int


def _tensor_refs(value: Any) -> list[_TensorRef]:
    """Collect all tensor references in a call's argument, or in the lists of a model's inputs and outputs."""
    if isinstance(value, dict):
        if value.get("class_name") == "__keras_tensor__":
            return _tensor_refs(value.get("config", {}).get("keras_history"))
        return [ref for item in value.values() for ref in _tensor_refs(item)]
    if not isinstance(value, list):
        return []
    if len(value) == 3 and isinstance(value[0], str) and all(isinstance(item, int) for item in value[1:]):
        return [_TensorRef(*value)]
    return [ref for item in value for ref in _tensor_refs(item)]


def _topological_order(
    config: dict[str, Any], layers: list[tuple[Any, KerasLayerSpec]], problems: list[str]
) -> list[tuple[Any, KerasLayerSpec]]:
    """Return the layers of a functional model from its input to its output.

    Raises:
        InputError: the layers do not form a single chain.
    """
    by_name = {str(entry.get("name", spec.name)): (entry, spec) for entry, spec in layers}
    graph = _CallGraph({str(entry.get("name")): entry for entry in config["layers"] if isinstance(entry, dict)})
    inputs, outputs = _tensor_refs(config.get("input_layers")), _tensor_refs(config.get("output_layers"))
    if len(inputs) != 1 or not outputs or outputs[0].output:
        raise InputError(
            f"expected one input, and as first output the first output of a layer, found {len(inputs)} inputs and "
            f"{outputs[:1]}"
        )
    chain: list[str] = []
    name = outputs[0].layer
    while name != inputs[0].layer:
        if name not in by_name or name in chain:
            raise InputError(f"{name}: expected a chain from the input to the output in which every layer occurs once")
        chain.append(name)
        name = graph.input_layer(name, problems)
    chain.reverse()
    unused = [ref.layer for ref in outputs[1:] if ref.layer not in chain or ref.output == 0]
    unused += [name for name in by_name if name not in chain and by_name[name][1].class_name != "InputLayer"]
    if unused:
        problems.append(f"{', '.join(dict.fromkeys(unused))}: not in the chain from the input to the first output")
    graph.check_masks(inputs[0].layer, [by_name[name][1] for name in chain], chain, problems)
    return [by_name[name] for name in chain]


class _CallGraph:
    """The calls of layers in a functional model."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self.raw_configs = entries
        self.masks: dict[str, _TensorRef] = {}  # layer name -> the mask argument of its call

    def _call_arguments(self, name: str) -> tuple[list[Any], dict[str, Any]]:
        nodes = self.raw_configs[name].get("inbound_nodes")
        if not isinstance(nodes, list) or len(nodes) != 1:
            count = len(nodes) if isinstance(nodes, list) else 0
            raise InputError(f"{name} is called {count} times, expected once")
        node = nodes[0]
        if not isinstance(node, dict) or not isinstance(node.get("args"), list):
            raise InputError(f"{name}: inbound_nodes does not have the format of Keras 3")
        return node["args"], node.get("kwargs") or {}

    def input_layer(self, name: str, problems: list[str]) -> str:
        """Return the name of the layer whose output the named layer receives, and record the mask of the call."""
        args, kwargs = self._call_arguments(name)
        first, others = _tensor_refs(args[:1]), _tensor_refs(args[1:])
        masks = _tensor_refs(kwargs.get("mask"))
        others += _tensor_refs({key: value for key, value in kwargs.items() if key != "mask"})
        if len(first) != 1 or first[0].output:
            raise InputError(f"{name}: expected the first output of one layer as its input")
        if others:
            problems.append(
                f"{name} receives {', '.join(ref.layer for ref in others)} in addition to its input (an initial state?)"
            )
        if masks:
            self.masks[name] = masks[0]
        return first[0].layer

    def check_masks(self, model_input: str, specs: list[KerasLayerSpec], chain: list[str], problems: list[str]) -> None:
        """Append a problem for each mask argument that is not the mask of the last Masking or Embedding before it."""
        mask_sources: list[tuple[str, float]] = []
        input_name = model_input
        for name, spec in zip(chain, specs, strict=True):
            if name in self.masks and self._mask_source(self.masks[name].layer) not in mask_sources[-1:]:
                problems.append(f"{name}: its mask argument is not the mask of the Masking or Embedding before it")
            if spec.class_name == "Masking":
                mask_sources.append((input_name, spec.config.get("mask_value", 0.0)))
            elif spec.class_name == "Embedding" and spec.config.get("mask_zero"):
                mask_sources.append((input_name, 0))
            input_name = name

    def _mask_source(self, name: str) -> tuple[str, float] | None:
        """Return (layer, value) if a mask is `any(output of layer != value)`, else None."""
        entry = self.raw_configs.get(name, {})
        if entry.get("class_name") == "Any":
            name = _tensor_refs(self._call_arguments(name)[0])[0].layer
            entry = self.raw_configs.get(name, {})
        if entry.get("class_name") != "NotEqual" or not _is_operation(entry):
            return None
        args, _ = self._call_arguments(name)
        source = _tensor_refs(args[:1])
        return (source[0].layer, args[1]) if len(source) == 1 and len(args) == 2 else None
