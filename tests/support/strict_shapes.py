"""Permission for array-api-strict to make arrays whose shape depends on values, as sparse gradients need."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


def allow_data_dependent_shapes(xp: Any) -> AbstractContextManager[Any]:
    """Lift the rule against data-dependent shapes that the backend fixture sets for array-api-strict."""
    if xp.library != "strict":
        return nullcontext()
    import array_api_strict

    return array_api_strict.ArrayAPIStrictFlags(data_dependent_shapes=True)
