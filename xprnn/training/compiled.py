"""Access to the compiled passes of a training step, which need numba."""

from types import ModuleType
from typing import Any

from xprnn.kernels.jit.applies import jit_applies

__all__ = ["compiled_passes"]


def compiled_passes(dtype: Any) -> ModuleType | None:
    """Return xprnn.kernels.jit.training, or None if the NumPy formulas must run on arrays of this dtype."""
    if not jit_applies(dtype):
        return None
    from xprnn.kernels.jit import training  # imports numba

    return training
