"""Forward driver: the time loop of a compiled scan, the same for every cell.

The loop runs in blocks of steps. A block is small enough for its gate sums to stay in the cache. For each block, one
product computes x W' of all its steps. For each step, the recurrent product is added and the cell's pointwise function
runs over the active rows. record.py documents the arguments, backward.py is the adjoint.

This module imports numba. Import it only when a kernel is about to run.
"""

from numba import njit

from xprnn.kernels.jit.products import IN_PLACE, ROWS, multiply, pack
from xprnn.kernels.jit.record import (
    AFTER,
    AFTER_FLIP,
    AFTER_STRIDE,
    BEFORE,
    EXTRA,
    PRODUCT_COLUMNS,
    PRODUCT_OUT,
    PRODUCT_START,
    PRODUCT_WEIGHT,
    RESET_BEFORE,
    RESET_STATE,
    RESET_STATE_ROW,
    STATES,
    STATES_FULL,
    STEP_EXTRA,
    get,
    put,
    scan_record,
)
from xprnn.kernels.jit.simd import ANY_SCOPE, call_address, int64_pointer, load, pointer_like, store, uint8_pointer

__all__ = ["copy_block", "forward", "is_active", "num_rows", "run_rows", "set_states"]

_compile = njit(fastmath={"contract"}, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


@_compile
def forward(address, zero):  # type: ignore[no-untyped-def]
    """Run all steps of the record at `address`; `zero` has the type of the arrays' elements."""
    args = scan_record(address)
    _pack_weights(args, zero)
    T, block_steps, reverse = args.T, args.block_steps, args.reverse
    for b in range(0, T, block_steps):
        m = min(block_steps, T - b)
        t0 = T - b - m if reverse else b
        if args.D > 0:
            _project_inputs(args, t0, m, zero)
        else:
            _look_up_inputs(args, t0, m, zero)
        first = t0 + m - 1 if reverse else t0
        if args.active == 0 and args.reset == 0 and m > 1 and args.fused:
            _set_step(args, first, first - t0)
            call_address(args.forward_rows, (address, 0, args.R, m))
        else:
            for i in range(m):
                t = first - i if reverse else first + i
                _set_step(args, t, t - t0)
                _step(args, address, t, zero)
        if args.y != 0:
            _copy_output(args, t0, m, zero)


# --- before the time loop


@_compile
def _pack_weights(args, zero):  # type: ignore[no-untyped-def]
    """Pack the weights, and set the rows of biases that are the starts of the products."""
    item, first, second = args.item, args.first_width, args.W - args.first_width
    row, column = args.weight_ih_row, args.weight_ih_column
    if args.D > 0:
        scale = 1 if args.input_strategy == ROWS else args.D
        to, stride = args.packed_ih, args.packed_ih_stride
        pack(args.gemm, args.input_strategy, args.weight_ih, column, row, args.D, first, to, stride)
        source, to = args.weight_ih + first * row * item, to + args.first_padded * scale * item
        pack(args.gemm, args.input_strategy, source, column, row, args.D, second, to, stride)
    _pack_recurrent(args, 0, args.weight_hh, args.packed_hh, first)
    scale = 1 if args.recurrent_strategy == ROWS else args.P
    source, to = args.weight_hh + first * args.weight_hh_row * item, args.packed_hh + args.first_padded * scale * item
    _pack_recurrent(args, 1, source, to, second)
    if args.has_projection:
        row, column = args.weight_hr_row, args.weight_hr_column
        pack(args.gemm, 0, args.weight_hr, column, row, args.H, args.P, args.packed_hr, 0)
    _set_biases(args, zero)


@_compile
def _pack_recurrent(args, group, weight, packed, columns):  # type: ignore[no-untyped-def]
    """Pack the rows of weight_hh of a gate group, and describe its product for `_recurrent_product`."""
    row, column, strategy = args.weight_hh_row, args.weight_hh_column, args.recurrent_strategy
    pack(args.gemm, strategy, weight, column, row, args.P, columns, packed, args.packed_hh_stride)
    padded = args.padded_width - args.first_padded if group else args.first_padded
    put(args, PRODUCT_WEIGHT, group, weight if strategy == IN_PLACE else packed)
    put(args, PRODUCT_COLUMNS, group, columns if strategy == IN_PLACE else padded)
    offset = args.first_padded * args.item if group else 0
    if args.separate_second if group else args.separate_first:
        offset = offset if args.separate_first else 0
        put(args, PRODUCT_START, group, args.bias_recurrent + offset)
        put(args, PRODUCT_OUT, group, args.recurrent + offset)
    else:
        put(args, PRODUCT_START, group, 0)
        put(args, PRODUCT_OUT, group, offset)


@_compile
def _set_biases(args, zero):  # type: ignore[no-untyped-def]
    """Set bias_sums to b_ih, plus b_hh in summed groups, and bias_recurrent to b_hh of the other groups."""
    bias_ih, bias_hh = pointer_like(args.bias_ih, zero), pointer_like(args.bias_hh, zero)
    sums, recurrent = pointer_like(args.bias_sums, zero), pointer_like(args.bias_recurrent, zero)
    for j in range(args.W):
        in_first = j < args.first_width
        column = j if in_first else args.first_padded + j - args.first_width
        b_ih = load(bias_ih, j * args.bias_ih_stride, ANY_SCOPE)
        b_hh = load(bias_hh, j * args.bias_hh_stride, ANY_SCOPE)
        if (args.separate_first if in_first else args.separate_second) == 0:
            store(sums, column, ANY_SCOPE, b_ih + b_hh)
        else:
            store(sums, column, ANY_SCOPE, b_ih)
            skip = 0 if in_first or args.separate_first else args.first_padded
            store(recurrent, column - skip, ANY_SCOPE, b_hh)


# --- input projection of a block


@_compile
def copy_block(source, step, row, unit, out, m, rows, width, zero):  # type: ignore[no-untyped-def]
    """out (m, rows, width) = the strided array at `source`. Steps are the inner loop where they are adjacent."""
    a, b = pointer_like(source, zero), pointer_like(out, zero)
    if abs(step) < abs(unit):
        for r in range(rows):
            for j0 in range(0, width, 16):
                for s0 in range(0, m, 16):
                    for j in range(j0, min(j0 + 16, width)):
                        for s in range(s0, min(s0 + 16, m)):
                            store(b, (s * rows + r) * width + j, 1, load(a, s * step + r * row + j * unit, 0))
    else:
        for s in range(m):
            for r in range(rows):
                for j in range(width):
                    store(b, (s * rows + r) * width + j, 1, load(a, s * step + r * row + j * unit, 0))


@_compile
def _project_inputs(args, t0, m, zero):  # type: ignore[no-untyped-def]
    """gate_sums = x W' + biases for the steps t0 to t0 + m - 1."""
    item, R, D = args.item, args.R, args.D
    x, lda, blocks, rows = args.x + t0 * args.x_step * item, args.x_row, m, R
    if args.copy_x:
        copy_block(x, args.x_step, args.x_row, args.x_unit, args.x_block, m, R, D, zero)
        x, lda, blocks, rows = args.x_block, D, 1, m * R
    elif args.x_step == R * args.x_row:
        blocks, rows = 1, m * R
    strategy, stride = args.input_strategy, args.packed_ih_stride
    for group in range(2 if args.first_width < args.W else 1):
        start, width = (args.first_padded, args.padded_width - args.first_padded) if group else (0, args.first_padded)
        weight = args.packed_ih + start * (1 if strategy == ROWS else D) * item
        if strategy == IN_PLACE:
            weight = args.weight_ih + (args.first_width * args.weight_ih_row * item if group else 0)
            width = args.W - args.first_width if group else args.first_width
        bias = args.bias_sums + start * item
        for s in range(blocks):
            a = x + s * args.x_step * item
            out = args.gate_sums + (s * R * args.padded_width + start) * item
            multiply(
                args.gemm, strategy, a, lda, weight, stride, bias, 0, out, args.padded_width,
                rows, D, width, args.edge,
            )  # fmt: skip


@_compile
def _look_up_inputs(args, t0, m, zero):  # type: ignore[no-untyped-def]
    """gate_sums = the columns of weight_ih of the class numbers ids + biases, for the steps t0 to t0 + m - 1."""
    ids, weight = int64_pointer(args.ids), pointer_like(args.weight_ih, zero)
    sums, bias = pointer_like(args.gate_sums, zero), pointer_like(args.bias_sums, zero)
    first_width, gap, row = args.first_width, args.first_padded - args.first_width, args.weight_ih_row
    for s in range(m):
        for r in range(args.R):
            v = load(ids, (t0 + s) * args.ids_step + r * args.ids_row, ANY_SCOPE) * args.weight_ih_column
            z = (s * args.R + r) * args.padded_width
            if row == 1:
                for j in range(first_width):
                    store(sums, z + j, 1, load(weight, v + j, 0) + load(bias, j, 0))
                for j in range(first_width, args.W):
                    store(sums, z + j + gap, 1, load(weight, v + j, 0) + load(bias, j + gap, 0))
            else:
                for j in range(args.W):
                    k = j if j < first_width else j + gap
                    store(sums, z + k, 1, load(weight, v + j * row, 0) + load(bias, k, 0))


# --- one step


@_compile
def num_rows(args, t):  # type: ignore[no-untyped-def]
    """Return the number of rows up to the last one that is active at step t."""
    n = args.R
    if args.active != 0:
        active = uint8_pointer(args.active)
        while n > 0 and load(active, t * args.N + n - 1, ANY_SCOPE) == 0:
            n -= 1
    return n


@_compile
def is_active(args, t, r):  # type: ignore[no-untyped-def]
    """Return True if row r is active at step t."""
    return args.active == 0 or load(uint8_pointer(args.active), t * args.N + r, ANY_SCOPE) != 0


@_compile
def run_rows(args, address, function, t, n):  # type: ignore[no-untyped-def]
    """Call a pointwise function for the active rows of the first n rows of step t."""
    if args.active == 0:
        call_address(function, (address, 0, n, 1))
        return
    r = 0
    while r < n:
        first = r
        while r < n and is_active(args, t, r):
            r += 1
        if first < r:
            call_address(function, (address, first, r, 1))
        r += 1


@_compile
def set_states(args, t):  # type: ignore[no-untyped-def]
    """Point before[k] and after[k] at the states of step t."""
    before, after = (t + 1, t) if args.reverse else (t, t + 1)
    for k in range(args.num_states):
        row = (args.H if k else args.P) * args.item
        mask = -1 if get(args, STATES_FULL, k) else 1  # without a tape there are two slots, used alternately
        put(args, BEFORE, k, get(args, STATES, k) + (before & mask) * args.N * row)
        put(args, AFTER, k, get(args, STATES, k) + (after & mask) * args.N * row)
        if get(args, RESET_BEFORE, k) != 0:
            put(args, BEFORE, k, get(args, RESET_BEFORE, k) + t * args.saved_step * row)


@_compile
def _set_step(args, t, s):  # type: ignore[no-untyped-def]
    """Point the record at step t, the s-th of its block, and set the distances to the next step."""
    item, saved, sign = args.item, t * args.saved_step, -1 if args.reverse else 1
    args.sums_stride = sign * args.R * args.padded_width
    args.gates_stride, args.units_stride = sign * args.saved_step * args.W, sign * args.saved_step * args.H
    args.step_sums = args.gate_sums + s * args.R * args.padded_width * item
    args.step_gates = args.gates + saved * args.W * item
    args.step_gated = args.gated_state + saved * args.H * item
    args.step_unprojected = args.unprojected + saved * args.H * item
    for k in range(args.num_extra):
        put(args, STEP_EXTRA, k, get(args, EXTRA, k) + saved * args.H * item)
    set_states(args, t)
    for k in range(args.num_states):
        is_full, stride = get(args, STATES_FULL, k), sign * args.N * (args.H if k else args.P)
        put(args, AFTER_STRIDE, k, stride if is_full else (get(args, BEFORE, k) - get(args, AFTER, k)) // item)
        put(args, AFTER_FLIP, k, 1 if is_full else -1)


@_compile
def _reset_states(args, t, zero):  # type: ignore[no-untyped-def]
    """Set the states before step t: those after the previous step, or the reset states in rows that are reset."""
    reset = uint8_pointer(args.reset)
    previous = t + 1 if args.reverse else t
    for k in range(args.num_states):
        width = args.H if k else args.P
        slot = previous & (-1 if get(args, STATES_FULL, k) else 1)
        carried = pointer_like(get(args, STATES, k) + slot * args.N * width * args.item, zero)
        restored, before = pointer_like(get(args, RESET_STATE, k), zero), pointer_like(get(args, BEFORE, k), zero)
        for r in range(args.R):
            is_reset = load(reset, t * args.N + r, ANY_SCOPE) != 0
            for j in range(width):
                value = load(carried, r * width + j, 0)
                if is_reset:
                    value = load(restored, r * get(args, RESET_STATE_ROW, k) + j, 1)
                store(before, r * width + j, 2, value)


@_compile
def _recurrent_product(args, group, h, n):  # type: ignore[no-untyped-def]
    """Add h U' of a gate group to the step's gate sums, or set `recurrent` to h U' + bias."""
    start, out, lds, ldo = get(args, PRODUCT_START, group), get(args, PRODUCT_OUT, group), 0, args.recurrent_width
    if start == 0:
        lds = ldo = args.padded_width
        start = out = args.step_sums + out
    multiply(
        args.gemm, args.recurrent_strategy, h, args.P, get(args, PRODUCT_WEIGHT, group), args.packed_hh_stride,
        start, lds, out, ldo, n, args.P, get(args, PRODUCT_COLUMNS, group), args.edge,
    )  # fmt: skip


@_compile
def _step(args, address, t, zero):  # type: ignore[no-untyped-def]
    """Compute step t, at which the record points."""
    n = num_rows(args, t)
    if args.reset != 0:
        _reset_states(args, t, zero)
    h = get(args, BEFORE, 0)
    _recurrent_product(args, 0, h, n)
    if args.has_pregates:
        run_rows(args, address, args.pregate_rows, t, n)
        _zero_inactive(args, args.step_gated, args.H, t, zero)
        h = args.step_gated
    if args.first_width < args.W:
        _recurrent_product(args, 1, h, n)
    run_rows(args, address, args.forward_rows, t, n)
    if args.has_projection:
        _zero_inactive(args, args.step_unprojected, args.H, t, zero)
        multiply(
            args.gemm, 0, args.step_unprojected, args.H, args.packed_hr, 0, args.zeros, 0,
            get(args, AFTER, 0), args.P, n, args.H, args.P, args.edge,
        )  # fmt: skip
    if args.active != 0:
        _carry_inactive(args, t, zero)


@_compile
def _zero_inactive(args, rows, width, t, zero):  # type: ignore[no-untyped-def]
    """Zero the inactive rows of an array (R, width) of step t, which a product of backward reads."""
    if args.active != 0:
        a = pointer_like(rows, zero)
        for r in range(args.R):
            if not is_active(args, t, r):
                for j in range(width):
                    store(a, r * width + j, ANY_SCOPE, zero)


@_compile
def _carry_inactive(args, t, zero):  # type: ignore[no-untyped-def]
    """Copy the states of inactive rows over step t."""
    for k in range(args.num_states):
        width = args.H if k else args.P
        before, after = pointer_like(get(args, BEFORE, k), zero), pointer_like(get(args, AFTER, k), zero)
        for r in range(args.R):
            if not is_active(args, t, r):
                for j in range(width):
                    store(after, r * width + j, 1, load(before, r * width + j, 0))


@_compile
def _copy_output(args, t0, m, zero):  # type: ignore[no-untyped-def]
    """Copy h after each step of a block to y, and 0 to the rows of y that are inactive."""
    P, item = args.P, args.item
    first = t0 if args.reverse else t0 + 1
    for s in range(m):
        h = pointer_like(get(args, STATES, 0) + (first + s) * args.N * P * item, zero)
        y = pointer_like(args.y + (t0 + s) * args.y_step * item, zero)
        for r in range(args.R):
            if is_active(args, t0 + s, r):
                for j in range(P):
                    store(y, r * args.y_row + j, 1, load(h, r * P + j, 0))
            else:
                for j in range(P):
                    store(y, r * args.y_row + j, 1, zero)
