"""The scan with its time loop compiled by numba: what is prepared before the loop, and what is done after it.

Between them source.py's kernel walks all steps, products with the weights and all gradients included, without coming
back to Python. The rows of a batch are independent of each other: with several threads each walks some of them.
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
    """`forward` where the cell can be compiled and numba is there, else None."""
    if unsupported_reason(cell, params):
        return None
    sources = kernel_sources(cell, _bits(params), "weight_hr" in params)
    assert sources is not None
    return partial(_forward, sources)


def _bits(params: Params) -> int:
    return 8 * int(params["weight_hh"].dtype.itemsize)


def unsupported_reason(cell: Cell, params: Params) -> str:
    """Why `find` has nothing, or ""."""
    if (dtype := params["weight_hh"].dtype) not in _DTYPES:
        return f"{dtype} is neither float32 nor float64"
    if not compile_cache.numba_available():
        return 'numba is not installed: pip install "xprnn[fast]"'
    sources = kernel_sources(cell, _bits(params), "weight_hr" in params)
    if sources is None:
        return "its cell can't be printed as scalar code"
    works = compile_cache.can_compile(sources.forward) and compile_cache.can_compile_gemm(_bits(params) // 8)
    return "" if works else "numba can't compile its cell"


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
    """See xprnn.kernels.dispatch.forward, which is the specification."""
    done = scan_plan.planned_forward(sources, cell, params, x, state, step_mask, reverse, record_tape)
    if done is not None:
        return with_tape(done, cell, params, x, state, step_mask, reverse, record_tape)
    rows = RowOrder.from_step_mask(x.shape[:2], step_mask)
    kept, table = _allocate(sources, cell, params, rows.sort(x, 1), rows, reverse, record_tape)
    ends = tuple(rows.sort(s, 0) for s in state), tuple(rows.sort(s, 0) for s in reset_state)
    final = tuple(rows.unsort(s, 0) for s in _launch_forward(kept, table, cell, params, ends, reverse, record_tape))
    y = rows.unsort(kept.states_after[0].view(), 1)
    if not record_tape:
        return y, final, None
    if rows.active is not None:
        y = np.where(np.asarray(step_mask.active)[..., None], y, 0)
    else:
        y.flags.writeable = False  # the tape lives in this memory
    shown = partial(rows.original_order, kept.states_after)
    return y, final, Tape(backward, np, cell, params, x, state, reset_state, step_mask, reverse, shown, kept, NAME)


def with_tape(
    result: tuple[SavedForBackward, State],
    cell: Cell,
    params: Params,
    x: Array,
    state: State,
    steps: StepMask,
    reverse: bool,
    keep: bool,
) -> tuple[Array, State, Tape | None]:
    """What plain.forward has done, as a scan returns it."""
    kept, final = result
    if not keep:
        return kept.states_after[0], final, None
    y = kept.states_after[0].view()
    y.flags.writeable = False  # the tape lives in this memory
    shown = partial(kept.row_order.original_order, kept.states_after)
    return y, final, Tape(backward, np, cell, params, x, state, state, steps, reverse, shown, kept, NAME)


def _allocate(
    sources: KernelSources, cell: Cell, params: Params, x: Array, rows: RowOrder, reverse: bool, keep: bool
) -> tuple[SavedForBackward, KernelArguments]:
    """All arrays with a step axis, of one step where no tape is kept."""
    u = params["weight_hh"]
    (count, n), hidden, item = x.shape[:2], u.shape[0] // cell.gates, u.itemsize
    length, widths = count if keep else 1, [u.shape[1], *[hidden] * (len(cell.states) - 1)]
    table = KernelArguments({"keep": int(keep), "v0": n * hidden if keep else 0})
    before, after = [], []
    for k, wide in enumerate(widths):
        # The state before the first step in line: those before all steps are a view.
        memory, row = aligned_empty(((count if k == 0 else length) + 1, n, wide), u.dtype), wide * item
        before.append(memory[1:] if reverse else memory[:-1])
        after.append(memory[:-1] if reverse else memory[1:])
        at = address(memory)
        table.set_pointer(f"M{k}", at + (0 if reverse else n * row), row)
        table.set_pointer(f"S{k}", at + (n * row if reverse else 0), row)
        table.entries[f"m{k}"] = n * wide if keep or k == 0 else 0
    if rows.reset is not None:
        before = [aligned_empty((length, n, wide), u.dtype) for wide in widths]
        for k, a in enumerate(before):
            table.set_pointer(f"S{k}", address(a), widths[k] * item)
    spare = {slot: aligned_empty((length, n, hidden), u.dtype) for slot in sources.saved_buffers if slot[0] == "V"}
    for slot, a in spare.items():
        table.set_pointer(slot, address(a), hidden * item)
    gates = None
    if keep and any(slot[0] == "X" for slot in sources.saved_buffers):
        gates = aligned_empty((count, n, u.shape[0]), u.dtype)
        table.set_pointer("G", address(gates), u.shape[0] * item)
    return SavedForBackward(
        sources, rows, bind_inputs(table, params, x), gates, spare, tuple(before), tuple(after)
    ), table


def _launch_forward(
    kept: SavedForBackward,
    table: KernelArguments,
    cell: Cell,
    params: Params,
    ends: tuple[State, State],
    reverse: bool,
    keep: bool,
) -> tuple[Array, ...]:
    """The time loop: fills what is kept and returns the states after the last step."""
    u, rows, (initial, home) = params["weight_hh"], kept.row_order, ends
    (count, n), (width, inner), item = kept.x.shape[:2], u.shape, u.itemsize
    hidden, projected = width // cell.gates, projection_size(params)
    table.set_sizes(rows, (count, n, hidden, width))
    running = tuple(np.array(s, u.dtype, order="C") for s in initial)
    if keep and rows.reset is None and count:
        for k, s in enumerate(running):
            kept.states_before[k][-1 if reverse else 0] = s
    table.entries |= {"turned": int(reverse), "go": compile_cache.gemm_kernel(item).address}
    table.set_input("WH", u)
    if projected:
        table.set_input("WR", params["weight_hr"])
    for name, key in (("BI", "bias_ih"), ("BH", "bias_hh")):
        table.set_input(name, params[key] if key in params else np.zeros(width, u.dtype))
    for k, name in enumerate(cell.vectors):
        table.set_input(f"p{k}", params[name])
    for k, (s, e) in enumerate(zip(running, home, strict=True)):
        table.set_pointer(f"C{k}", address(s), s.shape[1] * item)
        if rows.reset is not None:
            table.set_input(f"E{k}", e, s.shape[1] * item)
    d = table.entries["D"]

    def walk(part: RowRange) -> None:
        numbers, sizes = forward_workspace(kept.sources, (count, part.size, d, hidden, width), item, projected)
        _room, here = allocate_workspace(u.dtype, sizes | ({} if kept.gates is not None else {"G": width}))
        launch(kept.sources.forward, kept.sources.forward_arguments, table.for_rows(part) | here | numbers)

    parallel_map(walk, split_rows(rows, count, n, (inner + d) * width))
    return running


# --- and its adjoint


def backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None]
) -> tuple[Array | None, State, Sequence[Array | None], Params]:
    """See xprnn.kernels.dispatch.backward."""
    if all(d is None for d in dstates) and (done := scan_plan.planned_backward(tape, dy, dstate)) is not None:
        return *done[:2], [None] * len(dstate), done[2]
    kept: SavedForBackward = tape.saved
    params, rows = tape.params, kept.row_order
    injected = [None if d is None else rows.sort(d, 1) for d in dstates] or [None] * len(dstate)
    if dy is not None:
        dy = rows.sort(dy, 1)
        dy = dy if rows.active is None else np.where(rows.active[..., None], dy, 0)
        injected[0] = dy if injected[0] is None else injected[0] + dy
    dx, ds, dhome, grads = _launch_backward(tape, [None if d is None else rows.sort(d, 0) for d in dstate], injected)
    dx = None if dx is None else rows.unsort(dx, 1)
    home = [None if d is None else rows.unsort(d, 0) for d in dhome]
    return dx, tuple(rows.unsort(d, 0) for d in ds), home, {name: grads[name] for name in params}


def _launch_backward(
    tape: Tape, dstate: Sequence[Array | None], injected: Sequence[Array | None]
) -> tuple[Array | None, list[Array], list[Array | None], Params]:
    """The time loop, in reverse order: the adjoints of x, first states, home states, parameters."""
    from xprnn.kernels.jit.segment_sum import segment_sum

    kept, params, u = tape.saved, tape.params, tape.params["weight_hh"]
    (count, n), (width, inner), item = kept.x.shape[:2], u.shape, u.itemsize
    hidden, projected = width // tape.cell.gates, projection_size(params)
    table = KernelArguments({"turned": int(tape.reverse), "go": compile_cache.gemm_kernel(item).address})
    table.set_sizes(kept.row_order, (count, n, hidden, width))
    room = _allocate_cotangents(table, tape, dstate, injected)
    dx, dgates = bind_backward_inputs(table, tape)
    d = table.entries["D"]
    # The rows of the gradients are summed over all steps and rows, or, where there are none, are zero.
    make = aligned_empty if count else np.zeros

    def walk(part: RowRange) -> tuple[Array, ...]:
        numbers, sizes = backward_workspace(kept.sources, (count, part.size, d, hidden, width), item, projected)
        sums = [make((width, d), u.dtype), make(u.shape, u.dtype), np.zeros((2, width), u.dtype)]
        sums += [make((projected, hidden), u.dtype)] * (projected > 0)
        own, here = allocate_workspace(u.dtype, sizes)
        own["B"].fill(0)
        own["O"].fill(0)
        here |= dict(zip(("GI", "GU", "SI", "GR"), map(address, sums), strict=False)) | numbers
        here |= {"SH": here["SI"] + width * item}
        launch(kept.sources.backward, kept.sources.backward_arguments, table.for_rows(part) | here)
        return tuple(sums)

    dw, du, (db_ih, db_hh), *dhr = _reduce_threads(
        parallel_map(walk, split_rows(kept.row_order, count, n, (inner + d) * width))
    )
    if dgates is not None:
        wanted = {"sparse": tape.sparse, "active": kept.row_order.active, "segment_sum_fn": segment_sum}
        dw = lookup_backward(
            np, kept.x.reshape(-1), flatten_leading(np, dgates), params["weight_ih"].shape[1], **wanted
        )
    grads = {"weight_ih": dw, "weight_hh": du, "bias_ih": db_ih} | dict(zip(["weight_hr"], dhr, strict=False))
    grads["bias_hh"] = db_ih.copy() if kept.sources.dx_is_dh else db_hh
    grads |= {name: np.add.reduce(room[f"P{k}"], axis=0) for k, name in enumerate(tape.cell.vectors)}
    states = range(len(dstate))
    home: list[Array | None] = [None if kept.row_order.reset is None else room[f"E{k}"] for k in states]
    return dx, [room[f"D{k}"] for k in states], home, grads


def _allocate_cotangents(
    table: KernelArguments, tape: Tape, dstate: Sequence[Array | None], injected: Sequence[Array | None]
) -> dict[str, Array]:
    """Into the table, the adjoints of the states, given and running; returns the running ones, (N, H) each."""
    kept: SavedForBackward = tape.saved
    n, hidden, dtype = table.entries["N"], table.entries["H"], tape.params["weight_hh"].dtype
    row, states, vectors = hidden * dtype.itemsize, range(len(dstate)), range(len(tape.cell.vectors))
    names = [*(f"D{k}" for k in states), *(f"E{k}" for k in states), *(f"P{k}" for k in vectors)]
    widths = dict.fromkeys(names, hidden) | dict.fromkeys(("D0", "E0"), tape.initial_state[0].shape[1])
    room, here = allocate_workspace(dtype, {"nothing": hidden} | {name: n * wide for name, wide in widths.items()})
    for name, a in room.items():
        if name[0] != "D":
            a.fill(0)
    for name, wide in widths.items():
        room[name] = room[name].reshape(n, wide)
        table.set_pointer("R0" if name == "D0" else name, here[name], wide * dtype.itemsize)
    for k, (d, sent) in enumerate(zip(dstate, injected, strict=True)):
        room[f"D{k}"][...] = 0 if d is None else d
        table.set_pointer(f"M{k}", address(kept.states_after[k]), widths[f"D{k}"] * dtype.itemsize)
        table.set_pointer(f"S{k}", address(kept.states_before[k]), widths[f"D{k}"] * dtype.itemsize)
        if sent is None:
            table.set_input(f"I{k}", room["nothing"])
        else:
            table.set_cotangent(k, sent, dtype)
    for slot, a in kept.extra_values.items():
        table.set_pointer(slot, address(a), row)
    if kept.gates is not None:
        table.set_pointer("G", address(kept.gates), tape.cell.gates * row)
    for k, name in enumerate(tape.cell.vectors):
        table.set_input(f"p{k}", tape.params[name])
    return room


def _reduce_threads(sums: list[tuple[Array, ...]]) -> tuple[Array, ...]:
    """The parts' sums, added up in their order."""
    for one in sums[1:]:
        for total, more in zip(sums[0], one, strict=True):
            np.add(total, more, total)
    return sums[0]
