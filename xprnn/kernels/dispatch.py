"""Choice of the implementation of a scan: a kernel where one fits, else the reference."""

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

from xprnn.arrays.namespace import Array, Namespace, Params, is_cupy, is_numpy
from xprnn.cells.cell import Cell
from xprnn.kernels.config import REFERENCE_NAME, _reference_only, jit_enabled
from xprnn.kernels.reference import ScanGradients, reference_forward
from xprnn.kernels.tape import State, StepMask, Tape

__all__ = ["backward", "explain", "find_kernel", "forward"]


def forward(
    cell: Cell,
    params: Params,
    x: Array,
    state: State,
    step_mask: StepMask,
    *,
    reset_state: State | None = None,
    xp: Namespace,
    reverse: bool,
    record_tape: bool,
) -> tuple[Array, State, Tape | None]:
    """Run the cell along x; the fastest implementation that knows the case does the work.

    Args:
        cell: the cell.
        params: weight_ih (G*H, D), weight_hh (G*H, P), and where used bias_ih, bias_hh (G*H,), weight_hr (P, H), and
            the cell's own vectors (H,).
        x: (T, N, D), or integers (T, N).
        state: the cell's states, h (N, P) first, the others (N, H).
        steps: which rows take part when.
        home: the state that a reset leads to; `state` unless given.
        xp: the arrays' namespace.
        reverse: walk from T-1 to 0.
        keep: whether backward will follow; else no tape is kept.

    Returns:
        y (T, N, P), the final state, the tape or None.
    """
    if step_mask.active is not None:
        # What stands in padding must not reach a product, where even 0 * nan is nan.
        mask = step_mask.active[..., None] if x.ndim == 3 else step_mask.active
        x = xp.where(mask, x, xp.zeros_like(x))
    run = find_kernel(xp, cell, params, x.shape[:2], step_mask) or reference_forward
    reset_state = state if reset_state is None else reset_state
    result: tuple[Array, State, Tape | None] = run(
        cell, params, x, state, step_mask, reset_state=reset_state, xp=xp, reverse=reverse, record_tape=record_tape
    )
    return result


def backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None] = ()
) -> ScanGradients:
    """The adjoint of `forward`.

    Args:
        tape: what forward returned.
        dy: (T, N, P), adjoint of y, or None.
        dstate: the adjoint of each final state, or None for zero.
        dstates: the adjoint of each entry of tape.states (T, N, .), or None.

    Returns:
        dx like x (None for integers), the adjoint of each initial state, that of each home state (None where nothing is
        reset), gradients keyed like params.
    """
    result: ScanGradients = tape.backward_fn(tape, dy, dstate, dstates)
    return result


@cache
def _numpy_kernels() -> tuple[ModuleType, ModuleType]:
    """Its kernels, imported when they are first wanted; to ask for them again would take two microseconds."""
    from xprnn.kernels.jit import scan as jit_scan
    from xprnn.kernels.ufunc import scan as ufunc_scan

    return jit_scan, ufunc_scan


def find_kernel(xp: Namespace, cell: Cell, params: Params, shape: Any, step_mask: Any) -> Callable[..., Any] | None:
    """The forward function of the kernel for this case, `shape` = (T, N), or None for the generic scan."""
    if _reference_only.get():
        return None
    if is_numpy(xp):
        jit_scan, ufunc_scan = _numpy_kernels()
        found: Callable[..., Any] | None = (
            jit_scan.find_kernel(cell, params) if jit_enabled() else None
        ) or ufunc_scan.find_kernel(cell)
        return found
    if is_cupy(xp):
        from xprnn.kernels import cuda

        return cuda.find_kernel(cell, params, shape, step_mask)
    return None


def explain(xp: Namespace, cell: Cell, params: Params, shape: Any, step_mask: Any) -> str:
    """The kernel that `find` takes, as a tape names it, and for each that could be faster why it is not taken."""
    if _reference_only.get():
        return f"{REFERENCE_NAME} (asked for by reference_only)"
    if is_numpy(xp):
        jit_scan, ufunc_scan = _numpy_kernels()
        slow: str = (
            jit_scan.unsupported_reason(cell, params)
            if jit_enabled()
            else "switched off (XPRNN_FAST=0 or allow_jit(False))"
        )
        if not slow:
            return str(jit_scan.NAME)
        why = ufunc_scan.unsupported_reason(cell)
        return f"{REFERENCE_NAME} (not in place: {why})" if why else f"{ufunc_scan.NAME} (not compiled: {slow})"
    if is_cupy(xp):
        from xprnn.kernels import cuda

        return cuda.explain(cell, params, shape, step_mask)
    return f"{REFERENCE_NAME} (no kernels for this array library)"
