"""The scan on NumPy, with every array of the time loop made before it: no allocation inside.

The cell's programs come from trace.py. Beyond that, what is done otherwise than in the generic scan:

- the halves x W' and h U' of a gate are added for all gates in one call, and b_hh goes into the hoisted projection,
  wherever the cell only looks at their sum;
- an Elman layer's projection is written straight into the memory of its states;
- gates that are nothing but a tanh or sigmoid of their sum are squashed by one tanh for all of them;
- the factors of the adjoint that need no adjoint are computed for a block of steps at once;
- rows are sorted by length where that saves work, so that a step touches only the rows still running.

Steps are walked in blocks that share a row count; views for each step are made a block at a time, so that a million
steps cost no more Python objects than a thousand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xprnn.arrays.linear import affine_back, flat
from xprnn.arrays.namespace import Array, Params
from xprnn.cells.cell import Cell
from xprnn.kernels.memory import contiguous
from xprnn.kernels.row_order import Rows
from xprnn.kernels.tape import State, Steps, Tape
from xprnn.kernels.ufunc.plan import plan_of
from xprnn.kernels.ufunc.workspace import Squash, Walk, project, room, views

__all__ = ["NAME", "find", "why_not"]

NAME = "NumPy in place"


def find(cell: Cell) -> Callable[..., Any] | None:
    """`forward` where the cell can be traced, else None."""
    return None if why_not(cell) else forward


def why_not(cell: Cell) -> str:
    """Why `find` has nothing, or ""."""
    if cell.early:
        return "gates act before their product"
    return "its cell can't be traced" if plan_of(cell) is None else ""


# --- forward


def forward(
    cell: Cell, params: Params, x: Array, state: State, steps: Steps, *, home: State, xp: Any, reverse: bool, keep: bool
) -> tuple[Array, State, Tape | None]:
    """See xprnn.kernels.dispatch.forward, which is the specification."""
    plan, rows = plan_of(cell), Rows.of(x.shape[:2], steps)
    assert plan is not None
    given, x, initial = x, rows.sort(contiguous(x), 1), tuple(rows.sort(s, 0) for s in state)
    w = Walk(plan, cell, params, rows, reverse, tuple(rows.sort(s, 0) for s in home))
    count, n = x.shape[:2]
    memory = tuple(np.empty((count + 1, *s.shape), s.dtype) for s in initial)
    first, last = (count, 0) if reverse else (0, count)
    for m, s in zip(memory, initial, strict=True):
        m[first] = s
    held = tuple(m[1:] if reverse else m[:-1] for m in memory)
    after = tuple(m[:-1] if reverse else m[1:] for m in memory)
    _make_arrays(w, held, after, (count, n, w.hidden), keep)
    squash = Squash.of(w, initial[0].dtype)
    xg = project(w, squash, x, after[0] if cell.gates == plan.added == 1 and "weight_hr" not in params else None)
    if plan.squash:
        w.arrays |= w.gates("a", xg)  # the gates grow where their halves were
    _walk(w, squash, xg, held, after)
    final = tuple(rows.unsort(m[last].copy(), 0) for m in memory)
    y = rows.unsort(after[0].view(), 1)
    if rows.active is not None:
        y = np.where(np.asarray(steps.active)[..., None], y, 0)
    if not keep:
        return y, final, None
    if np.may_share_memory(y, after[0]):
        y.flags.writeable = False  # the tape lives in this memory

    def states() -> State:
        return rows.shown(after)

    kept = (w, x)
    tape = Tape(backward, np, cell, params, given, state, home, steps, reverse, states, kept, NAME)
    return y, final, tape


def _make_arrays(w: Walk, held: State, after: State, shape: tuple[int, ...], keep: bool) -> None:
    """The states before and after each step, and what the program saves."""
    before = held if w.rows.reset is None else tuple(np.empty_like(b) for b in held)
    w.arrays |= {f"s{k}": b for k, b in enumerate(before)} | {f"n{k}": a for k, a in enumerate(after)}
    w.arrays |= {name: room(shape, held[0].dtype, keep) for name in w.plan.saved if name[0] == "v"}
    if "weight_hr" in w.params:
        w.arrays["n0"] = room(shape, held[0].dtype, keep)
        if w.rows.active is not None:
            w.arrays["n0"][...] = 0  # a row that has ended meets only zeros in the weight's gradient, but not 0 * nan


def _walk(w: Walk, squash: Squash | None, xg: Array, held: State, after: State) -> None:
    """The time loop: fills the arrays of `w`."""
    u = w.params["weight_hh"]
    ut = np.ascontiguousarray((u if squash is None else squash.scaled(u)).T)
    together = _together(w, squash)
    cut, rows, program = w.plan.added * w.hidden, w.rows, w.plan.forward
    b_late = w.params["bias_hh"][cut:] if "bias_hh" in w.params and cut < ut.shape[1] else None
    hr_t = np.ascontiguousarray(w.params["weight_hr"].T) if "weight_hr" in w.params else None
    arrays = w.arrays | w.gates("x", xg)
    product = np.empty((xg.shape[1], ut.shape[1]), ut.dtype)
    body, bound, dot, add = None, -1, np.dot, np.add
    for t0, t1, n, order in w.blocks(w.reverse, 1):
        u = product[:n]
        if n != bound:
            body, bound = program.bind(w.gates("g", u) | w.gates("h", u) | w.vectors(), (n, w.hidden), ut.dtype), n
        assert body is not None
        into, late = u[:, :cut], u[:, cut:]
        moving = zip(*(views(arrays[name][t0:t1], n, w.reverse) for name in program.moving), strict=True)
        starts, sums = views(arrays["s0"][t0:t1], n, w.reverse), views(xg[t0:t1, :, :cut], n, w.reverse)
        for t, h, xa, args in zip(order, starts, sums, moving, strict=True):
            if rows.reset is not None:
                _reset(rows.reset[t, :, None], w, held, t)
            dot(h, ut, u)
            if together is not None:
                add(xa, into, xa)
                together(xa)
            elif cut:
                add(into, xa, into)
            if b_late is not None:
                add(late, b_late, late)
            body(*args)
            if hr_t is not None:
                dot(arrays["n0"][t, :n], hr_t, after[0][t, :n])
            if rows.active is not None:
                rows.carry(t, n, arrays, after)


def _together(w: Walk, squash: Squash | None) -> Callable[[Array], None] | None:
    """What turns the sums of the added gates into the gates, in place; None where the program does."""
    if not w.plan.squash:
        return None
    if squash is None:
        return lambda a: np.copyto(a, np.tanh(a))
    half, offset = squash

    def run(a: Array) -> None:
        np.tanh(a, a)
        np.multiply(a, half, a)
        np.add(a, offset, a)

    return run


def _reset(reset: Array, w: Walk, held: State, t: int) -> None:
    """Before step t: the states it starts from, those of the rows in `reset` back home."""
    for k, (home, b) in enumerate(zip(w.home, held, strict=True)):
        np.copyto(w.arrays[f"s{k}"][t], b[t])
        np.copyto(w.arrays[f"s{k}"][t], home, where=reset)


# --- and its adjoint


@dataclass
class _Sent:
    """What the walk back fills, (T, N, .) each: where the adjoints of a step's products and vectors go."""

    dxg: Array
    dhg: Array  # dxg itself, where the cell says so
    vectors: list[Array]
    projected: Array | None

    def named(self, w: Walk) -> dict[str, Array]:
        """Every array the adjoint's programs read or write, under its name there."""
        read = {name: a for name, a in w.arrays.items() if name[0] == "s"}
        read |= {f"v{j}": w.arrays[name] for j, name in enumerate(w.plan.saved)}
        return read | w.gates("X", self.dxg) | w.gates("U", self.dhg) | {f"P{k}": a for k, a in enumerate(self.vectors)}


def backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None]
) -> tuple[Array | None, State, Sequence[Array | None], Params]:
    """See xprnn.kernels.dispatch.backward."""
    w, x = tape.saved
    params, rows, plan, before = w.params, w.rows, w.plan, w.arrays["s0"]
    # C order whatever the caller's: the step's product is written into them.
    pairs = zip(tape.initial, dstate, strict=True)
    ds = [np.zeros(i.shape, i.dtype) if d is None else np.array(rows.sort(d, 0), order="C") for i, d in pairs]
    injected = [
        None if d is None else rows.sort(contiguous(d), 1) for d in (*dstates, *[None] * (len(ds) - len(dstates)))
    ]
    if dy is not None:
        dy = rows.sort(contiguous(dy), 1)
        dy = dy if rows.active is None else np.where(rows.active[..., None], dy, 0)
        injected[0] = dy if injected[0] is None else injected[0] + dy
    make = np.empty if rows.active is None else np.zeros  # a row that sits a step out sends nothing back
    shape, dtype = (*x.shape[:2], params["weight_hh"].shape[0]), ds[0].dtype
    dxg = make(shape, dtype)
    vectors = [make((*shape[:2], w.hidden), dtype) for _ in w.cell.vectors]
    projected = make(before.shape, dtype) if "weight_hr" in params else None
    sent = _Sent(dxg, dxg if plan.same else make(shape, dtype), vectors, projected)
    dhome = _walk_back(w, ds, injected, sent)
    dx, dw, db = affine_back(np, dxg, x, params["weight_ih"], sparse=tape.sparse, active=rows.active)
    grads = {"weight_ih": dw, "weight_hh": np.dot(flat(np, sent.dhg).T, flat(np, before))}
    if "bias_ih" in params:
        grads |= {"bias_ih": db, "bias_hh": db.copy() if plan.same else _sum_rows(sent.dhg)}
    if projected is not None:
        grads["weight_hr"] = np.dot(flat(np, projected).T, flat(np, w.arrays["n0"]))
    grads |= {name: _sum_rows(d) for name, d in zip(w.cell.vectors, vectors, strict=True)}
    back = [None if d is None else rows.unsort(d, 0) for d in (*ds, *dhome)]
    dx = None if dx is None else rows.unsort(dx, 1)
    return dx, tuple(back[: len(ds)]), back[len(ds) :], {name: grads[name] for name in params}


def _sum_rows(a: Array) -> Array:
    return np.dot(np.ones(a.shape[0] * a.shape[1], a.dtype), flat(np, a))


def _walk_back(w: Walk, ds: list[Array], injected: Sequence[Array | None], sent: _Sent) -> list[Array | None]:
    """The time loop, in reverse order: leaves the adjoint of the first states in `ds`, returns the home states'."""
    rows, plan, turned, dtype = w.rows, w.plan, not w.reverse, ds[0].dtype
    u, hr = np.ascontiguousarray(w.params["weight_hh"]), w.params.get("weight_hr")
    d_raw = np.empty((sent.dxg.shape[1], w.hidden), dtype) if hr is not None else ds[0]
    through = np.empty_like(ds[0]) if plan.through else None
    dhome: list[Array | None] = [None if rows.reset is None else np.zeros_like(d) for d in ds]
    arrays = sent.named(w)
    step_bytes = ds[0].shape[0] * w.hidden * dtype.itemsize * max(1, len(plan.hoisted))
    given = [(d, i) for d, i in zip(ds, injected, strict=True) if i is not None]
    body, bound, dot, add = None, -1, np.dot, np.add
    for t0, t1, n, order in w.blocks(turned, step_bytes):
        d0 = ds[0][:n]
        if n != bound:
            body, bound = _bind_back(w, ds, d_raw, through, n), n
        assert body is not None
        block = _hoist(w, {name: a[t0:t1] for name, a in arrays.items()}, (t1 - t0, n, w.hidden), dtype)
        moving = zip(*(views(block[name], n, turned) for name in plan.back.moving), strict=True)
        for t, dh, args in zip(order, views(sent.dhg[t0:t1], n, turned), moving, strict=True):
            for d, i in given:
                add(d, i[t], d)
            old = [d[:n].copy() for d in ds] if rows.holes else []
            if hr is not None and sent.projected is not None:
                sent.projected[t, :n] = d0
                dot(d0, hr, d_raw[:n])
            body(*args)
            dot(dh, u, d0)
            if through is not None:
                add(d0, through[:n], d0)
            if rows.holes:
                _sit_out(rows, ds, old, sent, t, n)
            if rows.reset is not None:
                _reset_back(rows.reset[t, :, None], ds, dhome)
    return dhome


def _sit_out(rows: Rows, ds: list[Array], old: list[Array], sent: _Sent, t: int, n: int) -> None:
    """Undo step t for the rows that sat it out: their adjoints pass by."""
    assert rows.active is not None
    out = ~rows.active[t, :n, None]
    for o, d in zip(old, ds, strict=True):
        np.copyto(d[:n], o, where=out)
    for a in (sent.dxg, sent.dhg, *sent.vectors, sent.projected):
        if a is not None:
            np.copyto(a[t, :n], 0, where=out)


def _bind_back(w: Walk, ds: list[Array], d_raw: Array, through: Array | None, n: int) -> Any:
    fixed = {f"d{k}": d[:n] for k, d in enumerate(ds)} | {f"e{k}": d[:n] for k, d in enumerate(ds)} | w.vectors()
    fixed |= {"d0": d_raw[:n]} | ({} if through is None else {"r0": through[:n]})
    return w.plan.back.bind(fixed, (n, w.hidden), ds[0].dtype)


def _hoist(w: Walk, block: dict[str, Array], shape: tuple[int, ...], dtype: Any) -> dict[str, Array]:
    """The block with the factors of the adjoint, k0, k1, ..., for all its steps."""
    program = w.plan.before
    if w.plan.hoisted:
        block |= {name: np.empty(shape, dtype) for name in w.plan.hoisted}
        run = program.bind({name: w.vectors()[name] for name in program.static}, shape, dtype)
        run(*(block[name][:, : shape[1]] for name in program.moving))
    return block


def _reset_back(reset: Array, ds: list[Array], dhome: list[Array | None]) -> None:
    """The adjoint of `_reset`: what reached the reset rows belongs to their home states."""
    for d, home in zip(ds, dhome, strict=True):
        if home is not None:
            np.add(home, d, home, where=reset)
        np.copyto(d, 0, where=reset)
