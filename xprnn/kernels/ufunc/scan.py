"""NumPy scan: every array is allocated before the time loop, and the loop calls ufuncs that write into these arrays.

It computes the same results as the reference scan, with these differences:

- the halves x W^T and h U^T of a gate are added for all gates in one call, and b_hh is part of the input projection,
  if the cell uses only their sum;
- the input projection of an Elman layer is written to the memory of its states;
- gates that are nothing but a tanh or a sigmoid of their sum are computed by one call of tanh;
- the factors of the adjoint that need no cotangent are computed for a block of steps at once;
- rows are sorted by length if that saves work, so that a step processes only the rows that are still active.
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
    """Return `forward` if the kernel applies to this cell, else None."""
    return None if unsupported_reason(cell) else forward


def unsupported_reason(cell: Cell) -> str:
    """Return the reason why the kernel does not apply to this cell, or ""."""
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
    """Run the scan; see dispatch.forward for the arguments."""
    plan, rows = ufunc_plan(cell), RowOrder.from_step_mask(x.shape[:2], step_mask)
    assert plan is not None
    x_sorted = rows.sort(contiguous(x), 1)
    w = ScanWorkspace(plan, cell, params, rows, reverse, tuple(rows.sort(s, 0) for s in reset_state))
    memory, before, after = _allocate_states(tuple(rows.sort(s, 0) for s in state), x.shape[0], reverse)
    _allocate_arrays(w, before, after, (*x.shape[:2], w.hidden_size), record_tape)
    activation = FusedGateActivation.from_workspace(w, before[0].dtype)
    project_in_place = cell.gates == plan.summed_gates == 1 and "weight_hr" not in params
    xg = project_inputs(w, activation, x_sorted, after[0] if project_in_place else None)
    if plan.gate_activations:
        w.arrays |= w.gate_views("a", xg)  # the activations overwrite the input projection
    _forward_time_loop(w, activation, xg, before, after)
    final = tuple(rows.unsort(m[0 if reverse else -1].copy(), 0) for m in memory)
    y = rows.unsort(after[0].view(), 1)
    if rows.active is not None:
        y = np.where(np.asarray(step_mask.active)[..., None], y, 0)
    if not record_tape:
        return y, final, None
    if np.may_share_memory(y, after[0]):
        y.flags.writeable = False  # y is a view of the tape's memory

    def states() -> State:
        return rows.original_order(after)

    saved = (w, x_sorted)
    tape = Tape(backward, np, cell, params, x, state, reset_state, step_mask, reverse, states, saved, NAME)
    return y, final, tape


def _allocate_states(initial: State, count: int, reverse: bool) -> tuple[State, State, State]:
    """Allocate the states of all steps: memory (T+1, N, .), and its views before and after each step (T, N, .)."""
    memory = tuple(np.empty((count + 1, *s.shape), s.dtype) for s in initial)
    for m, s in zip(memory, initial, strict=True):
        m[-1 if reverse else 0] = s
    first_steps, last_steps = tuple(m[:-1] for m in memory), tuple(m[1:] for m in memory)
    return (memory, last_steps, first_steps) if reverse else (memory, first_steps, last_steps)


def _allocate_arrays(w: ScanWorkspace, before: State, after: State, shape: tuple[int, ...], record_tape: bool) -> None:
    """Add the arrays of the states (s before, n after each step) and of the saved values to the workspace."""
    dtype = before[0].dtype
    old = before if w.row_order.reset is None else tuple(np.empty_like(b) for b in before)
    w.arrays |= {f"s{k}": s for k, s in enumerate(old)} | {f"n{k}": a for k, a in enumerate(after)}
    w.arrays |= {name: step_buffer(shape, dtype, record_tape) for name in w.plan.saved_names if name[0] == "v"}
    if "weight_hr" in w.params:
        w.arrays["n0"] = step_buffer(shape, dtype, record_tape)
        if w.row_order.active is not None:
            # The loop skips inactive rows. Their cotangents are 0, but 0 * nan would reach the gradient of weight_hr.
            w.arrays["n0"][...] = 0


def _forward_time_loop(
    w: ScanWorkspace, activation: FusedGateActivation | None, xg: Array, before: State, after: State
) -> None:
    """Run all steps, which fill the arrays of the workspace."""
    u = w.params["weight_hh"]
    ut = np.ascontiguousarray((u if activation is None else activation.scale_rows(u)).T)
    activate = _gate_activation(w, activation)
    cut, rows, program = w.plan.summed_gates * w.hidden_size, w.row_order, w.plan.forward_program
    b_rest = w.params["bias_hh"][cut:] if "bias_hh" in w.params and cut < ut.shape[1] else None
    hr_t = np.ascontiguousarray(w.params["weight_hr"].T) if "weight_hr" in w.params else None
    arrays = w.arrays | w.gate_views("x", xg)
    product = np.empty((xg.shape[1], ut.shape[1]), ut.dtype)
    body, bound_rows, dot, add = None, -1, np.dot, np.add
    for t0, t1, n, order in w.step_blocks(w.reverse, 1):
        hg = product[:n]
        if n != bound_rows:
            views = w.gate_views("g", hg) | w.gate_views("h", hg) | w.vectors()
            body, bound_rows = program.bind(views, (n, w.hidden_size), ut.dtype), n
        assert body is not None
        hg_summed, hg_rest = hg[:, :cut], hg[:, cut:]
        calls = zip(*(step_views(arrays[name][t0:t1], n, w.reverse) for name in program.call_args), strict=True)
        hs, xgs = step_views(arrays["s0"][t0:t1], n, w.reverse), step_views(xg[t0:t1, :, :cut], n, w.reverse)
        for t, h, xg_summed, args in zip(order, hs, xgs, calls, strict=True):
            if rows.reset is not None:
                _apply_reset(rows.reset[t, :, None], w, before, t)
            dot(h, ut, hg)
            if activate is not None:
                add(xg_summed, hg_summed, xg_summed)
                activate(xg_summed)
            elif cut:
                add(hg_summed, xg_summed, hg_summed)
            if b_rest is not None:
                add(hg_rest, b_rest, hg_rest)
            body(*args)
            if hr_t is not None:
                dot(arrays["n0"][t, :n], hr_t, after[0][t, :n])
            if rows.active is not None:
                rows.carry_inactive(t, n, arrays, after)


def _gate_activation(w: ScanWorkspace, activation: FusedGateActivation | None) -> Callable[[Array], None] | None:
    """The function that activates all summed gates in place; None if the program computes the activations."""
    if not w.plan.gate_activations:
        return None
    if activation is None:
        return lambda a: np.copyto(a, np.tanh(a))
    scale, offset = activation

    def run(a: Array) -> None:
        np.tanh(a, a)
        np.multiply(a, scale, a)
        np.add(a, offset, a)

    return run


def _apply_reset(reset: Array, w: ScanWorkspace, before: State, t: int) -> None:
    """Set the states from which step t starts: the reset states in the rows `reset` (N, 1), else those before t."""
    for k, (reset_state, b) in enumerate(zip(w.reset_state, before, strict=True)):
        np.copyto(w.arrays[f"s{k}"][t], b[t])
        np.copyto(w.arrays[f"s{k}"][t], reset_state, where=reset)


def _reset_backward(reset: Array, ds: list[Array], dreset: list[Array | None]) -> None:
    """The adjoint of `_apply_reset`: move the cotangents of the rows `reset` from `ds` to the reset states."""
    for d, total in zip(ds, dreset, strict=True):
        if total is not None:
            np.add(total, d, total, where=reset)
        np.copyto(d, 0, where=reset)


# --- backward


@dataclass
class _GradientBuffers:
    """The arrays (T, N, .) that the backward loop fills, from which the weight gradients are computed afterwards."""

    dxg: Array
    dhg: Array  # the same array as dxg if the plan says so
    dvectors: list[Array]
    dh_projected: Array | None

    def program_arrays(self, w: ScanWorkspace) -> dict[str, Array]:
        """Return every array that the backward programs read or write, by its name there."""
        inputs = {name: a for name, a in w.arrays.items() if name[0] == "s"}
        inputs |= {f"v{j}": w.arrays[name] for j, name in enumerate(w.plan.saved_names)}
        dvectors = {f"P{k}": a for k, a in enumerate(self.dvectors)}
        return inputs | w.gate_views("X", self.dxg) | w.gate_views("U", self.dhg) | dvectors


def backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None]
) -> tuple[Array | None, State, Sequence[Array | None], Params]:
    """The adjoint of `forward`; see dispatch.backward for the arguments."""
    w, x = tape.saved
    params, rows, plan, h_previous = w.params, w.row_order, w.plan, w.arrays["s0"]
    # In C order, because np.dot writes to these arrays.
    pairs = zip(tape.initial_state, dstate, strict=True)
    ds = [np.zeros(s.shape, s.dtype) if d is None else np.array(rows.sort(d, 0), order="C") for s, d in pairs]
    injected = [
        None if d is None else rows.sort(contiguous(d), 1) for d in (*dstates, *[None] * (len(ds) - len(dstates)))
    ]
    if dy is not None:
        dy = rows.sort(contiguous(dy), 1)
        dy = dy if rows.active is None else np.where(rows.active[..., None], dy, 0)
        injected[0] = dy if injected[0] is None else injected[0] + dy
    allocate = np.empty if rows.active is None else np.zeros  # the loop skips inactive rows, whose gradients are 0
    shape, dtype = (*x.shape[:2], params["weight_hh"].shape[0]), ds[0].dtype
    dxg = allocate(shape, dtype)
    dvectors = [allocate((*shape[:2], w.hidden_size), dtype) for _ in w.cell.vectors]
    dh_projected = allocate(h_previous.shape, dtype) if "weight_hr" in params else None
    buffers = _GradientBuffers(dxg, dxg if plan.dx_is_dh else allocate(shape, dtype), dvectors, dh_projected)
    dreset = _backward_time_loop(w, ds, injected, buffers)
    dx, dw, db = linear_backward(np, dxg, x, params["weight_ih"], sparse=tape.sparse, active=rows.active)
    du = np.dot(flatten_leading(np, buffers.dhg).T, flatten_leading(np, h_previous))
    grads = {"weight_ih": dw, "weight_hh": du}
    if "bias_ih" in params:
        grads |= {"bias_ih": db, "bias_hh": db.copy() if plan.dx_is_dh else _sum_rows(buffers.dhg)}
    if dh_projected is not None:
        grads["weight_hr"] = np.dot(flatten_leading(np, dh_projected).T, flatten_leading(np, w.arrays["n0"]))
    grads |= {name: _sum_rows(d) for name, d in zip(w.cell.vectors, dvectors, strict=True)}
    unsorted = [None if d is None else rows.unsort(d, 0) for d in (*ds, *dreset)]
    dx = None if dx is None else rows.unsort(dx, 1)
    return dx, tuple(unsorted[: len(ds)]), unsorted[len(ds) :], {name: grads[name] for name in params}


def _sum_rows(a: Array) -> Array:
    return np.dot(np.ones(a.shape[0] * a.shape[1], a.dtype), flatten_leading(np, a))


def _backward_time_loop(
    w: ScanWorkspace, ds: list[Array], injected: Sequence[Array | None], buffers: _GradientBuffers
) -> list[Array | None]:
    """Run the adjoint of all steps.

    Args:
        w: the workspace of the forward pass.
        ds: the cotangents of the final states, (N, .) each; replaced by those of the initial states.
        injected: the cotangents (T, N, .) that each state receives after every step, or None.
        buffers: the arrays to fill.

    Returns:
        The cotangents of the reset states.
    """
    rows, plan, backwards, dtype = w.row_order, w.plan, not w.reverse, ds[0].dtype
    u, hr = np.ascontiguousarray(w.params["weight_hh"]), w.params.get("weight_hr")
    dh_unprojected = np.empty((buffers.dxg.shape[1], w.hidden_size), dtype) if hr is not None else ds[0]
    direct = np.empty_like(ds[0]) if plan.has_direct_path else None
    dreset: list[Array | None] = [None if rows.reset is None else np.zeros_like(d) for d in ds]
    arrays = buffers.program_arrays(w)
    step_bytes = ds[0].shape[0] * w.hidden_size * dtype.itemsize * max(1, len(plan.hoisted_names))
    to_add = [(d, c) for d, c in zip(ds, injected, strict=True) if c is not None]
    body, bound_rows, dot, add = None, -1, np.dot, np.add
    for t0, t1, n, order in w.step_blocks(backwards, step_bytes):
        dh = ds[0][:n]
        if n != bound_rows:
            body, bound_rows = _bind_backward(w, ds, dh_unprojected, direct, n), n
        assert body is not None
        block = _compute_hoisted(w, {name: a[t0:t1] for name, a in arrays.items()}, (t1 - t0, n, w.hidden_size), dtype)
        calls = zip(*(step_views(block[name], n, backwards) for name in plan.backward_program.call_args), strict=True)
        for t, dhg, args in zip(order, step_views(buffers.dhg[t0:t1], n, backwards), calls, strict=True):
            for d, c in to_add:
                add(d, c[t], d)
            copies = [d[:n].copy() for d in ds] if rows.has_gaps else []
            if hr is not None and buffers.dh_projected is not None:
                buffers.dh_projected[t, :n] = dh
                dot(dh, hr, dh_unprojected[:n])
            body(*args)
            dot(dhg, u, dh)
            if direct is not None:
                add(dh, direct[:n], dh)
            if rows.has_gaps:
                _undo_masked_rows(rows, ds, copies, buffers, t, n)
            if rows.reset is not None:
                _reset_backward(rows.reset[t, :, None], ds, dreset)
    return dreset


def _undo_masked_rows(
    rows: RowOrder, ds: list[Array], copies: list[Array], buffers: _GradientBuffers, t: int, n: int
) -> None:
    """Restore the cotangents of the rows that are inactive at step t from `copies`, and zero their gradients."""
    assert rows.active is not None
    inactive = ~rows.active[t, :n, None]
    for copy, d in zip(copies, ds, strict=True):
        np.copyto(d[:n], copy, where=inactive)
    for a in (buffers.dxg, buffers.dhg, *buffers.dvectors, buffers.dh_projected):
        if a is not None:
            np.copyto(a[t, :n], 0, where=inactive)


def _bind_backward(w: ScanWorkspace, ds: list[Array], dh_unprojected: Array, direct: Array | None, n: int) -> Any:
    """Bind the backward program to the cotangents of the first n rows, which it updates in place."""
    views = {f"{letter}{k}": d[:n] for letter in "de" for k, d in enumerate(ds)} | w.vectors()
    views |= {"d0": dh_unprojected[:n]} | ({} if direct is None else {"r0": direct[:n]})
    return w.plan.backward_program.bind(views, (n, w.hidden_size), ds[0].dtype)


def _compute_hoisted(w: ScanWorkspace, block: dict[str, Array], shape: tuple[int, ...], dtype: Any) -> dict[str, Array]:
    """Compute the hoisted factors k0, k1, ... of all steps of a block, and add them to its arrays."""
    program = w.plan.hoisted_program
    if w.plan.hoisted_names:
        block |= {name: np.empty(shape, dtype) for name in w.plan.hoisted_names}
        run = program.bind({name: w.vectors()[name] for name in program.bound_args}, shape, dtype)
        run(*(block[name][:, : shape[1]] for name in program.call_args))
    return block
