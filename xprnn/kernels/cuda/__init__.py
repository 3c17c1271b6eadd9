"""Kernels for CuPy arrays. The fastest that knows a case runs it; what none knows takes the generic scan.

    persistent   one launch for the whole sequence, the recurrent weight kept on the chip (persistent.py)
    fused        two launches a step: the recurrent product, and the cell's printed kernel (fused.py)

No decision waits for the device: it is made from shapes, dtypes and the device's number.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from xprnn.arrays import Params, device_of
from xprnn.cells import Cell
from xprnn.kernels.cuda import persistent

__all__ = ["capability", "explain", "find"]

_GENERIC = "generic scan"


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
    place = capability(int(device_of(u).id))
    config = persistent.find(cell, params, tuple(shape), steps, place)
    if not isinstance(config, str):
        return partial(persistent.forward, config), persistent.NAME
    return None, f"{_GENERIC} (not persistent: {config})"
