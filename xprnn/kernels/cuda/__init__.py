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
from xprnn.kernels.config import GENERIC, fast
from xprnn.kernels.cuda import fused, persistent, pointwise
from xprnn.kernels.cuda.cluster_config import Config

__all__ = ["capability", "explain", "find", "fused_only"]

_fused: ContextVar[bool] = ContextVar("fused", default=False)


@contextmanager
def fused_only() -> Iterator[None]:
    """Within this context no persistent kernel runs: to compare, or to rule one out."""
    token = _fused.set(True)
    try:
        yield
    finally:
        _fused.reset(token)


def find(cell: Cell, params: Params, shape: Any, steps: Any) -> Callable[..., Any] | None:
    """`forward` of the fastest kernel for `shape` = (T, N), or None; it is called as the generic scan is."""
    return _choose(cell, params, shape, steps)[0]


def explain(cell: Cell, params: Params, shape: Any, steps: Any) -> str:
    """What `find` takes, and why nothing faster."""
    return _choose(cell, params, shape, steps)[1]


@cache
def capability(device: int) -> tuple[int, int]:
    """The compute capability of a device, by its number."""
    import cupy

    text = cupy.cuda.Device(device).compute_capability
    return int(text[:-1]), int(text[-1])


def _choose(cell: Cell, params: Params, shape: Any, steps: Any) -> tuple[Callable[..., Any] | None, str]:
    u = params["weight_hh"]
    if why := _unfit(params, shape):
        return None, f"{GENERIC} ({why})"
    config: Config | str = "ruled out by fused_only"
    if not _fused.get():
        config = persistent.find(cell, params, tuple(shape), steps, capability(int(device_of(u).id)))
        if not isinstance(config, str):
            return partial(persistent.forward, config), persistent.NAME
    if why := _unprinted(cell, params):
        return None, f"{GENERIC} (not fused: {why}; not persistent: {config})"
    name = f"{fused.NAME} (not persistent: {config})"
    printed = pointwise.printed(cell, 8 * u.dtype.itemsize)
    assert printed is not None
    return partial(fused.forward, printed, name), name


def _unfit(params: Params, shape: Any) -> str:
    """Why no kernel can run, or ""."""
    if not fast():
        return "kernels are switched off: XPRNN_FAST=0 or compiling(False)"
    if str(dtype := params["weight_hh"].dtype) not in ("float32", "float64"):
        return f"{dtype} is neither float32 nor float64"
    return "" if shape[0] and shape[1] else "no step or no row"


def _unprinted(cell: Cell, params: Params) -> str:
    """Why the cell has no printed kernel, or ""."""
    if "weight_hr" in params:
        return "h is projected by weight_hr"
    if cell.early:
        return "gates act before their product"
    printed = pointwise.printed(cell, 8 * params["weight_hh"].dtype.itemsize)
    return "its cell can't be printed as CUDA code" if printed is None else ""
