"""Which kernels may run, and in which precision: context managers and an environment variable."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from xprnn.arrays.namespace import InputError

__all__ = [
    "REFERENCE_NAME",
    "allow_jit",
    "is_default",
    "is_reference_only",
    "jit_enabled",
    "precision",
    "reference_only",
    "tf32_enabled",
]


REFERENCE_NAME = "reference scan"  # the kernel name in tapes and in explain()

_JIT_DEFAULT = os.environ.get("XPRNN_FAST", "1") != "0"

_reference_only: ContextVar[bool] = ContextVar("reference_only", default=False)
_jit_override: ContextVar[bool | None] = ContextVar("jit_override", default=None)
_precision: ContextVar[str] = ContextVar("precision", default="float32")


def jit_enabled() -> bool:
    """True if compiled NumPy kernels may run: the choice of `allow_jit`, else of XPRNN_FAST (0 is off) at import."""
    override = _jit_override.get()
    return _JIT_DEFAULT if override is None else override


def is_default() -> bool:
    """True outside `allow_jit` and `reference_only`, if XPRNN_FAST did not switch compiled kernels off."""
    return _JIT_DEFAULT and _jit_override.get() is None and not _reference_only.get()


@contextmanager
def allow_jit(enabled: bool) -> Iterator[None]:
    """Within this context compiled NumPy kernels may run (True) or not (False), regardless of XPRNN_FAST.

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
    """True within `reference_only`."""
    return _reference_only.get()


@contextmanager
def reference_only() -> Iterator[None]:
    """Within this context every pass runs the reference scan, for comparison with the other kernels.

    >>> with reference_only():
    ...     is_reference_only()
    True
    """
    token = _reference_only.set(True)
    try:
        yield
    finally:
        _reference_only.reset(token)


def tf32_enabled() -> bool:
    """True if float32 matrix products on a CUDA device may round their factors to TF32."""
    return _precision.get() == "tf32"


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Set the arithmetic of the recurrent layers' float32 matrix products on CUDA devices within this context.

    "float32", the default, is float32 throughout. "tf32" lets the tensor cores round both factors of each product to
    10 bits after the point, which is the default of PyTorch's cuDNN layers. It is several times as fast where matrix
    products dominate, and its relative error is about 1e-3 instead of 1e-6.

    `forward` and `backward` each use the setting of the context in which they are called. The setting has no effect on
    float64, on a CPU, or on the reference scan.

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
