"""The compiled scan of the plain case: its table worked out once for its sizes, its memory in a few pieces.

A hundred steps of fifty units take twenty microseconds; so does asking for twenty arrays and for their addresses. Here
compiled.py's kernels get what they get there, where every row takes part in every step, x holds features and all lies
in C order (backward: and one thread walks). An entry of their table is a number, or lies so many bytes behind the start
of one of a call's pieces of memory, whatever these are: table = (1, start of each piece) . places.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays import Array, Params
from xprnn.cells import Cell
from xprnn.kernels import library
from xprnn.kernels.ragged import Rows
from xprnn.kernels.source import Sources
from xprnn.kernels.table import ALIGNED, Kept, back_room, forward_room
from xprnn.kernels.threads import Part, each, parts, several
from xprnn.kernels.walk import contiguous
from xprnn.tape import State, Steps, Tape

__all__ = ["backward", "forward"]

_SLOTS = {"weight_ih": "WI", "weight_hh": "WH", "bias_ih": "BI", "bias_hh": "BH"}
_ADDRESS = '''"""Written by xprnn: where an array lies; it may be deleted at any time."""


def kernel(a):
    return a.ctypes.data
'''
_ARRAYS = ";".join(f"int64(Array(float{bits}, {rank}, 'C', True))" for bits in (32, 64) for rank in (1, 2, 3))
Shape = tuple[int, int, int, int, int]  # T, N, D, H, W


class _Piece:
    """Places in one piece of memory, each on a line of the cache."""

    def __init__(self, item: int, sizes: dict[str, int]) -> None:
        self.line, self.size, self.starts = ALIGNED // item, 0, dict[str, int]()
        self.bytes = dict[str, int]()  # behind the start of the piece
        for name, size in sizes.items():
            self.starts[name], self.bytes[name] = self.size, self.size * item
            self.size += -(-size // self.line) * self.line

    def made(self, at: Callable[[Array], int], dtype: Any, zeros: str = "") -> tuple[Array, int]:
        """The memory, its places before the one that is named set to 0, and its address."""
        whole = np.empty(self.size + self.line, dtype)
        skip = -(start := at(whole)) % ALIGNED
        whole = whole[skip // whole.itemsize :]
        if zeros:
            whole[: self.starts[zeros]] = 0
        return whole, start + skip

    def view(self, memory: Array, name: str, shape: tuple[int, ...]) -> Array:
        """The array in a place."""
        start, size = self.starts[name], 1
        for n in shape:
            size *= n
        return memory[start : start + size].reshape(shape)


class _Plan(NamedTuple):
    """What the sizes of a pass decide: its pieces of memory, and places[i, j], what piece i is to entry j."""

    whole: _Piece  # y with the state before it, or dx: the caller may keep it alone
    rest: _Piece  # of the tape, or of the gradients
    scratch: _Piece
    places: Array
    wide: int = 0  # a row of the adjoint that comes through h U'


def _places(names: Sequence[str], numbers: dict[str, int], pieces: Sequence[dict[str, int]]) -> Array:
    places = np.zeros((1 + len(pieces), len(names)), np.int64)
    places[0] = [numbers.get(name, 0) for name in names]
    for i, piece in enumerate(pieces, 1):
        for name, start in piece.items():
            if name in names:
                j = names.index(name)
                assert not places[1:, j].any()
                places[0, j], places[i, j] = start, 1
    return places


def _addresses() -> Callable[[Array], int]:
    """NumPy takes ten times as long to say where an array lies."""
    return library.compiled(_ADDRESS, _ARRAYS)


def _numbers(shape: Shape, item: int, reverse: bool) -> dict[str, int]:
    count, n, d, hidden, width = shape
    turned = {"turned": int(reverse), "go": library.gemm(item).address}
    return turned | {"T": count, "N": n, "R": n, "D": d, "H": hidden, "W": width}


def _tape(
    sources: Sources, states: int, shape: Shape, item: int, reverse: bool, keep: bool
) -> tuple[_Piece, _Piece, list[dict[str, int]]]:
    """The pieces of a tape, and where they hold the states after and before each step: in the same place, one apart.

    Without `keep`, of what only backward asks for, there is room for one step.
    """
    count, n, _, hidden, width = shape
    size, length = n * hidden, count if keep else 1
    first, sizes = _Piece(item, {"M0": (count + 1) * size}), {f"M{k}": (length + 1) * size for k in range(1, states)}
    sizes |= {slot: length * size for slot in sources.slots if slot[0] == "V"}
    gates = keep and any(slot[0] == "X" for slot in sources.slots)
    rest = _Piece(item, sizes | ({"G": count * n * width} if gates else {}))
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


@lru_cache(maxsize=1024)
def _plan(
    sources: Sources,
    states: int,
    names: tuple[str, ...],
    shape: Shape,
    item: int,
    reverse: bool,
    keep: bool,
    part: Part,
) -> _Plan:
    count, n, d, hidden, width = shape
    first, rest, places = _tape(sources, states, shape, item, reverse, keep)
    numbers, sizes = forward_room(sources, (count, part.rows, d, hidden, width), item)
    missing = {slot: width for name, slot in _SLOTS.items() if name not in names}
    scratch = _Piece(item, missing | sizes | ({} if keep else {"G": width}))
    step, row = n * hidden, part.first * item
    places = [{name: at + row * (width if name == "G" else hidden) for name, at in piece.items()} for piece in places]
    numbers |= _numbers(shape, item, reverse) | {"R": part.rows, "keep": int(keep), "v0": step * keep}
    numbers |= {f"m{k}": step if keep or k == 0 else 0 for k in range(states)}
    pieces = [*places, scratch.bytes, {f"C{k}": k * step * item + row * hidden for k in range(states)}, {"A": row * d}]
    own = [_SLOTS[name] for name in names if name in _SLOTS]
    pieces += [{slot: 0} for slot in (*own, *(f"p{k}" for k in range(len(names) - len(own))))]
    return _Plan(first, rest, scratch, _places(sources.forward_table, numbers, pieces))


def forward(
    sources: Sources, cell: Cell, params: Params, x: Array, state: State, steps: Steps, reverse: bool, keep: bool
) -> tuple[Kept, State] | None:
    """The tape and the states after the last step; None where compiled.py is to walk."""
    u, arrays = params["weight_hh"], (x, *params.values())
    dtype, (width, hidden) = u.dtype, u.shape
    if steps.active is not None or steps.reset is not None or "weight_hr" in params:
        return None
    if not all(_plain(a, dtype) for a in arrays):
        return None
    (count, n, d), states = x.shape, len(state)
    if not count * n:
        return None
    names = tuple(name for name in (*_SLOTS, *cell.vectors) if name in params)
    rows, shape = Rows.of((count, n), steps), (count, n, d, hidden, width)
    those = parts(rows, count, n, (hidden + d) * width)
    plans = [_plan(sources, states, names, shape, u.itemsize, reverse, keep, part) for part in those]
    at, plan, tape = _addresses(), plans[0], plans[0].rest
    whole, whole_at = plan.whole.made(at, dtype)
    memory, tape_at = tape.made(at, dtype)
    running, first = np.empty((states, n, hidden), dtype), -1 if reverse else 0
    kept = [plan.whole.view(whole, "M0", (count + 1, n, hidden))]
    kept += [tape.view(memory, f"M{k}", ((count if keep else 1) + 1, n, hidden)) for k in range(1, states)]
    for s, r, m in zip(state, running, kept, strict=True):
        r[...] = s
        m[first] = s
    given = tuple(map(at, (running, x, *(params[name] for name in names))))
    zeros = "" if "bias_ih" in params and "bias_hh" in params else "Q"
    rooms = [one.scratch.made(at, dtype, zeros) for one in plans]
    starts = [(whole_at, tape_at, room_at, *given) for _, room_at in rooms]
    tables = [_table(one, start) for one, start in zip(plans, starts, strict=True)]
    each(library.compiled(sources.forward), tables)
    before, after = tuple(m[:-1] for m in kept), tuple(m[1:] for m in kept)
    gates = tape.view(memory, "G", (count, n, width)) if keep and "G" in tape.starts else None
    spare = {slot: tape.view(memory, slot, (count, n, hidden)) for slot in tape.starts if keep and slot[0] == "V"}
    ends = (after, before) if reverse else (before, after)
    return Kept(sources, rows, x, gates, spare, *ends, (whole, memory)), tuple(running)


def _table(plan: _Plan, starts: tuple[int, ...]) -> Array:
    return np.array((1, *starts), np.int64).dot(plan.places)


# --- and its adjoint


@lru_cache(maxsize=1024)
def _back_plan(sources: Sources, states: int, vectors: int, shape: Shape, item: int, reverse: bool) -> _Plan:
    count, n, d, hidden, width = shape
    row, step = hidden, n * hidden
    _, _, places = _tape(sources, states, shape, item, reverse, True)
    numbers, sizes = back_room(sources, shape, item)
    scratch = _Piece(item, {"nothing": hidden, "B": sizes.pop("B"), "O": sizes.pop("O")} | sizes)
    sums = {"SI": width, "SH": width} | dict.fromkeys((f"D{k}" for k in range(states)), step)
    sums |= dict.fromkeys((f"P{k}" for k in range(vectors)), step)
    dx, grads = _Piece(item, {"DX": count * n * d}), _Piece(item, sums | {"GI": width * d, "GU": width * hidden})
    numbers |= _numbers(shape, item, reverse) | {"a0": step, "b0": row}
    nothing = {f"I{k}": scratch.bytes["nothing"] for k in range(1, states)}
    pieces = [dx.bytes, grads.bytes | {"R0": grads.bytes["D0"]}, scratch.bytes | nothing, *places]
    pieces += [{name: 0} for name in ("I0", "A", "WI", "WH", *(f"p{k}" for k in range(vectors)))]
    return _Plan(dx, grads, scratch, _places(sources.backward_table, numbers, pieces), numbers["Hz"])


def backward(tape: Tape, dy: Array | None, dstate: Sequence[Array | None]) -> tuple[Array, State, Params] | None:
    """The adjoints of x, of the first states, of the parameters; None where compiled.py is to walk."""
    kept, params, cell = tape.saved, tape.params, tape.cell
    w, u = params["weight_ih"], params["weight_hh"]
    if kept.memory is None or dy is None or not _plain(dy := contiguous(dy), u.dtype):
        return None
    (count, n, d), (width, hidden), sources = kept.x.shape, u.shape, kept.sources
    if several(count, n, (hidden + d) * width):
        return None
    states, vectors, shape = len(dstate), len(cell.vectors), (count, n, d, hidden, width)
    plan = _back_plan(sources, states, vectors, shape, u.itemsize, tape.reverse)
    result, scratch = plan.rest, plan.scratch
    at = _addresses()
    dx, dx_at = plan.whole.made(at, u.dtype)
    memory, result_at = result.made(at, u.dtype, "GI")
    room, room_at = scratch.made(at, u.dtype, "Q")
    ds = tuple(result.view(memory, f"D{k}", (n, hidden)) for k in range(states))
    for mine, given in zip(ds, dstate, strict=True):
        if given is not None:
            mine[...] = given
    pieces = (*kept.memory, dy, kept.x, w, u, *(params[name] for name in cell.vectors))
    library.compiled(sources.backward)(_table(plan, (dx_at, result_at, room_at, *map(at, pieces))))
    ds[0][...] += scratch.view(room, "B", (n, plan.wide))[:, :hidden]
    grads = {
        "weight_ih": result.view(memory, "GI", (width, d)),
        "weight_hh": result.view(memory, "GU", (width, hidden)),
    }
    grads["bias_ih"] = result.view(memory, "SI", (width,))
    grads["bias_hh"] = grads["bias_ih"].copy() if sources.same else result.view(memory, "SH", (width,))
    for k, name in enumerate(cell.vectors):
        grads[name] = np.add.reduce(result.view(memory, f"P{k}", (n, hidden)), axis=0)
    return plan.whole.view(dx, "DX", (count, n, d)), ds, {name: grads[name] for name in params}
