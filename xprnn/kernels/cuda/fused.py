"""The scan on CuPy: two launches a step, the recurrent product and the cell's printed kernel; everything else outside.

All memory is taken before the time loop, and nothing in it waits for the device. The products of the input and of the
weights' gradients are one each, over all T*N rows. Letters and arrays are those of source.py.
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

__all__ = ["NAME", "forward", "input_gradients", "project_inputs"]

NAME = "CUDA fused steps"

_BLOCK_BYTES = 1 << 28  # of the projection, where no tape needs it whole


class _FusedSavedArrays(NamedTuple):
    """What backward needs: arrays (T, N, .)."""

    kernels: PointwiseKernels
    x: Array
    active: Array | None
    reset: Array | None
    gates: Array  # the projection, overwritten by the first saved values
    extra_values: dict[str, Array]  # the other saved values
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
    """See xprnn.kernels.dispatch.forward, which is the specification; `name` is what the tape calls this."""
    with device_of(x):
        kept = _allocate(kernels, cell, params, x, step_mask, reverse, record_tape)
        first, last = (-1, 0) if reverse else (0, -1)
        for s, h, b in zip(state, reset_state, kept.states_before, strict=True):
            b[first, ...] = s if kept.reset is None else xp.where(kept.reset[first, :, None], h, s)
        # Whoever works in place on what comes out must not reach the tape.
        apart = record_tape or kept.active is not None
        y = empty((*x.shape[:2], state[0].shape[1]), state[0].dtype) if apart else kept.states_after[0]
        _forward_time_loop(xp, kept, cell, params, reset_state, y, reverse, record_tape)
        final = tuple(copy(a[last, ...]) for a in kept.states_after)
    if not record_tape:
        return y, final, None

    def states() -> State:
        return tuple(copy(a) for a in kept.states_after)

    return (
        y,
        final,
        Tape(backward, xp, cell, params, x, state, reset_state, step_mask, reverse, states, kept, kernel_name),
    )


def _allocate(
    printed: PointwiseKernels, cell: Cell, params: Params, x: Array, steps: StepMask, reverse: bool, keep: bool
) -> _FusedSavedArrays:
    """All memory with a step axis; of one step, or of some steps of the projection, where no tape is kept."""
    (count, n), (width, hidden), dtype = x.shape[:2], params["weight_hh"].shape, params["weight_hh"].dtype
    before, after = [], []
    for k in range(len(cell.states)):
        # State 0 without a tape: y itself, where it is 0 nowhere.
        length = count if keep or (k == 0 and steps.active is None) else 0
        if steps.reset is not None:
            before.append(empty((count if keep else 1, n, hidden), dtype))
            after.append(empty((max(1, length), n, hidden), dtype))
            continue
        memory = empty((length + 1, n, hidden), dtype)
        before.append(memory[1:] if reverse and length else memory[: max(1, length)])
        after.append(memory[1:] if length and not reverse else memory[: max(1, length)])
    spare = {slot: empty((count, n, hidden), dtype) for slot in printed.saved_buffers if slot[0] == "V" and keep}
    if (
        width == hidden
        and set(printed.saved_buffers) <= {"M0"}
        and not printed.separate_recurrent
        and len(after[0]) == count
    ):
        gates = after[0]  # an Elman layer's projection is written where its states will be
    else:
        block = max(1, _BLOCK_BYTES // (n * width * dtype.itemsize))
        gates = empty((count if keep else min(count, block), n, width), dtype)
    active, reset = (None if a is None else contiguous(a) for a in (steps.active, steps.reset))
    return _FusedSavedArrays(printed, contiguous(x), active, reset, gates, spare, tuple(before), tuple(after))


def _forward_time_loop(
    xp: Namespace, kept: _FusedSavedArrays, cell: Cell, params: Params, home: State, y: Array, reverse: bool, keep: bool
) -> None:
    """The time loop."""
    printed, u = kept.kernels, contiguous(params["weight_hh"])
    (count, n), (width, hidden), item = kept.x.shape[:2], u.shape, u.dtype.itemsize
    values = _common_fields(kept, cell, params, reverse) | _biases(params, printed.summed_gates * hidden, u)
    values |= {"keep": int(keep), "X": kept.gates} | {f"E{k}": contiguous(h) for k, h in enumerate(home)}
    values["Y"] = None if y is kept.states_after[0] else y
    into = values["B"] = empty((n, width), u.dtype) if printed.separate_recurrent else kept.gates
    for letter, arrays in (("s", kept.states_before), ("m", kept.states_after)):
        values |= {f"{letter}{k}": _step_stride(a, count) for k, a in enumerate(arrays)}
    h_at, h_step, u_at = address(kept.states_before[0]), values["s0"] * item, address(u)
    out_at, out_step = address(into), 0 if printed.separate_recurrent else n * width * item
    run, size = raw_kernel(printed.source, "forward_step"), len(kept.gates)
    with cublas_gemm(u.dtype) as p:
        multiply = p.make_gemm((n, width, hidden), (False, True), not printed.separate_recurrent)
        starts = range(0, count, size)
        for t0 in reversed(starts) if reverse else starts:
            t1 = min(t0 + size, count)
            project_inputs(p, xp, kept.gates[: t1 - t0], kept.x[t0:t1], params["weight_ih"])
            launch = make_launcher(run, printed.forward_fields, values | {"from": t0}, n * hidden)
            for t in range(t1 - 1, t0 - 1, -1) if reverse else range(t0, t1):
                multiply(out_at + (t - t0) * out_step, h_at + t * h_step, u_at)
                launch(t)


def _step_stride(a: Array, count: int) -> int:
    """How many numbers lie between two steps of a: 0 where it holds one step."""
    return int(a.shape[1] * a.shape[2]) if a.shape[0] == count else 0


def _common_fields(kept: _FusedSavedArrays, cell: Cell, params: Params, reverse: bool) -> dict[str, Any]:
    """The fields that both kernels have."""
    (count, n), (width, hidden) = kept.x.shape[:2], params["weight_hh"].shape
    values = {"T": count, "N": n, "H": hidden, "W": width, "turned": int(reverse)}
    values |= {"active": kept.active, "reset": kept.reset} | kept.extra_values
    for letter, arrays in (("S", kept.states_before), ("M", kept.states_after)):
        values |= {f"{letter}{k}": a for k, a in enumerate(arrays)}
    return values | {f"p{k}": contiguous(params[name]) for k, name in enumerate(cell.vectors)}


def _biases(params: Params, cut: int, like: Array) -> dict[str, Array]:
    """b_ih, plus b_hh up to `cut`, as K; b_hh as L, of which the rest is read."""
    b_ih, b_hh = params.get("bias_ih"), params.get("bias_hh")
    first = zeros(like.shape[:1], like.dtype) if b_ih is None else copy(b_ih)
    if b_hh is not None:
        first[:cut] += b_hh[:cut]
    return {"K": first, "L": zeros(like.shape[:1], like.dtype) if b_hh is None else contiguous(b_hh)}


def project_inputs(p: CublasGemm, xp: Namespace, out: Array, x: Array, w: Array) -> None:
    """out (T, N, W) = x W', for all steps at once; a look-up where x holds class numbers."""
    if x.dtype.kind in "iu":
        take_rows(flatten_leading(xp, out), contiguous(w.T), x.reshape(-1))
    else:
        p.matmul(flatten_leading(xp, out), flatten_leading(xp, x), contiguous(w), rhs_transposed=True)


# --- and its adjoint


def backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None]
) -> tuple[Array | None, State, Sequence[Array | None], Params]:
    """See xprnn.kernels.dispatch.backward."""
    kept: _FusedSavedArrays = tape.saved
    xp, params, u = tape.xp, tape.params, tape.params["weight_hh"]
    with device_of(u), cublas_gemm(u.dtype) as p:
        shape, dtype = (*kept.x.shape[:2], u.shape[0]), u.dtype
        dxg = empty(shape, dtype)
        dhg = dxg if kept.kernels.dx_is_dh else empty(shape, dtype)
        ds = [zeros(i.shape, dtype) if d is None else copy(d) for i, d in zip(tape.initial_state, dstate, strict=True)]
        dhome: list[Array | None] = [None if kept.reset is None else zeros(d.shape, dtype) for d in ds]
        vectors = [zeros(ds[0].shape, dtype) for _ in tape.cell.vectors]
        _backward_time_loop(tape, p, {"X": dxg, "Y": dhg, "O": dy}, ds, dhome, dstates, vectors)
        if kept.reset is not None:  # what the first step was reset to
            row = kept.reset[-1 if tape.reverse else 0, :, None]
            dhome = [e + xp.where(row, d, xp.zeros_like(d)) for e, d in zip(dhome, ds, strict=True)]
            ds = [xp.where(row, xp.zeros_like(d), d) for d in ds]
        dx, grads = input_gradients(p, tape, kept.x, dxg)
        du = grads["weight_hh"] = empty(u.shape, dtype)
        p.matmul_lhs_transposed(du, flatten_leading(xp, dhg), flatten_leading(xp, kept.states_before[0]))
        if "bias_ih" in params:
            grads["bias_ih"] = flatten_leading(xp, dxg).sum(axis=0)
            grads["bias_hh"] = copy(grads["bias_ih"]) if dhg is dxg else flatten_leading(xp, dhg).sum(axis=0)
        grads |= {name: v.sum(axis=0) for name, v in zip(tape.cell.vectors, vectors, strict=True)}
    return dx, tuple(ds), dhome, {name: grads[name] for name in params}


def _backward_time_loop(
    tape: Tape,
    p: CublasGemm,
    given: dict[str, Array | None],
    ds: Sequence[Array],
    dhome: Sequence[Array | None],
    dstates: Sequence[Array | None],
    vectors: Sequence[Array],
) -> None:
    """The time loop, in reverse order: fills dx and dh of the gates, and leaves the first step's adjoints in `ds`."""
    kept: _FusedSavedArrays = tape.saved
    u, printed, (count, n) = contiguous(tape.params["weight_hh"]), kept.kernels, kept.x.shape[:2]
    width, hidden = u.shape
    values = _common_fields(kept, tape.cell, tape.params, tape.reverse) | {"G": kept.gates}
    values |= {name: None if a is None else contiguous(a) for name, a in given.items()}
    values |= {f"D{k}": d for k, d in enumerate(ds)} | {f"E{k}": d for k, d in enumerate(dhome)}
    values |= {f"I{k}": None if d is None else contiguous(d) for k, d in enumerate(dstates)}
    values |= {f"P{k}": v for k, v in enumerate(vectors)}
    launch = make_launcher(raw_kernel(printed.source, "backward_step"), printed.backward_fields, values, n * hidden)
    multiply = p.make_gemm((n, hidden, width), (False, False), True)
    d_at, u_at, from_at = address(ds[0]), address(u), address(values["Y"])
    step = n * width * u.dtype.itemsize
    for t in range(count) if tape.reverse else range(count - 1, -1, -1):
        launch(t)
        multiply(d_at, from_at + t * step, u_at)


def input_gradients(p: CublasGemm, tape: Tape, x: Array, dxg: Array) -> tuple[Array | None, Params]:
    """dx (None for class numbers), and the gradient of weight_ih; x (T, N, .) is the tape's."""
    xp, w, d = tape.xp, contiguous(tape.params["weight_ih"]), flatten_leading(tape.xp, dxg)
    if x.dtype.kind in "iu":

        def total(ids: Array, rows: Array, count: int) -> Array:
            return segment_sum(xp, ids, rows, count).T

        wanted: dict[str, Any] = {"sparse": tape.sparse, "active": tape.step_mask.active, "segment_sum_fn": total}
        return None, {"weight_ih": lookup_backward(xp, x.reshape(-1), d, w.shape[1], **wanted)}
    dx, dw = empty(x.shape, x.dtype), empty(w.shape, w.dtype)
    p.matmul(flatten_leading(xp, dx), d, w)
    p.matmul_lhs_transposed(dw, d, flatten_leading(xp, x))
    return dx, {"weight_ih": dw}
