"""Layers in one direction, run as one: a whole sequence at once, or segment by segment in bounded memory.

A unidirectional stack is one chain of all its layers; in a bidirectional one each direction of each layer is a chain of
its own. With checkpoints, `forward` walks segments of k steps and keeps no tape, only the states between segments;
`backward` walks the segments in reverse, runs each again with a tape, and goes back through it (Chen et al. 2016).
Dropout masks are drawn step after step from one generator for each layer, so they don't depend on the segments.
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
    """The record of a chain's pass: where each segment started, and the scans of the last one."""

    x: Array
    reset_states: list[State]
    step_mask: StepMask
    segments: list[tuple[int, int]]  # in the order of the walk
    checkpoints: list[list[State]]
    rngs: list[list[Generator]]  # before each segment
    scan_tapes: list[Tape] = field(default_factory=list)  # of the last segment
    dropout_masks: list[Array | None] = field(default_factory=list)


@dataclass(frozen=True)
class DirectionStack:
    """Layers of one cell in one direction, each with its parameters."""

    xp: Namespace
    cell: Cell
    params: list[Params]
    reverse: bool = False
    dropout: float = 0.0
    sparse: bool = False

    def dropout_generators(self, rng: Generator | None) -> list[Generator]:
        """A generator for the mask after each layer but the last; none where nothing is dropped."""
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
        """The output, the final states and the tape; `every` is the number of steps between checkpoints, or None."""
        count, rngs = x.shape[0], self.dropout_generators(rng)
        if not record_tape:
            y, finals, _, _ = self._run_segment(x, states, states, step_mask, rngs, False)
            return y, finals, None
        checkpoint_interval = checkpoint_interval or max(1, count)
        segments = [(t, min(t + checkpoint_interval, count)) for t in range(0, max(1, count), checkpoint_interval)]
        if self.reverse:
            segments.reverse()
        tape = DirectionStackTape(x, states, step_mask, segments, [], [])
        outputs, now = _SegmentWriter(self.xp, count), states
        if len(segments) == 1:
            y, now, scans, masks = self._run_segment(x, states, states, step_mask, rngs, True)
            tape.checkpoints.append(states)
            tape.scan_tapes.extend(scans)
            tape.dropout_masks.extend(masks)
            return y, now, tape
        for t0, t1 in segments:
            tape.checkpoints.append(now)
            tape.rngs.append(deepcopy(rngs))
            # The last segment is the first that backward needs: its tape may as well stay.
            last = (t0, t1) == segments[-1]
            y, now, scans, masks = self._run_segment(
                x[t0:t1, ...], now, states, step_mask.slice_steps(t0, t1), rngs, last
            )
            outputs.write(t0, t1, y)
            if last:
                tape.scan_tapes.extend(scans)
                tape.dropout_masks.extend(masks)
        return outputs.concat(), now, tape

    def _run_segment(
        self, x: Array, states: list[State], home: list[State], steps: StepMask, rngs: list[Generator], keep: bool
    ) -> tuple[Array, list[State], list[Any], list[Array | None]]:
        """All layers over one segment."""
        y, finals, scans, masks = x, [], [], []
        for k, (params, state) in enumerate(zip(self.params, states, strict=True)):
            y, final, tape = dispatch.forward(
                self.cell,
                params,
                y,
                state,
                steps,
                reset_state=home[k],
                xp=self.xp,
                reverse=self.reverse,
                record_tape=keep,
            )
            if tape is not None and self.sparse:
                tape = replace(tape, sparse=True)
            mask = dropout_mask(rngs[k], self.dropout, y, self.reverse) if k < len(rngs) else None
            y = y if mask is None else y * mask
            finals.append(final)
            scans.append(tape)
            masks.append(mask)
        return y, finals, scans, masks

    def _replay_segments(self, tape: DirectionStackTape, backwards: bool) -> Any:
        """(t0, t1, scans, masks) of each segment, run again where no tape was kept."""
        order = range(len(tape.segments))
        for s in reversed(order) if backwards else order:
            t0, t1 = tape.segments[s]
            if s == len(tape.segments) - 1:
                yield t0, t1, tape.scan_tapes, tape.dropout_masks
                continue
            steps, rngs = tape.step_mask.slice_steps(t0, t1), deepcopy(tape.rngs[s])
            _, _, scans, masks = self._run_segment(
                tape.x[t0:t1, ...], tape.checkpoints[s], tape.reset_states, steps, rngs, True
            )
            yield t0, t1, scans, masks

    def states(self, tape: DirectionStackTape) -> list[State]:
        """For each layer its states after every step, (T, N, .) each."""
        pieces = [[s.states() for s in scans] for _, _, scans, _ in self._replay_segments(tape, backwards=self.reverse)]
        if len(pieces) == 1:
            return pieces[0]
        layers = zip(*pieces, strict=True)
        return [tuple(self.xp.concat(parts, axis=0) for parts in zip(*layer, strict=True)) for layer in layers]

    def backward(
        self,
        tape: DirectionStackTape,
        dy: Array | None,
        dfinal_states: Sequence[Sequence[Array | None]],
        state_cotangents: Sequence[Sequence[Array | None]],
    ) -> tuple[Array | None, list[State], LayerGradients]:
        """The adjoint of x, of the initial states and of each layer's parameters."""
        if len(tape.segments) == 1 == len(self.params):
            dx, start, home, dp = dispatch.backward(tape.scan_tapes[0], dy, dfinal_states[0], state_cotangents[0])
            return dx, [tuple(map(_add, start, home))], [dp]
        ds: list[Any] = [*dfinal_states]
        dhome: list[Any] = [(None,) * len(d) for d in ds]
        grads: list[Any] = [None] * len(self.params)
        dx = _SegmentWriter(self.xp, tape.x.shape[0])
        for t0, t1, scans, masks in self._replay_segments(tape, backwards=True):
            d = None if dy is None else dy[t0:t1, ...]
            for k in range(len(scans) - 1, -1, -1):
                d = d if masks[k] is None or d is None else d * masks[k]
                injected = [None if i is None else i[t0:t1, ...] for i in state_cotangents[k]]
                d, ds[k], home, dp = dispatch.backward(scans[k], d, ds[k], injected)
                dhome[k] = tuple(_add(a, b) for a, b in zip(dhome[k], home, strict=True))
                grads[k] = dp if grads[k] is None else {name: g + dp[name] for name, g in grads[k].items()}
            dx.write(t0, t1, d)
        return (
            dx.concat(),
            [tuple(_add(a, b) for a, b in zip(s, h, strict=True)) for s, h in zip(ds, dhome, strict=True)],
            grads,
        )


class _SegmentWriter:
    """Segments put together: written into one array as they come, or joined at the end where that can't be."""

    def __init__(self, xp: Namespace, count: int) -> None:
        self.xp, self.count = xp, count
        self.output: Array | None = None
        self.segments: dict[int, Array | None] = {}

    def write(self, t0: int, t1: int, segment: Array | None) -> None:
        """The steps t0 to t1 - 1."""
        if self.output is None and segment is not None and t1 - t0 < self.count:
            self.output = self.xp.empty(
                (self.count, *segment.shape[1:]), dtype=segment.dtype, device=device_of(segment)
            )
        if self.output is not None and is_writeable(self.output):
            self.output[t0:t1, ...] = segment
        else:
            self.segments[t0] = segment

    def concat(self) -> Array | None:
        """All steps; None where the segments were None."""
        if self.output is not None and not self.segments:
            return self.output
        parts = [self.segments[t] for t in sorted(self.segments)]
        return parts[0] if len(parts) == 1 or parts[0] is None else self.xp.concat(parts, axis=0)


def _add(a: Array | None, b: Array | None) -> Array | None:
    return b if a is None else a if b is None else a + b


def dropout_mask(rng: Generator, p: float, y: Array, reverse: bool = False) -> Array:
    """Zeros with probability p, else 1/(1-p), like y: drawn on the host, the same numbers for every array library.

    Steps are drawn in the order of the walk, so that segments of any length get the same ones.
    """
    drawn = rng.random(tuple(y.shape))
    return from_numpy(((drawn[::-1] if reverse else drawn) >= p) / (1 - p), like=y)


_MIN_SEGMENT_BYTES = 1 << 22
_BYTE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def segment_length(where: str, checkpoint: Any, count: int, step_bytes: int, state_bytes: int) -> int:
    """How many steps lie between checkpoints.

    Args:
        where: the public function, named in errors.
        checkpoint: a number of steps, "sqrt" (2 sqrt(T)), or bytes as in "64MiB".
        count: T.
        step_bytes: what one step's tape and its adjoint take.
        state_bytes: what the states between two steps take.
    """
    if checkpoint == "sqrt":
        # Twice the root costs little memory and halves what cutting costs in time; what takes 4 MiB is not cut at all.
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
    # k steps of tape and T/k states fit the budget: k step_bytes + (T/k) state_bytes <= budget, the largest such k.
    least = 2 * sqrt(step_bytes * state_bytes * count)
    if budget < (need := max(least, step_bytes)):
        raise InputError(f"{where}: checkpoint={checkpoint!r} is too small: at least {ceil(need)} bytes are needed")
    root = sqrt(max(0.0, budget * budget - least * least))
    return max(1, int((budget + root) / (2 * max(1, step_bytes))))
