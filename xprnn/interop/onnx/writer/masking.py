"""Masks, and layers that act along the time axis, in elementary operators of ONNX.

Masked steps can be anywhere in a row, but the recurrent operators of ONNX only support lengths. `compact` moves the
valid steps of each row to its front, where an operator with lengths runs over them in either direction;
`scatter_back` moves its outputs back to the steps that they belong to.
"""

from __future__ import annotations

from math import isnan
from typing import Any

from xprnn.interop.onnx.writer.node_builder import NodeBuilder
from xprnn.layers.masking import HoldLastOutput, LastStep, Masking
from xprnn.layers.sequence_ops import ReverseTime

__all__ = ["MaskedTimeWriter"]

_INT32, _INT64, _BOOL = 6, 7, 9  # TensorProto data types


class MaskedTimeWriter(NodeBuilder):
    """A NodeBuilder that tracks which steps are valid and writes the layers that depend on it.

    The attributes are names of values, "" if there is no such value. All are time-major; `x` may be batch-first.
    """

    batch_first: bool
    row_lengths = ""  # (N,) int32: the lengths of the rows
    valid_mask = ""  # (T,N) bool: True at valid steps; "" while lengths alone describe them
    valid_first_order = ""  # (T,N) int64: the step numbers of each row, valid steps first
    cumulative_valid = ""  # (T,N) int64: the number of valid steps up to and including this one
    valid_count = ""  # (N,) int64: the number of valid steps

    def swap_batch_time(self, x: str) -> str:
        """Convert x between the layout of the model and time-major; the same operation in both directions."""
        return self.emit("Transpose", x, perm=[1, 0, 2]) if self.batch_first else x

    def time_index(self, x: str) -> str:
        """The step numbers 0 to T-1 of a time-major x, (T,1)."""
        steps = self.emit("Squeeze", self.emit("Shape", x, start=0, end=1), self.int64_vector(0))
        return self.emit(
            "Unsqueeze", self.emit("Range", self.int64_scalar(0), steps, self.int64_scalar(1)), self.int64_vector(1)
        )

    def get_valid_mask(self, x: str) -> str:
        """The mask (T,N) of the valid steps of a time-major x; "" if all are valid."""
        if not self.valid_mask and self.row_lengths:
            self.valid_mask = self.emit("Less", self.time_index(x), self.emit("Cast", self.row_lengths, to=_INT64))
        return self.valid_mask

    def set_valid_mask(self, valid_mask: str) -> None:
        """Replace the mask of the valid steps, for the layers that follow."""
        self.valid_mask, self.row_lengths, self.valid_first_order = valid_mask, "", ""

    def _compute_compaction(self, x: str) -> None:
        """Write valid_first_order, cumulative_valid and valid_count."""
        if self.valid_first_order:
            return
        valid, t = self.get_valid_mask(x), self.time_index(x)
        steps = self.emit("Shape", x, start=0, end=1)
        # Sort keys: t for a valid step, t + T for a masked one. No two keys are equal.
        masked_key = self.emit("Add", t, steps)
        _, self.valid_first_order = self.emit_multi_output(
            2, "TopK", self.emit("Where", valid, t, masked_key), steps, axis=0, largest=0
        )
        self.cumulative_valid = self.emit("CumSum", self.emit("Cast", valid, to=_INT64), self.int64_scalar(0))
        self.valid_count = self.emit("ReduceSum", self.emit("Cast", valid, to=_INT64), self.int64_vector(0), keepdims=0)

    def gather_steps(self, x: str, ids: str) -> str:
        """Gather from each row of x (T,N,D) the steps whose numbers are in ids (S,N): (S,N,D)."""
        width = self.emit("Shape", x, start=2, end=3)
        shape = self.emit("Concat", self.emit("Shape", ids), width, axis=0)
        expanded = self.emit("Expand", self.emit("Unsqueeze", ids, self.int64_vector(2)), shape)
        return self.emit("GatherElements", x, expanded, axis=0)

    def compact(self, x: str) -> str:
        """Move the valid steps of each row of x (T,N,D) to its front."""
        self._compute_compaction(x)
        return self.gather_steps(x, self.valid_first_order)

    def scatter_back(self, y: str) -> str:
        """Invert `compact`; masked steps become 0."""
        ids = self._clamp_min_zero(self.emit("Sub", self.cumulative_valid, self.int64_scalar(1)))
        gathered = self.gather_steps(y, ids)
        return self._where_valid(self.valid_mask, 2, gathered)

    def _where_valid(self, valid: str, axis: int, x: str) -> str:
        """x where `valid` is True, else 0; `axis` is added to `valid`."""
        return self.emit("Where", self.emit("Unsqueeze", valid, self.int64_vector(axis)), x, self.float_scalar(0.0))

    def _clamp_min_zero(self, ids: str) -> str:
        return self.emit("Max", ids, self.int64_scalar(0))

    def last_valid_step(self, x: str, reverse: bool) -> str:
        """x at the last valid step of each row (N,D), or at the first if reverse; 0 for a row without a valid step."""
        compacted = self.compact(x)
        last = self.emit("Sub", self.valid_count, self.int64_scalar(1))
        ids = self.emit("Mul", last, self.int64_scalar(0)) if reverse else self._clamp_min_zero(last)
        gathered = self.gather_steps(compacted, self.emit("Unsqueeze", ids, self.int64_vector(0)))
        step = self.emit("Squeeze", gathered, self.int64_vector(0))
        return self._where_valid(self.emit("Greater", self.valid_count, self.int64_scalar(0)), 1, step)

    def hold_last(self, x: str, reverse: bool) -> str:
        """At a masked step, the x of the valid step before it (after it if reverse), or 0 if there is none."""
        compacted = self.compact(x)
        if reverse:
            # The number of valid steps before this one is the compacted number of the next valid step from here on.
            ids = self.emit("Sub", self.cumulative_valid, self.emit("Cast", self.valid_mask, to=_INT64))
            exists = self.emit("Less", ids, self.valid_count)
            ids = self.emit("Min", ids, self._clamp_min_zero(self.emit("Sub", self.valid_count, self.int64_scalar(1))))
        else:
            exists = self.emit("Greater", self.cumulative_valid, self.int64_scalar(0))
            ids = self._clamp_min_zero(self.emit("Sub", self.cumulative_valid, self.int64_scalar(1)))
        gathered = self.gather_steps(compacted, ids)
        return self._where_valid(exists, 2, gathered)

    def per_direction(self, direction: str, x: str, fn: Any) -> str:
        """Apply fn(x, reverse); if the direction is "both", to each half of the features with its direction."""
        if direction != "both":
            y: str = fn(x, direction == "reverse")
            return y
        width = self.emit("Shape", x, start=-1)
        half = self.emit("Div", width, self.int64_vector(2))
        forward = self.emit("Slice", x, self.int64_vector(0), half, self.int64_vector(-1))
        backward = self.emit("Slice", x, half, width, self.int64_vector(-1))
        return self.emit("Concat", fn(forward, False), fn(backward, True), axis=-1)

    def emit_hold_last_output(self, layer: HoldLastOutput, x: str) -> str:
        """Write a HoldLastOutput; without masked steps it is the identity."""
        time_major = self.swap_batch_time(x)
        if not self.get_valid_mask(time_major):
            return x
        return self.swap_batch_time(self.per_direction(layer.direction, time_major, self.hold_last))

    def emit_last_step(self, layer: LastStep, x: str) -> str:
        """Write a LastStep after any layer."""
        time_major = self.swap_batch_time(x)
        if layer.valid_only and self.get_valid_mask(time_major):
            return self.per_direction(layer.direction, time_major, self.last_valid_step)

        def gather_end(x: str, reverse: bool) -> str:
            return self.emit("Gather", x, self.int64_scalar(0 if reverse else -1), axis=0)

        return self.per_direction(layer.direction, time_major, gather_end)

    def emit_reverse_time(self, layer: ReverseTime, x: str) -> str:
        """Write a ReverseTime, which also reverses the mask if reverse_mask is set."""
        if layer.reverse_mask and (valid := self.get_valid_mask(self.swap_batch_time(x))):
            self.set_valid_mask(self._reverse_axis(valid, 0))
        return self._reverse_axis(x, int(self.batch_first))

    def _reverse_axis(self, x: str, axis: int) -> str:
        ends = [self.int64_vector(-1), self.int64_vector(-(1 << 62)), self.int64_vector(axis), self.int64_vector(-1)]
        return self.emit("Slice", x, *ends)

    def emit_masking(self, layer: Masking, x: str, integer_input: bool, has_time_axis: bool) -> str:
        """Write a Masking: update the mask of the valid steps and set x to 0 at masked steps."""
        value = float(layer.value)
        if integer_input:
            if not value.is_integer():
                return x
            valid = self.emit("Not", self.emit("Equal", x, self.int64_scalar(int(value))))
        else:
            equal = self.emit("Equal", x, x if isnan(value) else self.float_scalar(value))  # x == x: not NaN
            differs = self.emit("Cast", equal if isnan(value) else self.emit("Not", equal), to=_INT32)
            valid = self.emit("Cast", self.emit("ReduceMax", differs, axes=[-1], keepdims=0), to=_BOOL)
        if has_time_axis:
            time_major = self.emit("Transpose", valid, perm=[1, 0]) if self.batch_first else valid
            previous = self.get_valid_mask(time_major)
            self.set_valid_mask(self.emit("And", time_major, previous) if previous else time_major)
        return x if integer_input else self._where_valid(valid, -1, x)

    def emit_context_shift(self, hidden_size: int, x: str) -> str:
        """Write a ContextShift: the first half of the features moves one step later, the second one earlier."""
        zero, width, features = self.int64_vector(0), self.int64_vector(hidden_size), self.int64_vector(-1)
        forward = self.emit("Slice", x, zero, width, features)
        backward = self.emit("Slice", x, width, self.int64_vector(2 * hidden_size), features)
        row_shape = self.emit("Shape", self.emit("Slice", forward, zero, self.int64_vector(1), zero))
        zeros = self.emit("ConstantOfShape", row_shape, value=self.zero_tensor())
        later = self.emit("Concat", zeros, self.emit("Slice", forward, zero, self.int64_vector(-1), zero), axis=0)
        rest = self.emit("Slice", backward, self.int64_vector(1), self.int64_vector(1 << 62), zero)
        return self.emit("Concat", later, self.emit("Concat", rest, zeros, axis=0), axis=-1)
