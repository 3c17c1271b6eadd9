"""Which steps of which rows are valid, and parts that act along time, in plain operators of ONNX.

Skipped steps can stand anywhere. A row's valid steps are moved to its front (`packed`), where an operator with lengths
walks over them in either direction, and its outputs moved back (`spread`): skipping is what that comes to.
"""

from __future__ import annotations

from math import isnan
from typing import Any

from xprnn.interop.onnx.writer.node_builder import Nodes
from xprnn.layers.masking import Hold, Last, Masking
from xprnn.layers.sequence_ops import Flip

__all__ = ["OverTimeWriter"]

_INT32, _INT64 = 6, 7


class OverTimeWriter(Nodes):
    """The part of a writer that knows about time; all of it is time-major but `x` itself."""

    batch_first: bool
    lens = ""  # (N,) int32, where rows end early
    valid = ""  # (T, N), where steps are skipped by a mask
    order = ""  # (T, N), numbers of the valid steps first
    ran = ""  # (T, N), how many steps up to this one were valid
    count = ""  # (N,), how many there are

    def turned(self, x: str) -> str:
        """Time-major from the caller's layout, and back."""
        return self.emit("Transpose", x, perm=[1, 0, 2]) if self.batch_first else x

    def clock(self, x: str) -> str:
        """0 to T-1 as a column (T, 1), for a time-major x."""
        steps = self.emit("Squeeze", self.emit("Shape", x, start=0, end=1), self.numbers(0))
        return self.emit("Unsqueeze", self.emit("Range", self.integer(0), steps, self.integer(1)), self.numbers(1))

    def steps(self, x: str) -> str:
        """Which steps of the time-major x are valid, (T, N); "" for all."""
        if not self.valid and self.lens:
            self.valid = self.emit("Less", self.clock(x), self.emit("Cast", self.lens, to=_INT64))
        return self.valid

    def now_valid(self, valid: str) -> None:
        """From here on these steps are."""
        self.valid, self.lens, self.order = valid, "", ""

    def _pack(self, x: str) -> None:
        """How to move valid steps to the front."""
        if self.order:
            return
        valid, clock = self.steps(x), self.clock(x)
        steps = self.emit("Shape", x, start=0, end=1)
        late = self.emit("Add", clock, steps)  # skipped steps come behind, and no two are equal
        _, self.order = self.emits(2, "TopK", self.emit("Where", valid, clock, late), steps, axis=0, largest=0)
        self.ran = self.emit("CumSum", self.emit("Cast", valid, to=_INT64), self.integer(0))
        self.count = self.emit("ReduceSum", self.emit("Cast", valid, to=_INT64), self.numbers(0), keepdims=0)

    def picked(self, x: str, ids: str) -> str:
        """The steps of each row of x (T, N, D) that ids (S, N) numbers: (S, N, D)."""
        width = self.emit("Shape", x, start=2, end=3)
        shape = self.emit("Concat", self.emit("Shape", ids), width, axis=0)
        wide = self.emit("Expand", self.emit("Unsqueeze", ids, self.numbers(2)), shape)
        return self.emit("GatherElements", x, wide, axis=0)

    def packed(self, x: str) -> str:
        """x (T, N, D) with each row's valid steps at its front, whose number is then `lens`."""
        self._pack(x)
        return self.picked(x, self.order)

    def spread(self, y: str) -> str:
        """The inverse of `packed`; 0 at skipped steps."""
        back = self.picked(y, self._at_least_0(self.emit("Sub", self.ran, self.integer(1))))
        return self.emit("Where", self.emit("Unsqueeze", self.valid, self.numbers(2)), back, self.number(0.0))

    def _at_least_0(self, ids: str) -> str:
        return self.emit("Max", ids, self.integer(0))

    def last_of_rows(self, x: str, reverse: bool) -> str:
        """(N, D): x at each row's last (or first) valid step, 0 where it has none."""
        front = self.packed(x)
        at = self.emit("Sub", self.count, self.integer(1))
        ids = self.emit("Mul", at, self.integer(0)) if reverse else self._at_least_0(at)
        one = self.emit("Squeeze", self.picked(front, self.emit("Unsqueeze", ids, self.numbers(0))), self.numbers(0))
        some = self.emit("Unsqueeze", self.emit("Greater", self.count, self.integer(0)), self.numbers(1))
        return self.emit("Where", some, one, self.number(0.0))

    def held(self, x: str, reverse: bool) -> str:
        """x at a valid step, else at the valid one before it in the walk; 0 where there was none."""
        front = self.packed(x)
        if reverse:  # the valid step after this one has as many before it as have run here, itself not counted
            ids = self.emit("Sub", self.ran, self.emit("Cast", self.valid, to=_INT64))
            some = self.emit("Less", ids, self.count)
            ids = self.emit("Min", ids, self._at_least_0(self.emit("Sub", self.count, self.integer(1))))
        else:
            some = self.emit("Greater", self.ran, self.integer(0))
            ids = self._at_least_0(self.emit("Sub", self.ran, self.integer(1)))
        found = self.picked(front, ids)
        return self.emit("Where", self.emit("Unsqueeze", some, self.numbers(2)), found, self.number(0.0))

    def in_walks(self, walk: str, x: str, run: Any) -> str:
        """`run(x, reverse)`; of both directions side by side, each half with its own."""
        if walk != "both":
            found: str = run(x, walk == "reverse")
            return found
        wide = self.emit("Shape", x, start=-1)
        half = self.emit("Div", wide, self.numbers(2))
        low = self.emit("Slice", x, self.numbers(0), half, self.numbers(-1))
        high = self.emit("Slice", x, half, wide, self.numbers(-1))
        return self.emit("Concat", run(low, False), run(high, True), axis=-1)

    def hold(self, part: Hold, x: str) -> str:
        """A Hold; without skipped steps, nothing."""
        inner = self.turned(x)
        return self.turned(self.in_walks(part.walk, inner, self.held)) if self.steps(inner) else x

    def last(self, part: Last, x: str) -> str:
        """A Last, wherever it stands."""
        inner = self.turned(x)
        if part.valid and self.steps(inner):
            return self.in_walks(part.walk, inner, self.last_of_rows)

        def end(x: str, reverse: bool) -> str:
            return self.emit("Gather", x, self.integer(0 if reverse else -1), axis=0)

        return self.in_walks(part.walk, inner, end)

    def flip(self, part: Flip, x: str) -> str:
        """A Flip, and the steps as they are after it."""
        if part.flags and (valid := self.steps(self.turned(x))):
            self.now_valid(self._backwards(valid, 0))
        return self._backwards(x, int(self.batch_first))

    def _backwards(self, x: str, axis: int) -> str:
        ends = [self.numbers(-1), self.numbers(-(1 << 62)), self.numbers(axis), self.numbers(-1)]
        return self.emit("Slice", x, *ends)

    def masking(self, part: Masking, x: str, integers: bool, timed: bool) -> str:
        """A Masking, and the steps as they are after it."""
        value = float(part.value)
        if integers:
            if not value.is_integer():
                return x
            valid = self.emit("Not", self.emit("Equal", x, self.integer(int(value))))
        else:
            other = self.emit("Equal", x, x if isnan(value) else self.number(value))
            kept = self.emit("Cast", other if isnan(value) else self.emit("Not", other), to=_INT32)
            valid = self.emit("Cast", self.emit("ReduceMax", kept, axes=[-1], keepdims=0), to=9)
        if timed:
            inner = self.emit("Transpose", valid, perm=[1, 0]) if self.batch_first else valid
            before = self.steps(inner)
            self.now_valid(self.emit("And", inner, before) if before else inner)
        if integers:
            return x
        return self.emit("Where", self.emit("Unsqueeze", valid, self.numbers(-1)), x, self.number(0.0))

    def around(self, hidden: int, x: str) -> str:
        """An Around: the first half one step later, the second one earlier, along the first axis."""
        first, zero = self.numbers(0), self.numbers(0)
        cut = [self.emit("Slice", x, self.numbers(0), self.numbers(hidden), self.numbers(-1))]
        cut.append(self.emit("Slice", x, self.numbers(hidden), self.numbers(2 * hidden), self.numbers(-1)))
        row = self.emit("Shape", self.emit("Slice", cut[0], first, self.numbers(1), zero))
        blank = self.emit("ConstantOfShape", row, value=self.zero())
        later = self.emit("Concat", blank, self.emit("Slice", cut[0], first, self.numbers(-1), zero), axis=0)
        rest = self.emit("Slice", cut[1], self.numbers(1), self.numbers(1 << 62), zero)
        return self.emit("Concat", later, self.emit("Concat", rest, blank, axis=0), axis=-1)
