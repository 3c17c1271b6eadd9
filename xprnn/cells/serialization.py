"""The file form of cells and activations: plain data that JSON can hold, and back.

Only what xprnn made itself has one: a cell from one of its factories, an activation with one of its names. A file
never holds code.
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
    """Decorate a cell's factory: its cells know their options, and there is one object for each choice of them.

    Every argument is an activation but `peepholes`, `coupled` (flags) and `clip` (None or a number above 0).

    >>> from xprnn.cells import gru
    >>> gru() is gru("Sigmoid", clip=None), gru().options
    (True, (('gate', 'sigmoid'), ('candidate', 'tanh'), ('clip', None)))
    """
    name, signature = factory.__name__, inspect.signature(factory)
    made: dict[Any, Any] = {}
    plainly: Callable[..., Any] = factory

    @wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        plain = {key: _normalize_option(name, key, value) for key, value in bound.arguments.items()}
        choice = tuple(plain.items())
        if choice not in made:
            forms = tuple((k, activation_to_config(v) if isinstance(v, Activation) else v) for k, v in choice)
            known = all(form is not None or plain[k] is None for k, form in forms)
            made[choice] = replace(plainly(**plain), options=forms if known else None)
        return made[choice]

    _factories[name] = make
    return cast(Callable[P, Any], cache(make))


def _normalize_option(where: str, name: str, value: Any) -> Any:
    if name in ("peepholes", "coupled"):
        if not isinstance(value, bool):
            raise InputError(f"{where}: {name} must be True or False, found {value!r}")
        return value
    if name != "clip":
        found = activation(value)
        if found.from_input:
            raise InputError(
                f"{where}: {name}={found.name}: its derivative cannot be told from its output, which is what a cell "
                "keeps: it stands in Apply alone"
            )
        return found
    if value is not None and not (_is_number(value) and value > 0):
        raise InputError(f"{where}: clip must be None or a number above 0, found {value!r}")
    return None if value is None else float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def activation_to_config(f: Activation | str) -> Any:
    """The file form of an activation: its name, or its name and constants; None for one of your own.

    >>> activation_to_config("tanh"), activation_to_config(activation("elu", 0.5))
    ('tanh', {'name': 'elu', 'alpha': 0.5, 'beta': 0.0})
    """
    if isinstance(f, str):
        return f
    try:
        known = activation(f.name, f.alpha, f.beta)
    except InputError:
        return None
    if known != f:
        return None
    return f.name if f.alpha is None else {"name": f.name, "alpha": f.alpha, "beta": f.beta}


def activation_from_config(config: Any) -> Activation:
    """The activation of a file form.

    Raises:
        InputError: not such a form.

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
    """The file form of a cell: its factory's name and options; None for a cell of your own.

    >>> from xprnn.cells import elman
    >>> cell_to_config(elman("relu", clip=3))
    {'type': 'elman', 'f': 'relu', 'clip': 3.0}
    """
    if cell.options is None:
        return None
    return {"type": cell.name} | {k: dict(v) if isinstance(v, dict) else v for k, v in cell.options}


def cell_from_config(config: Any) -> Any:
    """The cell of a file form.

    Raises:
        InputError: not such a form.

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
    if strangers := [str(key) for key in config if key != "type" and key not in known]:
        raise InputError(f"cell {config['type']}: expected {', '.join(known)}, found {', '.join(strangers)[:60]}")
    flat = ("peepholes", "coupled", "clip")
    return make(**{k: v if k in flat else activation_from_config(v) for k, v in config.items() if k != "type"})
