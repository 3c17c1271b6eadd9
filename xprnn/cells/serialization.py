"""JSON configuration of cells and activations, for model files.

Only cells from the factories of `xprnn.cells` and activations known by name have a configuration. User-defined ones
have none, because a file never contains code.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, wraps
from typing import Any, ParamSpec, cast

from xprnn.arrays.namespace import InputError
from xprnn.cells.activations import Activation, activation

__all__ = ["activation_from_config", "activation_to_config", "cell_from_config", "cell_to_config", "serializable"]

P = ParamSpec("P")

_factories: dict[str, Callable[..., Any]] = {}


def serializable(factory: Callable[P, Any]) -> Callable[P, Any]:
    """Decorate a cell factory: its cells record their options, and equal options return the same object.

    The arguments `peepholes` and `coupled` are bools and `clip` is None or a number above 0. Every other argument of
    the factory is an activation.

    >>> from xprnn.cells import gru
    >>> gru() is gru("Sigmoid", clip=None), gru().options
    (True, (('gate', 'sigmoid'), ('candidate', 'tanh'), ('clip', None)))
    """
    name, signature = factory.__name__, inspect.signature(factory)
    cells: dict[Any, Any] = {}
    create: Callable[..., Any] = factory

    @wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        normalized = {k: _normalize_option(name, k, v) for k, v in bound.arguments.items()}
        key = tuple(normalized.items())
        if key not in cells:
            options = tuple((k, activation_to_config(v) if isinstance(v, Activation) else v) for k, v in key)
            is_serializable = all(config is not None or normalized[k] is None for k, config in options)
            cells[key] = replace(create(**normalized), options=options if is_serializable else None)
        return cells[key]

    _factories[name] = make
    return cast(Callable[P, Any], cache(make))


def _normalize_option(where: str, name: str, value: Any) -> Any:
    """Return the value of one option as a bool, an Activation, a float or None, or raise InputError."""
    if name in ("peepholes", "coupled"):
        if not isinstance(value, bool):
            raise InputError(f"{where}: {name} must be True or False, found {value!r}")
        return value
    if name != "clip":
        function = activation(value)
        if function.from_input:
            raise InputError(
                f"{where}: {name}={function.name}: its derivative needs the input, but a cell saves only the output: "
                "use it in an ActivationLayer"
            )
        return function
    if value is not None and not (_is_number(value) and value > 0):
        raise InputError(f"{where}: clip must be None or a number above 0, found {value!r}")
    return None if value is None else float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def activation_to_config(f: Activation | str) -> Any:
    """Return the configuration of an activation: its name, or a dict with name, alpha and beta if it has constants.

    A user-defined activation has none: the result is None.

    >>> activation_to_config("tanh"), activation_to_config(activation("elu", 0.5))
    ('tanh', {'name': 'elu', 'alpha': 0.5, 'beta': 0.0})
    """
    if isinstance(f, str):
        return f
    try:
        named = activation(f.name, f.alpha, f.beta)
    except InputError:
        return None
    if named != f:
        return None
    return f.name if f.alpha is None else {"name": f.name, "alpha": f.alpha, "beta": f.beta}


def activation_from_config(config: Any) -> Activation:
    """Return the activation that `activation_to_config` described.

    Raises:
        InputError: `config` is not the configuration of an activation.

    >>> activation_from_config({"name": "elu", "alpha": 0.5}).beta
    0.0
    """
    if isinstance(config, str):
        return activation(config)
    if (
        not isinstance(config, dict)
        or not config.keys() <= {"name", "alpha", "beta"}
        or not isinstance(config.get("name"), str)
    ):
        raise InputError(f"activation: expected a name, or a dict with name, alpha and beta, found {str(config)[:60]}")
    constants = {key: config[key] for key in ("alpha", "beta") if config.get(key) is not None}
    for key, value in constants.items():
        if not _is_number(value):
            raise InputError(f"activation {config['name']}: {key} must be a number, found {str(value)[:60]}")
    return activation(config["name"], **constants)


def cell_to_config(cell: Any) -> dict[str, Any] | None:
    """Return the configuration of a cell: the name of its factory and its options. None for a user-defined cell.

    >>> from xprnn.cells import elman
    >>> cell_to_config(elman("relu", clip=3))
    {'type': 'elman', 'f': 'relu', 'clip': 3.0}
    """
    if cell.options is None:
        return None
    return {"type": cell.name} | {k: dict(v) if isinstance(v, dict) else v for k, v in cell.options}


def cell_from_config(config: Any) -> Any:
    """Return the cell that `cell_to_config` described.

    Raises:
        InputError: `config` is not the configuration of a cell.

    >>> from xprnn.cells import lstm
    >>> cell_from_config({"type": "lstm", "peepholes": True}) is lstm(peepholes=True)
    True
    """
    if not isinstance(config, dict) or config.get("type") not in [*_factories]:
        raise InputError(
            f"cell: expected a dict whose type is one of {', '.join(_factories)}, found {str(config)[:60]}"
        )
    make = _factories[config["type"]]
    known = inspect.signature(make).parameters
    if unknown := [str(key) for key in config if key != "type" and key not in known]:
        raise InputError(f"cell {config['type']}: expected {', '.join(known)}, found {', '.join(unknown)[:60]}")
    scalars = ("peepholes", "coupled", "clip")
    return make(**{k: v if k in scalars else activation_from_config(v) for k, v in config.items() if k != "type"})
