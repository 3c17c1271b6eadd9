"""Whole-sequence overrides of the scan, one file for each way of running that has one.

`find` is asked once for a sequence. A kernel has the signature and the meaning of the generic scan; the tests compare
the two for every cell, dtype, ragged pattern and direction.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

from xprnn.arrays import InputError, Namespace, Params, is_cupy, is_numpy
from xprnn.cells import Cell

__all__ = ["GENERIC", "compiling", "explain", "fast", "find", "generic", "generic_only", "precision", "tf32"]

GENERIC = "generic scan"

_generic: ContextVar[bool] = ContextVar("generic", default=False)
_ALLOWED = os.environ.get("XPRNN_FAST", "1") != "0"
_precision: ContextVar[str] = ContextVar("precision", default="float32")
_fast: ContextVar[bool | None] = ContextVar("fast", default=None)


def fast() -> bool:
    """Whether compiled kernels may run: unless switched off here or by XPRNN_FAST=0 in the environment at the start."""
    chosen = _fast.get()
    return _ALLOWED if chosen is None else chosen


@contextmanager
def compiling(allowed: bool) -> Iterator[None]:
    """Within this context compiled kernels run, or do not run, whatever XPRNN_FAST says.

    >>> with compiling(False):
    ...     fast()
    False
    """
    token = _fast.set(allowed)
    try:
        yield
    finally:
        _fast.reset(token)


def generic() -> bool:
    """Whether every pass is to take the generic scan."""
    return _generic.get()


@contextmanager
def generic_only() -> Iterator[None]:
    """Within this context every pass takes the generic scan: to compare, to teach, to rule a kernel out.

    >>> with generic_only():
    ...     find(None, None, {}, (0, 0), None) is None
    True
    """
    token = _generic.set(True)
    try:
        yield
    finally:
        _generic.reset(token)


def tf32() -> bool:
    """Whether float32 matrix products on a CUDA device may round their factors to TF32."""
    return _precision.get() == "tf32"


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Within this context the recurrent layers' float32 matrix products on CUDA devices run in this arithmetic.

    "float32", the default, is float32 throughout. "tf32" lets the tensor cores round both factors of each product to
    10 bits after the point, as PyTorch's cuDNN layers do unless told otherwise: several times the speed where products
    dominate, at relative errors around 1e-3 instead of 1e-6. It holds for what runs inside, forward and backward apart;
    nothing changes for float64, on a CPU, or in the generic scan.

    Args:
        name: "float32" or "tf32".

    Raises:
        InputError: another name.

    >>> with precision("tf32"):
    ...     tf32()
    True
    >>> tf32()
    False
    """
    if name not in ("float32", "tf32"):
        raise InputError(f'precision: name must be "float32" or "tf32", found {name!r}')
    token = _precision.set(name)
    try:
        yield
    finally:
        _precision.reset(token)


@cache
def _on_numpy() -> tuple[ModuleType, ModuleType]:
    """Its kernels, imported when they are first wanted; to ask for them again would take two microseconds."""
    from xprnn.kernels import compiled, inplace

    return compiled, inplace


def find(xp: Namespace, cell: Cell, params: Params, shape: Any, steps: Any) -> Callable[..., Any] | None:
    """The forward function of the kernel for this case, `shape` = (T, N), or None for the generic scan."""
    if _generic.get():
        return None
    if is_numpy(xp):
        compiled, inplace = _on_numpy()
        found: Callable[..., Any] | None = (compiled.find(cell, params) if fast() else None) or inplace.find(cell)
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
        compiled, inplace = _on_numpy()
        slow: str = compiled.why_not(cell, params) if fast() else "switched off (XPRNN_FAST=0 or compiling(False))"
        if not slow:
            return str(compiled.NAME)
        why = inplace.why_not(cell)
        return f"{GENERIC} (not in place: {why})" if why else f"{inplace.NAME} (not compiled: {slow})"
    if is_cupy(xp):
        from xprnn.kernels import cuda

        return cuda.explain(cell, params, shape, steps)
    return f"{GENERIC} (no kernels for this array library)"
