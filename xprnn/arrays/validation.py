"""Argument checks. Each raises InputError with the function, the argument, the expectation and the value found."""

from numbers import Integral
from typing import Any

import numpy as np
from numpy.random import Generator

from xprnn.arrays.namespace import (
    InputError,
    Params,
    check_shape,
    resolve_namespace,
)

__all__ = [
    "check_bool",
    "check_init",
    "check_param_shapes",
    "check_params",
    "check_probability",
    "check_rng",
    "positive_int",
    "require_array",
    "validate_positive",
]


def check_params(where: str, params: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise InputError unless `params` is a dict with exactly the keys of `shapes` and no value is None."""
    if not isinstance(params, dict):
        raise InputError(f"{where}: params must be a dict of arrays, found {type(params).__name__}")
    if params.keys() != shapes.keys():
        missing, extra = sorted(shapes.keys() - params.keys()), sorted(params.keys() - shapes.keys())
        problems = [f"{kind} {', '.join(n)}" for kind, n in (("missing", missing), ("unexpected", extra)) if n]
        raise InputError(f"{where}: params: {'; '.join(problems)} (expected {', '.join(shapes)})")
    for name, value in params.items():
        require_array(where, name, value)


def check_param_shapes(where: str, params: Params, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise InputError unless every parameter has the shape listed for it."""
    for name, shape in shapes.items():
        if tuple(params[name].shape) != shape:
            check_shape(where, name, "", params[name], shape)


def positive_int(where: str, name: str, value: Any, minimum: int = 1) -> int:
    """Return `value` as an int, or raise InputError unless it is an integer >= `minimum` (np.int64 and others too).

    >>> positive_int("LSTM", "hidden_size", 0)
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: LSTM: hidden_size must be an integer >= 1, found 0
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise InputError(f"{where}: {name} must be an integer >= {minimum}, found {value!r}")
    return int(value)


def validate_positive(config: Any, *names: str, minimum: int = 1) -> None:
    """Replace attributes of a frozen dataclass by their `positive_int`."""
    for name in names:
        object.__setattr__(config, name, positive_int(type(config).__name__, name, getattr(config, name), minimum))


def check_probability(where: str, name: str, value: Any) -> None:
    """Raise InputError unless 0 <= `value` < 1."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise InputError(f"{where}: {name} must be in [0, 1), found {value!r}")


def require_array(where: str, name: str, value: Any) -> None:
    """Raise InputError if `value` is None where an array is needed."""
    if value is None:
        raise InputError(f"{where}: {name} must be an array, found None")


def check_bool(where: str, name: str, value: Any) -> None:
    """Raise InputError unless `value` is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{where}: {name} must be True or False, found {value!r}")


def check_init(where: str, rng: Any, like: Any) -> None:
    """Raise InputError unless `rng` is a NumPy Generator and `like` is an array of a real floating dtype."""
    check_rng(where, rng)
    resolve_namespace(where, {"like": like})


def check_rng(where: str, rng: Any, *, optional: bool = False) -> None:
    """Raise InputError unless `rng` is a NumPy Generator, or None if that is allowed by `optional`."""
    if not isinstance(rng, Generator) and not (optional and rng is None):
        raise InputError(
            f"{where}: rng must be a numpy.random.Generator, found {type(rng).__name__}: numpy.random.default_rng(0)"
        )
