"""The scan on NumPy, with every array of the time loop made before it: no allocation inside.

The cell's programs come from trace.py. Beyond that, what is done otherwise than in the generic scan:

- the halves x W' and h U' of a gate are added for all gates in one call, and b_hh goes into the hoisted projection,
  wherever the cell only looks at their sum;
- an Elman layer's projection is written straight into the memory of its states;
- the factors of the adjoint that need no adjoint are computed for a block of steps at once;
- rows are sorted by length where that saves work, so that a step touches only the rows still running.

Steps are walked in blocks that share a row count; views for each step are made a block at a time, so that a million
steps cost no more Python objects than a thousand.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from xprnn.affine import affine_back, flat
from xprnn.arrays import Array, Params
from xprnn.cells import Cell
from xprnn.kernels.plan import Plan, plan_of
from xprnn.kernels.ragged import Rows

__all__ = ["find"]

_BLOCK_BYTES = 1 << 18  # the hoisted factors of a block should stay in the second-level cache
_BLOCK_STEPS = 512


def find(cell: Cell) -> Callable[..., Any] | None:
    """`forward` where the cell can be traced, else None."""
    return forward if cell.early == 0 and plan_of(cell) is not None else None


class _Kept(NamedTuple):
    """What backward needs, rows in the order in which they were walked."""

    x: Array
    rows: Rows
    before: tuple[Array, ...]  # (T, N, .) the states each step started from
    after: tuple[Array, ...]
    saved: tuple[Array, ...]
    raw: Array | None  # (T, N, H) h before the projection


def _blocks(rows: Rows, reverse: bool, step_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(first step, last step + 1, row count) in the order of the walk."""
    size = max(1, min(_BLOCK_STEPS, _BLOCK_BYTES // max(1, step_bytes)))
    runs = [(a, min(a + size, b), n) for start, b, n in rows.runs for a in range(start, b, size)]
    return iter(runs[::-1] if reverse else runs)


def _cut(a: Array, k: int, width: int) -> Array:
    return a[..., k * width : (k + 1) * width]


def _moving(names: Sequence[str], arrays: dict[str, Array], t0: int, t1: int, n: int, turned: bool) -> list[Any]:
    """For each name the views of its steps, in the order of the walk."""
    return [list(arrays[name][t0:t1, :n][::-1] if turned else arrays[name][t0:t1, :n]) for name in names]


def _project(cell: Cell, plan: Plan, params: Params, x: Array, out: Array | None) -> Array:
    """x W' + b_ih, and b_hh of the added gates, for all steps."""
    w, b, b_hh = params["weight_ih"], params.get("bias_ih"), params.get("bias_hh")
    if x.dtype.kind in "iu":
        ids = x.reshape(x.size)
        y = np.ascontiguousarray(w[:, ids].T) if x.size < w.shape[1] else w.T.take(ids, axis=0)
        if out is not None:
            out[...] = y.reshape(out.shape)
            y = out
    elif out is None:
        y = np.dot(flat(np, x), w.T)
    else:
        y = np.dot(flat(np, x), w.T, out=flat(np, out))
    y = y.reshape(*x.shape[:2], w.shape[0])
    if b is not None:
        cut = plan.added * (w.shape[0] // cell.gates)
        # The article's network has one bias, so bias_hh may be missing.
        y += b if b_hh is None else np.concatenate((b[:cut] + b_hh[:cut], b[cut:]))
    return y


def forward(
    cell: Cell, params: Params, x: Array, state: tuple[Array, ...], steps: Any, *, xp: Any, reverse: bool, keep: bool
) -> tuple[Array, tuple[Array, ...], Any]:
    """See xprnn.scan.forward, which is the specification."""
    plan = plan_of(cell)
    assert plan is not None
    rows = Rows.of(x.shape[:2], steps)
    x, initial = rows.sort(x, 1), tuple(rows.sort(s, 0) for s in state)
    count, n = x.shape[:2]
    hidden = params["weight_hh"].shape[0] // cell.gates
    dtype = initial[0].dtype
    memory = tuple(np.empty((count + 1, *s.shape), dtype) for s in initial)
    start, first, last = (1, count, 0) if reverse else (0, 0, count)
    for m, s in zip(memory, initial, strict=True):
        m[first] = s
    held = tuple(m[start : start + count] for m in memory)
    before = tuple(np.empty_like(b) for b in held) if rows.reset is not None else held
    after = tuple(m[1 - start : 1 - start + count] for m in memory)
    raw = np.empty((count, n, hidden), dtype) if "weight_hr" in params else None
    whole = cell.gates == 1 and plan.added == 1 and raw is None and initial[0].dtype == params["weight_ih"].dtype
    xg = _project(cell, plan, params, x, after[0] if whole else None)
    # Without a tape only what the program writes must exist: one step's room, seen at every step.
    room = (count, n, hidden) if keep else (1, n, hidden)
    own = {m: np.empty(room, dtype) for m in plan.saved if m[0] == "v"}
    if not keep:
        own = {m: as_strided(a, (count, n, hidden), (0, *a.strides[1:])) for m, a in own.items()}
    arrays = {f"s{k}": b for k, b in enumerate(before)} | {f"n{k}": a for k, a in enumerate(after)} | own
    arrays |= {f"x{k}": _cut(xg, k, hidden) for k in range(cell.gates)}
    if raw is not None:
        arrays["n0"] = raw
    _walk(cell, plan, params, rows, reverse, arrays, xg, held, initial, after)
    final = tuple(rows.unsort(m[last].copy(), 0) for m in memory)
    y = rows.unsort(after[0].view(), 1)
    if rows.active is not None:
        y = np.where(steps.active[..., None], y, 0)
    if not keep:
        return y, final, None
    if np.may_share_memory(y, after[0]):
        y.flags.writeable = False  # the tape lives in this memory
    return y, final, _tape(cell, params, x, state, steps, reverse, rows, before, after, tuple(arrays[m] for m in plan.saved), raw)


def _tape(
    cell: Cell, params: Params, x: Array, state: Any, steps: Any, reverse: bool, rows: Rows, before: Any, after: Any, saved: Any, raw: Any
) -> Any:
    from xprnn.scan import Tape

    kept = _Kept(x, rows, before, after, saved, raw)
    return Tape(
        backward, np, cell, params, x, state, steps, reverse, lambda: tuple(rows.unsort(a, 1) for a in after), kept, "NumPy in place"
    )


def _walk(
    cell: Cell, plan: Plan, params: Params, rows: Rows, reverse: bool, arrays: Any, xg: Array, held: Any, initial: Any, after: Any
) -> None:
    """The time loop."""
    ut = np.ascontiguousarray(params["weight_hh"].T)
    hidden = ut.shape[1] // cell.gates
    cut = plan.added * hidden
    b_late = params["bias_hh"][cut:] if "bias_hh" in params and cut < ut.shape[1] else None
    hr_t = np.ascontiguousarray(params["weight_hr"].T) if "weight_hr" in params else None
    product = np.empty((initial[0].shape[0], ut.shape[1]), ut.dtype)
    body, bound, dot, add = None, -1, np.dot, np.add
    for t0, t1, n in _blocks(rows, reverse, 1):
        u = product[:n]
        if n != bound:
            fixed = {f"{letter}{k}": _cut(u, k, hidden) for letter in "gh" for k in range(cell.gates)}
            fixed |= {f"p{k}": params[v] for k, v in enumerate(cell.vectors)}
            body, bound = plan.forward.bind(fixed, (n, hidden), ut.dtype), n
        assert body is not None
        moving = zip(*_moving(plan.forward.moving, arrays, t0, t1, n, reverse), strict=True)
        sums = _moving(["x"], {"x": xg[..., :cut]}, t0, t1, n, reverse)[0]
        into, late = u[:, :cut], u[:, cut:]
        order = range(t1 - 1, t0 - 1, -1) if reverse else range(t0, t1)
        for t, h, xa, args in zip(order, _moving(["s0"], arrays, t0, t1, n, reverse)[0], sums, moving, strict=False):
            if rows.reset is not None:
                _reset(rows.reset[t], initial, held, arrays, t)
            dot(h, ut, u)
            if cut:
                add(into, xa, into)
            if b_late is not None:
                add(late, b_late, late)
            body(*args)
            if hr_t is not None:
                dot(arrays["n0"][t, :n], hr_t, after[0][t, :n])
            if rows.active is not None:
                rows.carry(t, n, arrays, after)


def _reset(reset: Array, initial: Any, held: Any, arrays: Any, t: int) -> None:
    for k, (i, b) in enumerate(zip(initial, held, strict=True)):
        np.copyto(arrays[f"s{k}"][t], b[t])
        np.copyto(arrays[f"s{k}"][t], i, where=reset[:, None])


def backward(
    tape: Any, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None]
) -> tuple[Array | None, tuple[Array, ...], Params]:
    """See xprnn.scan.backward."""
    cell, params, kept, rows = tape.cell, tape.params, tape.saved, tape.saved.rows
    plan = plan_of(cell)
    assert plan is not None
    ds = [np.zeros(i.shape, i.dtype) if d is None else rows.sort(np.array(d, order="C"), 0) for i, d in zip(tape.initial, dstate, strict=True)]
    dinitial = [np.zeros_like(d) for d in ds]
    shape = (*kept.x.shape[:2], params["weight_hh"].shape[0])
    room = np.empty if rows.active is None else np.zeros  # a row that sits a step out sends nothing back
    dxg = room(shape, ds[0].dtype)
    dhg = dxg if plan.same else room(shape, ds[0].dtype)
    grads: dict[str, Array] = {}
    vectors = {v: room((*shape[:2], shape[2] // cell.gates), dxg.dtype) for v in cell.vectors}
    dprojected = np.zeros_like(kept.before[0]) if kept.raw is not None else None
    injected = [None if d is None else rows.sort(d, 1) for d in (*dstates, *[None] * (len(ds) - len(dstates)))]
    if dy is not None:
        dy = rows.sort(dy, 1)
        dy = dy if rows.active is None else np.where(rows.active[..., None], dy, 0)
        injected[0] = dy if injected[0] is None else injected[0] + dy
    _walk_back(tape, plan, ds, dinitial, injected, dxg, dhg, vectors, dprojected)
    dx, dw, db = affine_back(np, dxg, kept.x, params["weight_ih"])
    grads = {"weight_ih": dw, "weight_hh": np.dot(flat(np, dhg).T, flat(np, kept.before[0]))}
    if "bias_ih" in params:
        grads |= {"bias_ih": db, "bias_hh": db.copy() if plan.same else flat(np, dhg).sum(axis=0)}
    if kept.raw is not None:
        grads["weight_hr"] = np.dot(flat(np, dprojected).T, flat(np, kept.raw))
    grads |= {v: flat(np, d).sum(axis=0) for v, d in vectors.items()}
    dinitial = [rows.unsort(i + d, 0) for i, d in zip(dinitial, ds, strict=True)]
    return None if dx is None else rows.unsort(dx, 1), tuple(dinitial), {name: grads[name] for name in params}


def _walk_back(
    tape: Any, plan: Plan, ds: Any, dinitial: Any, injected: Any, dxg: Array, dhg: Array, vectors: Any, dprojected: Array | None
) -> None:
    """The time loop, in reverse order; leaves the adjoint of the states before the first step in `ds`."""
    cell, params, kept, rows = tape.cell, tape.params, tape.saved, tape.saved.rows
    n_all, hidden, dtype = dxg.shape[1], dxg.shape[2] // cell.gates, dxg.dtype
    u, hr = np.ascontiguousarray(params["weight_hh"]), params.get("weight_hr")
    d_raw = np.empty((n_all, hidden), dtype) if hr is not None else ds[0]
    through = np.empty_like(ds[0]) if plan.through else None
    arrays = {f"s{k}": b for k, b in enumerate(kept.before)} | {f"v{j}": a for j, a in enumerate(kept.saved)}
    arrays |= {f"X{k}": _cut(dxg, k, hidden) for k in range(cell.gates)}
    arrays |= {f"U{k}": _cut(dhg, k, hidden) for k in range(cell.gates)}
    arrays |= {f"P{k}": vectors[v] for k, v in enumerate(cell.vectors)}
    fixed_p = {f"p{k}": params[v] for k, v in enumerate(cell.vectors)}
    step_bytes = n_all * hidden * dtype.itemsize * max(1, len(plan.hoisted))
    bound, body = -1, None
    turned = not tape.reverse
    for t0, t1, n in _blocks(rows, turned, step_bytes):
        if n != bound:
            fixed = {f"d{k}": d[:n] for k, d in enumerate(ds)} | {f"e{k}": d[:n] for k, d in enumerate(ds)} | fixed_p
            fixed |= {"d0": d_raw[:n], "r0": None if through is None else through[:n]}
            body, bound = plan.back.bind(fixed, (n, hidden), dtype), n
        assert body is not None
        block = {name: a[t0:t1] for name, a in arrays.items()}
        block |= {name: np.empty((t1 - t0, n, hidden), dtype) for name in plan.hoisted}
        _hoisted(plan, fixed_p, block, n, (t1 - t0, n, hidden), dtype)
        moving = zip(*_moving(plan.back.moving, block, 0, t1 - t0, n, turned), strict=True)
        order = range(t1 - 1, t0 - 1, -1) if turned else range(t0, t1)
        sent = _moving(["U"], {"U": dhg}, t0, t1, n, turned)[0]
        for t, args, dh in zip(order, moving, sent, strict=True):
            for d, i in zip(ds, injected, strict=True):
                if i is not None:
                    np.add(d, i[t], d)
            old = [d[:n].copy() for d in ds] if rows.holes else []
            if hr is not None:
                dprojected[t, :n] = ds[0][:n]  # type: ignore[index] - made together with hr
                np.dot(ds[0][:n], hr, d_raw[:n])
            body(*args)
            np.dot(dh, u, ds[0][:n])
            if through is not None:
                np.add(ds[0][:n], through[:n], ds[0][:n])
            if rows.holes:
                _sit_out(~rows.active[t, :n, None], old, ds, n, t, (dxg, dhg, *vectors.values(), dprojected))
            if rows.reset is not None:
                for i, d in zip(dinitial, ds, strict=True):
                    i += np.where(rows.reset[t][:, None], d, 0)
                    np.copyto(d, 0, where=rows.reset[t][:, None])


def _hoisted(plan: Plan, fixed: Any, block: Any, n: int, shape: tuple[int, ...], dtype: Any) -> None:
    """The factors of the adjoint for all steps of a block."""
    if plan.hoisted:
        run = plan.before.bind({name: fixed[name] for name in plan.before.static}, shape, dtype)
        run(*(block[name][:, :n] for name in plan.before.moving))


def _sit_out(out: Array, old: Any, ds: Any, n: int, t: int, sent: Any) -> None:
    """Rows that sat step t out: their adjoints pass by it, and nothing goes into its sums."""
    for o, d in zip(old, ds, strict=True):
        np.copyto(d[:n], o, where=out)
    for a in sent:
        if a is not None:
            np.copyto(a[t, :n], 0, where=out)
