"""Entry points of a compiled forward pass: they read the caller's arrays, fill the argument record, and run the driver.

`forward` takes every option. `plain_forward` and `step` take fewer arrays, because reading an array takes numba 50 ns.
bind_backward.py has the entry point of the adjoint. All return 0, or a positive number if an array does not have the
expected shape: the caller's checked path then raises the error. Inputs may have any strides. They are NumPy arrays of
one floating dtype; a subclass that means something else, such as a masked array, must be excluded by the caller.

This module imports numba. Import it only when a kernel is about to run.
"""

import numpy as np
from numba import njit

from xprnn.kernels.jit.gemm import TILE_ROWS, TILE_VECTORS
from xprnn.kernels.jit.products import IN_PLACE, PANELS, ROWS, pack
from xprnn.kernels.jit.record import (
    EXTRA,
    RESET_BEFORE,
    RESET_STATE,
    RESET_STATE_ROW,
    STATES,
    STATES_FULL,
    VECTORS,
    get,
    put,
    scan_record,
)
from xprnn.kernels.jit.simd import ANY_SCOPE, call_address, data_address, load, pointer_like, store

__all__ = [
    "LINE",
    "MAX_ROWS_WORK",
    "after",
    "allocate",
    "fill_zero",
    "forward",
    "num_features",
    "pad",
    "plain_forward",
    "set_input",
    "set_masks",
    "set_projection",
    "set_sizes",
    "set_vectors",
    "set_weights",
    "step",
    "tape_layout",
]

# Bytes of a cache line, on which every array of a workspace begins: memory.ALIGNMENT. It stands here, too, because the
# text of this file is part of the name under which compiled code is cached.
LINE = 64
BLOCK_BYTES = 1 << 20  # size limit of a forward block's gate sums, so that they stay in the second-level cache
MAX_ROWS_WORK = 1 << 15  # multiply-adds of a step, of all rows, up to which ROWS is faster than PANELS
MIN_ADJACENT_ROWS = 16  # rows of a step from which a product for each step is as fast as one for a block
_compile = njit(fastmath={"contract"}, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


@_compile
def pad(columns, lanes):  # type: ignore[no-untyped-def]
    """Return the number of columns, rounded up to whole vectors of `lanes` elements, a power of two."""
    return (columns + lanes - 1) & -lanes


@_compile
def set_sizes(args, T, N, R, D, H, P):  # type: ignore[no-untyped-def]
    """Set the sizes, and the widths that follow from them."""
    args.T, args.N, args.R, args.D, args.H, args.P = T, N, R, D, H, P
    args.W = args.gates_count * H
    args.first_width = args.first_gates * H
    args.first_padded = pad(args.first_width, args.lanes)
    args.padded_width = args.first_padded + pad(args.W - args.first_width, args.lanes)
    second_padded = args.padded_width - args.first_padded
    args.recurrent_width = args.first_padded * args.separate_first + second_padded * args.separate_second
    whole = H & -args.lanes
    overlap = args.lanes <= H and whole < H
    args.whole_units, args.last_units = (whole, H - args.lanes) if overlap else (H, H)


@_compile
def set_weights(args, weight_ih, weight_hh, bias_ih, bias_hh):  # type: ignore[no-untyped-def]
    """Set the weights; return True if their shapes fit the sizes."""
    args.weight_ih, args.weight_hh = data_address(weight_ih), data_address(weight_hh)
    args.weight_ih_row = weight_ih.strides[0] >> args.shift
    args.weight_ih_column = weight_ih.strides[1] >> args.shift
    args.weight_hh_row = weight_hh.strides[0] >> args.shift
    args.weight_hh_column = weight_hh.strides[1] >> args.shift
    args.bias_ih, args.bias_ih_stride = data_address(bias_ih), bias_ih.strides[0] >> args.shift
    args.bias_hh, args.bias_hh_stride = data_address(bias_hh), bias_hh.strides[0] >> args.shift
    W = args.W
    return (
        weight_ih.shape[0] == W
        and weight_hh.shape[0] == W
        and weight_hh.shape[1] == args.P
        and bias_ih.shape[0] == W
        and bias_hh.shape[0] == W
    )


@_compile
def set_projection(args, weight_hr):  # type: ignore[no-untyped-def]
    """Set weight_hr, which projects h."""
    args.weight_hr = data_address(weight_hr)
    args.weight_hr_row = weight_hr.strides[0] >> args.shift
    args.weight_hr_column = weight_hr.strides[1] >> args.shift


@_compile
def set_vectors(args, vectors):  # type: ignore[no-untyped-def]
    """Set the cell's vectors; return True if their shapes fit and they are contiguous."""
    fits = True
    if len(vectors) > 0:  # numba cannot index an empty tuple
        for k in range(args.num_vectors):
            vector = vectors[k]
            put(args, VECTORS, k, data_address(vector))
            fits &= vector.shape[0] == args.H and (args.H < 2 or vector.strides[0] == args.item)
    return fits


@_compile
def set_input(args, x, num_classes):  # type: ignore[no-untyped-def]
    """Set x (T, N, D), or class numbers (T, N). Return False if D does not fit, or a number is out of range."""
    if x.ndim == 2:
        args.ids = data_address(x) + args.row_offset * x.strides[1]
        args.ids_step, args.ids_row, args.num_classes = x.strides[0] // 8, x.strides[1] // 8, num_classes
        args.copy_table = args.weight_ih_row != 1 and num_classes < 2 * args.T * args.R
        for t in range(args.T):
            for r in range(args.R):
                if not 0 <= x[t, args.row_offset + r] < num_classes:
                    return False
        return True
    if x.shape[2] != num_classes:
        return False
    args.x = data_address(x) + args.row_offset * x.strides[1]
    args.x_step, args.x_row, args.x_unit = (
        x.strides[0] >> args.shift,
        x.strides[1] >> args.shift,
        x.strides[2] >> args.shift,
    )
    if args.D == 1:
        args.x_unit = 1
    if args.R == 1:
        args.x_row = args.x_step  # the rows of consecutive steps are x_row apart, as in a contiguous x
    args.copy_x = args.x_unit != 1 or not (args.x_step == args.R * args.x_row or args.R >= MIN_ADJACENT_ROWS)
    return True


@_compile
def num_features(x):  # type: ignore[no-untyped-def]
    """Return D of x (T, N, D), or 0 for class numbers (T, N)."""
    return x.shape[2] if x.ndim == 3 else 0


@_compile
def _step_features(x):  # type: ignore[no-untyped-def]
    """Return D of x (N, D), or 0 for class numbers (N,)."""
    return x.shape[1] if x.ndim == 2 else 0


@_compile
def _set_step_input(args, x, num_classes):  # type: ignore[no-untyped-def]
    """Set x (N, D), or class numbers (N,), of a single step; as `set_input`."""
    args.x_unit = 1
    if x.ndim == 1:
        args.ids, args.ids_row, args.num_classes = data_address(x), x.strides[0] // 8, num_classes
        for v in x:  # noqa: SIM110 - numba compiles no generator expression
            if not 0 <= v < num_classes:
                return False
        return True
    if x.shape[1] != num_classes:
        return False
    args.x, args.x_step, args.x_row = data_address(x), 0, x.strides[0] >> args.shift
    args.x_unit = x.strides[1] >> args.shift if args.D > 1 else 1
    args.x_step = args.R * args.x_row
    args.copy_x = args.x_unit != 1
    return True


@_compile
def after(at, elements, item):  # type: ignore[no-untyped-def]
    """Return the address of the first cache line after `elements` elements at `at`."""
    return at + -(-elements * item // LINE) * LINE


@_compile
def tape_layout(args, base, has_reset):  # type: ignore[no-untyped-def]
    """Place the arrays of the tape but the first state from address `base` on; return their size in bytes.

    Without a tape, the states but the first have two slots, and the other arrays hold one step.
    """
    item, N, H, at = args.item, args.N, args.H, base
    slots, steps = (args.T + 1, args.T) if args.record_tape else (2, 1)
    args.saved_step = N if args.record_tape else 0
    offset = args.row_offset * item
    put(args, STATES_FULL, 0, 1)
    for k in range(1, args.num_states):
        put(args, STATES, k, at + offset * H)
        put(args, STATES_FULL, k, args.record_tape)
        at = after(at, slots * N * H, item)
    args.gates = at + offset * args.W
    at = after(at, steps * N * args.W * args.saves_gates, item)
    for k in range(args.num_extra):
        put(args, EXTRA, k, at + offset * H)
        at = after(at, steps * N * H, item)
    args.gated_state = args.unprojected = at + offset * H
    at = after(at, steps * N * H * (args.has_pregates or args.has_projection), item)
    for k in range(args.num_states):
        width = H if k else args.P
        put(args, RESET_BEFORE, k, at + offset * width if has_reset else 0)
        at = after(at, steps * N * width * has_reset, item)
    return at - base


@_compile
def _forward_layout(args, base, has_tape, has_reset):  # type: ignore[no-untyped-def]
    """Place the workspace of a forward pass from address `base` on; return its size in bytes."""
    item, R, padded, at = args.item, args.R, args.padded_width, base
    rows = args.block_steps * R
    args.packed_ih = at
    packed = args.num_classes * args.W if args.copy_table else args.D * args.packed_ih_stride
    at = after(at, packed * (args.input_strategy != IN_PLACE or args.copy_table), item)
    args.packed_hh = at
    at = after(at, args.P * args.packed_hh_stride * (args.recurrent_strategy != IN_PLACE), item)
    args.packed_hr = at
    at = after(at, args.H * pad(args.P, args.lanes) * args.has_projection, item)
    args.x_block = at
    at = after(at, rows * args.D * args.copy_x, item)
    args.gate_sums = at
    at = after(at, rows * padded, item)
    args.recurrent = at
    at = after(at, R * args.recurrent_width, item)
    args.bias_sums = at
    at = after(at, padded, item)
    args.bias_recurrent = at
    at = after(at, args.recurrent_width, item)
    args.edge, args.zeros = at, at + TILE_ROWS * TILE_VECTORS * args.lanes * item
    at = after(at, (TILE_ROWS + 1) * TILE_VECTORS * args.lanes + args.P, item)
    if not has_tape:
        at += tape_layout(args, at, has_reset)
    return at - base


@_compile
def _choose_products(args, is_step):  # type: ignore[no-untyped-def]
    """Choose how the products read the weights. The choice does not depend on T, so chunks of a sequence agree."""
    work = args.R * args.W * (args.P + args.D)
    adjacent = args.weight_ih_column == 1 and args.weight_hh_column == 1
    if is_step and adjacent:
        args.input_strategy = args.recurrent_strategy = IN_PLACE
    elif work <= MAX_ROWS_WORK and not args.has_projection:
        args.recurrent_strategy = ROWS
        # A product of panels with fewer terms than gemm_tile.UNROLL has the same bits for every number of rows.
        args.input_strategy = PANELS if args.D < 4 else ROWS
    elif args.R == 1 and args.weight_hh_column == 1 and not args.has_projection and not args.has_pregates:
        args.input_strategy, args.recurrent_strategy = PANELS, IN_PLACE  # a step reads the weights once, packed or not
    else:
        args.input_strategy = args.recurrent_strategy = PANELS
    stride = args.padded_width
    args.packed_ih_stride = args.weight_ih_row if args.input_strategy == IN_PLACE else stride
    # Rows an even number of vectors apart would map to few sets of the cache.
    stride += args.lanes * (args.recurrent_strategy == ROWS and stride & args.lanes == 0)
    args.packed_hh_stride = args.weight_hh_row if args.recurrent_strategy == IN_PLACE else stride
    args.block_steps = 1
    if args.T > 1:
        args.block_steps = max(1, min(args.T, BLOCK_BYTES // max(1, args.R * args.padded_width * args.item)))


@_compile
def allocate(size, shift, zero):  # type: ignore[no-untyped-def]
    """Allocate `size` bytes; return the array, which keeps them alive, and the address of their first cache line."""
    workspace = np.empty((size + LINE) >> shift, type(zero))
    start = data_address(workspace)
    return workspace, start + -start % LINE


@_compile
def fill_zero(address, elements, zero):  # type: ignore[no-untyped-def]
    """Set `elements` elements from an address on to zero."""
    a = pointer_like(address, zero)
    for j in range(elements):
        store(a, j, ANY_SCOPE, zero)


@_compile
def _copy_states(args, layer, initial, zero):  # type: ignore[no-untyped-def]
    """Copy the initial states to the slot before the first step; return True if their shapes fit."""
    for k in range(args.num_states):
        state = initial[k]
        width = args.H if k else args.P
        if state.shape[1] != args.N or state.shape[2] != width or layer >= state.shape[0]:
            return False
        slot = (args.T if get(args, STATES_FULL, k) else args.T & 1) if args.reverse else 0
        a = pointer_like(get(args, STATES, k) + slot * args.N * width * args.item, zero)
        for r in range(args.R):
            for j in range(width):
                store(a, r * width + j, ANY_SCOPE, state[layer, args.row_offset + r, j])
    return True


@_compile
def _copy_final(args, layer, final, zero):  # type: ignore[no-untyped-def]
    """Copy the states after the last step to `final`."""
    for k in range(args.num_states):
        state = final[k]
        width = args.H if k else args.P
        slot = 0 if args.reverse else (args.T if get(args, STATES_FULL, k) else args.T & 1)
        a = pointer_like(get(args, STATES, k) + slot * args.N * width * args.item, zero)
        for r in range(args.R):
            for j in range(width):
                state[layer, args.row_offset + r, j] = load(a, r * width + j, ANY_SCOPE)


@_compile
def _run_forward(records, layer, initial, output, saved, final, is_step, zero):  # type: ignore[no-untyped-def]
    """Allocate the workspace of the first record, and run the forward driver."""
    args = scan_record(data_address(records))
    has_reset, has_tape = args.reset != 0, args.record_tape != 0
    put(args, STATES, 0, data_address(output) + args.row_offset * args.P * args.item)
    _choose_products(args, is_step)
    workspace, base = allocate(_forward_layout(args, 0, has_tape, has_reset), args.shift, zero)
    _forward_layout(args, base, has_tape, has_reset)
    if has_tape:
        start = data_address(saved)
        tape_layout(args, start + -start % LINE, has_reset)
    if args.input_strategy == ROWS:  # the padding of the rows is read
        fill_zero(args.packed_ih, args.D * args.packed_ih_stride, zero)
    if args.recurrent_strategy == ROWS:
        fill_zero(args.packed_hh, args.P * args.packed_hh_stride, zero)
    fill_zero(args.bias_sums, args.padded_width, zero)
    fill_zero(args.bias_recurrent, args.recurrent_width, zero)
    fill_zero(args.zeros, TILE_VECTORS * args.lanes + args.P, zero)
    if args.copy_table:  # rows of the transposed weight_ih are adjacent in memory
        pack(0, ROWS, args.weight_ih, args.weight_ih_column, args.weight_ih_row, args.num_classes, args.W,
             args.packed_ih, args.W)  # fmt: skip
        args.weight_ih, args.weight_ih_row, args.weight_ih_column = args.packed_ih, 1, args.W
    if not _copy_states(args, layer, initial, zero):
        return 2
    call_address(args.forward_driver, (data_address(records),))
    _copy_final(args, layer, final, zero)
    return 0 * workspace.size  # this use keeps the memory alive while the driver runs


# --- entry points


@_compile
def plain_forward(  # type: ignore[no-untyped-def]
    template, layer, x, weight_ih, weight_hh, bias_ih, bias_hh, vectors, initial, output, saved, final
):
    """Run a scan of x (T, N, D) over all rows, without masks, resets and projection.

    Args:
        template: (fields,) int64, the record of the kernel.
        layer: index of the layer in `initial` and `final`.
        x, weight_ih, weight_hh, bias_ih, bias_hh: as in xprnn.kernels.dispatch.
        vectors: tuple of the cell's vectors; it may have more entries, which are not read.
        initial: tuple of (L, N, .), the initial states; this and the following tuples may have more entries, too.
        output: (T+1, N, H), written: h after each step, after that before the first (or before that, if reverse).
        saved: tape memory of ScanKernel.tape_size elements.
        final: tuple of (L, N, .), written: the states after the last step.
    """
    records = template.copy()
    args, zero = scan_record(data_address(records)), weight_hh.dtype.type(0)
    T, N = x.shape[0], x.shape[1]
    D, H = weight_ih.shape[1], output.shape[2]
    set_sizes(args, T, N, N, num_features(x), H, H)
    fits = set_weights(args, weight_ih, weight_hh, bias_ih, bias_hh) and set_vectors(args, vectors)
    if not fits or output.shape[0] != T + 1 or output.shape[1] != N:
        return 1
    if not set_input(args, x, D):
        return 3
    return _run_forward(records, layer, initial, output, saved, final, False, zero)


@_compile
def step(  # type: ignore[no-untyped-def]
    template, layer, x, weight_ih, weight_hh, bias_ih, bias_hh, vectors, initial, y, final
):
    """Run one step of x (N, D) or class numbers (N,): as `plain_forward`, with the output y (N, H)."""
    records = template.copy()
    args, zero = scan_record(data_address(records)), weight_hh.dtype.type(0)
    N, H = y.shape
    set_sizes(args, 1, N, N, _step_features(x), H, H)
    fits = set_weights(args, weight_ih, weight_hh, bias_ih, bias_hh) and set_vectors(args, vectors)
    if not fits or x.shape[0] != N:
        return 1
    if not _set_step_input(args, x, weight_ih.shape[1]):
        return 3
    output = np.empty((2, N, H), type(zero))
    status = _run_forward(records, layer, initial, output, output.reshape(-1), final, True, zero)
    y[:] = output[1]
    return status


@_compile
def forward(  # type: ignore[no-untyped-def]
    template, layer, x, weight_ih, weight_hh, bias_ih, bias_hh, vectors, initial, output, saved, final,
    weight_hr, reset_state, active, reset, y, first_row, rows,
):  # fmt: skip
    """Run a scan over the rows first_row to first_row + rows - 1, with every option.

    Args:
        template to final: as in `plain_forward`; `output` is (T+1, N, P).
        weight_hr: (P, H), or of size 0 without projection.
        reset_state: tuple of (1, N, .), the states that a reset restores.
        active, reset: (T, N) uint8, or of size 0.
        y: (T, N, P), written: h after each step, 0 where a row is inactive; of size 0 if `output` serves.
        first_row, rows: the rows.
    """
    records = template.copy()
    args, zero = scan_record(data_address(records)), weight_hh.dtype.type(0)
    T, N = x.shape[0], x.shape[1]
    D, P = weight_ih.shape[1], output.shape[2]
    set_sizes(args, T, N, rows, num_features(x), weight_hr.shape[1] if args.has_projection else P, P)
    args.row_offset = first_row
    fits = set_weights(args, weight_ih, weight_hh, bias_ih, bias_hh) and set_vectors(args, vectors)
    if not fits or output.shape[0] != T + 1 or output.shape[1] != N:
        return 1
    if not set_input(args, x, D):
        return 3
    if args.has_projection:
        set_projection(args, weight_hr)
    set_masks(args, active, reset)
    if reset.size:
        for k in range(args.num_states):
            state = reset_state[k]
            put(args, RESET_STATE, k, data_address(state) + first_row * state.strides[1])
            put(args, RESET_STATE_ROW, k, state.strides[1] >> args.shift)
            if state.shape[2] > 1 and state.strides[2] != args.item:
                return 2
    if y.size:
        args.y = data_address(y) + first_row * y.strides[1]
        args.y_step, args.y_row = y.strides[0] >> args.shift, y.strides[1] >> args.shift
    return _run_forward(records, layer, initial, output, saved, final, False, zero)


@_compile
def set_masks(args, active, reset):  # type: ignore[no-untyped-def]
    """Set the masks that are present."""
    if active.size:
        args.active = data_address(active) + args.row_offset
    if reset.size:
        args.reset = data_address(reset) + args.row_offset
