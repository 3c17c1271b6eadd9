"""Stacked layers of one direction, run over a whole sequence or segment by segment in bounded memory.

With checkpoints, `forward` cuts the sequence into segments of k steps. It saves the states between segments, and a tape
for the last segment only. `backward` takes the segments in reverse order: it runs each segment again to record a tape,
then applies the adjoint of that segment (Chen et al. 2016, arXiv:1604.06174).

Each layer draws its dropout masks step by step from one generator, so the masks do not depend on the segments.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import ceil, isqrt, sqrt
from typing import Any

import numpy as np
from numpy.random import PCG64, Generator

from xprnn.arrays.namespace import Array, InputError, Namespace, Params, device_of, from_numpy, is_writeable
from xprnn.cells.cell import Cell
from xprnn.kernels import dispatch
from xprnn.kernels.tape import State, StepMask, Tape

__all__ = ["DirectionStack", "DirectionStackTape", "segment_length"]

LayerGradients = list[Params]


@dataclass(frozen=True)
class DirectionStackTape:
    """Tape of a DirectionStack: the states before each segment, and the scan tapes of the segment that ran last."""

    x: Array
    reset_states: list[State]  # for each layer, the states that a reset restores
    step_mask: StepMask
    segments: list[tuple[int, int]]  # (first step, last step + 1), in the order in which they ran
    checkpoints: list[list[State]]  # for each segment, the states of each layer before it
    rngs: list[list[Generator]]  # for each segment, the dropout generator of each layer before it
    scan_tapes: list[Tape] = field(default_factory=list)  # of each layer, for the segment that ran last
    dropout_masks: list[Array | None] = field(default_factory=list)  # of each layer, for the same segment


@dataclass(frozen=True)
class DirectionStack:
    """Stacked layers of one cell in one direction, with their parameters."""

    xp: Namespace
    cell: Cell
    params: list[Params]
    reverse: bool = False
    dropout: float = 0.0
    sparse: bool = False

    def dropout_generators(self, rng: Generator | None) -> list[Generator]:
        """Return one generator of dropout masks for each layer but the last; an empty list without dropout."""
        if rng is None or not self.dropout:
            return []
        return [Generator(PCG64(int(rng.integers(1 << 62)))) for _ in self.params[1:]]

    def forward(
        self,
        x: Array,
        states: list[State],
        step_mask: StepMask,
        *,
        record_tape: bool,
        rng: Generator | None,
        checkpoint_interval: int | None,
    ) -> tuple[Array, list[State], DirectionStackTape | None]:
        """Run all layers over a sequence.

        Args:
            x: (T, N, D), or integers (T, N).
            states: the initial states of each layer.
            step_mask: the active steps and the resets.
            record_tape: False if `backward` will not follow.
            rng: generator for dropout, or None.
            checkpoint_interval: k, the number of steps in a segment; None for one segment.

        Returns:
            y (T, N, H) of the last layer, the final states of each layer, and the tape or None.
        """
        count, rngs = x.shape[0], self.dropout_generators(rng)
        if not record_tape:
            y, finals, _, _ = self._run_segment(x, states, states, step_mask, rngs, False)
            return y, finals, None
        checkpoint_interval = checkpoint_interval or max(1, count)
        segments = [(t, min(t + checkpoint_interval, count)) for t in range(0, max(1, count), checkpoint_interval)]
        if self.reverse:
            segments.reverse()
        tape = DirectionStackTape(x, states, step_mask, segments, [], [])
        outputs, current = _SegmentWriter(self.xp, count), states
        if len(segments) == 1:
            y, current, scan_tapes, masks = self._run_segment(x, states, states, step_mask, rngs, True)
            tape.checkpoints.append(states)
            tape.scan_tapes.extend(scan_tapes)
            tape.dropout_masks.extend(masks)
            return y, current, tape
        for t0, t1 in segments:
            tape.checkpoints.append(current)
            tape.rngs.append(deepcopy(rngs))
            # `backward` starts with the segment that ran last, so recording that tape now saves one replay.
            last = (t0, t1) == segments[-1]
            y, current, scan_tapes, masks = self._run_segment(
                x[t0:t1, ...], current, states, step_mask.slice_steps(t0, t1), rngs, last
            )
            outputs.write(t0, t1, y)
            if last:
                tape.scan_tapes.extend(scan_tapes)
                tape.dropout_masks.extend(masks)
        return outputs.concat(), current, tape

    def _run_segment(
        self,
        x: Array,
        states: list[State],
        reset_states: list[State],
        step_mask: StepMask,
        rngs: list[Generator],
        record_tape: bool,
    ) -> tuple[Array, list[State], list[Any], list[Array | None]]:
        """Run all layers over one segment; return y and, for each layer, final states, scan tape and dropout mask."""
        y, finals, scan_tapes, masks = x, [], [], []
        for k, (params, state) in enumerate(zip(self.params, states, strict=True)):
            y, final, tape = dispatch.forward(
                self.cell,
                params,
                y,
                state,
                step_mask,
                reset_state=reset_states[k],
                xp=self.xp,
                reverse=self.reverse,
                record_tape=record_tape,
            )
            if tape is not None and self.sparse:
                tape = replace(tape, sparse=True)
            mask = dropout_mask(rngs[k], self.dropout, y, self.reverse) if k < len(rngs) else None
            y = y if mask is None else y * mask
            finals.append(final)
            scan_tapes.append(tape)
            masks.append(mask)
        return y, finals, scan_tapes, masks

    def _replay_segments(self, tape: DirectionStackTape, *, from_last: bool) -> Any:
        """Yield (t0, t1, scan tapes, dropout masks) of each segment; segments without a tape are run again."""
        order = range(len(tape.segments))
        for s in reversed(order) if from_last else order:
            t0, t1 = tape.segments[s]
            if s == len(tape.segments) - 1:
                yield t0, t1, tape.scan_tapes, tape.dropout_masks
                continue
            step_mask, rngs = tape.step_mask.slice_steps(t0, t1), deepcopy(tape.rngs[s])
            _, _, scan_tapes, masks = self._run_segment(
                tape.x[t0:t1, ...], tape.checkpoints[s], tape.reset_states, step_mask, rngs, True
            )
            yield t0, t1, scan_tapes, masks

    def states(self, tape: DirectionStackTape) -> list[State]:
        """Return the states of each layer after every step, (T, N, .) each."""
        replay = self._replay_segments(tape, from_last=self.reverse)
        segments = [[scan_tape.states() for scan_tape in scan_tapes] for _, _, scan_tapes, _ in replay]
        if len(segments) == 1:
            return segments[0]
        layers = zip(*segments, strict=True)
        return [tuple(self.xp.concat(arrays, axis=0) for arrays in zip(*layer, strict=True)) for layer in layers]

    def backward(
        self,
        tape: DirectionStackTape,
        dy: Array | None,
        dfinal_states: Sequence[Sequence[Array | None]],
        state_cotangents: Sequence[Sequence[Array | None]],
    ) -> tuple[Array | None, list[State], LayerGradients]:
        """The adjoint of `forward`.

        Args:
            tape: from `forward`.
            dy: (T, N, H), the cotangent of y, or None.
            dfinal_states: for each layer, the cotangent of each final state, or None.
            state_cotangents: for each layer, the cotangent (T, N, H) of each state after every step, or None.

        Returns:
            dx, the cotangents of each layer's initial states, and the gradients of each layer's parameters.
        """
        if len(tape.segments) == 1 == len(self.params):
            dx, dinitial, dreset, dp = dispatch.backward(tape.scan_tapes[0], dy, dfinal_states[0], state_cotangents[0])
            return dx, [tuple(map(_add, dinitial, dreset))], [dp]
        dstates: list[Any] = [*dfinal_states]
        dresets: list[Any] = [(None,) * len(d) for d in dstates]
        grads: list[Any] = [None] * len(self.params)
        dx = _SegmentWriter(self.xp, tape.x.shape[0])
        for t0, t1, scan_tapes, masks in self._replay_segments(tape, from_last=True):
            d = None if dy is None else dy[t0:t1, ...]
            for k in range(len(scan_tapes) - 1, -1, -1):
                d = d if masks[k] is None or d is None else d * masks[k]
                injected = [None if c is None else c[t0:t1, ...] for c in state_cotangents[k]]
                d, dstates[k], dreset, dp = dispatch.backward(scan_tapes[k], d, dstates[k], injected)
                dresets[k] = tuple(map(_add, dresets[k], dreset))
                grads[k] = dp if grads[k] is None else {name: g + dp[name] for name, g in grads[k].items()}
            dx.write(t0, t1, d)
        return dx.concat(), [tuple(map(_add, d, r)) for d, r in zip(dstates, dresets, strict=True)], grads


class _SegmentWriter:
    """Joins the segments of one array (T, ...): written into one output where arrays can be written, else concatenated.

    Nothing is copied if there is only one segment.
    """

    def __init__(self, xp: Namespace, count: int) -> None:
        self.xp, self.count = xp, count
        self.output: Array | None = None
        self.segments: dict[int, Array | None] = {}

    def write(self, t0: int, t1: int, segment: Array | None) -> None:
        """Store the steps t0 to t1 - 1."""
        if self.output is None and segment is not None and t1 - t0 < self.count:
            self.output = self.xp.empty(
                (self.count, *segment.shape[1:]), dtype=segment.dtype, device=device_of(segment)
            )
        if self.output is not None and is_writeable(self.output):
            self.output[t0:t1, ...] = segment
        else:
            self.segments[t0] = segment

    def concat(self) -> Array | None:
        """Return all steps; None if the segments are None."""
        if self.output is not None and not self.segments:
            return self.output
        segments = [self.segments[t] for t in sorted(self.segments)]
        return segments[0] if len(segments) == 1 or segments[0] is None else self.xp.concat(segments, axis=0)


def _add(a: Array | None, b: Array | None) -> Array | None:
    return b if a is None else a if b is None else a + b


def dropout_mask(rng: Generator, p: float, y: Array, reverse: bool = False) -> Array:
    """Draw a dropout mask in the shape of y: 0 with probability p, else 1/(1-p).

    The numbers are drawn on the host, so they are the same for every array library. They are drawn in the order in
    which the steps run (from the last step if `reverse`), so they do not depend on the length of the segments.
    """
    uniform = rng.random(tuple(y.shape))
    return from_numpy(((uniform[::-1] if reverse else uniform) >= p) / (1 - p), like=y)


_MIN_SEGMENT_BYTES = 1 << 22
_BYTE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def segment_length(where: str, checkpoint: Any, count: int, step_bytes: int, state_bytes: int) -> int:
    """Return the number of steps between checkpoints.

    Args:
        where: the public function, named in errors.
        checkpoint: a number of steps >= 1, "sqrt", or a memory budget such as "64MiB".
        count: T.
        step_bytes: size of the tape and the cotangents of one step.
        state_bytes: size of the states between two steps.

    Returns:
        For "sqrt" 2 sqrt(T), or more steps if they fit into 4 MiB. For a budget, the largest k with
        k step_bytes + (T/k) state_bytes <= budget.

    Raises:
        InputError: another value, or a budget that no k satisfies.
    """
    if checkpoint == "sqrt":
        # Not sqrt(T): at 2 sqrt(T) there are half as many segments, with half the overhead, for little more memory.
        return max(1, 2 * isqrt(count), _MIN_SEGMENT_BYTES // max(1, step_bytes))
    if not isinstance(checkpoint, bool) and isinstance(checkpoint, (int, np.integer)) and checkpoint >= 1:
        return int(checkpoint)
    number = checkpoint.rstrip("BKMGibkmg ") if isinstance(checkpoint, str) else ""
    unit = checkpoint[len(number) :].strip().upper() if isinstance(checkpoint, str) else ""
    if unit not in _BYTE_UNITS or not number.replace(".", "", 1).isdigit():
        raise InputError(
            f'{where}: checkpoint must be a number of steps >= 1, "sqrt", or bytes like "64MiB", found {checkpoint!r}'
        )
    budget = float(number) * _BYTE_UNITS[unit]
    minimum = 2 * sqrt(step_bytes * state_bytes * count)  # of k step_bytes + (T/k) state_bytes over all k > 0
    if budget < (required := max(minimum, step_bytes)):
        raise InputError(f"{where}: checkpoint={checkpoint!r} is too small: at least {ceil(required)} bytes are needed")
    root = sqrt(max(0.0, budget * budget - minimum * minimum))
    return max(1, int((budget + root) / (2 * max(1, step_bytes))))
