"""Which kernels may run, and in which precision: context managers and environment variables."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from xprnn.arrays.namespace import InputError

__all__ = [
    "REFERENCE_NAME",
    "allow_jit",
    "is_reference_only",
    "jit_enabled",
    "precision",
    "reference_only",
    "tf32_enabled",
]


REFERENCE_NAME = "generic scan"


_reference_only: ContextVar[bool] = ContextVar("generic", default=False)


_JIT_DEFAULT = os.environ.get("XPRNN_FAST", "1") != "0"


_precision: ContextVar[str] = ContextVar("precision", default="float32")


_jit_override: ContextVar[bool | None] = ContextVar("fast", default=None)


def jit_enabled() -> bool:
    """Whether compiled kernels may run: unless switched off here or by XPRNN_FAST=0 in the environment at the start."""
    chosen = _jit_override.get()
    return _JIT_DEFAULT if chosen is None else chosen


@contextmanager
def allow_jit(enabled: bool) -> Iterator[None]:
    """Within this context compiled kernels run, or do not run, whatever XPRNN_FAST says.

    >>> with allow_jit(False):
    ...     jit_enabled()
    False
    """
    token = _jit_override.set(enabled)
    try:
        yield
    finally:
        _jit_override.reset(token)


def is_reference_only() -> bool:
    """Whether every pass is to take the generic scan."""
    return _reference_only.get()


@contextmanager
def reference_only() -> Iterator[None]:
    """Within this context every pass takes the generic scan: to compare, to teach, to rule a kernel out.

    >>> with reference_only():
    ...     find(None, None, {}, (0, 0), None) is None
    True
    """
    token = _reference_only.set(True)
    try:
        yield
    finally:
        _reference_only.reset(token)


def tf32_enabled() -> bool:
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
    ...     tf32_enabled()
    True
    >>> tf32_enabled()
    False
    """
    if name not in ("float32", "tf32"):
        raise InputError(f'precision: name must be "float32" or "tf32", found {name!r}')
    token = _precision.set(name)
    try:
        yield
    finally:
        _precision.reset(token)
