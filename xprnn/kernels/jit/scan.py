"""The scan by a compiled kernel: it allocates the arrays of a pass, calls an entry point, and keeps the tape.

One call runs the whole time loop, including all matrix products and gradients, without returning to Python. The rows of
a batch are independent, so with several threads each thread runs its rows.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays.linear import flatten_leading, lookup_backward
from xprnn.arrays.namespace import Array, Params
from xprnn.cells.cell import Cell
from xprnn.kernels.jit.kernel import NAME, ScanKernel, scan_kernel, unsupported_reason
from xprnn.kernels.jit.threads import RowRange, parallel_map, split_rows, thread_count
from xprnn.kernels.memory import ALIGNMENT, address, aligned_empty
from xprnn.kernels.row_order import RowOrder
from xprnn.kernels.tape import State, StepMask, Tape

__all__ = ["NAME", "ForwardResult", "find_kernel", "run_backward", "run_forward", "unsupported_reason"]


class ForwardResult(NamedTuple):
    """Arrays of one forward pass over rows in the order of `row_order`."""

    kernel: ScanKernel
    row_order: RowOrder | None  # None: no masks and no resets
    x: Array
    weights: tuple[Array, ...]  # weight_ih, weight_hh, bias_ih, bias_hh
    vectors: tuple[Array, ...]
    weight_hr: Array
    output: Array  # (T+1, N, P), see bind.plain_forward
    saved: Array  # memory of the tape
    reverse: bool

    @property
    def y(self) -> Array:
        """h after each step, (T, N, P), a view of `output`."""
        return self.output[:-1] if self.reverse else self.output[1:]

    def state_arrays(self) -> list[Array]:
        """Return the states after each step, (T, N, .), in the order of `row_order`, as views."""
        steps, N, _ = self.output.shape
        H, item, arrays = self.weights[1].shape[0] // self.kernel.cell.gates, self.saved.itemsize, [self.y]
        at, line = -address(self.saved) % ALIGNMENT // item, ALIGNMENT // item
        for _ in range(1, self.kernel.num_states):
            a = self.saved[at : at + steps * N * H].reshape(steps, N, H)
            arrays.append(a[:-1] if self.reverse else a[1:])
            at += -(-steps * N * H // line) * line
        return arrays

    def states(self) -> State:
        """Return the states after each step, (T, N, .), in the caller's order, as read-only views or copies."""
        arrays = [
            a.view() if self.row_order is None else self.row_order.unsort(a, 1).view() for a in self.state_arrays()
        ]
        for a in arrays:
            a.flags.writeable = False
        return tuple(arrays)


def find_kernel(cell: Cell, params: Params) -> Callable[..., Any] | None:
    """Return the forward function if numba is installed and compiles the cell, else None."""
    kernel = scan_kernel(cell, params["weight_hh"].dtype, "weight_hr" in params)
    return None if isinstance(kernel, str) else partial(_forward, kernel)


# --- forward


def _forward(
    kernel: ScanKernel,
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
    rows = None
    if step_mask.active is not None or step_mask.reset is not None:
        rows = RowOrder.from_step_mask(x.shape[:2], step_mask)
    arrays = _parameter_arrays(kernel, params)
    x = _plain(x if rows is None else rows.sort(x, 1), kernel.dtype if x.dtype.kind == "f" else np.dtype(np.int64))
    initial, restored = (
        tuple(_plain(s if rows is None else rows.sort(s, 0), kernel.dtype)[None] for s in states)
        for states in (state, reset_state)
    )
    restored = tuple(np.ascontiguousarray(s) for s in restored)  # the kernel reads rows of adjacent units
    final = tuple(np.empty(s.shape, kernel.dtype) for s in initial)
    y, result = run_forward(kernel, x, arrays, initial, final, rows, restored, 0, reverse, record_tape)
    finals = tuple(f[0] if rows is None else rows.unsort(f[0], 0) for f in final)
    y = y if rows is None else rows.unsort(y, 1)
    if not record_tape:
        return y, finals, None
    y.flags.writeable = False  # y may share memory with the tape
    tape = Tape(backward, np, cell, params, x, state, reset_state, step_mask, reverse, result.states, result, NAME)
    return y, finals, tape


def _plain(a: Array, dtype: Any) -> Array:
    """Return `a` as an aligned array of this dtype and of no subclass."""
    if a.__class__ is np.ndarray and a.dtype == dtype and a.flags.aligned:
        return a
    return np.array(a, dtype, subok=False)


def _parameter_arrays(kernel: ScanKernel, params: Params) -> tuple[tuple[Array, ...], tuple[Array, ...], Array]:
    """Return the weights and biases, the cell's vectors, and weight_hr. Missing biases are zero."""
    dtype, rows = kernel.dtype, params["weight_hh"].shape[0]
    weights = [_plain(params[name], dtype) for name in ("weight_ih", "weight_hh")]
    weights += [
        _plain(params[name], dtype) if name in params else kernel.zeros(rows) for name in ("bias_ih", "bias_hh")
    ]
    vectors = kernel.vectors_tuple(np.ascontiguousarray(_plain(params[name], dtype)) for name in kernel.cell.vectors)
    weight_hr = _plain(params["weight_hr"], dtype) if kernel.projected else kernel.no_matrix
    return tuple(weights), vectors, weight_hr


def run_forward(
    kernel: ScanKernel,
    x: Array,
    arrays: tuple[tuple[Array, ...], tuple[Array, ...], Array],
    initial: State,
    final: State,
    rows: RowOrder | None,
    reset_state: State,
    layer: int,
    reverse: bool,
    record_tape: bool,
    target: Array | None = None,
) -> tuple[Array, ForwardResult]:
    """Run a forward pass of plain arrays.

    Args:
        kernel: of the cell.
        x: (T, N, D), or int64 (T, N), sorted by `rows`.
        arrays: as from `_parameter_arrays`.
        initial, final: (L, N, .) each; `final` is written.
        rows: the order of the rows, or None without masks and resets.
        reset_state: (1, N, .) each, the states that a reset restores.
        layer: the index in `initial` and `final`.
        reverse: True to run from the last step to the first.
        record_tape: True if backward will follow.
        target: (T, N, P) with adjacent units, to which y is written; None: a new array.

    Returns:
        y (T, N, P), with rows in the order of `rows`, and the arrays of the pass.

    Raises:
        ValueError: a shape does not fit.
    """
    weights, vectors, weight_hr = arrays
    (T, N), P, H = x.shape[:2], weights[1].shape[1], weights[1].shape[0] // kernel.cell.gates
    active, reset = _masks(kernel, rows)
    output = np.empty((T + 1, N, P), kernel.dtype)
    saved = kernel.no_vector
    template = kernel.template(reverse, record_tape)
    if record_tape:
        saved = aligned_empty((kernel.tape_size((T, N, H, P), reset.size > 0),), kernel.dtype)
    result = ForwardResult(kernel, rows, x, weights, vectors, weight_hr, output, saved, reverse)
    row_ranges = _split(rows, T, N, (P + weights[0].shape[1] * (x.ndim == 3)) * weights[1].shape[0])
    integer, y, pad = x.ndim == 2, result.y, kernel.states_tuple
    head = (template, layer, x, *weights, vectors, pad(initial), output, saved, pad(final))
    if rows is None and len(row_ranges) == 1 and not kernel.projected and target is None:
        check_status(kernel.entry("plain_forward", integer)(*head))
        return y, result
    if target is not None or active.size:
        y = np.empty((T, N, P), kernel.dtype) if target is None else target
    written = y if target is not None or active.size else kernel.no_sequence
    entry, options = kernel.entry("forward", integer), (weight_hr, pad(reset_state), active, reset, written)
    for status in parallel_map(lambda r: entry(*head, *options, r.start, r.size), row_ranges):
        check_status(status)
    return y, result


def _masks(kernel: ScanKernel, rows: RowOrder | None) -> tuple[Array, Array]:
    """Return the active steps and the resets as (T, N) uint8, of size 0 if there are none."""
    masks = (None, None) if rows is None else (rows.active, rows.reset)
    active, reset = (kernel.no_mask if m is None else np.ascontiguousarray(m).view(np.uint8) for m in masks)
    return active, reset


def check_status(status: int) -> None:
    """Raise ValueError if an entry point found that an array does not fit."""
    if status:
        raise ValueError(f"a compiled scan received arrays that do not fit (status {status})")


def _split(rows: RowOrder | None, T: int, N: int, weights: int) -> list[RowRange]:
    """Split the rows into one range per thread."""
    if not thread_count(T, N, weights):
        return [RowRange(0, N)]
    return split_rows(rows or RowOrder.from_step_mask((T, N), StepMask()), T, N, weights)


# --- backward


def backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None]
) -> tuple[Array | None, State, Sequence[Array | None], Params]:
    """Run the adjoint; see xprnn.kernels.dispatch.backward for the arguments."""
    result: ForwardResult = tape.saved
    rows, dtype = result.row_order, result.kernel.dtype
    injected = [None if d is None else _plain(d if rows is None else rows.sort(d, 1), dtype) for d in dstates]
    injected = injected or [None] * len(dstate)
    if dy is not None:
        dy = _plain(dy if rows is None else rows.sort(dy, 1), dtype)
        if rows is not None and rows.active is not None:
            dy = np.where(rows.active[..., None], dy, 0)
        injected[0] = dy if injected[0] is None else injected[0] + dy
    dfinal = [None if d is None else _plain(d if rows is None else rows.sort(d, 0), dtype)[None] for d in dstate]
    dinitial = tuple(np.empty((1, *s.shape), dtype) for s in tape.initial_state)
    dx, gradients, dreset = run_backward(result, injected, dfinal, dinitial, 0, tape.sparse)
    if rows is not None:
        dx = None if dx is None else rows.unsort(dx, 1)
        dinitial = tuple(rows.unsort(d, 1) for d in dinitial)
        dreset = [None if d is None else rows.unsort(d, 0) for d in dreset]
    return dx, tuple(d[0] for d in dinitial), dreset, {name: gradients[name] for name in tape.params}


def run_backward(
    result: ForwardResult,
    injected: Sequence[Array | None],
    dfinal: Sequence[Array | None],
    dinitial: State,
    layer: int,
    sparse: bool = False,
    dx: Array | None = None,
) -> tuple[Array | None, Params, list[Array | None]]:
    """Run the adjoint of a forward pass of plain arrays.

    Args:
        result: of the forward pass.
        injected: (T, N, .) each, the cotangents of the states after every step, or None for zero; that of y first.
        dfinal: (L, N, .) each, the cotangents of the final states, or None for zero.
        dinitial: (L, N, .) each, written: the cotangents of the initial states.
        layer: the index in `dfinal` and `dinitial`.
        sparse: True if the gradient of weight_ih is a SparseGradient where x holds class numbers.
        dx: an array to which dx is added; None: a new array.

    Returns:
        dx (None for class numbers), the gradients by scan name, and the cotangents of the reset states or None.
    """
    kernel, rows, x = result.kernel, result.row_order, result.x
    (T, N), (W, P), integer = x.shape[:2], result.weights[1].shape, x.ndim == 2
    D, dtype, H = result.weights[0].shape[1], kernel.dtype, W // kernel.cell.gates
    add_to_dx = dx is not None
    if integer:
        dx = aligned_empty((2 - kernel.sources.dx_is_dh, T, N, W), dtype)
    elif dx is None:
        dx = aligned_empty((T, N, D), dtype)
    has_reset = rows is not None and rows.reset is not None
    dreset = [np.zeros((N, H if k else P), dtype) if has_reset else kernel.no_matrix for k in range(kernel.num_states)]
    dvectors = np.zeros((kernel.num_vectors, N, H), dtype) if kernel.num_vectors else kernel.no_sequence
    masks, template, pad = _masks(kernel, rows), kernel.template(result.reverse, True, "backward"), kernel.states_tuple
    injected = kernel.states_tuple([kernel.no_sequence if d is None else d for d in injected])
    final = kernel.states_tuple([kernel.no_sequence if d is None else d for d in dfinal])
    entry, unused = kernel.entry("backward", integer), (kernel.no_matrix,) * (kernel.padded_states - kernel.num_states)
    make = np.empty if T else np.zeros  # without steps, the driver does not write the gradients

    def run(row_range: RowRange) -> tuple[Array, ...]:
        biases = np.zeros((2, W), dtype)
        dhr = make((P, H) if kernel.projected else (0, 0), dtype)
        sums = (make((W, 0 if integer else D), dtype), make((W, P), dtype), biases[0], biases[1], dhr, dvectors)
        arrays = (result.output, result.saved, injected[0], final, dx, sums, pad(dinitial), result.weight_hr, *masks)
        others = (injected[1:], (*dreset, *unused), row_range.start, row_range.size, add_to_dx)
        check_status(entry(template, layer, x, *result.weights[:2], result.vectors, *arrays, *others))
        return sums[:5]

    row_ranges = _split(rows, T, N, (P + D * (not integer)) * W)
    gradients = _name_gradients(kernel, _reduce_threads(parallel_map(run, row_ranges)), dvectors)
    if integer:
        gradients["weight_ih"] = _lookup_gradient(result, dx[0], D, sparse)
    return None if integer else dx, gradients, [d if has_reset else None for d in dreset]


def _name_gradients(kernel: ScanKernel, sums: tuple[Array, ...], dvectors: Array) -> dict[str, Any]:
    """Return the gradients of all parameters by scan name."""
    dw, du, db_ih, db_hh, dhr = sums
    gradients = {"weight_ih": dw, "weight_hh": du, "weight_hr": dhr, "bias_ih": db_ih}
    gradients["bias_hh"] = db_ih.copy() if kernel.sources.dx_is_dh else db_hh
    return gradients | {name: np.add.reduce(dvectors[k], axis=0) for k, name in enumerate(kernel.cell.vectors)}


def _lookup_gradient(result: ForwardResult, dgates: Array, count: int, sparse: bool) -> Any:
    """Return the gradient of weight_ih for integer x, given the cotangents of the gates (T, N, W)."""
    from xprnn.kernels.jit.segment_sum import segment_sum  # imports numba

    active = None if result.row_order is None else result.row_order.active
    rows = flatten_leading(np, dgates)
    return lookup_backward(
        np, result.x.reshape(-1), rows, count, sparse=sparse, active=active, segment_sum_fn=segment_sum
    )


def _reduce_threads(sums: list[tuple[Array, ...]]) -> tuple[Array, ...]:
    """Add the threads' sums in the order of their rows."""
    for partial_sums in sums[1:]:
        for total, part in zip(sums[0], partial_sums, strict=True):
            np.add(total, part, total)
    return sums[0]
