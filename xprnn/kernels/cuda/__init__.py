"""CUDA kernels for CuPy arrays, and their dispatch.

The first of these that supports the layer runs it:

    persistent   one launch for the whole sequence, with the recurrent weight in registers and shared memory
    fused        two launches per step: the recurrent product (cuBLAS) and a pointwise kernel generated from the cell
    reference    the reference scan, on CuPy's array functions

Dispatch reads only shapes, dtypes and the device number, so it never waits for the device.
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

_no_persistent: ContextVar[bool] = ContextVar("no_persistent", default=False)


@contextmanager
def no_persistent() -> Iterator[None]:
    """Disable the persistent kernels within this context, for example to compare results or times."""
    token = _no_persistent.set(True)
    try:
        yield
    finally:
        _no_persistent.reset(token)


def find_kernel(cell: Cell, params: Params, shape: Any, step_mask: Any) -> Callable[..., Any] | None:
    """Return the `forward` function of the fastest kernel that supports the layer, or None.

    Args:
        cell: the cell.
        params: the parameters of one layer in one direction.
        shape: (T, N).
        step_mask: the active and the reset rows of each step.

    Returns:
        A function with the signature of xprnn.kernels.dispatch.forward, or None: the reference scan runs.
    """
    return _select_kernel(cell, params, shape, step_mask)[0]


def explain(cell: Cell, params: Params, shape: Any, step_mask: Any) -> str:
    """Name the kernel that `find_kernel` selects, and say why no faster one applies."""
    return _select_kernel(cell, params, shape, step_mask)[1]


@cache
def compute_capability(device: int) -> tuple[int, int]:
    """Return the compute capability (major, minor) of a device number."""
    import cupy

    text = cupy.cuda.Device(device).compute_capability
    return int(text[:-1]), int(text[-1])


def _select_kernel(cell: Cell, params: Params, shape: Any, step_mask: Any) -> tuple[Callable[..., Any] | None, str]:
    weight = params["weight_hh"]
    if reason := _unsupported_reason(params, shape):
        return None, f"{REFERENCE_NAME} ({reason})"
    config: ClusterConfig | str = "ruled out by no_persistent"
    if not _no_persistent.get():
        config = persistent.find_config(
            cell, params, tuple(shape), step_mask, compute_capability(int(device_of(weight).id))
        )
        if not isinstance(config, str):
            return partial(persistent.forward, config), persistent.NAME
    if reason := _fused_unsupported_reason(cell, params):
        return None, f"{REFERENCE_NAME} (not fused: {reason}; not persistent: {config})"
    name = f"{fused.NAME} (not persistent: {config})"
    kernels = pointwise.pointwise_kernels(cell, 8 * weight.dtype.itemsize)
    assert kernels is not None
    return partial(fused.forward, kernels, name), name


def _unsupported_reason(params: Params, shape: Any) -> str:
    """Return the reason why no CUDA kernel can run, or ""."""
    if not jit_enabled():
        return "kernels are switched off: XPRNN_FAST=0 or allow_jit(False)"
    if str(dtype := params["weight_hh"].dtype) not in ("float32", "float64"):
        return f"{dtype} is neither float32 nor float64"
    return "" if shape[0] and shape[1] else "no step or no row"


def _fused_unsupported_reason(cell: Cell, params: Params) -> str:
    """Return the reason why the fused kernels cannot run the cell, or ""."""
    if "weight_hr" in params:
        return "h is projected by weight_hr"
    if cell.pregates:
        return "gates act before their product"
    kernels = pointwise.pointwise_kernels(cell, 8 * params["weight_hh"].dtype.itemsize)
    return "its cell can't be printed as CUDA code" if kernels is None else ""
