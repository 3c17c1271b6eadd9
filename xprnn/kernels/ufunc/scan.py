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

from xprnn.arrays.linear import flatten_leading, linear_backward
from xprnn.arrays.namespace import Array, Params
from xprnn.cells.cell import Cell
from xprnn.kernels.memory import contiguous
from xprnn.kernels.row_order import RowOrder
from xprnn.kernels.tape import State, StepMask, Tape
from xprnn.kernels.ufunc.plan import ufunc_plan
from xprnn.kernels.ufunc.workspace import FusedGateActivation, ScanWorkspace, project_inputs, step_buffer, step_views

__all__ = ["NAME", "find_kernel", "unsupported_reason"]

NAME = "NumPy in place"


def find_kernel(cell: Cell) -> Callable[..., Any] | None:
    """`forward` where the cell can be traced, else None."""
    return None if unsupported_reason(cell) else forward


def unsupported_reason(cell: Cell) -> str:
    """Why `find` has nothing, or ""."""
    if cell.pregates:
        return "gates act before their product"
    return "its cell can't be traced" if ufunc_plan(cell) is None else ""


# --- forward


def forward(
    cell: Cell,
    params: Params,
    x: Array,
    state: State,
    step_mask: StepMask,
    *,
    reset_state: State,
    xp: Any,
    reverse: bool,
    record_tape: bool,
) -> tuple[Array, State, Tape | None]:
    """See xprnn.kernels.dispatch.forward, which is the specification."""
    plan, rows = ufunc_plan(cell), RowOrder.from_step_mask(x.shape[:2], step_mask)
    assert plan is not None
    given, x, initial = x, rows.sort(contiguous(x), 1), tuple(rows.sort(s, 0) for s in state)
    w = ScanWorkspace(plan, cell, params, rows, reverse, tuple(rows.sort(s, 0) for s in reset_state))
    count, n = x.shape[:2]
    memory = tuple(np.empty((count + 1, *s.shape), s.dtype) for s in initial)
    first, last = (count, 0) if reverse else (0, count)
    for m, s in zip(memory, initial, strict=True):
        m[first] = s
    held = tuple(m[1:] if reverse else m[:-1] for m in memory)
    after = tuple(m[:-1] if reverse else m[1:] for m in memory)
    _allocate_arrays(w, held, after, (count, n, w.hidden_size), record_tape)
    squash = FusedGateActivation.from_workspace(w, initial[0].dtype)
    xg = project_inputs(
        w, squash, x, after[0] if cell.gates == plan.summed_gates == 1 and "weight_hr" not in params else None
    )
    if plan.gate_activations:
        w.arrays |= w.gate_views("a", xg)  # the gates grow where their halves were
    _forward_time_loop(w, squash, xg, held, after)
    final = tuple(rows.unsort(m[last].copy(), 0) for m in memory)
    y = rows.unsort(after[0].view(), 1)
    if rows.active is not None:
        y = np.where(np.asarray(step_mask.active)[..., None], y, 0)
    if not record_tape:
        return y, final, None
    if np.may_share_memory(y, after[0]):
        y.flags.writeable = False  # the tape lives in this memory

    def states() -> State:
        return rows.original_order(after)

    kept = (w, x)
    tape = Tape(backward, np, cell, params, given, state, reset_state, step_mask, reverse, states, kept, NAME)
    return y, final, tape


def _allocate_arrays(w: ScanWorkspace, held: State, after: State, shape: tuple[int, ...], keep: bool) -> None:
    """The states before and after each step, and what the program saves."""
    before = held if w.row_order.reset is None else tuple(np.empty_like(b) for b in held)
    w.arrays |= {f"s{k}": b for k, b in enumerate(before)} | {f"n{k}": a for k, a in enumerate(after)}
    w.arrays |= {name: step_buffer(shape, held[0].dtype, keep) for name in w.plan.saved_names if name[0] == "v"}
    if "weight_hr" in w.params:
        w.arrays["n0"] = step_buffer(shape, held[0].dtype, keep)
        if w.row_order.active is not None:
            w.arrays["n0"][...] = 0  # a row that has ended meets only zeros in the weight's gradient, but not 0 * nan


def _forward_time_loop(
    w: ScanWorkspace, squash: FusedGateActivation | None, xg: Array, held: State, after: State
) -> None:
    """The time loop: fills the arrays of `w`."""
    u = w.params["weight_hh"]
    ut = np.ascontiguousarray((u if squash is None else squash.scale_rows(u)).T)
    together = _gate_activation(w, squash)
    cut, rows, program = w.plan.summed_gates * w.hidden_size, w.row_order, w.plan.forward_program
    b_late = w.params["bias_hh"][cut:] if "bias_hh" in w.params and cut < ut.shape[1] else None
    hr_t = np.ascontiguousarray(w.params["weight_hr"].T) if "weight_hr" in w.params else None
    arrays = w.arrays | w.gate_views("x", xg)
    product = np.empty((xg.shape[1], ut.shape[1]), ut.dtype)
    body, bound, dot, add = None, -1, np.dot, np.add
    for t0, t1, n, order in w.step_blocks(w.reverse, 1):
        u = product[:n]
        if n != bound:
            body, bound = (
                program.bind(w.gate_views("g", u) | w.gate_views("h", u) | w.vectors(), (n, w.hidden_size), ut.dtype),
                n,
            )
        assert body is not None
        into, late = u[:, :cut], u[:, cut:]
        moving = zip(*(step_views(arrays[name][t0:t1], n, w.reverse) for name in program.call_args), strict=True)
        starts, sums = step_views(arrays["s0"][t0:t1], n, w.reverse), step_views(xg[t0:t1, :, :cut], n, w.reverse)
        for t, h, xa, args in zip(order, starts, sums, moving, strict=True):
            if rows.reset is not None:
                _apply_reset(rows.reset[t, :, None], w, held, t)
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
                rows.carry_inactive(t, n, arrays, after)


def _gate_activation(w: ScanWorkspace, squash: FusedGateActivation | None) -> Callable[[Array], None] | None:
    """What turns the sums of the added gates into the gates, in place; None where the program does."""
    if not w.plan.gate_activations:
        return None
    if squash is None:
        return lambda a: np.copyto(a, np.tanh(a))
    half, offset = squash

    def run(a: Array) -> None:
        np.tanh(a, a)
        np.multiply(a, half, a)
        np.add(a, offset, a)

    return run


def _apply_reset(reset: Array, w: ScanWorkspace, held: State, t: int) -> None:
    """Before step t: the states it starts from, those of the rows in `reset` back home."""
    for k, (home, b) in enumerate(zip(w.reset_state, held, strict=True)):
        np.copyto(w.arrays[f"s{k}"][t], b[t])
        np.copyto(w.arrays[f"s{k}"][t], home, where=reset)


# --- and its adjoint


@dataclass
class _GradientBuffers:
    """What the walk back fills, (T, N, .) each: where the adjoints of a step's products and vectors go."""

    dxg: Array
    dhg: Array  # dxg itself, where the cell says so
    dvectors: list[Array]
    dh_projected: Array | None

    def program_arrays(self, w: ScanWorkspace) -> dict[str, Array]:
        """Every array the adjoint's programs read or write, under its name there."""
        read = {name: a for name, a in w.arrays.items() if name[0] == "s"}
        read |= {f"v{j}": w.arrays[name] for j, name in enumerate(w.plan.saved_names)}
        return (
            read
            | w.gate_views("X", self.dxg)
            | w.gate_views("U", self.dhg)
            | {f"P{k}": a for k, a in enumerate(self.dvectors)}
        )


def backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None]
) -> tuple[Array | None, State, Sequence[Array | None], Params]:
    """See xprnn.kernels.dispatch.backward."""
    w, x = tape.saved
    params, rows, plan, before = w.params, w.row_order, w.plan, w.arrays["s0"]
    # C order whatever the caller's: the step's product is written into them.
    pairs = zip(tape.initial_state, dstate, strict=True)
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
    vectors = [make((*shape[:2], w.hidden_size), dtype) for _ in w.cell.vectors]
    projected = make(before.shape, dtype) if "weight_hr" in params else None
    sent = _GradientBuffers(dxg, dxg if plan.dx_is_dh else make(shape, dtype), vectors, projected)
    dhome = _backward_time_loop(w, ds, injected, sent)
    dx, dw, db = linear_backward(np, dxg, x, params["weight_ih"], sparse=tape.sparse, active=rows.active)
    grads = {"weight_ih": dw, "weight_hh": np.dot(flatten_leading(np, sent.dhg).T, flatten_leading(np, before))}
    if "bias_ih" in params:
        grads |= {"bias_ih": db, "bias_hh": db.copy() if plan.dx_is_dh else _sum_rows(sent.dhg)}
    if projected is not None:
        grads["weight_hr"] = np.dot(flatten_leading(np, projected).T, flatten_leading(np, w.arrays["n0"]))
    grads |= {name: _sum_rows(d) for name, d in zip(w.cell.vectors, vectors, strict=True)}
    back = [None if d is None else rows.unsort(d, 0) for d in (*ds, *dhome)]
    dx = None if dx is None else rows.unsort(dx, 1)
    return dx, tuple(back[: len(ds)]), back[len(ds) :], {name: grads[name] for name in params}


def _sum_rows(a: Array) -> Array:
    return np.dot(np.ones(a.shape[0] * a.shape[1], a.dtype), flatten_leading(np, a))


def _backward_time_loop(
    w: ScanWorkspace, ds: list[Array], injected: Sequence[Array | None], sent: _GradientBuffers
) -> list[Array | None]:
    """The time loop, in reverse order: leaves the adjoint of the first states in `ds`, returns the home states'."""
    rows, plan, turned, dtype = w.row_order, w.plan, not w.reverse, ds[0].dtype
    u, hr = np.ascontiguousarray(w.params["weight_hh"]), w.params.get("weight_hr")
    d_raw = np.empty((sent.dxg.shape[1], w.hidden_size), dtype) if hr is not None else ds[0]
    through = np.empty_like(ds[0]) if plan.has_direct_path else None
    dhome: list[Array | None] = [None if rows.reset is None else np.zeros_like(d) for d in ds]
    arrays = sent.program_arrays(w)
    step_bytes = ds[0].shape[0] * w.hidden_size * dtype.itemsize * max(1, len(plan.hoisted_names))
    given = [(d, i) for d, i in zip(ds, injected, strict=True) if i is not None]
    body, bound, dot, add = None, -1, np.dot, np.add
    for t0, t1, n, order in w.step_blocks(turned, step_bytes):
        d0 = ds[0][:n]
        if n != bound:
            body, bound = _bind_backward(w, ds, d_raw, through, n), n
        assert body is not None
        block = _compute_hoisted(w, {name: a[t0:t1] for name, a in arrays.items()}, (t1 - t0, n, w.hidden_size), dtype)
        moving = zip(*(step_views(block[name], n, turned) for name in plan.backward_program.call_args), strict=True)
        for t, dh, args in zip(order, step_views(sent.dhg[t0:t1], n, turned), moving, strict=True):
            for d, i in given:
                add(d, i[t], d)
            old = [d[:n].copy() for d in ds] if rows.has_gaps else []
            if hr is not None and sent.dh_projected is not None:
                sent.dh_projected[t, :n] = d0
                dot(d0, hr, d_raw[:n])
            body(*args)
            dot(dh, u, d0)
            if through is not None:
                add(d0, through[:n], d0)
            if rows.has_gaps:
                _undo_masked_rows(rows, ds, old, sent, t, n)
            if rows.reset is not None:
                _reset_backward(rows.reset[t, :, None], ds, dhome)
    return dhome


def _undo_masked_rows(
    rows: RowOrder, ds: list[Array], old: list[Array], sent: _GradientBuffers, t: int, n: int
) -> None:
    """Undo step t for the rows that sat it out: their adjoints pass by."""
    assert rows.active is not None
    out = ~rows.active[t, :n, None]
    for o, d in zip(old, ds, strict=True):
        np.copyto(d[:n], o, where=out)
    for a in (sent.dxg, sent.dhg, *sent.dvectors, sent.dh_projected):
        if a is not None:
            np.copyto(a[t, :n], 0, where=out)


def _bind_backward(w: ScanWorkspace, ds: list[Array], d_raw: Array, through: Array | None, n: int) -> Any:
    fixed = {f"d{k}": d[:n] for k, d in enumerate(ds)} | {f"e{k}": d[:n] for k, d in enumerate(ds)} | w.vectors()
    fixed |= {"d0": d_raw[:n]} | ({} if through is None else {"r0": through[:n]})
    return w.plan.backward_program.bind(fixed, (n, w.hidden_size), ds[0].dtype)


def _compute_hoisted(w: ScanWorkspace, block: dict[str, Array], shape: tuple[int, ...], dtype: Any) -> dict[str, Array]:
    """The block with the factors of the adjoint, k0, k1, ..., for all its steps."""
    program = w.plan.hoisted_program
    if w.plan.hoisted_names:
        block |= {name: np.empty(shape, dtype) for name in w.plan.hoisted_names}
        run = program.bind({name: w.vectors()[name] for name in program.bound_args}, shape, dtype)
        run(*(block[name][:, : shape[1]] for name in program.call_args))
    return block


def _reset_backward(reset: Array, ds: list[Array], dhome: list[Array | None]) -> None:
    """The adjoint of `_apply_reset`: what reached the reset rows belongs to their home states."""
    for d, home in zip(ds, dhome, strict=True):
        if home is not None:
            np.add(home, d, home, where=reset)
        np.copyto(d, 0, where=reset)
