"""What a Keras configuration says, read with care: numbers, flags, activations."""

from __future__ import annotations

from typing import Any

from xprnn.arrays.namespace import InputError
from xprnn.cells.activations import Activation, activation
from xprnn.interop.keras.topology import Spec, inner_spec

__all__ = ["activation_layer", "activation_named", "cell_activation", "flag", "number", "units"]

# Keras's name -> ours, with the constants that Keras means.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "linear": ("identity",),
    "tanh": ("tanh",),
    "sigmoid": ("sigmoid",),
    "relu": ("relu",),
    "softsign": ("softsign",),
    "softplus": ("softplus",),
    "hard_sigmoid": ("hardsigmoid", 1 / 6, 0.5),
    "elu": ("elu", 1.0),
    "celu": ("elu", 1.0),
    "leaky_relu": ("leakyrelu", 0.2),
    "selu": ("selu",),
    "relu6": ("relu6",),
    "exponential": ("exponential",),
    "hard_tanh": ("hardtanh",),
    "log_sigmoid": ("logsigmoid",),
    "sparse_plus": ("sparseplus",),
    "sparse_sigmoid": ("hardsigmoid", 0.5, 0.5),
    "squareplus": ("squareplus", 4.0),
    "soft_shrink": ("softshrink", 0.5),
    "hard_shrink": ("hardshrink", 0.5),
    "silu": ("silu",),
    "swish": ("silu",),
    "gelu": ("gelu",),
    "mish": ("mish",),
    "hard_silu": ("hardswish",),
    "hard_swish": ("hardswish",),
    "tanh_shrink": ("tanhshrink",),
}


def activation_named(value: Any) -> Activation:
    """An activation that a configuration names."""
    if isinstance(value, dict):
        inner = inner_spec(value, "")
        if inner.kind in ("ReLU", "LeakyReLU", "ELU"):
            return activation_layer(inner)
        value = inner.kind
    if value is None:
        value = "linear"
    if not isinstance(value, str) or value not in _KNOWN:
        raise InputError(f"activation {str(value)[:40]!r} has no counterpart here, only {', '.join(_KNOWN)} have")
    return activation(*_KNOWN[value])


def cell_activation(options: dict[str, Any], name: str, default: str) -> Activation:
    """The activation of a recurrent layer, which must be told from its output."""
    value = options.get(name, default)
    found = activation_named(value)
    if found.of_input:
        raise InputError(
            f"{name} {value!r} has no counterpart in a cell, which keeps outputs: one does not tell its slope"
        )
    return found


def number(options: dict[str, Any], *names: str, default: float) -> float:
    """The first of these options that is there; older files have older names."""
    found: Any = next((options[n] for n in names if n in options), default)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise InputError(f"{names[0]} must be a number, found {found!r}")
    return float(found)


def activation_layer(spec: Spec) -> Activation:
    """ReLU, LeakyReLU and ELU, the layers."""
    o = spec.options
    if spec.kind == "ELU":
        return activation("elu", number(o, "alpha", default=1.0))
    if spec.kind == "LeakyReLU":
        return activation("leakyrelu", number(o, "negative_slope", "alpha", default=0.3))
    slope = number(o, "negative_slope", default=0.0)
    if o.get("max_value") == 6 and not o.get("threshold", 0) and not slope:
        return activation("relu6")
    if o.get("max_value") is not None or o.get("threshold", 0):
        raise InputError("a max_value (but 6) or threshold has no counterpart here")
    return activation("leakyrelu", slope) if slope else activation("relu")


def units(options: dict[str, Any], name: str = "units") -> int:
    """An integer >= 1."""
    found = options.get(name)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise InputError(f"{name} must be an integer >= 1, found {found!r}")
    return found


def flag(options: dict[str, Any], name: str, default: bool = False) -> bool:
    """True or False."""
    found = options.get(name, default)
    if not isinstance(found, bool):
        raise InputError(f"{name} must be true or false, found {found!r}")
    return found
