"""Validated reading of options of a Keras configuration: numbers, booleans, activations."""

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

# Keras's name -> arguments of xprnn's `activation`: the name and Keras's constants.
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
    """Return the xprnn activation for an `activation` option: a name, the config of an activation layer, or None.

    Raises:
        InputError: xprnn has no equivalent activation.
    """
    if isinstance(value, dict):
        inner = parse_layer_spec(value, "")
        if inner.class_name in ("ReLU", "LeakyReLU", "ELU"):
            return parse_activation_layer(inner)
        value = inner.class_name
    if value is None:
        value = "linear"
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise InputError(
            f"activation {str(value)[:40]!r} has no equivalent in xprnn, expected one of {', '.join(_ACTIVATIONS)}"
        )
    return activation(*_ACTIVATIONS[value])


def parse_cell_activation(config: dict[str, Any], name: str, default: str) -> Activation:
    """Return the activation of a recurrent layer.

    Raises:
        InputError: its derivative cannot be computed from its output, which is all that a cell saves for backward.
    """
    value = config.get(name, default)
    f = parse_activation(value)
    if f.from_input:
        raise InputError(
            f"{name} {value!r} is not supported in a recurrent layer: its derivative cannot be computed from its output"
        )
    return f


def parse_float(config: dict[str, Any], *names: str, default: float) -> float:
    """Return the first of the named options that is present (older files have older names), else the default."""
    value: Any = next((config[n] for n in names if n in config), default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{names[0]} must be a number, found {value!r}")
    return float(value)


def parse_activation_layer(spec: KerasLayerSpec) -> Activation:
    """Return the activation of a ReLU, LeakyReLU or ELU layer."""
    config = spec.config
    if spec.class_name == "ELU":
        return activation("elu", parse_float(config, "alpha", default=1.0))
    if spec.class_name == "LeakyReLU":
        return activation("leakyrelu", parse_float(config, "negative_slope", "alpha", default=0.3))
    slope = parse_float(config, "negative_slope", default=0.0)
    if config.get("max_value") == 6 and not config.get("threshold", 0) and not slope:
        return activation("relu6")
    if config.get("max_value") is not None or config.get("threshold", 0):
        raise InputError("max_value must be None or 6, and threshold 0, to have an equivalent in xprnn")
    return activation("leakyrelu", slope) if slope else activation("relu")


def parse_positive_int(config: dict[str, Any], name: str = "units") -> int:
    """Return the named option, an integer >= 1."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be an integer >= 1, found {value!r}")
    return value


def parse_bool(config: dict[str, Any], name: str, default: bool = False) -> bool:
    """Return the named option, True or False."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, found {value!r}")
    return value
