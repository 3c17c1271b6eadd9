"""The scan by a compiled kernel: argument preparation, the kernel call, and results.

One call of forward_driver.py's kernel, or backward_driver.py's, runs the whole time loop, including all matrix products
and gradients, without returning to Python. The rows of a batch are independent, so with several threads each thread
runs the kernel on its rows.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from xprnn.arrays.linear import flatten_leading, lookup_backward
from xprnn.arrays.namespace import Array, Params
from xprnn.cells.cell import Cell
from xprnn.kernels.jit import compile_cache, scan_plan
from xprnn.kernels.jit.arguments import (
    KernelArguments,
    SavedForBackward,
    backward_workspace,
    bind_backward_inputs,
    bind_inputs,
    forward_workspace,
    launch,
    projection_size,
)
from xprnn.kernels.jit.forward_driver import KernelSources, kernel_sources
from xprnn.kernels.jit.threads import RowRange, parallel_map, split_rows
from xprnn.kernels.memory import address, aligned_empty, allocate_workspace
from xprnn.kernels.row_order import RowOrder
from xprnn.kernels.tape import State, StepMask, Tape

__all__ = ["NAME", "find_kernel", "kernel_sources", "unsupported_reason", "with_tape"]

NAME = "compiled by numba"
_DTYPES = frozenset((np.dtype(np.float32), np.dtype(np.float64)))


def find_kernel(cell: Cell, params: Params) -> Callable[..., Any] | None:
    """Return the forward function if numba is installed and compiles the cell, else None."""
    if unsupported_reason(cell, params):
        return None
    sources = kernel_sources(cell, _bits(params), "weight_hr" in params)
    assert sources is not None
    return partial(_forward, sources)


def _bits(params: Params) -> int:
    return 8 * int(params["weight_hh"].dtype.itemsize)


def unsupported_reason(cell: Cell, params: Params) -> str:
    """Return why `find_kernel` returns None, or ""."""
    if (dtype := params["weight_hh"].dtype) not in _DTYPES:
        return f"{dtype} is neither float32 nor float64"
    if not compile_cache.numba_available():
        return 'numba is not installed: pip install "xprnn[fast]"'
    sources = kernel_sources(cell, _bits(params), "weight_hr" in params)
    if sources is None:
        return "its cell can't be printed as scalar code"
    is_compiled = compile_cache.can_compile(sources.forward) and compile_cache.can_compile_gemm(_bits(params) // 8)
    return "" if is_compiled else "numba can't compile its cell"


# --- forward


def _forward(
    sources: KernelSources,
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
    """Run the scan; see xprnn.kernels.dispatch.forward for the arguments."""
    result = scan_plan.planned_forward(sources, cell, params, x, state, step_mask, reverse, record_tape)
    if result is not None:
        return with_tape(result, cell, params, x, state, step_mask, reverse, record_tape)
    rows = RowOrder.from_step_mask(x.shape[:2], step_mask)
    saved, arguments = _allocate(sources, cell, params, rows.sort(x, 1), rows, reverse, record_tape)
    starts = tuple(rows.sort(s, 0) for s in state), tuple(rows.sort(s, 0) for s in reset_state)
    running = _launch_forward(saved, arguments, cell, params, starts, reverse, record_tape)
    final = tuple(rows.unsort(s, 0) for s in running)
    y = rows.unsort(saved.states_after[0].view(), 1)
    if not record_tape:
        return y, final, None
    if rows.active is not None:
        y = np.where(np.asarray(step_mask.active)[..., None], y, 0)
    else:
        y.flags.writeable = False  # shares memory with the tape
    states = partial(rows.original_order, saved.states_after)
    return y, final, Tape(backward, np, cell, params, x, state, reset_state, step_mask, reverse, states, saved, NAME)


def with_tape(
    result: tuple[SavedForBackward, State],
    cell: Cell,
    params: Params,
    x: Array,
    state: State,
    step_mask: StepMask,
    reverse: bool,
    record_tape: bool,
) -> tuple[Array, State, Tape | None]:
    """Convert the result of scan_plan.planned_forward to that of a scan: y, the final state, and the tape or None."""
    saved, final = result
    if not record_tape:
        return saved.states_after[0], final, None
    y = saved.states_after[0].view()
    y.flags.writeable = False  # shares memory with the tape
    states = partial(saved.row_order.original_order, saved.states_after)
    return y, final, Tape(backward, np, cell, params, x, state, state, step_mask, reverse, states, saved, NAME)


def _allocate(
    sources: KernelSources, cell: Cell, params: Params, x: Array, rows: RowOrder, reverse: bool, record_tape: bool
) -> tuple[SavedForBackward, KernelArguments]:
    """Allocate the arrays with a step axis. Those that only backward reads have one step if no tape is recorded."""
    u = params["weight_hh"]
    (T, N), H, item = x.shape[:2], u.shape[0] // cell.gates, u.itemsize
    saved_steps, widths = T if record_tape else 1, [u.shape[1], *[H] * (len(cell.states) - 1)]
    arguments = KernelArguments({"record_tape": int(record_tape), "saved_stride": N * H if record_tape else 0})
    before, after = [], []
    for k, width in enumerate(widths):
        # The states before and after each step are two views of one array with an additional step.
        memory, row = aligned_empty(((T if k == 0 else saved_steps) + 1, N, width), u.dtype), width * item
        before.append(memory[1:] if reverse else memory[:-1])
        after.append(memory[:-1] if reverse else memory[1:])
        start = address(memory)
        arguments.set_pointer(f"M{k}", start + (0 if reverse else N * row), row)
        arguments.set_pointer(f"S{k}", start + (N * row if reverse else 0), row)
        arguments.entries[f"M{k}_stride"] = N * width if record_tape or k == 0 else 0
    if rows.reset is not None:
        before = [aligned_empty((saved_steps, N, width), u.dtype) for width in widths]
        for k, a in enumerate(before):
            arguments.set_pointer(f"S{k}", address(a), widths[k] * item)
    extra_values = {
        name: aligned_empty((saved_steps, N, H), u.dtype) for name in sources.saved_buffers if name[0] == "V"
    }
    for name, a in extra_values.items():
        arguments.set_pointer(name, address(a), H * item)
    gates = None
    if record_tape and any(name[0] == "X" for name in sources.saved_buffers):
        gates = aligned_empty((T, N, u.shape[0]), u.dtype)
        arguments.set_pointer("G", address(gates), u.shape[0] * item)
    x = bind_inputs(arguments, params, x)
    return SavedForBackward(sources, rows, x, gates, extra_values, tuple(before), tuple(after)), arguments


def _launch_forward(
    saved: SavedForBackward,
    arguments: KernelArguments,
    cell: Cell,
    params: Params,
    starts: tuple[State, State],
    reverse: bool,
    record_tape: bool,
) -> tuple[Array, ...]:
    """Run the time loop, which fills the arrays of `saved`; `starts` are the initial and the reset states.

    Returns:
        The states after the last step.
    """
    u, rows, (initial, reset_state) = params["weight_hh"], saved.row_order, starts
    (T, N), (W, inner), item = saved.x.shape[:2], u.shape, u.itemsize
    H, proj_size = W // cell.gates, projection_size(params)
    arguments.set_sizes(rows, (T, N, H, W))
    running = tuple(np.array(s, u.dtype, order="C") for s in initial)
    if record_tape and rows.reset is None and T:
        for k, s in enumerate(running):
            saved.states_before[k][-1 if reverse else 0] = s
    arguments.entries |= {"reverse": int(reverse), "gemm_address": compile_cache.gemm_kernel(item).address}
    _set_parameters(arguments, cell, params)
    for k, (s, e) in enumerate(zip(running, reset_state, strict=True)):
        arguments.set_pointer(f"C{k}", address(s), s.shape[1] * item)
        if rows.reset is not None:
            arguments.set_input(f"E{k}", e, s.shape[1] * item)
    D = arguments.entries["D"]

    def run(row_range: RowRange) -> None:
        scalars, sizes = forward_workspace(saved.sources, (T, row_range.size, D, H, W), item, proj_size)
        sizes |= {} if saved.gates is not None else {"G": W}
        _workspace, pointers = allocate_workspace(u.dtype, sizes)  # a local variable keeps the memory alive
        launch(
            saved.sources.forward, saved.sources.forward_arguments, arguments.for_rows(row_range) | pointers | scalars
        )

    parallel_map(run, split_rows(rows, T, N, (inner + D) * W))
    return running


def _set_parameters(arguments: KernelArguments, cell: Cell, params: Params) -> None:
    """Set all parameters but weight_ih. Missing biases are zero."""
    u = params["weight_hh"]
    arguments.set_input("WH", u)
    if "weight_hr" in params:
        arguments.set_input("WR", params["weight_hr"])
    for name, key in (("BI", "bias_ih"), ("BH", "bias_hh")):
        arguments.set_input(name, params[key] if key in params else np.zeros(u.shape[0], u.dtype))
    for k, name in enumerate(cell.vectors):
        arguments.set_input(f"p{k}", params[name])


# --- backward


def backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None]
) -> tuple[Array | None, State, Sequence[Array | None], Params]:
    """Run the adjoint; see xprnn.kernels.dispatch.backward for the arguments."""
    if all(d is None for d in dstates) and (planned := scan_plan.planned_backward(tape, dy, dstate)) is not None:
        dx, ds, grads = planned
        return dx, ds, [None] * len(dstate), grads
    saved: SavedForBackward = tape.saved
    params, rows = tape.params, saved.row_order
    injected = [None if d is None else rows.sort(d, 1) for d in dstates] or [None] * len(dstate)
    if dy is not None:
        dy = rows.sort(dy, 1)
        dy = dy if rows.active is None else np.where(rows.active[..., None], dy, 0)
        injected[0] = dy if injected[0] is None else injected[0] + dy
    sorted_dstate = [None if d is None else rows.sort(d, 0) for d in dstate]
    dx_sorted, initial, reset, grads = _launch_backward(tape, sorted_dstate, injected)
    dreset_state = [None if d is None else rows.unsort(d, 0) for d in reset]
    grads = {name: grads[name] for name in params}
    return (
        None if dx_sorted is None else rows.unsort(dx_sorted, 1),
        tuple(rows.unsort(d, 0) for d in initial),
        dreset_state,
        grads,
    )


def _launch_backward(
    tape: Tape, dstate: Sequence[Array | None], injected: Sequence[Array | None]
) -> tuple[Array | None, list[Array], list[Array | None], Params]:
    """Run the time loop in reverse order.

    Returns:
        The cotangents of x, of the initial states, of the reset states, and of the parameters.
    """
    saved, u = tape.saved, tape.params["weight_hh"]
    (T, N), (W, inner), item = saved.x.shape[:2], u.shape, u.itemsize
    H, proj_size = W // tape.cell.gates, projection_size(tape.params)
    gemm_address = compile_cache.gemm_kernel(item).address
    arguments = KernelArguments({"reverse": int(tape.reverse), "gemm_address": gemm_address})
    arguments.set_sizes(saved.row_order, (T, N, H, W))
    cotangents = _allocate_cotangents(arguments, tape, dstate, injected)
    dx, dgates = bind_backward_inputs(arguments, tape)
    D = arguments.entries["D"]
    make = aligned_empty if T else np.zeros  # without steps, the kernel does not write the gradients

    def run(row_range: RowRange) -> tuple[Array, ...]:
        scalars, sizes = backward_workspace(saved.sources, (T, row_range.size, D, H, W), item, proj_size)
        sums = [make((W, D), u.dtype), make(u.shape, u.dtype), np.zeros((2, W), u.dtype)]
        sums += [make((proj_size, H), u.dtype)] * (proj_size > 0)
        workspace, pointers = allocate_workspace(u.dtype, sizes)
        workspace["B"].fill(0)
        workspace["O"].fill(0)
        pointers |= dict(zip(("GI", "GU", "SI", "GR"), map(address, sums), strict=False)) | scalars
        pointers |= {"SH": pointers["SI"] + W * item}
        launch(saved.sources.backward, saved.sources.backward_arguments, arguments.for_rows(row_range) | pointers)
        return tuple(sums)

    row_ranges = split_rows(saved.row_order, T, N, (inner + D) * W)
    dw, du, (db_ih, db_hh), *dhr = _reduce_threads(parallel_map(run, row_ranges))
    if dgates is not None:
        dw = _lookup_gradient(tape, dgates)
    grads = {"weight_ih": dw, "weight_hh": du, "bias_ih": db_ih} | dict(zip(["weight_hr"], dhr, strict=False))
    grads["bias_hh"] = db_ih.copy() if saved.sources.dx_is_dh else db_hh
    grads |= {name: np.add.reduce(cotangents[f"P{k}"], axis=0) for k, name in enumerate(tape.cell.vectors)}
    states = range(len(dstate))
    reset: list[Array | None] = [None if saved.row_order.reset is None else cotangents[f"E{k}"] for k in states]
    return dx, [cotangents[f"D{k}"] for k in states], reset, grads


def _lookup_gradient(tape: Tape, dgates: Array) -> Any:
    """Return the gradient of weight_ih for integer x, given the cotangents of the gates (T, N, W)."""
    from xprnn.kernels.jit.segment_sum import segment_sum  # imports numba

    saved, count = tape.saved, tape.params["weight_ih"].shape[1]
    options = {"sparse": tape.sparse, "active": saved.row_order.active, "segment_sum_fn": segment_sum}
    return lookup_backward(np, saved.x.reshape(-1), flatten_leading(np, dgates), count, **options)


def _allocate_cotangents(
    arguments: KernelArguments, tape: Tape, dstate: Sequence[Array | None], injected: Sequence[Array | None]
) -> dict[str, Array]:
    """Set the tape's arrays and the caller's state cotangents, and allocate the running cotangents.

    Returns:
        The running cotangents, (N, H) each: Dk of the states, Ek of the reset states, Pk of the cell's vectors.
    """
    saved: SavedForBackward = tape.saved
    N, H, dtype = arguments.entries["N"], arguments.entries["H"], tape.params["weight_hh"].dtype
    row, states, vectors = H * dtype.itemsize, range(len(dstate)), range(len(tape.cell.vectors))
    names = [*(f"D{k}" for k in states), *(f"E{k}" for k in states), *(f"P{k}" for k in vectors)]
    widths = dict.fromkeys(names, H) | dict.fromkeys(("D0", "E0"), tape.initial_state[0].shape[1])
    sizes = {"zero_row": H} | {name: N * width for name, width in widths.items()}
    arrays, pointers = allocate_workspace(dtype, sizes)
    for name, a in arrays.items():
        if name[0] != "D":
            a.fill(0)
    for name, width in widths.items():
        arrays[name] = arrays[name].reshape(N, width)
        arguments.set_pointer("R0" if name == "D0" else name, pointers[name], width * dtype.itemsize)
    for k, (d, cotangent) in enumerate(zip(dstate, injected, strict=True)):
        arrays[f"D{k}"][...] = 0 if d is None else d
        arguments.set_pointer(f"M{k}", address(saved.states_after[k]), widths[f"D{k}"] * dtype.itemsize)
        arguments.set_pointer(f"S{k}", address(saved.states_before[k]), widths[f"D{k}"] * dtype.itemsize)
        if cotangent is None:
            arguments.set_input(f"I{k}", arrays["zero_row"])
        else:
            arguments.set_cotangent(k, cotangent, dtype)
    for name, a in saved.extra_values.items():
        arguments.set_pointer(name, address(a), row)
    if saved.gates is not None:
        arguments.set_pointer("G", address(saved.gates), tape.cell.gates * row)
    for k, name in enumerate(tape.cell.vectors):
        arguments.set_input(f"p{k}", tape.params[name])
    return arrays


def _reduce_threads(sums: list[tuple[Array, ...]]) -> tuple[Array, ...]:
    """Add the threads' sums in the order of their rows."""
    for partial_sums in sums[1:]:
        for total, part in zip(sums[0], partial_sums, strict=True):
            np.add(total, part, total)
    return sums[0]
