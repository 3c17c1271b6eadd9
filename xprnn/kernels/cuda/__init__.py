"""Kernels for CuPy arrays. The fastest that knows a case runs it; what none knows takes the generic scan.

    persistent   one launch for the whole sequence, the recurrent weight kept on the chip (persistent.py)
    fused        two launches a step: the recurrent product, and the cell's printed kernel (fused.py)

No decision waits for the device: it is made from shapes, dtypes and the device's number.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

from xprnn.arrays.namespace import Params, device_of
from xprnn.cells.cell import Cell
from xprnn.kernels.config import REFERENCE_NAME, jit_enabled
from xprnn.kernels.cuda import fused, persistent, pointwise
from xprnn.kernels.cuda.cluster_config import ClusterConfig

__all__ = ["compute_capability", "explain", "find_kernel", "no_persistent"]

_no_persistent: ContextVar[bool] = ContextVar("fused", default=False)


@contextmanager
def no_persistent() -> Iterator[None]:
    """Within this context no persistent kernel runs: to compare, or to rule one out."""
    token = _no_persistent.set(True)
    try:
        yield
    finally:
        _no_persistent.reset(token)


def find_kernel(cell: Cell, params: Params, shape: Any, step_mask: Any) -> Callable[..., Any] | None:
    """`forward` of the fastest kernel for `shape` = (T, N), or None; it is called as the generic scan is."""
    return _select_kernel(cell, params, shape, step_mask)[0]


def explain(cell: Cell, params: Params, shape: Any, step_mask: Any) -> str:
    """What `find` takes, and why nothing faster."""
    return _select_kernel(cell, params, shape, step_mask)[1]


@cache
def compute_capability(device: int) -> tuple[int, int]:
    """The compute capability of a device, by its number."""
    import cupy

    text = cupy.cuda.Device(device).compute_capability
    return int(text[:-1]), int(text[-1])


def _select_kernel(cell: Cell, params: Params, shape: Any, steps: Any) -> tuple[Callable[..., Any] | None, str]:
    u = params["weight_hh"]
    if why := _unsupported_reason(params, shape):
        return None, f"{REFERENCE_NAME} ({why})"
    config: ClusterConfig | str = "ruled out by no_persistent"
    if not _no_persistent.get():
        config = persistent.find_config(cell, params, tuple(shape), steps, compute_capability(int(device_of(u).id)))
        if not isinstance(config, str):
            return partial(persistent.forward, config), persistent.NAME
    if why := _fused_unsupported_reason(cell, params):
        return None, f"{REFERENCE_NAME} (not fused: {why}; not persistent: {config})"
    name = f"{fused.NAME} (not persistent: {config})"
    printed = pointwise.pointwise_kernels(cell, 8 * u.dtype.itemsize)
    assert printed is not None
    return partial(fused.forward, printed, name), name


def _unsupported_reason(params: Params, shape: Any) -> str:
    """Why no kernel can run, or ""."""
    if not jit_enabled():
        return "kernels are switched off: XPRNN_FAST=0 or allow_jit(False)"
    if str(dtype := params["weight_hh"].dtype) not in ("float32", "float64"):
        return f"{dtype} is neither float32 nor float64"
    return "" if shape[0] and shape[1] else "no step or no row"


def _fused_unsupported_reason(cell: Cell, params: Params) -> str:
    """Why the cell has no printed kernel, or ""."""
    if "weight_hr" in params:
        return "h is projected by weight_hr"
    if cell.pregates:
        return "gates act before their product"
    printed = pointwise.pointwise_kernels(cell, 8 * params["weight_hh"].dtype.itemsize)
    return "its cell can't be printed as CUDA code" if printed is None else ""
