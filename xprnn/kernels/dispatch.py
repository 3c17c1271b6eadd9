"""Choice of the implementation of a scan: a kernel where one fits, else the reference."""

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

from xprnn.arrays.namespace import Array, Namespace, Params, is_cupy, is_numpy
from xprnn.cells.cell import Cell
from xprnn.kernels.config import GENERIC, _generic, fast
from xprnn.kernels.reference import Back, _forward
from xprnn.kernels.tape import State, Steps, Tape

__all__ = ["backward", "explain", "find", "forward"]


def forward(
    cell: Cell,
    params: Params,
    x: Array,
    state: State,
    steps: Steps,
    *,
    home: State | None = None,
    xp: Namespace,
    reverse: bool,
    keep: bool,
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
    if steps.active is not None:
        # What stands in padding must not reach a product, where even 0 * nan is nan.
        mask = steps.active[..., None] if x.ndim == 3 else steps.active
        x = xp.where(mask, x, xp.zeros_like(x))
    run = find(xp, cell, params, x.shape[:2], steps) or _forward
    home = state if home is None else home
    result: tuple[Array, State, Tape | None] = run(
        cell, params, x, state, steps, home=home, xp=xp, reverse=reverse, keep=keep
    )
    return result


def backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None] = ()
) -> Back:
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
    result: Back = tape.back(tape, dy, dstate, dstates)
    return result


@cache
def _on_numpy() -> tuple[ModuleType, ModuleType]:
    """Its kernels, imported when they are first wanted; to ask for them again would take two microseconds."""
    from xprnn.kernels.jit import scan as jit_scan
    from xprnn.kernels.ufunc import scan as ufunc_scan

    return jit_scan, ufunc_scan


def find(xp: Namespace, cell: Cell, params: Params, shape: Any, steps: Any) -> Callable[..., Any] | None:
    """The forward function of the kernel for this case, `shape` = (T, N), or None for the generic scan."""
    if _generic.get():
        return None
    if is_numpy(xp):
        jit_scan, ufunc_scan = _on_numpy()
        found: Callable[..., Any] | None = (jit_scan.find(cell, params) if fast() else None) or ufunc_scan.find(cell)
        return found
    if is_cupy(xp):
        from xprnn.kernels import cuda

        return cuda.find(cell, params, shape, steps)
    return None


def explain(xp: Namespace, cell: Cell, params: Params, shape: Any, steps: Any) -> str:
    """The kernel that `find` takes, as a tape names it, and for each that could be faster why it is not taken."""
    if _generic.get():
        return f"{GENERIC} (asked for by generic_only)"
    if is_numpy(xp):
        jit_scan, ufunc_scan = _on_numpy()
        slow: str = jit_scan.why_not(cell, params) if fast() else "switched off (XPRNN_FAST=0 or compiling(False))"
        if not slow:
            return str(jit_scan.NAME)
        why = ufunc_scan.why_not(cell)
        return f"{GENERIC} (not in place: {why})" if why else f"{ufunc_scan.NAME} (not compiled: {slow})"
    if is_cupy(xp):
        from xprnn.kernels import cuda

        return cuda.explain(cell, params, shape, steps)
    return f"{GENERIC} (no kernels for this array library)"
