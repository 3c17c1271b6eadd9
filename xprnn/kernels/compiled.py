"""The scan with its time loop compiled by numba: what is prepared before the loop, and what is done after it.

One matrix product before the loop and those of the weight gradients after it stay NumPy's; between them source.py's
kernel walks all steps without coming back to Python.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from xprnn.affine import affine_back, flat
from xprnn.arrays import Array, Params
from xprnn.cells import Cell
from xprnn.kernels import library
from xprnn.kernels.ragged import Rows
from xprnn.kernels.source import Sources, sources_of
from xprnn.kernels.table import Kept, address, call, common_entries, packed_panels, room_for
from xprnn.kernels.walk import look_up
from xprnn.tape import State, Steps, Tape

__all__ = ["NAME", "find", "why_not"]

NAME = "compiled by numba"
_Made = tuple[Kept, dict[str, int]]
_BLOCK_BYTES = 1 << 22  # of the projection
_BLOCK_ROWS = 1024  # at least: a product of fewer rows is slow


def find(cell: Cell, params: Params) -> Callable[..., Any] | None:
    """`forward` where the cell can be compiled and numba is there, else None."""
    if why_not(cell, params):
        return None
    sources = sources_of(cell, _bits(params))
    assert sources is not None
    return partial(_forward, sources)


def _bits(params: Params) -> int:
    return 8 * int(params["weight_hh"].dtype.itemsize)


def why_not(cell: Cell, params: Params) -> str:
    """Why `find` has nothing, or ""."""
    if (dtype := params["weight_hh"].dtype) not in (np.float32, np.float64):
        return f"{dtype} is neither float32 nor float64"
    if "weight_hr" in params:
        return "h is projected by weight_hr"
    if not library.available():
        return 'numba is not installed: pip install "xprnn[fast]"'
    sources = sources_of(cell, _bits(params))
    if sources is None:
        return "gates act before their product" if cell.early else "its cell can't be printed as scalar code"
    return "" if library.works(sources.forward) else "numba can't compile its cell"


# --- forward


def _forward(
    sources: Sources,
    cell: Cell,
    params: Params,
    x: Array,
    state: State,
    steps: Steps,
    *,
    home: State,
    xp: Any,
    reverse: bool,
    keep: bool,
) -> tuple[Array, State, Tape | None]:
    """See xprnn.scan.forward, which is the specification."""
    rows = Rows.of(x.shape[:2], steps)
    kept, table = _prepare(sources, cell, params, rows.sort(x, 1), rows, reverse, keep)
    ends = tuple(rows.sort(s, 0) for s in state), tuple(rows.sort(s, 0) for s in home)
    final = tuple(rows.unsort(s, 0) for s in _run(kept, table, cell, params, ends, reverse, keep))
    after = kept.after
    y = rows.unsort(after[0].view(), 1)
    if not keep:
        return y, final, None
    if rows.active is not None:
        y = np.where(np.asarray(steps.active)[..., None], y, 0)
    else:
        y.flags.writeable = False  # the tape lives in this memory

    def states() -> State:
        return rows.shown(after)

    tape = Tape(backward, np, cell, params, x, state, home, steps, reverse, states, kept, NAME)
    return y, final, tape


def _prepare(sources: Sources, cell: Cell, params: Params, x: Array, rows: Rows, reverse: bool, keep: bool) -> _Made:
    """All arrays with a step axis, of one step where no tape is kept; the projection done."""
    u = params["weight_hh"]
    (count, n), hidden = x.shape[:2], u.shape[0] // cell.gates
    length = count if keep else 1
    step = n * hidden * u.itemsize
    table = {"v0": n * hidden if keep else 0}
    before, after = [], []
    for k in range(len(cell.states)):
        # With the state before the first step in line, the recurrent weight's gradient is one product.
        memory = np.empty(((count if k == 0 else length) + 1, n, hidden), u.dtype)
        before.append(memory[1:] if reverse else memory[:-1])
        after.append(memory[:-1] if reverse else memory[1:])
        at = address(memory)
        table |= {f"M{k}": at + (0 if reverse else step), f"S{k}": at + (step if reverse else 0)}
        table[f"m{k}"] = n * hidden if keep or k == 0 else 0
    if rows.reset is not None:
        before = [np.empty((length, n, hidden), u.dtype) for _ in before]
        table |= {f"S{k}": address(a) for k, a in enumerate(before)}
    spare = {slot: np.empty((length, n, hidden), u.dtype) for slot in sources.slots if slot[0] == "V"}
    table |= {slot: address(a) for slot, a in spare.items()}
    if x.dtype.kind in "iu":
        gates = look_up(params["weight_ih"], x.reshape(x.size)).reshape(count, n, u.shape[0])
    elif cell.gates == sources.added == 1 and sources.slots in ((), ("M0",)):
        gates = after[0]  # an Elman layer's projection is written where its states will be
    else:
        gates = np.empty((count if keep else min(count, _block(x, u)), n, u.shape[0]), u.dtype)
    table["X"] = address(gates)
    return Kept(sources, rows, x, gates, spare, tuple(before), tuple(after)), table


def _block(x: Array, u: Array) -> int:
    """How many steps are projected at a time: so few that the kernel finds them in the cache."""
    count, n = int(x.shape[0]), max(1, int(x.shape[1]))
    at_once = max(_BLOCK_BYTES // (n * u.shape[0] * u.itemsize), -(-_BLOCK_ROWS // n))
    return count if x.dtype.kind in "iu" else int(at_once)


def _run(
    kept: Kept, table: dict[str, int], cell: Cell, params: Params, ends: tuple[State, State], reverse: bool, keep: bool
) -> tuple[Array, ...]:
    """The time loop: fills what is kept and returns the states after the last step."""
    u, rows, (initial, home) = params["weight_hh"], kept.rows, ends
    (count, n), width = kept.x.shape[:2], u.shape[0]
    hidden = width // cell.gates
    common, alive = common_entries(rows, (count, n, hidden, width))
    packed, padded = packed_panels(u.T)
    sizes = {"B": n * padded, "K": width, "L": width} | {f"C{k}": n * hidden for k in range(len(initial))}
    room, addresses = room_for(u.dtype, sizes)
    cut = kept.sources.added * hidden
    _biases(params, cut, room)
    running = tuple(room[f"C{k}"].reshape(n, hidden) for k in range(len(initial)))
    for k, (c, s) in enumerate(zip(running, initial, strict=True)):
        c[...] = s
        if keep and rows.reset is None and count:
            kept.before[k][-1 if reverse else 0] = s
    vectors = [np.ascontiguousarray(params[name]) for name in cell.vectors]
    homes = [np.ascontiguousarray(s) for s in home] if rows.reset is not None else []
    here = {f"p{k}": address(a) for k, a in enumerate(vectors)} | {f"E{k}": address(a) for k, a in enumerate(homes)}
    here |= {"turned": int(reverse), "blank": int(not keep), "U": address(packed), "Z": padded}
    _run_blocks(kept, params["weight_ih"], table | common | addresses | here)
    del alive  # until here the kernel needed it
    return running


def _run_blocks(kept: Kept, w: Array, table: Mapping[str, int]) -> None:
    """Project some steps, walk them, and go on with the next ones."""
    (count, n), gates, item = kept.x.shape[:2], kept.gates, w.itemsize
    size, whole = max(1, _block(kept.x, w)), gates.shape[0] == count
    starts = range(0, count, size)
    for t0 in reversed(starts) if table["turned"] else starts:
        t1 = min(t0 + size, count)
        if kept.x.dtype.kind not in "iu":
            to = gates[t0:t1] if whole else gates[: t1 - t0]
            np.dot(flat(np, kept.x[t0:t1]), w.T, out=flat(np, to))
        moved = {"T": t1 - t0, "X": table["X"] + (t0 * n * w.shape[0] * item if whole else 0)}
        if t0:
            for name, at in table.items():
                if name[0] == "M":
                    moved[name] = at + t0 * table["m" + name[1:]] * item
                elif name[0] in "SV":
                    moved[name] = at + t0 * table["v0"] * item
            for name, step in (("counts", 8), ("active", n), ("reset", n)):
                moved[name] = table.get(name, 0) + t0 * step
        call(kept.sources.forward, kept.sources.forward_table, {**table, **moved})


def _biases(params: Params, cut: int, room: Mapping[str, Array]) -> None:
    """b_ih, plus b_hh up to `cut`, into K; the rest of b_hh into L."""
    first, second = room["K"], room["L"]
    first[...] = params.get("bias_ih", 0)
    b_hh = params.get("bias_hh")
    if b_hh is not None:
        np.add(first[:cut], b_hh[:cut], first[:cut])
    if cut < second.size:
        second[cut:] = 0 if b_hh is None else b_hh[cut:]


# --- and its adjoint


def backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None]
) -> tuple[Array | None, State, Sequence[Array | None], Params]:
    """See xprnn.scan.backward."""
    kept: Kept = tape.saved
    params, rows, cell, x = tape.params, kept.rows, tape.cell, kept.x
    injected = [None if d is None else rows.sort(d, 1) for d in dstates] or [None] * len(dstate)
    if dy is not None:
        dy = rows.sort(dy, 1)
        dy = dy if rows.active is None else np.where(rows.active[..., None], dy, 0)
        injected[0] = dy if injected[0] is None else injected[0] + dy
    make = np.empty if rows.active is None else np.zeros  # a row that sits a step out sends nothing back
    dxg = make(kept.gates.shape, kept.gates.dtype)
    dhg = dxg if kept.sources.same else make(dxg.shape, dxg.dtype)
    ds, dhome, dp = _run_back(tape, [None if d is None else rows.sort(d, 0) for d in dstate], injected, (dxg, dhg))
    flat_x, flat_h = flat(np, dxg), flat(np, dhg)
    if x.dtype.kind in "iu":
        dx, dw, _ = affine_back(np, dxg, x, params["weight_ih"])
    else:
        dx = rows.unsort(np.dot(flat_x, params["weight_ih"]).reshape(x.shape), 1)
        dw = np.dot(flat_x.T, flat(np, x))
    grads = {"weight_ih": dw, "weight_hh": np.dot(flat_h.T, flat(np, kept.before[0]))}
    if "bias_ih" in params:
        db = np.add.reduce(flat_x, axis=0)
        grads |= {"bias_ih": db, "bias_hh": db.copy() if dhg is dxg else np.add.reduce(flat_h, axis=0)}
    grads |= dict(zip(cell.vectors, dp, strict=True))
    home = [None if d is None else rows.unsort(d, 0) for d in dhome]
    return dx, tuple(rows.unsort(d, 0) for d in ds), home, {name: grads[name] for name in params}


def _run_back(
    tape: Tape, dstate: Sequence[Array | None], injected: Sequence[Array | None], sent: tuple[Array, Array]
) -> tuple[list[Array], list[Array | None], list[Array]]:
    """The time loop, in reverse order: the adjoints of the first states, of the home states, of the vectors."""
    kept: Kept = tape.saved
    (count, n, width), cell, dtype = sent[0].shape, tape.cell, sent[0].dtype
    hidden, (packed, padded) = width // cell.gates, packed_panels(tape.params["weight_hh"])
    common, alive = common_entries(kept.rows, (count, n, hidden, width))
    states, vectors = range(len(dstate)), range(len(cell.vectors))
    names = [*(f"D{k}" for k in states), *(f"E{k}" for k in states), *(f"P{k}" for k in vectors)]
    room, here = room_for(dtype, {"nothing": hidden, "B": n * padded} | dict.fromkeys(names, n * hidden))
    for name, a in room.items():
        if name[0] != "D":
            a.fill(0)
    for k, d in enumerate(dstate):
        room[f"D{k}"].reshape(n, hidden)[...] = 0 if d is None else d
    p = [np.ascontiguousarray(tape.params[name]) for name in cell.vectors]
    here |= {"X": address(sent[0]), "U": address(packed), "Z": padded, "R": here["D0"], "G": address(kept.gates)}
    here |= {f"p{k}": address(a) for k, a in enumerate(p)} | {"turned": int(tape.reverse)}
    here["Y"] = here["X"] if sent[1] is sent[0] else address(sent[1])
    here |= {slot: address(a) for slot, a in kept.spare.items()}
    for k, d in enumerate(injected):
        here |= {f"M{k}": address(kept.after[k]), f"S{k}": address(kept.before[k])}
        here[f"I{k}"] = here["nothing"]
        if d is not None:
            alive.append(_in_rows(d, dtype))
            steps, rows = (stride // dtype.itemsize for stride in alive[-1].strides[:2])
            here |= {f"I{k}": address(alive[-1]), f"a{k}": steps, f"b{k}": rows}
    call(kept.sources.backward, kept.sources.backward_table, common | here)
    shaped = {name: room[name].reshape(n, hidden) for name in names}
    shaped["D0"] += room["B"].reshape(n, padded)[:, :hidden]
    home: list[Array | None] = [None if kept.rows.reset is None else shaped[f"E{k}"] for k in states]
    return [shaped[f"D{k}"] for k in states], home, [np.add.reduce(shaped[f"P{k}"], axis=0) for k in vectors]


def _in_rows(d: Array, dtype: Any) -> Array:
    """`d`, whose rows the kernel can read where they are, or else a copy."""
    item = dtype.itemsize
    whole = d.dtype == dtype and d.strides[-1] == item and not (d.strides[0] % item or d.strides[1] % item)
    return d if whole else np.ascontiguousarray(d, dtype)
