"""Choice of the kernel of a scan: the fastest that applies to the call, else the reference scan."""

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

from xprnn.arrays.namespace import Array, Namespace, Params, is_cupy, is_numpy
from xprnn.cells.cell import Cell
from xprnn.kernels.config import REFERENCE_NAME, is_reference_only, jit_enabled
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
    """Run a cell over the sequence x.

    Every kernel has this signature; the equations are in reference.py.

    Args:
        cell: the cell.
        params: weight_ih (G*H, D), weight_hh (G*H, P); if there are any, bias_ih and bias_hh (G*H,), weight_hr (P, H)
            and the cell's vectors (H,). P is H without weight_hr.
        x: (T, N, D), or integers (T, N) that stand for one-hot vectors.
        state: the cell's initial states: h (N, P) first, the others (N, H).
        step_mask: the active steps and the resets.
        reset_state: the states that a reset restores; None: `state`.
        xp: the namespace of the arrays.
        reverse: True to run from step T-1 to step 0.
        record_tape: False if `backward` will not follow.

    Returns:
        y (T, N, P), the final states, and the tape or None.
    """
    if step_mask.active is not None:
        # Padding may hold NaN, and in a product even 0 * nan is nan.
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
    """The adjoint of `forward`, by the kernel that recorded the tape.

    Args:
        tape: from `forward`.
        dy: (T, N, P), the cotangent of y, or None.
        dstate: the cotangent of each final state, or None for zero.
        dstates: the cotangent of each entry of tape.states(), (T, N, .), or None.

    Returns:
        dx in the shape of x (None for integers), the cotangent of each initial state, the cotangent of each reset state
        (None without resets), and gradients keyed like params.
    """
    result: ScanGradients = tape.backward_fn(tape, dy, dstate, dstates)
    return result


@cache
def _numpy_kernels() -> tuple[ModuleType, ModuleType]:
    """The modules of the NumPy kernels, imported at first use; an import statement at each call would take 2 µs."""
    from xprnn.kernels.jit import scan as jit_scan
    from xprnn.kernels.ufunc import scan as ufunc_scan

    return jit_scan, ufunc_scan


def find_kernel(xp: Namespace, cell: Cell, params: Params, shape: Any, step_mask: Any) -> Callable[..., Any] | None:
    """Return the forward function of the kernel for a call with `shape` = (T, N); None for the reference scan."""
    if is_reference_only():
        return None
    if is_numpy(xp):
        jit_scan, ufunc_scan = _numpy_kernels()
        kernel: Callable[..., Any] | None = (
            jit_scan.find_kernel(cell, params) if jit_enabled() else None
        ) or ufunc_scan.find_kernel(cell)
        return kernel
    if is_cupy(xp):
        from xprnn.kernels import cuda

        return cuda.find_kernel(cell, params, shape, step_mask)
    return None


def explain(xp: Namespace, cell: Cell, params: Params, shape: Any, step_mask: Any) -> str:
    """Return the name of the kernel that `find_kernel` chooses, with the reason why each faster one does not apply."""
    if is_reference_only():
        return f"{REFERENCE_NAME} (asked for by reference_only)"
    if is_numpy(xp):
        jit_scan, ufunc_scan = _numpy_kernels()
        not_compiled: str = (
            jit_scan.unsupported_reason(cell, params["weight_hh"].dtype, "weight_hr" in params)
            if jit_enabled()
            else "switched off (XPRNN_FAST=0 or allow_jit(False))"
        )
        if not not_compiled:
            return str(jit_scan.NAME)
        not_in_place = ufunc_scan.unsupported_reason(cell)
        if not_in_place:
            return f"{REFERENCE_NAME} (not in place: {not_in_place})"
        return f"{ufunc_scan.NAME} (not compiled: {not_compiled})"
    if is_cupy(xp):
        from xprnn.kernels import cuda

        return cuda.explain(cell, params, shape, step_mask)
    return f"{REFERENCE_NAME} (no kernels for this array library)"
