"""Whether compiled kernels outside the scan may run."""

from typing import Any

from xprnn.kernels.config import is_reference_only, jit_enabled
from xprnn.kernels.jit.compile_cache import numba_available
from xprnn.kernels.step_plan import DTYPE_BITS

__all__ = ["jit_applies"]


def jit_applies(dtype: Any) -> bool:
    """Return True if compiled kernels may run on NumPy arrays of this dtype.

    False for a dtype other than float32 and float64, without numba, within `reference_only`, and where compiled kernels
    are switched off. This imports numba if no other condition decides.
    """
    return dtype in DTYPE_BITS and jit_enabled() and not is_reference_only() and numba_available()
