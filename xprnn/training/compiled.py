"""Access to the compiled passes of a training step, which need numba."""

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from xprnn.kernels.config import is_reference_only, jit_enabled
from xprnn.kernels.jit import compile_cache

__all__ = ["FLOAT_DTYPES", "compiled_passes"]

FLOAT_DTYPES = frozenset((np.dtype(np.float32), np.dtype(np.float64)))


def compiled_passes(dtype: Any) -> ModuleType | None:
    """Return the module of compiled passes, or None if the NumPy formulas must run.

    Args:
        dtype: dtype of the NumPy arrays of the call.

    Returns:
        xprnn.kernels.jit.training. None for a dtype other than float32 and float64, without numba, within
        `reference_only`, and where compiled kernels are switched off.
    """
    return _load() if dtype in FLOAT_DTYPES and jit_enabled() and not is_reference_only() else None


@cache
def _load() -> ModuleType | None:
    if not compile_cache.numba_available():
        return None
    from xprnn.kernels.jit import training

    return training
