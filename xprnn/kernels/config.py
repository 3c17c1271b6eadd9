"""Which kernels may run, and in which precision: context managers and environment variables."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from xprnn.arrays.namespace import InputError

__all__ = [
    "GENERIC",
    "compiling",
    "fast",
    "generic",
    "generic_only",
    "precision",
    "tf32",
]


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
