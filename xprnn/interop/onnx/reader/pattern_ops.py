"""Operators evaluated with symbolic values; those that are layers are appended to the list of layer specs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from xprnn.interop.onnx.layer_specs import LayerSpec
from xprnn.interop.onnx.node import HostValue, Node
from xprnn.interop.onnx.reader.symbolic_axes import (
    AxisLabels,
    AxisSizes,
    FinalState,
    NotALayerGraphError,
    SymbolicArray,
    SymbolicInput,
)
from xprnn.interop.onnx.recurrent_attributes import MERGE_MODES, activation_from_operator
from xprnn.layers.elementwise import ActivationLayer, Softmax
from xprnn.layers.masking import LastStep
from xprnn.layers.sequence_ops import MergeDirections

__all__ = ["PatternOps", "identifier_or_empty"]


class FeatureHalf(NamedTuple):
    """The first (0) or second (1) half of the features of `source`."""

    source: SymbolicArray
    half_index: int


class PatternOps:
    """One method `_on_<operator>` for each operator. Its annotations are the types of values that it accepts.

    `specs` are the layers so far; `time_label` is the label of the time axis, None before the first recurrent layer.
    """

    def __init__(self) -> None:
        self.specs: list[LayerSpec] = []
        self.axis_sizes = AxisSizes()
        self.time_label: str | None = None
        self.length_inputs: set[str | None] = (
            set()
        )  # names of the inputs that are lengths; None: a layer has no lengths

    def _is_latest_output(self, x: Any) -> bool:
        """True if x is the output of the last layer so far."""
        return isinstance(x, SymbolicArray) and x.layer_index == len(self.specs) - 1

    def _on_identity(self, node: Node, x: Any) -> Any:
        return x

    def _on_dropout(self, node: Node, x: Any, *rest: Any) -> Any:
        return x

    def _on_cast(self, node: Node, x: Any) -> Any:
        return x

    def _on_shape(self, node: Node, x: SymbolicArray) -> HostValue:
        return self.axis_sizes.shape(node, x)

    def _on_transpose(self, node: Node, x: Any) -> SymbolicArray:
        if isinstance(x, FinalState):
            return self._last_step_from_both_final_states(node, x)
        return self.axis_sizes.transpose(node, x)

    def _on_squeeze(self, node: Node, x: SymbolicArray, axes: HostValue | None = None) -> SymbolicArray:
        return self.axis_sizes.squeeze(node, x, axes)

    def _on_reshape(self, node: Node, x: SymbolicArray, shape: HostValue) -> SymbolicArray:
        return self.axis_sizes.reshape(node, x, shape)

    def _append_stateless_layer(self, layer: Any, axes: tuple[AxisLabels, ...]) -> SymbolicArray:
        """Append a layer without parameters; `axes` are those of its output."""
        self.specs.append(LayerSpec("", "stateless", 0, 0, False, {}, layer=layer))
        return SymbolicArray(len(self.specs) - 1, axes)

    def _match_activation(self, node: Node, x: Any) -> SymbolicArray:
        """Append an activation."""
        if not self._is_latest_output(x) or not self.specs:
            raise NotALayerGraphError(f"{node} does not read the layer before it")
        return self._append_stateless_layer(ActivationLayer(activation_from_operator(node.op, node.attrs)), x.axes)

    def _on_softmax(self, node: Node, x: Any) -> SymbolicArray:
        axis = node.attrs.get("axis", -1 if node.opset >= 13 else 1)
        if not self._is_latest_output(x) or axis % len(x.axes) != len(x.axes) - 1 or not self.specs:
            raise NotALayerGraphError(f"{node} is not along the features of the layer before it")
        return self._append_stateless_layer(Softmax(log=node.op == "LogSoftmax"), x.axes)

    _on_logsoftmax = _on_softmax

    def _on_split(self, node: Node, x: Any, sizes: HostValue | None = None) -> tuple[Any, Any]:
        """Split the features into two halves, which a later Sum, Mul or Mean merges."""
        if (
            not self._is_latest_output(x)
            or not self.specs
            or node.attrs.get("axis", 0) % len(x.axes) != len(x.axes) - 1
        ):
            raise NotALayerGraphError(f"{node} slices data")
        half, remainder = divmod(self.axis_sizes.size_of(x.axes[-1]), 2)
        widths = [half, half] if sizes is None else sizes.array.tolist()
        if remainder or len(node.outputs) != 2 or "split" in node.attrs or widths != [half, half]:
            raise NotALayerGraphError(f"{node} does not split the features into two halves")
        return FeatureHalf(x, 0), FeatureHalf(x, 1)

    def _match_merge(self, node: Node, *halves: Any) -> SymbolicArray:
        """Append a MergeDirections of two halves."""
        if {h.half_index if isinstance(h, FeatureHalf) else None for h in halves} != {0, 1} or len(halves) != 2:
            raise NotALayerGraphError(f"{node} is not an operator of a model of xprnn")
        x = halves[0].source
        if not self._is_latest_output(x) or halves[1].source != x:
            raise NotALayerGraphError(f"{node} does not read the layer before it")
        label, half = f"m{len(self.specs)}", self.axis_sizes.size_of(x.axes[-1]) // 2
        self.axis_sizes[label] = half
        return self._append_stateless_layer(MergeDirections(half, MERGE_MODES[node.op]), (*x.axes[:-1], (label,)))

    _on_sum = _on_mul = _on_mean = _match_merge

    def _axes_without_time(self, node: Node, x: SymbolicArray, axis: int) -> tuple[AxisLabels, ...]:
        """The axes of x without its time axis, of which `node` takes the last step."""
        axis = axis % len(x.axes)
        if not self._is_latest_output(x) or x.axes[axis] != (self.time_label,) or len(x.axes) != 3:
            raise NotALayerGraphError(f"{node} slices data")
        return x.axes[:axis] + x.axes[axis + 1 :]

    def _last_step_layer(self) -> LastStep:
        """A LastStep that takes step T-1, which may be after the last valid step of a row if the graph has lengths."""
        return LastStep(valid_only=not self.length_inputs - {None})

    def _on_gather(self, node: Node, table: Any, ids: Any) -> SymbolicArray:
        axis = node.attrs.get("axis", 0)
        if isinstance(ids, HostValue) and ids.array.shape == ():
            if isinstance(table, SymbolicArray) and int(ids.array) in (-1, self.axis_sizes[self.time_label or "0"] - 1):
                axes = self._axes_without_time(node, table, axis)
                return self._append_stateless_layer(self._last_step_layer(), axes)
            if isinstance(table, FinalState):
                return self._last_step_from_final_state(node, table, axis, int(ids.array))
        is_table = isinstance(table, HostValue) and table.array.ndim == 2 and table.array.dtype.kind == "f"
        if not is_table or not self._is_latest_output(ids) or self.specs or axis != 0:
            raise NotALayerGraphError(f"{node} selects steps or features")
        k, name = len(self.specs), _module_name(node.inputs[0])
        classes, width = (int(d) for d in table.array.shape)
        self.axis_sizes[f"h{k}"] = width
        self.specs.append(LayerSpec(name, "embedding", classes, width, False, {"weight": table.array}))
        return SymbolicArray(k, (*ids.axes, (f"h{k}",)))

    def _last_step_from_final_state(self, node: Node, finals: FinalState, axis: int, index: int) -> SymbolicArray:
        """Append a LastStep: the final state h of the last layer, if it has one direction, is its last output."""
        k = len(self.specs) - 1
        is_last_layer = (
            finals.layer_indices[-1:] == (k,)
            and len(self.specs[k].reverse) == 1
            and index in (-1, len(finals.layer_indices) - 1)
        )
        if finals.state != "h" or not is_last_layer or axis % 3 != int(finals.batch_first):
            raise NotALayerGraphError(f"{node} reads a state of another layer, or of one row")
        batch = "0" if self.time_label == "1" else "1"
        direction = "reverse" if self.specs[k].reverse == (True,) else "forward"
        return self._append_stateless_layer(LastStep(direction=direction), ((batch,), (f"h{k}",)))

    def _last_step_from_both_final_states(self, node: Node, finals: FinalState) -> SymbolicArray:
        """Append a LastStep: the final states h of both directions, transposed to (N,directions,H), are its output."""
        k = len(self.specs) - 1
        is_last_layer = finals == FinalState((k,), "h") and len(self.specs[k].reverse) == 2
        if not is_last_layer or list(node.attrs.get("perm", ())) != [1, 0, 2]:
            raise NotALayerGraphError(f"{node} transposes states")
        batch = "0" if self.time_label == "1" else "1"
        return self._append_stateless_layer(LastStep(direction="both"), ((batch,), (f"d{k}",), (f"h{k}",)))

    def _append_linear(self, node: Node, x: Any, weight: Any, bias: Any, name: str) -> SymbolicArray:
        if not isinstance(weight, HostValue) or weight.array.ndim != 2 or not self._is_latest_output(x):
            raise NotALayerGraphError(f"{node} is not a product of the layer before it with a weight")
        k = len(self.specs)
        params = {"weight": np.ascontiguousarray(weight.array.T)}
        params |= {} if bias is None else {"bias": bias.array.reshape(-1)}
        input_size, output_size = weight.array.shape
        self.axis_sizes[f"h{k}"] = output_size
        self.specs.append(LayerSpec(name, "linear", input_size, output_size, bias is not None, params))
        return SymbolicArray(k, (*x.axes[:-1], (f"h{k}",)))

    def _on_matmul(self, node: Node, x: Any, weight: Any) -> SymbolicArray:
        return self._append_linear(node, x, weight, None, _module_name(node.inputs[1]))

    def _on_gemm(self, node: Node, x: Any, weight: Any, bias: HostValue | None = None) -> SymbolicArray:
        get = node.attrs.get
        if get("transA", 0) or get("alpha", 1.0) != 1 or get("beta", 1.0) != 1 or not isinstance(weight, HostValue):
            raise NotALayerGraphError(f"{node} is not a product of the layer before it with a weight")
        weight = HostValue(weight.array.T) if get("transB", 0) else weight
        return self._append_linear(node, x, weight, bias, _module_name(node.inputs[1]))

    def _on_add(self, node: Node, a: Any, b: Any) -> SymbolicArray:
        """Add the bias to the last linear layer; a or b is the constant."""
        x, bias = (a, b) if isinstance(a, SymbolicArray) else (b, a)
        spec = self.specs[-1] if self.specs else None
        fits = isinstance(bias, HostValue) and spec is not None and bias.array.shape == (spec.output_size,)
        if spec is None or not fits or not self._is_latest_output(x) or spec.kind != "linear" or spec.bias:
            raise NotALayerGraphError(f"{node} does not add the bias of a linear layer")
        name = _module_name(node.inputs[0 if x is b else 1]) or spec.name
        self.specs[-1] = replace(spec, name=name, bias=True, params=spec.params | {"bias": bias.array})
        return x

    def _on_slice(self, node: Node, s: Any, *bounds: HostValue) -> Any:
        """Take the last step of data, or some rows of an input of states."""
        starts_ends_axes = [b.array.reshape(-1).tolist() for b in bounds]
        if (
            isinstance(s, SymbolicArray)
            and starts_ends_axes[0] == [-1]
            and starts_ends_axes[1][0] >= 2**31 - 1
            and len(starts_ends_axes) == 3
        ):
            k = starts_ends_axes[2][0] % len(s.axes)
            rest = self._axes_without_time(node, s, k)
            self.axis_sizes["d_last"] = 1  # the time axis after the slice, which a Squeeze removes
            return self._append_stateless_layer(self._last_step_layer(), (*rest[:k], ("d_last",), *rest[k:]))
        if not isinstance(s, SymbolicInput) or starts_ends_axes[2:] not in ([[0]], [[0], [1]]):
            raise NotALayerGraphError(f"{node} slices data")
        (start,), (stop,) = starts_ends_axes[:2]
        return replace(s, start=s.start + start, stop=min(s.start + stop, s.stop))

    def _on_expand(self, node: Node, s: SymbolicInput, shape: Any) -> SymbolicInput:
        return s

    def _on_min(self, node: Node, *values: Any) -> SymbolicInput:
        """The lengths, limited to T."""
        lengths = [v for v in values if isinstance(v, SymbolicInput)]
        if len(lengths) != 1 or lengths[0].start or len(values) > 2:
            raise NotALayerGraphError(f"{node} is not an operator of a model of xprnn")
        return lengths[0]

    def _on_concat(self, node: Node, *finals: Any) -> FinalState:
        states = {(f.state, f.batch_first) if isinstance(f, FinalState) else None for f in finals}
        if node.attrs["axis"] != 0 or states not in ({("h", False)}, {("c", False)}):
            raise NotALayerGraphError(f"{node} concatenates data, or states of two kinds")
        return FinalState(tuple(k for f in finals for k in f.layer_indices), finals[0].state)


def _module_name(name: str) -> str:
    """The torch module in the name of a weight: "head" for "head.weight"; "" if there is none."""
    module = name.rpartition(".")[0] if name.rpartition(".")[2] in ("weight", "bias") else ""
    return identifier_or_empty(module)


def identifier_or_empty(name: str) -> str:
    """The name, if a layer of a Sequential can have it; else "".

    >>> identifier_or_empty("rnn"), identifier_or_empty("encoder.rnn")
    ('rnn', '')
    """
    return name if name.isidentifier() else ""
