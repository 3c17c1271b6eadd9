"""Backward driver: the adjoint of forward.py's time loop, the same for every cell.

The steps run in the reverse order. At each step the cell's pointwise function turns the cotangents of the states after
the step into those of the gates and of the states before it; the product with weight_hh adds the path through h U'.
After the steps of a block, its contributions to dx and to all weight gradients are computed by products over the block.

This module imports numba. Import it only when a kernel is about to run.
"""

from numba import njit

from xprnn.kernels.jit.forward import copy_block, is_active, num_rows, run_rows, set_states
from xprnn.kernels.jit.products import add_lhs_transposed, multiply, pack, pack_lhs, pack_rhs
from xprnn.kernels.jit.record import (
    AFTER_STRIDE,
    DRESET,
    DSTATE_IN,
    DSTATE_OUT,
    EXTRA,
    INJECTED,
    INJECTED_BLOCK,
    INJECTED_ROW,
    INJECTED_STEP,
    INJECTED_STRIDE,
    INJECTED_UNIT,
    RESET_BEFORE,
    STATES,
    STEP_EXTRA,
    STEP_INJECTED,
    STEP_INJECTED_ROW,
    get,
    put,
    scan_record,
)
from xprnn.kernels.jit.simd import ANY_SCOPE, call_address, load, pointer_like, store, uint8_pointer

__all__ = ["backward"]

_compile = njit(fastmath={"contract"}, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


@_compile
def backward(address, zero):  # type: ignore[no-untyped-def]
    """Run the adjoint of the scan of the record at `address`; `zero` has the type of the arrays' elements."""
    args = scan_record(address)
    _pack_weights(args, zero)
    T, block_steps, reverse = args.T, args.block_steps, args.reverse
    for b in range(0, T, block_steps):
        m = min(block_steps, T - b)
        t0 = b if reverse else T - b - m
        _copy_injected(args, t0, m, zero)
        first = t0 if reverse else t0 + m - 1
        if args.active == 0 and args.reset == 0 and m > 1 and args.fused:
            _set_step(args, first, first - t0)
            call_address(args.backward_rows, (address, 0, args.R, m))
            if m % 2 == 1:
                _exchange_cotangents(args)
        else:
            for i in range(m):
                t = first + i if reverse else first - i
                _set_step(args, t, t - t0)
                _step(args, address, t, t - t0, zero)
        _block_gradients(args, t0, m, b == 0, zero)


@_compile
def _pack_weights(args, zero):  # type: ignore[no-untyped-def]
    """Pack weight_ih for dx, and weight_hh for the cotangent of h."""
    gemm, W = args.gemm, args.W
    if args.D > 0:
        pack(gemm, 0, args.weight_ih, args.weight_ih_row, args.weight_ih_column, W, args.D, args.packed_ih, 0)
    row, column, first = args.weight_hh_row, args.weight_hh_column, args.first_width if args.has_pregates else W
    strategy, stride = args.recurrent_strategy, args.packed_hh_stride
    pack(gemm, strategy, args.weight_hh, row, column, first, args.P, args.packed_hh, stride)
    if first < W:
        source, to = args.weight_hh + first * row * args.item, args.packed_hh + first * stride * args.item
        pack(gemm, strategy, source, row, column, W - first, args.P, to, stride)
    if args.has_projection:
        row, column = args.weight_hr_row, args.weight_hr_column
        pack(gemm, 0, args.weight_hr, row, column, args.P, args.H, args.packed_hr, 0)


@_compile
def _copy_injected(args, t0, m, zero):  # type: ignore[no-untyped-def]
    """Copy a block of the caller's cotangents of states whose units are not adjacent in memory."""
    for k in range(args.num_states):
        if get(args, INJECTED_BLOCK, k) != 0:
            source = get(args, INJECTED, k) + t0 * get(args, INJECTED_STEP, k) * args.item
            step, row, width = get(args, INJECTED_STEP, k), get(args, INJECTED_ROW, k), args.H if k else args.P
            copy_block(
                source, step, row, get(args, INJECTED_UNIT, k), get(args, INJECTED_BLOCK, k), m, args.R, width, zero
            )


# --- one step


@_compile
def _set_step(args, t, s):  # type: ignore[no-untyped-def]
    """Point the record at step t, the s-th of its block."""
    item, saved, row = args.item, t * args.N, s * args.R if args.D > 0 else t * args.N
    args.step_dgates_x = args.dgates_x + row * args.x_stride * item
    args.step_dgates_h = args.dgates_h + row * args.x_stride * item
    args.step_gates = args.gates + saved * args.W * item
    args.step_gated = args.gated_state + saved * args.H * item
    args.step_unprojected = args.unprojected + saved * args.H * item
    for k in range(args.num_extra):
        put(args, STEP_EXTRA, k, get(args, EXTRA, k) + saved * args.H * item)
    for k in range(args.num_states):
        width = args.H if k else args.P
        if get(args, INJECTED_BLOCK, k) != 0:
            put(args, STEP_INJECTED, k, get(args, INJECTED_BLOCK, k) + s * args.R * width * item)
            put(args, STEP_INJECTED_ROW, k, width)
        elif get(args, INJECTED, k) != 0:
            put(args, STEP_INJECTED, k, get(args, INJECTED, k) + t * get(args, INJECTED_STEP, k) * item)
            put(args, STEP_INJECTED_ROW, k, get(args, INJECTED_ROW, k))
        else:
            put(args, STEP_INJECTED, k, args.zeros)
            put(args, STEP_INJECTED_ROW, k, 0)
    set_states(args, t)
    _set_strides(args)


@_compile
def _set_strides(args):  # type: ignore[no-untyped-def]
    """Set the distances, in elements, from a step to the one that is processed next."""
    sign = 1 if args.reverse else -1
    args.sums_stride = sign * (args.R if args.D > 0 else args.N) * args.x_stride
    args.gates_stride, args.units_stride = sign * args.N * args.W, sign * args.N * args.H
    for k in range(args.num_states):
        width = args.H if k else args.P
        put(args, AFTER_STRIDE, k, sign * args.N * width)
        stride = 0 if get(args, INJECTED, k) == 0 else get(args, INJECTED_STEP, k)
        put(args, INJECTED_STRIDE, k, sign * (args.R * width if get(args, INJECTED_BLOCK, k) != 0 else stride))


@_compile
def _carry_inactive(args, t, zero):  # type: ignore[no-untyped-def]
    """In inactive rows, the cotangents of the states pass unchanged, and those of the gates are zero.

    In active rows, the start of the product that adds to the cotangent of h is set to zero if h has no other path.
    """
    for k in range(args.num_states):
        stride, width = (args.H, args.H) if k else (args.h_padded, args.P)
        incoming, outgoing = pointer_like(get(args, DSTATE_IN, k), zero), pointer_like(get(args, DSTATE_OUT, k), zero)
        injected = pointer_like(get(args, STEP_INJECTED, k), zero)
        for r in range(args.R):
            for j in range(width):
                if not is_active(args, t, r):
                    d = load(incoming, r * stride + j, 0) + load(injected, r * get(args, STEP_INJECTED_ROW, k) + j, 0)
                    store(outgoing, r * stride + j, 1, d)
                elif k == 0:
                    store(outgoing, r * stride + j, 1, zero)
    dx, dh = pointer_like(args.step_dgates_x, zero), pointer_like(args.step_dgates_h, zero)
    for r in range(args.R):
        if not is_active(args, t, r):
            for j in range(args.W):
                store(dx, r * args.x_stride + j, ANY_SCOPE, zero)
                store(dh, r * args.x_stride + j, ANY_SCOPE, zero)


@_compile
def _unproject(args, t, s, n, zero):  # type: ignore[no-untyped-def]
    """Set dh_block to the cotangent of the projected h, and dunprojected to that of h before its projection."""
    row = args.dh_block + s * args.R * args.P * args.item
    out, incoming = pointer_like(row, zero), pointer_like(get(args, DSTATE_IN, 0), zero)
    injected, injected_row = pointer_like(get(args, STEP_INJECTED, 0), zero), get(args, STEP_INJECTED_ROW, 0)
    for r in range(args.R):
        active = is_active(args, t, r)
        for j in range(args.P):
            d = load(incoming, r * args.h_padded + j, 0) + load(injected, r * injected_row + j, 0)
            store(out, r * args.P + j, 1, d if active else zero)
    multiply(
        args.gemm, 0, row, args.P, args.packed_hr, 0, args.zeros, 0,
        args.dunprojected, args.h_padded, n, args.P, args.H, args.edge,
    )  # fmt: skip


@_compile
def _reset_cotangents(args, t, zero):  # type: ignore[no-untyped-def]
    """Move the cotangents of rows that are reset before step t to those of the reset states."""
    reset = uint8_pointer(args.reset)
    for k in range(args.num_states):
        stride, width = (args.H, args.H) if k else (args.h_padded, args.P)
        d, dreset = pointer_like(get(args, DSTATE_OUT, k), zero), pointer_like(get(args, DRESET, k), zero)
        for r in range(args.R):
            if load(reset, t * args.N + r, ANY_SCOPE) != 0:
                for j in range(width):
                    total = load(dreset, r * width + j, 0) + load(d, r * stride + j, 1)
                    store(dreset, r * width + j, 0, total)
                    store(d, r * stride + j, 1, zero)


@_compile
def _step(args, address, t, s, zero):  # type: ignore[no-untyped-def]
    """Compute the adjoint of step t, the s-th of its block."""
    n = num_rows(args, t)
    if args.active != 0:
        _carry_inactive(args, t, zero)
    dh_in = get(args, DSTATE_IN, 0)
    if args.has_projection:
        _unproject(args, t, s, n, zero)
        put(args, DSTATE_IN, 0, args.dunprojected)
        put(args, STEP_INJECTED, 0, args.zeros)
        put(args, STEP_INJECTED_ROW, 0, 0)
    run_rows(args, address, args.backward_rows, t, n)
    put(args, DSTATE_IN, 0, dh_in)
    item, strategy, stride, inner = args.item, args.recurrent_strategy, args.packed_hh_stride, args.W
    if args.has_pregates:
        inner = args.first_width
        a, weight = args.step_dgates_h + inner * item, args.packed_hh + inner * stride * item
        multiply(
            args.gemm, strategy, a, args.x_stride, weight, stride, args.zeros, 0,
            args.dgated, args.h_padded, n, args.W - inner, stride, args.edge,
        )  # fmt: skip
        run_rows(args, address, args.pregate_backward_rows, t, n)
    out = get(args, DSTATE_OUT, 0)
    start, lds = (out, args.h_padded) if args.has_direct_path or args.active != 0 else (args.zeros, 0)
    multiply(
        args.gemm, strategy, args.step_dgates_h, args.x_stride, args.packed_hh, stride, start, lds,
        out, args.h_padded, n, inner, stride, args.edge,
    )  # fmt: skip
    if args.reset != 0:
        _reset_cotangents(args, t, zero)
    _exchange_cotangents(args)


@_compile
def _exchange_cotangents(args):  # type: ignore[no-untyped-def]
    """Make the cotangents of the states before a step those after the previous one."""
    for k in range(args.num_states):
        incoming = get(args, DSTATE_IN, k)
        put(args, DSTATE_IN, k, get(args, DSTATE_OUT, k))
        put(args, DSTATE_OUT, k, incoming)


# --- gradients of a block


@_compile
def _block_gradients(args, t0, m, first, zero):  # type: ignore[no-untyped-def]
    """Compute dx of a block, and add its contributions to the gradients of weights and biases."""
    first_width = args.first_width if args.has_pregates else args.W
    if args.D > 0:
        _input_gradient(args, t0, m, zero)
    _pack_cotangents(args, args.dgates_x, args.dbias_ih, t0, m)
    if args.D > 0:
        _pack_inputs(args, t0, m)
        _add_gradient(args, m, args.dweight_ih, args.D, first, 0, first_width)
        if args.has_pregates:
            _add_gradient(args, m, args.dweight_ih, args.D, first, first_width, args.W)
    if args.dgates_h != args.dgates_x:
        _pack_cotangents(args, args.dgates_h, args.dbias_hh, t0, m)
    before = (t0 + 1 if args.reverse else t0) * args.N * args.P * args.item
    h = (
        get(args, RESET_BEFORE, 0) + t0 * args.N * args.P * args.item
        if args.reset != 0
        else get(args, STATES, 0) + before
    )
    _pack_rows(args, h, args.P, m)
    _add_gradient(args, m, args.dweight_hh, args.P, first, 0, first_width)
    if args.has_pregates:
        _pack_rows(args, args.gated_state + t0 * args.N * args.H * args.item, args.H, m)
        _add_gradient(args, m, args.dweight_hh, args.P, first, first_width, args.W)
    if args.has_projection:
        pack_lhs(args.gemm, args.dh_block, args.P, m * args.R, args.P, args.packed_lhs, args.capacity, 0, args.dbias_hr)
        _pack_rows(args, args.unprojected + t0 * args.N * args.H * args.item, args.H, m)
        add_lhs_transposed(
            args.gemm, args.packed_lhs, args.packed_rhs, m * args.R, args.capacity, args.P, args.H,
            args.dweight_hr, first, args.zeros, args.edge,
        )  # fmt: skip


@_compile
def _input_gradient(args, t0, m, zero):  # type: ignore[no-untyped-def]
    """dx = dgates_x W for a block, or added to dx."""
    blocks, rows = (1, m * args.R) if args.R == args.N else (m, args.R)
    for s in range(blocks):
        out = args.dx + (t0 + s) * args.N * args.D * args.item
        start, lds = (out, args.D) if args.add_to_dx else (args.zeros, 0)
        a = args.dgates_x + s * args.R * args.x_stride * args.item
        multiply(
            args.gemm, 0, a, args.x_stride, args.packed_ih, 0, start, lds,
            out, args.D, rows, args.W, args.D, args.edge,
        )  # fmt: skip


@_compile
def _pack_cotangents(args, dgates, sums, t0, m):  # type: ignore[no-untyped-def]
    """Pack a block of dgates_x or dgates_h, one gate group after the other, and add its column sums to `sums`."""
    blocks, rows = (1, m * args.R) if args.D > 0 or args.R == args.N else (m, args.R)
    first_width = args.first_width if args.has_pregates else args.W
    for s in range(blocks):
        row = s * args.R if args.D > 0 else (t0 + s) * args.N
        a = dgates + row * args.x_stride * args.item
        pack_lhs(args.gemm, a, args.x_stride, rows, first_width, args.packed_lhs, args.capacity, s * args.R, sums)
        if first_width < args.W:
            skip = first_width * args.item
            to = args.packed_lhs + args.first_packed * args.capacity * args.item
            pack_lhs(
                args.gemm, a + skip, args.x_stride, rows, args.W - first_width, to, args.capacity, s * args.R,
                sums + skip,
            )  # fmt: skip


@_compile
def _pack_inputs(args, t0, m):  # type: ignore[no-untyped-def]
    """Pack a block of x."""
    blocks, rows = (1, m * args.R) if args.x_step == args.R * args.x_row else (m, args.R)
    for s in range(blocks):
        x = args.x + (t0 + s) * args.x_step * args.item
        pack_rhs(args.gemm, x, args.x_row, args.x_unit, rows, args.D, args.packed_rhs, args.capacity, s * args.R)


@_compile
def _pack_rows(args, a, width, m):  # type: ignore[no-untyped-def]
    """Pack a block of an array (T,N,width), from its first step at address `a`."""
    blocks, rows = (1, m * args.R) if args.R == args.N else (m, args.R)
    for s in range(blocks):
        source = a + s * args.N * width * args.item
        pack_rhs(args.gemm, source, width, 1, rows, width, args.packed_rhs, args.capacity, s * args.R)


@_compile
def _add_gradient(args, m, out, columns, first, start, stop):  # type: ignore[no-untyped-def]
    """Add the product of the packed factors to the rows start to stop - 1 of a gradient (W, columns)."""
    packed = args.packed_lhs + (args.first_packed * args.capacity * args.item if start else 0)
    add_lhs_transposed(
        args.gemm, packed, args.packed_rhs, m * args.R, args.capacity, stop - start, columns,
        out + start * columns * args.item, first, args.zeros, args.edge,
    )  # fmt: skip
