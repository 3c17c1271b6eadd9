"""The compiled scan of the plain case: everything worked out once for its sizes, its memory in a few pieces.

A hundred steps of fifty units take twenty microseconds; so does asking for twenty arrays and for their addresses. Here
compiled.py's kernels get what they get there, where every row takes part in every step, x holds features and all lies
in C order (backward: and one thread walks). What remains to do at a call is in `ForwardPlan.__call__`, and below it in
`Back.__call__`; pieces.py says how the tables are made.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays.namespace import Array, Params
from xprnn.cells.cell import Cell
from xprnn.kernels.jit import compile_cache
from xprnn.kernels.jit.arguments import (
    Arena,
    PointerBinder,
    SavedForBackward,
    backward_workspace,
    forward_workspace,
    make_binder,
)
from xprnn.kernels.jit.forward_driver import KernelSources
from xprnn.kernels.jit.threads import RowRange, parallel_map, split_rows, thread_count
from xprnn.kernels.memory import contiguous
from xprnn.kernels.row_order import RowOrder
from xprnn.kernels.tape import State, StepMask, Tape

__all__ = ["ForwardPlan", "ForwardResult", "forward_plan", "planned_backward", "planned_forward"]

_PARAM_ARGUMENTS = {"weight_ih": "WI", "weight_hh": "WH", "bias_ih": "BI", "bias_hh": "BH"}
ScanShape = tuple[int, int, int, int, int]  # T, N, D, H, W


class ForwardResult(NamedTuple):
    """A pass, as far as its memory goes."""

    plan: "ForwardPlan"
    x: Array
    param_arrays: tuple[Array, ...]  # the parameters in the way's order
    memory: tuple[
        Array, Array
    ]  # all of the tape: y with the state before it, which the caller may keep alone; the rest
    alignment_offsets: int

    @property
    def y(self) -> Array:
        """(T, N, H)."""
        return self.plan.states(self, 0, 0 if self.plan.reverse else 1)

    def saved_for_backward(self) -> SavedForBackward:
        """What compiled.py keeps of a pass."""
        way = self.plan
        (count, n, _, hidden, width), (_, memory), skip = way.shape, self.memory, self.alignment_offsets >> 8 & 255
        ends = tuple(tuple(way.states(self, k, i) for k in range(way.num_states)) for i in (0, 1))
        before, after = ends[::-1] if way.reverse else ends
        gates = (
            way.saved_arena.view(memory, skip, "G", (count, n, width))
            if way.keep and "G" in way.saved_arena.offsets
            else None
        )
        slots = [slot for slot in way.saved_arena.offsets if way.keep and slot[0] == "V"]
        spare = {slot: way.saved_arena.view(memory, skip, slot, (count, n, hidden)) for slot in slots}
        rows = RowOrder.from_step_mask((count, n), StepMask())
        return SavedForBackward(way.sources, rows, self.x, gates, spare, before, after, self)


def _scalar_arguments(shape: ScanShape, item: int, reverse: bool) -> dict[str, int]:
    count, n, d, hidden, width = shape
    turned = {"turned": int(reverse), "go": compile_cache.gemm_kernel(item).address}
    return turned | {"T": count, "N": n, "R": n, "D": d, "H": hidden, "W": width}


def _tape_layout(
    sources: KernelSources, states: int, shape: ScanShape, item: int, reverse: bool, keep: bool
) -> tuple[Arena, Arena, list[dict[str, int]]]:
    """The pieces of a tape, and where they hold the states after and before each step: in the same place, one apart.

    Without `keep`, of what only backward asks for, there is room for one step.
    """
    count, n, _, hidden, width = shape
    size, length = n * hidden, count if keep else 1
    first, sizes = Arena(item, {"M0": (count + 1) * size}), {f"M{k}": (length + 1) * size for k in range(1, states)}
    sizes |= {slot: length * size for slot in sources.saved_buffers if slot[0] == "V"}
    gates = keep and any(slot[0] == "X" for slot in sources.saved_buffers)
    rest = Arena(item, sizes | ({"G": count * n * width} if gates else {}))
    after, before = (0, size * item) if reverse else (size * item, 0)
    places = []
    for piece in (first, rest):
        here = {f"M{k}": at for k in range(states) if (at := piece.byte_offsets.get(f"M{k}")) is not None}
        states_ = {f"{c}{name[1:]}": at + d for name, at in here.items() for c, d in (("M", after), ("S", before))}
        places.append(piece.byte_offsets | states_)
    return first, rest, places


def _is_plain_array(a: Array, dtype: Any) -> bool:
    return a.__class__ is np.ndarray and a.dtype == dtype and (flags := a.flags).c_contiguous and flags.aligned


# --- forward


class ForwardPlan:
    """The forward pass of a cell for one shape.

    Args:
        sources, cell: the cell and its kernels.
        names: of the parameters, biases before the cell's vectors.
        shape: (T, N, D, H, W), all >= 1.
        dtype: float32 or float64.
        reverse: whether time runs backwards.
        keep: whether there is to be a tape.
    """

    def __init__(
        self,
        sources: KernelSources,
        cell: Cell,
        param_names: tuple[str, ...],
        shape: ScanShape,
        dtype: Any,
        reverse: bool,
        keep: bool,
    ) -> None:
        self.sources, self.cell, self.param_names, self.shape, self.dtype = sources, cell, param_names, shape, dtype
        self.reverse, self.keep, self.num_states = reverse, keep, len(cell.states)
        self.output_arena, self.saved_arena, self._tape_offsets = _tape_layout(
            sources, self.num_states, shape, dtype.itemsize, reverse, keep
        )
        self._num_weights = (shape[3] + shape[2]) * shape[4]
        self._kernel = compile_cache.compile_kernel(sources.forward)
        self._all_rows = (RowRange(0, shape[1]),)
        self._binders = dict[RowRange, tuple[PointerBinder, Arena]]()

    def _make_binder(self, part: RowRange) -> tuple[PointerBinder, Arena]:
        """The table for these rows, and their piece of memory."""
        (count, n, d, hidden, width), item, keep = self.shape, self.dtype.itemsize, self.keep
        numbers, sizes = forward_workspace(self.sources, (count, part.size, d, hidden, width), item)
        missing = {slot: width for name, slot in _PARAM_ARGUMENTS.items() if name not in self.param_names}
        room = Arena(item, missing | sizes | ({} if keep else {"G": width}), "Q" if missing else "")
        step, row = n * hidden, part.start * item
        held = [
            {k: at + row * (width if k == "G" else hidden) for k, at in piece.items()} for piece in self._tape_offsets
        ]
        numbers |= _scalar_arguments(self.shape, item, self.reverse) | {
            "R": part.size,
            "keep": int(keep),
            "v0": step * keep,
        }
        numbers |= {f"m{k}": step if keep or k == 0 else 0 for k in range(self.num_states)}
        own = [_PARAM_ARGUMENTS[name] for name in self.param_names if name in _PARAM_ARGUMENTS]
        vectors = [f"p{k}" for k in range(len(self.param_names) - len(own))]
        given = [{f"C{k}": row * hidden} for k in range(self.num_states)] + [{"A": row * d}]
        given += [{slot: 0} for slot in (*own, *vectors)]
        fresh = [(self.output_arena, held[0]), (self.saved_arena, held[1]), (room, room.byte_offsets)]
        begins = [self._initial_state_offset(k) for k in range(self.num_states)]
        shapes = [(count, n, d), (width, d), (width, hidden), *[(width,)] * (len(own) - 2), *[(hidden,)] * len(vectors)]
        table, bits = self.sources.forward_arguments, 8 * item
        return make_binder(table, numbers, fresh, given, 0, begins, shapes, bits, (n, hidden)), room

    def _initial_state_offset(self, k: int) -> int:
        """Where the state before the first step lies, in its piece."""
        count, n, _, hidden, _ = self.shape
        start = self.saved_arena.offsets[f"M{k}"] if k else 0
        return start + ((count if self.keep or not k else 1) * n * hidden if self.reverse else 0)

    def states(self, result: ForwardResult, k: int, start: int) -> Array:
        """State k at T steps from the first (0) or the second (1) entry of its place on: before or after each step."""
        count, n, _, hidden, _ = self.shape
        step, length = n * hidden, count if self.keep or not k else 1
        at = start * step + (
            self.saved_arena.offsets[f"M{k}"] + (result.alignment_offsets >> 8 & 255)
            if k
            else result.alignment_offsets & 255
        )
        return result.memory[k > 0][at : at + length * step].reshape(length, n, hidden)

    def __call__(
        self, x: Array, param_arrays: tuple[Array, ...], initial_states: Sequence[Array], final_states: Sequence[Array]
    ) -> ForwardResult | None:
        """The pass from states `start`, (1, N, H) each, into `finals`; None where an array has another shape.

        Raises TypeError for another dtype, or what is not in C order. Masked arrays and their like are the caller's to
        keep out.
        """
        (count, n, *_), dtype = self.shape, self.dtype
        whole, rest = np.empty(self.output_arena.size, dtype), np.empty(self.saved_arena.size, dtype)
        pairs = [a for pair in zip(final_states, initial_states, strict=True) for a in pair]
        those = (
            split_rows(RowOrder.from_step_mask((count, n), StepMask()), count, n, self._num_weights)
            if self.is_threaded()
            else self._all_rows
        )
        tables, rooms, skips = [], [], 0
        for part in those:
            if part not in self._binders:
                self._binders[part] = self._make_binder(part)
            its, piece = self._binders[part]
            table, room = np.empty(its.num_arguments, np.int64), np.empty(piece.size, dtype)
            skips = its.bind(
                its.pointer_sources, its.expected_sizes, table, whole, rest, room, *pairs, x, *param_arrays
            )
            if skips < 0:
                return None
            tables.append(table)
            rooms.append(room)
        parallel_map(self._kernel, tables)
        return ForwardResult(self, x, param_arrays, (whole, rest), skips)

    def is_threaded(self) -> bool:
        """Whether several threads are to walk."""
        return thread_count(*self.shape[:2], self._num_weights) > 0

    @cached_property
    def backward_plan(self) -> "BackwardPlan":
        """The way back."""
        return BackwardPlan(self)


@lru_cache(maxsize=1024)
def forward_plan(
    sources: KernelSources,
    cell: Cell,
    param_names: tuple[str, ...],
    shape: ScanShape,
    dtype: Any,
    reverse: bool,
    keep: bool,
) -> ForwardPlan:
    """The one for these."""
    return ForwardPlan(sources, cell, param_names, shape, dtype, reverse, keep)


def planned_forward(
    sources: KernelSources,
    cell: Cell,
    params: Params,
    x: Array,
    state: State,
    steps: StepMask,
    reverse: bool,
    keep: bool,
) -> tuple[SavedForBackward, State] | None:
    """The tape and the states after the last step; None where compiled.py is to walk."""
    u, start = params["weight_hh"], [s[None] for s in state]
    dtype, (width, hidden) = u.dtype, u.shape
    if steps.active is not None or steps.reset is not None or "weight_hr" in params or not x.size:
        return None
    start = [s if _is_plain_array(s, dtype) else np.array(s, dtype, order="C") for s in start]
    if not all(_is_plain_array(a, dtype) for a in (x, *params.values())):
        return None
    names = tuple(name for name in (*_PARAM_ARGUMENTS, *cell.vectors) if name in params)
    way = forward_plan(sources, cell, names, (*x.shape, hidden, width), dtype, reverse, keep)
    finals = np.empty((len(state), 1, x.shape[1], hidden), dtype)
    done = way(x, tuple(params[name] for name in names), start, list(finals))
    return None if done is None else (done.saved_for_backward(), tuple(f[0] for f in finals))


# --- and its adjoint


class BackwardPlan:
    """The adjoint of an `ForwardPlan` that keeps a tape."""

    def __init__(self, forward_plan: ForwardPlan) -> None:
        self.forward_plan, item = forward_plan, forward_plan.dtype.itemsize
        (count, n, d, hidden, width), vectors = forward_plan.shape, forward_plan.cell.vectors
        self._kernel, self._num_biases = (
            compile_cache.compile_kernel(forward_plan.sources.backward),
            len(forward_plan.param_names) - 2 - len(vectors),
        )
        states, step = range(forward_plan.num_states), n * hidden
        _, _, held = _tape_layout(
            forward_plan.sources, forward_plan.num_states, forward_plan.shape, item, forward_plan.reverse, True
        )
        numbers, sizes = backward_workspace(forward_plan.sources, forward_plan.shape, item)
        sums = {"SI": width, "SH": width} | dict.fromkeys((f"D{k}" for k in states), step)
        sums |= dict.fromkeys((f"P{k}" for k in range(len(vectors))), step)
        self.dx_arena = Arena(item, {"DX": count * n * d})
        self.gradient_arena = Arena(item, sums | {"GI": width * d, "GU": width * hidden}, "GI")
        self.workspace_arena = Arena(item, {"nothing": hidden, "B": sizes.pop("B"), "O": sizes.pop("O")} | sizes, "Q")
        numbers |= _scalar_arguments(forward_plan.shape, item, forward_plan.reverse) | {"a0": step, "b0": hidden}
        nothing = {f"I{k}": self.workspace_arena.byte_offsets["nothing"] for k in states[1:]}
        fresh = [
            (self.dx_arena, self.dx_arena.byte_offsets),
            (self.gradient_arena, self.gradient_arena.byte_offsets | {"R0": self.gradient_arena.byte_offsets["D0"]}),
        ]
        fresh += [(self.workspace_arena, self.workspace_arena.byte_offsets | nothing)]
        names = ("I0", "A", "WI", "WH", *(f"p{k}" for k in range(len(vectors))))
        shapes = [(count, n, hidden), (count, n, d), (width, d), (width, hidden), *[(hidden,)] * len(vectors)]
        rest = [*held, *({name: 0} for name in names)]
        self.binder = make_binder(
            forward_plan.sources.backward_arguments, numbers, fresh, rest, 2, (), shapes, 8 * item
        )
        slots: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_ih": ("GI", (width, d)),
            "weight_hh": ("GU", (width, hidden)),
        }
        slots |= {"bias_ih": ("SI", (width,)), "bias_hh": ("SI" if forward_plan.sources.dx_is_dh else "SH", (width,))}
        slots |= {name: (f"P{k}", (n, hidden)) for k, name in enumerate(vectors)}
        self._gradient_views = [slots[name] for name in forward_plan.param_names]

    def __call__(
        self, result: ForwardResult, dy: Array, dstate: Sequence[Array | None]
    ) -> tuple[Array, State, list[Array]] | None:
        """The adjoints of x, of the first states (1, N, H), of the parameters in the way's order; else as forward."""
        way, places, skip = self.forward_plan, self.binder, self._num_biases
        (count, n, d, hidden, _), dtype = way.shape, way.dtype
        dx, sums, room = (
            np.empty(self.dx_arena.size, dtype),
            np.empty(self.gradient_arena.size, dtype),
            np.empty(self.workspace_arena.size, dtype),
        )
        table, (w, u, *others) = np.empty(places.num_arguments, np.int64), result.param_arrays
        its = (*result.memory, dy, result.x, w, u, *others[skip:])
        skips = places.bind(places.pointer_sources, places.expected_sizes, table, dx, sums, room, *its)
        if skips < 0:
            return None
        at, view = skips >> 8 & 255, self.gradient_arena.view
        ds = tuple([view(sums, at, f"D{k}", (1, n, hidden)) for k in range(way.num_states)])
        for mine, given in zip(ds, dstate, strict=True):
            if given is not None:
                mine[...] = given
        self._kernel(table)
        grads = [view(sums, at, *slot) for slot in self._gradient_views]
        if skip == 2 and way.sources.dx_is_dh:
            grads[3] = grads[2].copy()
        for k in range(2 + skip, len(grads)):
            grads[k] = np.add.reduce(grads[k], axis=0)
        return self.dx_arena.view(dx, skips & 255, "DX", (count, n, d)), ds, grads


def planned_backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None]
) -> tuple[Array, State, Params] | None:
    """The adjoints of x, of the first states, of the parameters; None where compiled.py is to walk."""
    done: ForwardResult | None = tape.saved.result
    if (
        done is None
        or dy is None
        or done.plan.is_threaded()
        or not _is_plain_array(dy := contiguous(dy), done.plan.dtype)
    ):
        return None
    found = done.plan.backward_plan(done, dy, dstate)
    if found is None:
        return None
    grads = dict(zip(done.plan.param_names, found[2], strict=True))
    return found[0], tuple(s[0] for s in found[1]), {name: grads[name] for name in tape.params}
