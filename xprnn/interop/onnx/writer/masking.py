"""Which steps of which rows are valid, and parts that act along time, in plain operators of ONNX.

Skipped steps can stand anywhere. A row's valid steps are moved to its front (`packed`), where an operator with lengths
walks over them in either direction, and its outputs moved back (`spread`): skipping is what that comes to.
"""

from __future__ import annotations

from math import isnan
from typing import Any

from xprnn.interop.onnx.writer.node_builder import NodeBuilder
from xprnn.layers.masking import HoldLastOutput, LastStep, Masking
from xprnn.layers.sequence_ops import ReverseTime

__all__ = ["MaskedTimeWriter"]

_INT32, _INT64 = 6, 7


class MaskedTimeWriter(NodeBuilder):
    """The part of a writer that knows about time; all of it is time-major but `x` itself."""

    batch_first: bool
    row_lengths = ""  # (N,) int32, where rows end early
    valid_mask = ""  # (T, N), where steps are skipped by a mask
    valid_first_order = ""  # (T, N), numbers of the valid steps first
    cumulative_valid = ""  # (T, N), how many steps up to this one were valid
    valid_count = ""  # (N,), how many there are

    def swap_batch_time(self, x: str) -> str:
        """Time-major from the caller's layout, and back."""
        return self.emit("Transpose", x, perm=[1, 0, 2]) if self.batch_first else x

    def time_index(self, x: str) -> str:
        """0 to T-1 as a column (T, 1), for a time-major x."""
        steps = self.emit("Squeeze", self.emit("Shape", x, start=0, end=1), self.int64_vector(0))
        return self.emit(
            "Unsqueeze", self.emit("Range", self.int64_scalar(0), steps, self.int64_scalar(1)), self.int64_vector(1)
        )

    def get_valid_mask(self, x: str) -> str:
        """Which steps of the time-major x are valid, (T, N); "" for all."""
        if not self.valid_mask and self.row_lengths:
            self.valid_mask = self.emit("Less", self.time_index(x), self.emit("Cast", self.row_lengths, to=_INT64))
        return self.valid_mask

    def set_valid_mask(self, valid_mask: str) -> None:
        """From here on these steps are."""
        self.valid_mask, self.row_lengths, self.valid_first_order = valid_mask, "", ""

    def _compute_compaction(self, x: str) -> None:
        """How to move valid steps to the front."""
        if self.valid_first_order:
            return
        valid, clock = self.get_valid_mask(x), self.time_index(x)
        steps = self.emit("Shape", x, start=0, end=1)
        late = self.emit("Add", clock, steps)  # skipped steps come behind, and no two are equal
        _, self.valid_first_order = self.emit_multi_output(
            2, "TopK", self.emit("Where", valid, clock, late), steps, axis=0, largest=0
        )
        self.cumulative_valid = self.emit("CumSum", self.emit("Cast", valid, to=_INT64), self.int64_scalar(0))
        self.valid_count = self.emit("ReduceSum", self.emit("Cast", valid, to=_INT64), self.int64_vector(0), keepdims=0)

    def gather_steps(self, x: str, ids: str) -> str:
        """The steps of each row of x (T, N, D) that ids (S, N) numbers: (S, N, D)."""
        width = self.emit("Shape", x, start=2, end=3)
        shape = self.emit("Concat", self.emit("Shape", ids), width, axis=0)
        wide = self.emit("Expand", self.emit("Unsqueeze", ids, self.int64_vector(2)), shape)
        return self.emit("GatherElements", x, wide, axis=0)

    def compact(self, x: str) -> str:
        """x (T, N, D) with each row's valid steps at its front, whose number is then `lens`."""
        self._compute_compaction(x)
        return self.gather_steps(x, self.valid_first_order)

    def scatter_back(self, y: str) -> str:
        """The inverse of `packed`; 0 at skipped steps."""
        back = self.gather_steps(y, self._clamp_min_zero(self.emit("Sub", self.cumulative_valid, self.int64_scalar(1))))
        return self.emit(
            "Where", self.emit("Unsqueeze", self.valid_mask, self.int64_vector(2)), back, self.float_scalar(0.0)
        )

    def _clamp_min_zero(self, ids: str) -> str:
        return self.emit("Max", ids, self.int64_scalar(0))

    def last_valid_step(self, x: str, reverse: bool) -> str:
        """(N, D): x at each row's last (or first) valid step, 0 where it has none."""
        front = self.compact(x)
        at = self.emit("Sub", self.valid_count, self.int64_scalar(1))
        ids = self.emit("Mul", at, self.int64_scalar(0)) if reverse else self._clamp_min_zero(at)
        one = self.emit(
            "Squeeze", self.gather_steps(front, self.emit("Unsqueeze", ids, self.int64_vector(0))), self.int64_vector(0)
        )
        some = self.emit(
            "Unsqueeze", self.emit("Greater", self.valid_count, self.int64_scalar(0)), self.int64_vector(1)
        )
        return self.emit("Where", some, one, self.float_scalar(0.0))

    def hold_last(self, x: str, reverse: bool) -> str:
        """x at a valid step, else at the valid one before it in the walk; 0 where there was none."""
        front = self.compact(x)
        if reverse:  # the valid step after this one has as many before it as have run here, itself not counted
            ids = self.emit("Sub", self.cumulative_valid, self.emit("Cast", self.valid_mask, to=_INT64))
            some = self.emit("Less", ids, self.valid_count)
            ids = self.emit("Min", ids, self._clamp_min_zero(self.emit("Sub", self.valid_count, self.int64_scalar(1))))
        else:
            some = self.emit("Greater", self.cumulative_valid, self.int64_scalar(0))
            ids = self._clamp_min_zero(self.emit("Sub", self.cumulative_valid, self.int64_scalar(1)))
        found = self.gather_steps(front, ids)
        return self.emit("Where", self.emit("Unsqueeze", some, self.int64_vector(2)), found, self.float_scalar(0.0))

    def per_direction(self, direction: str, x: str, fn: Any) -> str:
        """`run(x, reverse)`; of both directions side by side, each half with its own."""
        if direction != "both":
            found: str = fn(x, direction == "reverse")
            return found
        wide = self.emit("Shape", x, start=-1)
        half = self.emit("Div", wide, self.int64_vector(2))
        low = self.emit("Slice", x, self.int64_vector(0), half, self.int64_vector(-1))
        high = self.emit("Slice", x, half, wide, self.int64_vector(-1))
        return self.emit("Concat", fn(low, False), fn(high, True), axis=-1)

    def emit_hold_last_output(self, layer: HoldLastOutput, x: str) -> str:
        """A Hold; without skipped steps, nothing."""
        inner = self.swap_batch_time(x)
        return (
            self.swap_batch_time(self.per_direction(layer.direction, inner, self.hold_last))
            if self.get_valid_mask(inner)
            else x
        )

    def emit_last_step(self, layer: LastStep, x: str) -> str:
        """A Last, wherever it stands."""
        inner = self.swap_batch_time(x)
        if layer.valid_only and self.get_valid_mask(inner):
            return self.per_direction(layer.direction, inner, self.last_valid_step)

        def end(x: str, reverse: bool) -> str:
            return self.emit("Gather", x, self.int64_scalar(0 if reverse else -1), axis=0)

        return self.per_direction(layer.direction, inner, end)

    def emit_reverse_time(self, layer: ReverseTime, x: str) -> str:
        """A Flip, and the steps as they are after it."""
        if layer.reverse_mask and (valid := self.get_valid_mask(self.swap_batch_time(x))):
            self.set_valid_mask(self._reverse_axis(valid, 0))
        return self._reverse_axis(x, int(self.batch_first))

    def _reverse_axis(self, x: str, axis: int) -> str:
        ends = [self.int64_vector(-1), self.int64_vector(-(1 << 62)), self.int64_vector(axis), self.int64_vector(-1)]
        return self.emit("Slice", x, *ends)

    def emit_masking(self, layer: Masking, x: str, integer_input: bool, has_time_axis: bool) -> str:
        """A Masking, and the steps as they are after it."""
        value = float(layer.value)
        if integer_input:
            if not value.is_integer():
                return x
            valid = self.emit("Not", self.emit("Equal", x, self.int64_scalar(int(value))))
        else:
            other = self.emit("Equal", x, x if isnan(value) else self.float_scalar(value))
            kept = self.emit("Cast", other if isnan(value) else self.emit("Not", other), to=_INT32)
            valid = self.emit("Cast", self.emit("ReduceMax", kept, axes=[-1], keepdims=0), to=9)
        if has_time_axis:
            inner = self.emit("Transpose", valid, perm=[1, 0]) if self.batch_first else valid
            before = self.get_valid_mask(inner)
            self.set_valid_mask(self.emit("And", inner, before) if before else inner)
        if integer_input:
            return x
        return self.emit("Where", self.emit("Unsqueeze", valid, self.int64_vector(-1)), x, self.float_scalar(0.0))

    def emit_context_shift(self, hidden_size: int, x: str) -> str:
        """An Around: the first half one step later, the second one earlier, along the first axis."""
        first, zero = self.int64_vector(0), self.int64_vector(0)
        cut = [self.emit("Slice", x, self.int64_vector(0), self.int64_vector(hidden_size), self.int64_vector(-1))]
        cut.append(
            self.emit(
                "Slice", x, self.int64_vector(hidden_size), self.int64_vector(2 * hidden_size), self.int64_vector(-1)
            )
        )
        row = self.emit("Shape", self.emit("Slice", cut[0], first, self.int64_vector(1), zero))
        blank = self.emit("ConstantOfShape", row, value=self.zero_tensor())
        later = self.emit("Concat", blank, self.emit("Slice", cut[0], first, self.int64_vector(-1), zero), axis=0)
        rest = self.emit("Slice", cut[1], self.int64_vector(1), self.int64_vector(1 << 62), zero)
        return self.emit("Concat", later, self.emit("Concat", rest, blank, axis=0), axis=-1)
