"""The scan on CuPy with two launches per step: the recurrent product and the cell's generated pointwise kernel.

All memory is allocated before the time loop, and nothing in the loop waits for the device. The input projection and
the weight gradients are one matrix product each, over all T*N rows. Single-letter keys are the argument fields that
xprnn.kernels.cuda.pointwise lists.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from xprnn.arrays.linear import flatten_leading, lookup_backward
from xprnn.arrays.namespace import Array, Namespace, Params, device_of
from xprnn.cells.cell import Cell
from xprnn.kernels.cuda.device import (
    CublasGemm,
    address,
    contiguous,
    copy,
    cublas_gemm,
    empty,
    make_launcher,
    raw_kernel,
    take_rows,
    zeros,
)
from xprnn.kernels.cuda.pointwise import PointwiseKernels
from xprnn.kernels.cuda.segment_sum import segment_sum
from xprnn.kernels.tape import State, StepMask, Tape

__all__ = ["NAME", "forward", "input_gradients", "project_inputs", "recurrent_gradients"]

NAME = "CUDA fused steps"

_BLOCK_BYTES = 1 << 28  # per block of steps of the input projection, if no tape is recorded


class _FusedSavedArrays(NamedTuple):
    """Arrays saved for backward, each (T, N, ...)."""

    kernels: PointwiseKernels
    x: Array
    active: Array | None
    reset: Array | None
    gates: Array  # the input projection, overwritten by the saved values of buffers Xk
    extra_values: dict[str, Array]  # the saved values of buffers Vj
    states_before: State
    states_after: State


# --- forward


def forward(
    kernels: PointwiseKernels,
    kernel_name: str,
    cell: Cell,
    params: Params,
    x: Array,
    state: State,
    step_mask: StepMask,
    *,
    reset_state: State,
    xp: Namespace,
    reverse: bool,
    record_tape: bool,
) -> tuple[Array, State, Tape | None]:
    """Run the scan as xprnn.kernels.dispatch.forward specifies; `kernel_name` is recorded on the tape."""
    with device_of(x):
        saved = _allocate(kernels, cell, params, x, step_mask, reverse, record_tape)
        first, last = (-1, 0) if reverse else (0, -1)
        for s, h, b in zip(state, reset_state, saved.states_before, strict=True):
            b[first, ...] = s if saved.reset is None else xp.where(saved.reset[first, :, None], h, s)
        # y gets separate memory, so that in-place edits by the caller cannot corrupt the tape.
        separate_y = record_tape or saved.active is not None
        y = empty((*x.shape[:2], state[0].shape[1]), state[0].dtype) if separate_y else saved.states_after[0]
        _forward_time_loop(xp, saved, cell, params, reset_state, y, reverse, record_tape)
        final = tuple(copy(a[last, ...]) for a in saved.states_after)
    if not record_tape:
        return y, final, None

    def states() -> State:
        return tuple(copy(a) for a in saved.states_after)

    return (
        y,
        final,
        Tape(backward, xp, cell, params, x, state, reset_state, step_mask, reverse, states, saved, kernel_name),
    )


def _allocate(
    kernels: PointwiseKernels,
    cell: Cell,
    params: Params,
    x: Array,
    step_mask: StepMask,
    reverse: bool,
    record_tape: bool,
) -> _FusedSavedArrays:
    """Allocate all arrays with a step axis.

    Without a tape, states have one step and the projection one block of steps.
    """
    (num_steps, n), (width, hidden), dtype = x.shape[:2], params["weight_hh"].shape, params["weight_hh"].dtype
    before, after = [], []
    for k in range(len(cell.states)):
        # Without a tape and without masked rows, state 0 shares its memory with y.
        length = num_steps if record_tape or (k == 0 and step_mask.active is None) else 0
        if step_mask.reset is not None:
            before.append(empty((num_steps if record_tape else 1, n, hidden), dtype))
            after.append(empty((max(1, length), n, hidden), dtype))
            continue
        states = empty((length + 1, n, hidden), dtype)
        before.append(states[1:] if reverse and length else states[: max(1, length)])
        after.append(states[1:] if length and not reverse else states[: max(1, length)])
    extra_values = {
        buffer: empty((num_steps, n, hidden), dtype)
        for buffer in kernels.saved_buffers
        if buffer[0] == "V" and record_tape
    }
    gates = _allocate_gates(kernels, after[0], (num_steps, n, width), record_tape)
    active, reset = (None if a is None else contiguous(a) for a in (step_mask.active, step_mask.reset))
    return _FusedSavedArrays(kernels, contiguous(x), active, reset, gates, extra_values, tuple(before), tuple(after))


def _allocate_gates(kernels: PointwiseKernels, h_after: Array, shape: tuple[int, int, int], record_tape: bool) -> Array:
    """Allocate the input projection of `shape` (T, N, W), or without a tape one block of its steps."""
    num_steps, n, width = shape
    only_h_saved = set(kernels.saved_buffers) <= {"M0"} and not kernels.separate_recurrent
    if width == h_after.shape[2] and only_h_saved and len(h_after) == num_steps:
        return h_after  # an Elman layer overwrites its input projection with its states
    block = max(1, _BLOCK_BYTES // (n * width * h_after.dtype.itemsize))
    return empty((num_steps if record_tape else min(num_steps, block), n, width), h_after.dtype)


def _forward_time_loop(
    xp: Namespace,
    saved: _FusedSavedArrays,
    cell: Cell,
    params: Params,
    reset_state: State,
    y: Array,
    reverse: bool,
    record_tape: bool,
) -> None:
    """Project the inputs block by block and run all steps; fill y and the states."""
    kernels, weight = saved.kernels, contiguous(params["weight_hh"])
    (num_steps, n), (width, hidden), item = saved.x.shape[:2], weight.shape, weight.dtype.itemsize
    values = _common_fields(saved, cell, params, reverse) | _biases(params, kernels.summed_gates * hidden, weight)
    values |= {"save": int(record_tape), "X": saved.gates} | {f"E{k}": contiguous(h) for k, h in enumerate(reset_state)}
    values["Y"] = None if y is saved.states_after[0] else y
    product = values["B"] = empty((n, width), weight.dtype) if kernels.separate_recurrent else saved.gates
    for letter, arrays in (("s", saved.states_before), ("m", saved.states_after)):
        values |= {f"{letter}{k}": _step_stride(a, num_steps) for k, a in enumerate(arrays)}
    h_address, h_step, u_address = address(saved.states_before[0]), values["s0"] * item, address(weight)
    out_address, out_step = address(product), 0 if kernels.separate_recurrent else n * width * item
    kernel, block_steps = raw_kernel(kernels.source, "forward_step"), len(saved.gates)
    with cublas_gemm(weight.dtype) as gemm:
        multiply = gemm.make_gemm((n, width, hidden), (False, True), not kernels.separate_recurrent)
        starts = range(0, num_steps, block_steps)
        for t0 in reversed(starts) if reverse else starts:
            t1 = min(t0 + block_steps, num_steps)
            project_inputs(gemm, xp, saved.gates[: t1 - t0], saved.x[t0:t1], params["weight_ih"])
            launch = make_launcher(kernel, kernels.forward_fields, values | {"first": t0}, n * hidden)
            for t in range(t1 - 1, t0 - 1, -1) if reverse else range(t0, t1):
                multiply(out_address + (t - t0) * out_step, h_address + t * h_step, u_address)
                launch(t)


def _step_stride(a: Array, num_steps: int) -> int:
    """Return the elements between two steps of a, or 0 if a holds a single step."""
    return int(a.shape[1] * a.shape[2]) if a.shape[0] == num_steps else 0


def _common_fields(saved: _FusedSavedArrays, cell: Cell, params: Params, reverse: bool) -> dict[str, Any]:
    """Return the argument fields that both kernels share."""
    (num_steps, n), (width, hidden) = saved.x.shape[:2], params["weight_hh"].shape
    values = {"T": num_steps, "N": n, "H": hidden, "W": width, "reverse": int(reverse)}
    values |= {"active": saved.active, "reset": saved.reset} | saved.extra_values
    for letter, arrays in (("S", saved.states_before), ("M", saved.states_after)):
        values |= {f"{letter}{k}": a for k, a in enumerate(arrays)}
    return values | {f"p{k}": contiguous(params[name]) for k, name in enumerate(cell.vectors)}


def _biases(params: Params, cut: int, like: Array) -> dict[str, Array]:
    """Return K = b_ih with the first `cut` elements of b_hh added, and L = b_hh, read from `cut` on."""
    b_ih, b_hh = params.get("bias_ih"), params.get("bias_hh")
    summed = zeros(like.shape[:1], like.dtype) if b_ih is None else copy(b_ih)
    if b_hh is not None:
        summed[:cut] += b_hh[:cut]
    return {"K": summed, "L": zeros(like.shape[:1], like.dtype) if b_hh is None else contiguous(b_hh)}


def project_inputs(gemm: CublasGemm, xp: Namespace, out: Array, x: Array, w: Array) -> None:
    """Compute out (T, N, W) = x w.T for all steps at once; gather columns of w if x holds class numbers."""
    if x.dtype.kind in "iu":
        take_rows(flatten_leading(xp, out), contiguous(w.T), x.reshape(-1))
    else:
        gemm.matmul(flatten_leading(xp, out), flatten_leading(xp, x), contiguous(w), rhs_transposed=True)


# --- backward


def backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None]
) -> tuple[Array | None, State, Sequence[Array | None], Params]:
    """Run backward as xprnn.kernels.dispatch.backward specifies."""
    saved: _FusedSavedArrays = tape.saved
    xp, params, weight = tape.xp, tape.params, tape.params["weight_hh"]
    with device_of(weight), cublas_gemm(weight.dtype) as gemm:
        shape, dtype = (*saved.x.shape[:2], weight.shape[0]), weight.dtype
        dxg = empty(shape, dtype)
        dhg = dxg if saved.kernels.dx_is_dh else empty(shape, dtype)
        dstate_out = [
            zeros(i.shape, dtype) if d is None else copy(d) for i, d in zip(tape.initial_state, dstate, strict=True)
        ]
        dreset_state: list[Array | None] = [None if saved.reset is None else zeros(d.shape, dtype) for d in dstate_out]
        vectors = [zeros(dstate_out[0].shape, dtype) for _ in tape.cell.vectors]
        _backward_time_loop(tape, gemm, {"X": dxg, "Y": dhg, "O": dy}, dstate_out, dreset_state, dstates, vectors)
        if saved.reset is not None:  # rows reset at the first step pass their cotangent to the reset state
            is_reset = saved.reset[-1 if tape.reverse else 0, :, None]
            dreset_state = [
                e + xp.where(is_reset, d, xp.zeros_like(d)) for e, d in zip(dreset_state, dstate_out, strict=True)
            ]
            dstate_out = [xp.where(is_reset, xp.zeros_like(d), d) for d in dstate_out]
        dx, grads = input_gradients(gemm, tape, saved.x, dxg)
        grads |= recurrent_gradients(gemm, tape, saved.states_before[0], dxg, dhg)
        grads |= {name: v.sum(axis=0) for name, v in zip(tape.cell.vectors, vectors, strict=True)}
    return dx, tuple(dstate_out), dreset_state, {name: grads[name] for name in params}


def _backward_time_loop(
    tape: Tape,
    gemm: CublasGemm,
    gate_arrays: dict[str, Array | None],
    dstate: Sequence[Array],
    dreset_state: Sequence[Array | None],
    dstates: Sequence[Array | None],
    dvectors: Sequence[Array],
) -> None:
    """Run all steps backward: fill the gate gradients X and Y, and leave the initial state's cotangent in `dstate`."""
    saved: _FusedSavedArrays = tape.saved
    weight, kernels, (num_steps, n) = contiguous(tape.params["weight_hh"]), saved.kernels, saved.x.shape[:2]
    width, hidden = weight.shape
    values = _common_fields(saved, tape.cell, tape.params, tape.reverse) | {"G": saved.gates}
    values |= {name: None if a is None else contiguous(a) for name, a in gate_arrays.items()}
    values |= {f"D{k}": d for k, d in enumerate(dstate)} | {f"E{k}": d for k, d in enumerate(dreset_state)}
    values |= {f"I{k}": None if d is None else contiguous(d) for k, d in enumerate(dstates)}
    values |= {f"P{k}": v for k, v in enumerate(dvectors)}
    launch = make_launcher(raw_kernel(kernels.source, "backward_step"), kernels.backward_fields, values, n * hidden)
    multiply = gemm.make_gemm((n, hidden, width), (False, False), True)
    d_address, u_address, dgates_address = address(dstate[0]), address(weight), address(values["Y"])
    step = n * width * weight.dtype.itemsize
    for t in range(num_steps) if tape.reverse else range(num_steps - 1, -1, -1):
        launch(t)
        multiply(d_address, dgates_address + t * step, u_address)


def recurrent_gradients(gemm: CublasGemm, tape: Tape, h_before: Array, dxg: Array, dhg: Array) -> Params:
    """Return the gradients of weight_hh and of the biases; h_before (T, N, H) is h before each step."""
    xp, weight = tape.xp, tape.params["weight_hh"]
    grads = {"weight_hh": empty(weight.shape, weight.dtype)}
    gemm.matmul_lhs_transposed(grads["weight_hh"], flatten_leading(xp, dhg), flatten_leading(xp, h_before))
    if "bias_ih" in tape.params:
        grads["bias_ih"] = flatten_leading(xp, dxg).sum(axis=0)
        grads["bias_hh"] = copy(grads["bias_ih"]) if dhg is dxg else flatten_leading(xp, dhg).sum(axis=0)
    return grads


def input_gradients(gemm: CublasGemm, tape: Tape, x: Array, dxg: Array) -> tuple[Array | None, Params]:
    """Return dx (None for class numbers) and the gradient of weight_ih; x (T, N, ...) is the saved input."""
    xp, w, d = tape.xp, contiguous(tape.params["weight_ih"]), flatten_leading(tape.xp, dxg)
    if x.dtype.kind in "iu":

        def sum_columns(ids: Array, rows: Array, num_classes: int) -> Array:
            return segment_sum(xp, ids, rows, num_classes).T

        options: dict[str, Any] = {
            "sparse": tape.sparse,
            "active": tape.step_mask.active,
            "segment_sum_fn": sum_columns,
        }
        return None, {"weight_ih": lookup_backward(xp, x.reshape(-1), d, w.shape[1], **options)}
    dx, dw = empty(x.shape, x.dtype), empty(w.shape, w.dtype)
    gemm.matmul(flatten_leading(xp, dx), d, w)
    gemm.matmul_lhs_transposed(dw, d, flatten_leading(xp, x))
    return dx, {"weight_ih": dw}
