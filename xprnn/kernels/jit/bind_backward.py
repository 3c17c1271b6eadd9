"""Entry point of a compiled backward pass; see bind.py.

This module imports numba. Import it only when a kernel is about to run.
"""

from numba import njit

from xprnn.kernels.jit.bind import (
    LINE,
    MAX_ROWS_WORK,
    after,
    allocate,
    fill_zero,
    num_features,
    pad,
    set_input,
    set_masks,
    set_projection,
    set_sizes,
    set_vectors,
    set_weights,
    tape_layout,
)
from xprnn.kernels.jit.gemm import TILE_ROWS, TILE_VECTORS
from xprnn.kernels.jit.products import PANELS, ROWS
from xprnn.kernels.jit.record import (
    DRESET,
    DSTATE_IN,
    DSTATE_OUT,
    DVECTORS,
    INJECTED,
    INJECTED_BLOCK,
    INJECTED_ROW,
    INJECTED_STEP,
    INJECTED_UNIT,
    STATES,
    get,
    put,
    scan_record,
)
from xprnn.kernels.jit.simd import ANY_SCOPE, call_address, data_address, load, pointer_like, store

__all__ = ["backward"]

BLOCK_ROWS = 256  # rows of a block, whose contributions to the weight gradients are added at once
CACHE_ALIAS_BYTES = 1 << 11  # rows this far apart compete for the same few sets of the first-level cache
_compile = njit(fastmath={"contract"}, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


@_compile
def _backward_layout(args, base):  # type: ignore[no-untyped-def]
    """Place the workspace of a backward pass from address `base` on; return its size in bytes."""
    item, R, W, P, H, lanes, at = args.item, args.R, args.W, args.P, args.H, args.lanes, base
    rows, d_padded, hidden_padded = args.capacity, pad(args.D, lanes), pad(H, lanes)
    widest = max(args.D, hidden_padded, TILE_ROWS * TILE_VECTORS * lanes)
    args.edge, args.zeros = at, at + TILE_ROWS * TILE_VECTORS * lanes * item
    at = after(at, TILE_ROWS * TILE_VECTORS * lanes + widest, item)
    for k in range(args.num_states):
        put(args, DSTATE_IN, k, at)
        at = after(at, R * (H if k else args.h_padded), item)
        put(args, DSTATE_OUT, k, at)
        at = after(at, R * (H if k else args.h_padded), item)
        if get(args, INJECTED_BLOCK, k) != 0:
            put(args, INJECTED_BLOCK, k, at)
            at = after(at, rows * (H if k else P), item)
    args.packed_ih = at
    at = after(at, W * d_padded, item)
    args.packed_hh = at
    at = after(at, W * args.packed_hh_stride, item)
    args.packed_lhs = at
    at = after(at, (W + 2 * TILE_ROWS) * rows, item)
    args.packed_rhs = at
    at = after(at, rows * max(d_padded, hidden_padded), item)
    if args.D > 0:
        args.dgates_x = args.dgates_h = at
        at = after(at, rows * args.x_stride, item)
        if not args.dx_is_dh:
            args.dgates_h = at
            at = after(at, rows * args.x_stride, item)
    args.dgated = at
    at = after(at, R * args.h_padded * args.has_pregates, item)
    args.packed_hr = at
    at = after(at, P * hidden_padded * args.has_projection, item)
    args.dh_block = at
    at = after(at, rows * P * args.has_projection, item)
    args.dunprojected = at
    at = after(at, R * args.h_padded * args.has_projection, item)
    args.dbias_hr = at
    at = after(at, P * args.has_projection, item)
    return at - base


@_compile
def _set_backward_sizes(args):  # type: ignore[no-untyped-def]
    """Set the sizes of backward's workspace, and how it multiplies by weight_hh."""
    W, H = args.W, args.H
    args.h_padded = pad(max(H, args.P), args.lanes)
    args.block_steps = max(1, min(args.T, -(-BLOCK_ROWS // max(1, args.R))))
    args.capacity = args.block_steps * args.R
    skip = (LINE >> args.shift) * (args.D > 0 and W * args.item % CACHE_ALIAS_BYTES == 0)
    args.x_stride = W + skip
    args.first_packed = -(-args.first_width // TILE_ROWS) * TILE_ROWS
    args.packed_hh_stride = pad(args.P, args.lanes)
    args.recurrent_strategy = ROWS if args.R * W * args.P <= MAX_ROWS_WORK else PANELS


@_compile
def _set_injected(args, k, d):  # type: ignore[no-untyped-def]
    """Set the caller's cotangent (T, N, .) of state k after every step; of size 0 if it is zero."""
    if d.size:
        put(args, INJECTED, k, data_address(d) + args.row_offset * d.strides[1])
        put(args, INJECTED_STEP, k, d.strides[0] >> args.shift)
        put(args, INJECTED_ROW, k, d.strides[1] >> args.shift)
        unit = d.strides[2] >> args.shift if d.shape[2] > 1 else 1
        put(args, INJECTED_UNIT, k, unit)
        put(args, INJECTED_BLOCK, k, unit != 1)  # _backward_layout replaces a 1 by an address


@_compile
def _start_cotangents(args, layer, dfinal, zero):  # type: ignore[no-untyped-def]
    """Set the running cotangents to those of the final states; of size 0 if one is zero."""
    for k in range(args.num_states):
        d = dfinal[k]
        stride, width = (args.H, args.H) if k else (args.h_padded, args.P)
        a = pointer_like(get(args, DSTATE_IN, k), zero)
        for r in range(args.R):
            for j in range(width):
                store(a, r * stride + j, ANY_SCOPE, d[layer, args.row_offset + r, j] if d.size else zero)
            for j in range(width, stride):
                store(a, r * stride + j, ANY_SCOPE, zero)


@_compile
def backward(  # type: ignore[no-untyped-def]
    template, layer, x, weight_ih, weight_hh, vectors, output, saved, dy, dfinal, dx, gradients, dinitial,
    weight_hr, active, reset, injected, dreset, first_row, rows, add_to_dx,
):  # fmt: skip
    """Run the adjoint of `forward` over the rows first_row to first_row + rows - 1.

    Args:
        template to saved, weight_hr, active, reset: as in `forward`.
        dy: (T, N, P), or of size 0: the cotangent of h after every step.
        dfinal: tuple of (L, N, .), or of size 0: the cotangents of the final states.
        dx: (T, N, D), written; for class numbers (1 or 2, T, N, W), the cotangents of x W' and, if it differs, of h U'.
        gradients: tuple of those of weight_ih (W, D), weight_hh, bias_ih, bias_hh, weight_hr, and (V, N, H) for the
            cell's vectors, written; the biases and the vectors must be zero before.
        dinitial: tuple of (L, N, .), written: the cotangents of the initial states.
        injected: tuple of (T, N, .), or of size 0: cotangents of the other states after every step.
        dreset: tuple of (N, .), the cotangents of the reset states; must be zero before.
        add_to_dx: True if dx is added to the array instead of written.
    """
    records = template.copy()
    args, zero = scan_record(data_address(records)), weight_hh.dtype.type(0)
    T, N, P = output.shape[0] - 1, output.shape[1], output.shape[2]
    H = weight_hr.shape[1] if args.has_projection else P
    set_sizes(args, T, N, rows, num_features(x), H, P)
    args.row_offset, args.add_to_dx = first_row, add_to_dx
    if not (set_weights(args, weight_ih, weight_hh, gradients[2], gradients[3]) and set_vectors(args, vectors)):
        return 1
    if dy.size and (dy.shape[0] != T or dy.shape[1] != N or dy.shape[2] != P):
        return 1
    if num_features(x) > 0:
        set_input(args, x, weight_ih.shape[1])
    if args.has_projection:
        set_projection(args, weight_hr)
    set_masks(args, active, reset)
    start = data_address(saved)
    tape_layout(args, start + -start % LINE, reset.size > 0)
    put(args, STATES, 0, data_address(output) + first_row * P * args.item)
    _set_injected(args, 0, dy)
    for k in range(1, args.num_states):
        _set_injected(args, k, injected[k - 1])
    for k in range(args.num_states):
        d = dreset[k]
        put(args, DRESET, k, data_address(d) + first_row * d.strides[0])
    return _run_backward(records, layer, dfinal, dx, gradients, dinitial, zero)


@_compile
def _run_backward(records, layer, dfinal, dx, gradients, dinitial, zero):  # type: ignore[no-untyped-def]
    """Set the outputs of the first record, allocate its workspace, and run the backward driver."""
    args = scan_record(data_address(records))
    dweight_ih, dweight_hh, dbias_ih, dbias_hh, dweight_hr, dvectors = gradients
    args.dweight_ih, args.dweight_hh, args.dweight_hr = (
        data_address(dweight_ih), data_address(dweight_hh), data_address(dweight_hr),
    )  # fmt: skip
    args.dbias_ih, args.dbias_hh = data_address(dbias_ih), data_address(dbias_hh)
    for k in range(args.num_vectors):
        put(args, DVECTORS, k, data_address(dvectors) + k * dvectors.strides[0] + args.row_offset * args.H * args.item)
    _set_backward_sizes(args)
    if dx.ndim == 3:
        args.dx = data_address(dx) + args.row_offset * args.D * args.item
    else:
        args.dgates_x = data_address(dx) + args.row_offset * args.W * args.item
        args.dgates_h = args.dgates_x if args.dx_is_dh else args.dgates_x + dx.strides[0]
    workspace, base = allocate(_backward_layout(args, 0), args.shift, zero)
    size = _backward_layout(args, base)
    fill_zero(base, min(size, (args.zeros - base)) >> args.shift, zero)
    fill_zero(args.zeros, max(args.D, pad(args.H, args.lanes), TILE_ROWS * TILE_VECTORS * args.lanes), zero)
    if args.recurrent_strategy == ROWS:
        fill_zero(args.packed_hh, args.W * args.packed_hh_stride, zero)
    fill_zero(args.dgated, args.R * args.h_padded * args.has_pregates, zero)
    _start_cotangents(args, layer, dfinal, zero)
    call_address(args.backward_driver, (data_address(records),))
    for k in range(args.num_states):
        d = dinitial[k]
        stride, width = (args.H, args.H) if k else (args.h_padded, args.P)
        a = pointer_like(get(args, DSTATE_IN, k), zero)
        for r in range(args.R):
            for j in range(width):
                d[layer, args.row_offset + r, j] = load(a, r * stride + j, ANY_SCOPE)
    return 0 * workspace.size
