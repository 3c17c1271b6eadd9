"""Whole-sequence overrides of the scan, one file for each way of running that has one.

`find` is asked once for a sequence. A kernel has the signature and the meaning of the generic scan; the tests compare
the two for every cell, dtype, ragged pattern and direction.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from xprnn.arrays import Namespace, Params, is_numpy
from xprnn.cells import Cell

__all__ = ["compiling", "fast", "find", "generic_only"]

_generic: ContextVar[bool] = ContextVar("generic", default=False)
_ALLOWED = os.environ.get("XPRNN_FAST", "1") != "0"
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


@contextmanager
def generic_only() -> Iterator[None]:
    """Within this context every pass takes the generic scan: to compare, to teach, to rule a kernel out.

    >>> with generic_only():
    ...     find(None, None, {}) is None
    True
    """
    token = _generic.set(True)
    try:
        yield
    finally:
        _generic.reset(token)


def find(xp: Namespace, cell: Cell, params: Params) -> Callable[..., Any] | None:
    """The forward function of the kernel for this case, or None for the generic scan."""
    if _generic.get():
        return None
    if is_numpy(xp):
        from xprnn.kernels import compiled, inplace

        return (compiled.find(cell, params) if fast() else None) or inplace.find(cell)
    return None
