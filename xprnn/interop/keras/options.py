"""What a Keras configuration says, read with care: numbers, flags, activations."""

from __future__ import annotations

from typing import Any

from xprnn.arrays.namespace import InputError
from xprnn.cells.activations import Activation, activation
from xprnn.interop.keras.topology import KerasLayerSpec, parse_layer_spec

__all__ = [
    "parse_activation",
    "parse_activation_layer",
    "parse_bool",
    "parse_cell_activation",
    "parse_float",
    "parse_positive_int",
]

# Keras's name -> ours, with the constants that Keras means.
_ACTIVATIONS: dict[str, tuple[Any, ...]] = {
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


def parse_activation(value: Any) -> Activation:
    """An activation that a configuration names."""
    if isinstance(value, dict):
        inner = parse_layer_spec(value, "")
        if inner.class_name in ("ReLU", "LeakyReLU", "ELU"):
            return parse_activation_layer(inner)
        value = inner.class_name
    if value is None:
        value = "linear"
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise InputError(f"activation {str(value)[:40]!r} has no counterpart here, only {', '.join(_ACTIVATIONS)} have")
    return activation(*_ACTIVATIONS[value])


def parse_cell_activation(config: dict[str, Any], name: str, default: str) -> Activation:
    """The activation of a recurrent layer, which must be told from its output."""
    value = config.get(name, default)
    found = parse_activation(value)
    if found.from_input:
        raise InputError(
            f"{name} {value!r} has no counterpart in a cell, which keeps outputs: one does not tell its slope"
        )
    return found


def parse_float(config: dict[str, Any], *names: str, default: float) -> float:
    """The first of these options that is there; older files have older names."""
    found: Any = next((config[n] for n in names if n in config), default)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise InputError(f"{names[0]} must be a number, found {found!r}")
    return float(found)


def parse_activation_layer(spec: KerasLayerSpec) -> Activation:
    """ReLU, LeakyReLU and ELU, the layers."""
    o = spec.config
    if spec.class_name == "ELU":
        return activation("elu", parse_float(o, "alpha", default=1.0))
    if spec.class_name == "LeakyReLU":
        return activation("leakyrelu", parse_float(o, "negative_slope", "alpha", default=0.3))
    slope = parse_float(o, "negative_slope", default=0.0)
    if o.get("max_value") == 6 and not o.get("threshold", 0) and not slope:
        return activation("relu6")
    if o.get("max_value") is not None or o.get("threshold", 0):
        raise InputError("a max_value (but 6) or threshold has no counterpart here")
    return activation("leakyrelu", slope) if slope else activation("relu")


def parse_positive_int(config: dict[str, Any], name: str = "units") -> int:
    """An integer >= 1."""
    found = config.get(name)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise InputError(f"{name} must be an integer >= 1, found {found!r}")
    return found


def parse_bool(config: dict[str, Any], name: str, default: bool = False) -> bool:
    """True or False."""
    found = config.get(name, default)
    if not isinstance(found, bool):
        raise InputError(f"{name} must be true or false, found {found!r}")
    return found
