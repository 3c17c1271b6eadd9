"""What each operator of the plumbing does to stand-ins, and to the row of pieces that stands so far."""

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

__all__ = [
    "PatternOps",
    "identifier_or_empty",
]


class FeatureHalf(NamedTuple):
    """The first or the second half of the features of `whole`."""

    source: SymbolicArray
    half_index: int


class PatternOps:
    """Operators by name, `_on_...`; `done` are the pieces so far, `time` the label of the axis that is walked."""

    def __init__(self) -> None:
        self.specs: list[LayerSpec] = []
        self.axis_sizes = AxisSizes()
        self.time_label: str | None = None
        self.length_inputs: set[str | None] = set()  # the input with lengths of each layer, None for none

    def _is_latest_output(self, x: Any) -> bool:
        """Whether x is what the last piece wrote."""
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

    def _append_stateless_layer(self, x: SymbolicArray, part: Any, axes: tuple[AxisLabels, ...]) -> SymbolicArray:
        """One more part, which has no parameters."""
        self.specs.append(LayerSpec("", "part", 0, 0, False, {}, layer=part))
        return SymbolicArray(len(self.specs) - 1, axes)

    def _match_activation(self, node: Node, x: Any) -> SymbolicArray:
        """An activation on every number."""
        if not self._is_latest_output(x) or not self.specs:
            raise NotALayerGraphError(f"{node} does not read what stands before it")
        return self._append_stateless_layer(x, ActivationLayer(activation_from_operator(node.op, node.attrs)), x.axes)

    def _on_softmax(self, node: Node, x: Any) -> SymbolicArray:
        axis = node.attrs.get("axis", -1 if node.opset >= 13 else 1)
        if not self._is_latest_output(x) or axis % len(x.axes) != len(x.axes) - 1 or not self.specs:
            raise NotALayerGraphError(f"{node} is not along the features of what stands before it")
        return self._append_stateless_layer(x, Softmax(log=node.op == "LogSoftmax"), x.axes)

    _on_logsoftmax = _on_softmax

    def _on_split(self, node: Node, x: Any, sizes: HostValue | None = None) -> tuple[Any, Any]:
        """Features in two halves, which stand for x until one operator puts them into one."""
        if (
            not self._is_latest_output(x)
            or not self.specs
            or node.attrs.get("axis", 0) % len(x.axes) != len(x.axes) - 1
        ):
            raise NotALayerGraphError(f"{node} cuts data")
        half, rest = divmod(self.axis_sizes.size_of(x.axes[-1]), 2)
        parts = [half, half] if sizes is None else sizes.array.tolist()
        if rest or len(node.outputs) != 2 or "split" in node.attrs or parts != [half, half]:
            raise NotALayerGraphError(f"{node} cuts features otherwise than in halves")
        return FeatureHalf(x, 0), FeatureHalf(x, 1)

    def _match_merge(self, node: Node, *halves: Any) -> SymbolicArray:
        """Two halves put into one."""
        if {h.half_index if isinstance(h, FeatureHalf) else None for h in halves} != {0, 1} or len(halves) != 2:
            raise NotALayerGraphError(f"{node} is none of the plumbing around recurrent layers")
        x = halves[0].source
        if not self._is_latest_output(x) or halves[1].source != x:
            raise NotALayerGraphError(f"{node} does not read what stands before it")
        label, half = f"m{len(self.specs)}", self.axis_sizes.size_of(x.axes[-1]) // 2
        self.axis_sizes[label] = half
        return self._append_stateless_layer(x, MergeDirections(half, MERGE_MODES[node.op]), (*x.axes[:-1], (label,)))

    _on_sum = _on_mul = _on_mean = _match_merge

    def _axes_without_time(self, node: Node, x: SymbolicArray, axis: int) -> tuple[AxisLabels, ...]:
        """The axes of x without time, which `node` takes the last step of."""
        axis = axis % len(x.axes)
        if not self._is_latest_output(x) or x.axes[axis] != (self.time_label,) or len(x.axes) != 3:
            raise NotALayerGraphError(f"{node} cuts data")
        return x.axes[:axis] + x.axes[axis + 1 :]

    def _last_step_layer(self) -> LastStep:
        """What takes step T-1: with lengths among the inputs, that is no row's last valid one."""
        return LastStep(valid_only=not self.length_inputs - {None})

    def _on_gather(self, node: Node, table: Any, ids: Any) -> SymbolicArray:
        axis = node.attrs.get("axis", 0)
        if isinstance(ids, HostValue) and ids.array.shape == ():
            if isinstance(table, SymbolicArray) and int(ids.array) in (-1, self.axis_sizes[self.time_label or "0"] - 1):
                return self._append_stateless_layer(
                    table, self._last_step_layer(), self._axes_without_time(node, table, axis)
                )
            if isinstance(table, FinalState):
                return self._last_step_from_final_state(node, table, axis, int(ids.array))
        whole = isinstance(table, HostValue) and table.array.ndim == 2 and table.array.dtype.kind == "f"
        if not whole or not self._is_latest_output(ids) or self.specs or axis != 0:
            raise NotALayerGraphError(f"{node} picks steps or features")
        at, name = len(self.specs), _module_name(node.inputs[0])
        self.axis_sizes[f"h{at}"] = table.array.shape[1]
        self.specs.append(
            LayerSpec(
                name, "embedding", int(table.array.shape[0]), int(table.array.shape[1]), False, {"weight": table.array}
            )
        )
        return SymbolicArray(at, (*ids.axes, (f"h{at}",)))

    def _last_step_from_final_state(self, node: Node, finals: FinalState, axis: int, k: int) -> SymbolicArray:
        """A final state h of the last layer, walked one way, is its last output."""
        at = len(self.specs) - 1
        rows = (
            finals.layer_indices[-1:] == (at,)
            and len(self.specs[at].reverse) == 1
            and k in (-1, len(finals.layer_indices) - 1)
        )
        if finals.state != "h" or not rows or axis % 3 != int(finals.batch_first):
            raise NotALayerGraphError(f"{node} takes a state of another layer, or of another row")
        batch = "0" if self.time_label == "1" else "1"
        walk = "reverse" if self.specs[at].reverse == (True,) else "forward"
        return self._append_stateless_layer(SymbolicArray(at, ()), LastStep(direction=walk), ((batch,), (f"h{at}",)))

    def _last_step_from_both_final_states(self, node: Node, finals: FinalState) -> SymbolicArray:
        """The final states h of both directions, (directions, N, H) -> (N, directions, H), are their last outputs."""
        at = len(self.specs) - 1
        known = finals == FinalState((at,), "h") and len(self.specs[at].reverse) == 2
        if not known or list(node.attrs.get("perm", ())) != [1, 0, 2]:
            raise NotALayerGraphError(f"{node} turns states around")
        batch = "0" if self.time_label == "1" else "1"
        return self._append_stateless_layer(
            SymbolicArray(at, ()), LastStep(direction="both"), ((batch,), (f"d{at}",), (f"h{at}",))
        )

    def _append_linear(self, node: Node, x: Any, weight: Any, bias: Any, name: str) -> SymbolicArray:
        if not isinstance(weight, HostValue) or weight.array.ndim != 2 or not self._is_latest_output(x):
            raise NotALayerGraphError(f"{node} is no product with a weight")
        at = len(self.specs)
        own = {"weight": np.ascontiguousarray(weight.array.T)}
        own |= {} if bias is None else {"bias": bias.array.reshape(-1)}
        self.axis_sizes[f"h{at}"] = weight.array.shape[1]
        wide, narrow = weight.array.shape
        self.specs.append(LayerSpec(name, "linear", wide, narrow, bias is not None, own))
        return SymbolicArray(at, (*x.axes[:-1], (f"h{at}",)))

    def _on_matmul(self, node: Node, x: Any, weight: Any) -> SymbolicArray:
        return self._append_linear(node, x, weight, None, _module_name(node.inputs[1]))

    def _on_gemm(self, node: Node, x: Any, weight: Any, bias: HostValue | None = None) -> SymbolicArray:
        get = node.attrs.get
        if get("transA", 0) or get("alpha", 1.0) != 1 or get("beta", 1.0) != 1 or not isinstance(weight, HostValue):
            raise NotALayerGraphError(f"{node} is no product with a weight")
        weight = HostValue(weight.array.T) if get("transB", 0) else weight
        return self._append_linear(node, x, weight, bias, _module_name(node.inputs[1]))

    def _on_add(self, node: Node, a: Any, b: Any) -> SymbolicArray:
        x, bias = (a, b) if isinstance(a, SymbolicArray) else (b, a)
        piece = self.specs[-1] if self.specs else None
        fits = isinstance(bias, HostValue) and piece is not None and bias.array.shape == (piece.output_size,)
        if piece is None or not fits or not self._is_latest_output(x) or piece.kind != "linear" or piece.bias:
            raise NotALayerGraphError(f"{node} adds something else than a bias")
        name = _module_name(node.inputs[0 if x is b else 1]) or piece.name
        self.specs[-1] = replace(piece, name=name, bias=True, params=piece.params | {"bias": bias.array})
        return x

    def _on_slice(self, node: Node, s: Any, *cuts: HostValue) -> Any:
        given = [c.array.reshape(-1).tolist() for c in cuts]
        if isinstance(s, SymbolicArray) and given[0] == [-1] and given[1][0] >= 2**31 - 1 and len(given) == 3:
            k = given[2][0] % len(s.axes)
            rest = self._axes_without_time(node, s, k)
            self.axis_sizes["done"] = 1  # what is left of the axis of time, to be squeezed away
            return self._append_stateless_layer(s, self._last_step_layer(), (*rest[:k], ("done",), *rest[k:]))
        if not isinstance(s, SymbolicInput) or given[2:] not in ([[0]], [[0], [1]]):
            raise NotALayerGraphError(f"{node} cuts data")
        (start,), (stop,) = given[:2]
        return replace(s, start=s.start + start, stop=min(s.start + stop, s.stop))

    def _on_expand(self, node: Node, s: SymbolicInput, shape: Any) -> SymbolicInput:
        return s

    def _on_min(self, node: Node, *values: Any) -> SymbolicInput:
        found = [v for v in values if isinstance(v, SymbolicInput)]
        if len(found) != 1 or found[0].start or len(values) > 2:
            raise NotALayerGraphError(f"{node} is none of the plumbing around recurrent layers")
        return found[0]

    def _on_concat(self, node: Node, *finals: Any) -> FinalState:
        states = {(f.state, f.batch_first) if isinstance(f, FinalState) else None for f in finals}
        if node.attrs["axis"] != 0 or states not in ({("h", False)}, {("c", False)}):
            raise NotALayerGraphError(f"{node} joins data, or states of two kinds")
        return FinalState(tuple(k for f in finals for k in f.layer_indices), finals[0].state)


def _module_name(name: str) -> str:
    """The module that a weight belongs to, as torch calls it: "head" for "head.weight"."""
    part = name.rpartition(".")[0] if name.rpartition(".")[2] in ("weight", "bias") else ""
    return identifier_or_empty(part)


def identifier_or_empty(name: str) -> str:
    """The name of a part that a module's name allows; "" for none.

    >>> identifier_or_empty("rnn"), identifier_or_empty("encoder.rnn")
    ('rnn', '')
    """
    return name if name.isidentifier() else ""
