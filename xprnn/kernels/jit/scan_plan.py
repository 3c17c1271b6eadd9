"""The compiled scan of the plain case: everything worked out once for its sizes, its memory in a few pieces.

A hundred steps of fifty units take twenty microseconds; so does asking for twenty arrays and for their addresses. Here
compiled.py's kernels get what they get there, where every row takes part in every step, x holds features and all lies
in C order (backward: and one thread walks). What remains to do at a call is in `Ahead.__call__`, and below it in
`Back.__call__`; pieces.py says how the tables are made.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays.namespace import Array, Params
from xprnn.cells.cell import Cell
from xprnn.kernels.jit import compile_cache
from xprnn.kernels.jit.arguments import Kept, Piece, Places, back_room, forward_room, places_of
from xprnn.kernels.jit.forward_driver import Sources
from xprnn.kernels.jit.threads import Part, each, parts, several
from xprnn.kernels.memory import contiguous
from xprnn.kernels.row_order import Rows
from xprnn.kernels.tape import State, Steps, Tape

__all__ = ["Ahead", "Done", "ahead", "backward", "forward"]

_SLOTS = {"weight_ih": "WI", "weight_hh": "WH", "bias_ih": "BI", "bias_hh": "BH"}
Shape = tuple[int, int, int, int, int]  # T, N, D, H, W


class Done(NamedTuple):
    """A pass, as far as its memory goes."""

    way: "Ahead"
    x: Array
    arrays: tuple[Array, ...]  # the parameters in the way's order
    memory: tuple[
        Array, Array
    ]  # all of the tape: y with the state before it, which the caller may keep alone; the rest
    skips: int

    @property
    def y(self) -> Array:
        """(T, N, H)."""
        return self.way.states(self, 0, 0 if self.way.reverse else 1)

    def kept(self) -> Kept:
        """What compiled.py keeps of a pass."""
        way = self.way
        (count, n, _, hidden, width), (_, memory), skip = way.shape, self.memory, self.skips >> 8 & 255
        ends = tuple(tuple(way.states(self, k, i) for k in range(way.count)) for i in (0, 1))
        before, after = ends[::-1] if way.reverse else ends
        gates = way.rest.view(memory, skip, "G", (count, n, width)) if way.keep and "G" in way.rest.starts else None
        slots = [slot for slot in way.rest.starts if way.keep and slot[0] == "V"]
        spare = {slot: way.rest.view(memory, skip, slot, (count, n, hidden)) for slot in slots}
        rows = Rows.of((count, n), Steps())
        return Kept(way.sources, rows, self.x, gates, spare, before, after, self)


def _numbers(shape: Shape, item: int, reverse: bool) -> dict[str, int]:
    count, n, d, hidden, width = shape
    turned = {"turned": int(reverse), "go": compile_cache.gemm(item).address}
    return turned | {"T": count, "N": n, "R": n, "D": d, "H": hidden, "W": width}


def _tape(
    sources: Sources, states: int, shape: Shape, item: int, reverse: bool, keep: bool
) -> tuple[Piece, Piece, list[dict[str, int]]]:
    """The pieces of a tape, and where they hold the states after and before each step: in the same place, one apart.

    Without `keep`, of what only backward asks for, there is room for one step.
    """
    count, n, _, hidden, width = shape
    size, length = n * hidden, count if keep else 1
    first, sizes = Piece(item, {"M0": (count + 1) * size}), {f"M{k}": (length + 1) * size for k in range(1, states)}
    sizes |= {slot: length * size for slot in sources.slots if slot[0] == "V"}
    gates = keep and any(slot[0] == "X" for slot in sources.slots)
    rest = Piece(item, sizes | ({"G": count * n * width} if gates else {}))
    after, before = (0, size * item) if reverse else (size * item, 0)
    places = []
    for piece in (first, rest):
        here = {f"M{k}": at for k in range(states) if (at := piece.bytes.get(f"M{k}")) is not None}
        states_ = {f"{c}{name[1:]}": at + d for name, at in here.items() for c, d in (("M", after), ("S", before))}
        places.append(piece.bytes | states_)
    return first, rest, places


def _plain(a: Array, dtype: Any) -> bool:
    return a.__class__ is np.ndarray and a.dtype == dtype and (flags := a.flags).c_contiguous and flags.aligned


# --- forward


class Ahead:
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
        self, sources: Sources, cell: Cell, names: tuple[str, ...], shape: Shape, dtype: Any, reverse: bool, keep: bool
    ) -> None:
        self.sources, self.cell, self.names, self.shape, self.dtype = sources, cell, names, shape, dtype
        self.reverse, self.keep, self.count = reverse, keep, len(cell.states)
        self.whole, self.rest, self._held = _tape(sources, self.count, shape, dtype.itemsize, reverse, keep)
        self._weights = (shape[3] + shape[2]) * shape[4]
        self._kernel = compile_cache.compiled(sources.forward)
        self._one = (Part(0, shape[1]),)
        self._parts = dict[Part, tuple[Places, Piece]]()

    def _part(self, part: Part) -> tuple[Places, Piece]:
        """The table for these rows, and their piece of memory."""
        (count, n, d, hidden, width), item, keep = self.shape, self.dtype.itemsize, self.keep
        numbers, sizes = forward_room(self.sources, (count, part.rows, d, hidden, width), item)
        missing = {slot: width for name, slot in _SLOTS.items() if name not in self.names}
        room = Piece(item, missing | sizes | ({} if keep else {"G": width}), "Q" if missing else "")
        step, row = n * hidden, part.first * item
        held = [{k: at + row * (width if k == "G" else hidden) for k, at in piece.items()} for piece in self._held]
        numbers |= _numbers(self.shape, item, self.reverse) | {"R": part.rows, "keep": int(keep), "v0": step * keep}
        numbers |= {f"m{k}": step if keep or k == 0 else 0 for k in range(self.count)}
        own = [_SLOTS[name] for name in self.names if name in _SLOTS]
        vectors = [f"p{k}" for k in range(len(self.names) - len(own))]
        given = [{f"C{k}": row * hidden} for k in range(self.count)] + [{"A": row * d}]
        given += [{slot: 0} for slot in (*own, *vectors)]
        fresh = [(self.whole, held[0]), (self.rest, held[1]), (room, room.bytes)]
        begins = [self._begin(k) for k in range(self.count)]
        shapes = [(count, n, d), (width, d), (width, hidden), *[(width,)] * (len(own) - 2), *[(hidden,)] * len(vectors)]
        table, bits = self.sources.forward_table, 8 * item
        return places_of(table, numbers, fresh, given, 0, begins, shapes, bits, (n, hidden)), room

    def _begin(self, k: int) -> int:
        """Where the state before the first step lies, in its piece."""
        count, n, _, hidden, _ = self.shape
        start = self.rest.starts[f"M{k}"] if k else 0
        return start + ((count if self.keep or not k else 1) * n * hidden if self.reverse else 0)

    def states(self, done: Done, k: int, start: int) -> Array:
        """State k at T steps from the first (0) or the second (1) entry of its place on: before or after each step."""
        count, n, _, hidden, _ = self.shape
        step, length = n * hidden, count if self.keep or not k else 1
        at = start * step + (self.rest.starts[f"M{k}"] + (done.skips >> 8 & 255) if k else done.skips & 255)
        return done.memory[k > 0][at : at + length * step].reshape(length, n, hidden)

    def __call__(
        self, x: Array, arrays: tuple[Array, ...], start: Sequence[Array], finals: Sequence[Array]
    ) -> Done | None:
        """The pass from states `start`, (1, N, H) each, into `finals`; None where an array has another shape.

        Raises TypeError for another dtype, or what is not in C order. Masked arrays and their like are the caller's to
        keep out.
        """
        (count, n, *_), dtype = self.shape, self.dtype
        whole, rest = np.empty(self.whole.room, dtype), np.empty(self.rest.room, dtype)
        pairs = [a for pair in zip(finals, start, strict=True) for a in pair]
        those = parts(Rows.of((count, n), Steps()), count, n, self._weights) if self.large() else self._one
        tables, rooms, skips = [], [], 0
        for part in those:
            if part not in self._parts:
                self._parts[part] = self._part(part)
            its, piece = self._parts[part]
            table, room = np.empty(its.entries, np.int64), np.empty(piece.room, dtype)
            skips = its.fill(its.places, its.sizes, table, whole, rest, room, *pairs, x, *arrays)
            if skips < 0:
                return None
            tables.append(table)
            rooms.append(room)
        each(self._kernel, tables)
        return Done(self, x, arrays, (whole, rest), skips)

    def large(self) -> bool:
        """Whether several threads are to walk."""
        return several(*self.shape[:2], self._weights) > 0

    @cached_property
    def back(self) -> "Back":
        """The way back."""
        return Back(self)


@lru_cache(maxsize=1024)
def ahead(
    sources: Sources, cell: Cell, names: tuple[str, ...], shape: Shape, dtype: Any, reverse: bool, keep: bool
) -> Ahead:
    """The one for these."""
    return Ahead(sources, cell, names, shape, dtype, reverse, keep)


def forward(
    sources: Sources, cell: Cell, params: Params, x: Array, state: State, steps: Steps, reverse: bool, keep: bool
) -> tuple[Kept, State] | None:
    """The tape and the states after the last step; None where compiled.py is to walk."""
    u, start = params["weight_hh"], [s[None] for s in state]
    dtype, (width, hidden) = u.dtype, u.shape
    if steps.active is not None or steps.reset is not None or "weight_hr" in params or not x.size:
        return None
    start = [s if _plain(s, dtype) else np.array(s, dtype, order="C") for s in start]
    if not all(_plain(a, dtype) for a in (x, *params.values())):
        return None
    names = tuple(name for name in (*_SLOTS, *cell.vectors) if name in params)
    way = ahead(sources, cell, names, (*x.shape, hidden, width), dtype, reverse, keep)
    finals = np.empty((len(state), 1, x.shape[1], hidden), dtype)
    done = way(x, tuple(params[name] for name in names), start, list(finals))
    return None if done is None else (done.kept(), tuple(f[0] for f in finals))


# --- and its adjoint


class Back:
    """The adjoint of an `Ahead` that keeps a tape."""

    def __init__(self, way: Ahead) -> None:
        self.way, item = way, way.dtype.itemsize
        (count, n, d, hidden, width), vectors = way.shape, way.cell.vectors
        self._kernel, self._biases = compile_cache.compiled(way.sources.backward), len(way.names) - 2 - len(vectors)
        states, step = range(way.count), n * hidden
        _, _, held = _tape(way.sources, way.count, way.shape, item, way.reverse, True)
        numbers, sizes = back_room(way.sources, way.shape, item)
        sums = {"SI": width, "SH": width} | dict.fromkeys((f"D{k}" for k in states), step)
        sums |= dict.fromkeys((f"P{k}" for k in range(len(vectors))), step)
        self.dx = Piece(item, {"DX": count * n * d})
        self.sums = Piece(item, sums | {"GI": width * d, "GU": width * hidden}, "GI")
        self.room = Piece(item, {"nothing": hidden, "B": sizes.pop("B"), "O": sizes.pop("O")} | sizes, "Q")
        numbers |= _numbers(way.shape, item, way.reverse) | {"a0": step, "b0": hidden}
        nothing = {f"I{k}": self.room.bytes["nothing"] for k in states[1:]}
        fresh = [(self.dx, self.dx.bytes), (self.sums, self.sums.bytes | {"R0": self.sums.bytes["D0"]})]
        fresh += [(self.room, self.room.bytes | nothing)]
        names = ("I0", "A", "WI", "WH", *(f"p{k}" for k in range(len(vectors))))
        shapes = [(count, n, hidden), (count, n, d), (width, d), (width, hidden), *[(hidden,)] * len(vectors)]
        rest = [*held, *({name: 0} for name in names)]
        self.places = places_of(way.sources.backward_table, numbers, fresh, rest, 2, (), shapes, 8 * item)
        slots: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_ih": ("GI", (width, d)),
            "weight_hh": ("GU", (width, hidden)),
        }
        slots |= {"bias_ih": ("SI", (width,)), "bias_hh": ("SI" if way.sources.same else "SH", (width,))}
        slots |= {name: (f"P{k}", (n, hidden)) for k, name in enumerate(vectors)}
        self._slots = [slots[name] for name in way.names]

    def __call__(
        self, done: Done, dy: Array, dstate: Sequence[Array | None]
    ) -> tuple[Array, State, list[Array]] | None:
        """The adjoints of x, of the first states (1, N, H), of the parameters in the way's order; else as forward."""
        way, places, skip = self.way, self.places, self._biases
        (count, n, d, hidden, _), dtype = way.shape, way.dtype
        dx, sums, room = np.empty(self.dx.room, dtype), np.empty(self.sums.room, dtype), np.empty(self.room.room, dtype)
        table, (w, u, *others) = np.empty(places.entries, np.int64), done.arrays
        its = (*done.memory, dy, done.x, w, u, *others[skip:])
        skips = places.fill(places.places, places.sizes, table, dx, sums, room, *its)
        if skips < 0:
            return None
        at, view = skips >> 8 & 255, self.sums.view
        ds = tuple([view(sums, at, f"D{k}", (1, n, hidden)) for k in range(way.count)])
        for mine, given in zip(ds, dstate, strict=True):
            if given is not None:
                mine[...] = given
        self._kernel(table)
        grads = [view(sums, at, *slot) for slot in self._slots]
        if skip == 2 and way.sources.same:
            grads[3] = grads[2].copy()
        for k in range(2 + skip, len(grads)):
            grads[k] = np.add.reduce(grads[k], axis=0)
        return self.dx.view(dx, skips & 255, "DX", (count, n, d)), ds, grads


def backward(tape: Tape, dy: Array | None, dstate: Sequence[Array | None]) -> tuple[Array, State, Params] | None:
    """The adjoints of x, of the first states, of the parameters; None where compiled.py is to walk."""
    done: Done | None = tape.saved.done
    if done is None or dy is None or done.way.large() or not _plain(dy := contiguous(dy), done.way.dtype):
        return None
    found = done.way.back(done, dy, dstate)
    if found is None:
        return None
    grads = dict(zip(done.way.names, found[2], strict=True))
    return found[0], tuple(s[0] for s in found[1]), {name: grads[name] for name in tape.params}
