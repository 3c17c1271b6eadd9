"""Whole-sequence overrides of the scan, one file for each way of running that has one.

`find` is asked once for a sequence. A kernel has the signature and the meaning of the generic scan; the tests compare
the two for every cell, dtype, ragged pattern and direction.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from xprnn.arrays import Namespace, Params, is_numpy
from xprnn.cells import Cell

__all__ = ["find", "generic_only"]

_generic: ContextVar[bool] = ContextVar("generic", default=False)


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
        from xprnn.kernels import inplace

        return inplace.find(cell)
    return None
