"""Conversion between the attributes of RNN, LSTM and GRU and the cells of xprnn.

Source: the ONNX standard's text of the three operators. It does not define which entry of activation_alpha and
activation_beta is for which activation. Here, as in ONNX Runtime, each list holds one entry for each activation that
has such a constant, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xprnn.arrays.namespace import InputError
from xprnn.cells.activations import Activation, activation
from xprnn.cells.cell import Cell
from xprnn.cells.serialization import activation_from_config
from xprnn.cells.standard import elman, gru, gru_reset_before, lstm

__all__ = [
    "ACTIVATION_OPERATORS",
    "GATE_COUNTS",
    "MERGE_MODES",
    "activation_from_operator",
    "attributes_from_cell",
    "cells_from_attributes",
    "is_supported_activation",
    "operator_from_activation",
]


GATE_COUNTS = {"RNN": 1, "LSTM": 4, "GRU": 3}
_DEFAULT_ACTIVATIONS = {"RNN": ("Tanh",), "LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh")}
_ACTIVATION_OPTIONS = {"elman": ("f",), "lstm": ("gate", "candidate", "output")}
_ONNX_NAMES = {
    "hardsigmoid": "HardSigmoid",
    "scaledtanh": "ScaledTanh",
    "leakyrelu": "LeakyRelu",
    "thresholdedrelu": "ThresholdedRelu",
}
_ACTIVATION_CONSTANTS = {
    "affine": ("alpha", "beta"),
    "scaledtanh": ("alpha", "beta"),
    "hardsigmoid": ("alpha", "beta"),
    "leakyrelu": ("alpha",),
    "thresholdedrelu": ("alpha",),
    "elu": ("alpha",),
}


def cells_from_attributes(op: str, attrs: dict[str, Any], peepholes: bool, directions: int) -> tuple[Cell, ...]:
    """The cell of each direction.

    Raises:
        InputError: no cell has the value of an attribute; the message names it.

    >>> cells_from_attributes("GRU", {"linear_before_reset": 1}, False, 1) == (gru(),)
    True
    """
    clip = attrs.get("clip")
    if clip is not None and not clip > 0:
        raise InputError(f"clip={clip}, expected a number above 0")
    options: dict[str, Any] = {"clip": clip}
    if op == "LSTM":
        options |= {"peepholes": peepholes, "coupled": bool(attrs.get("input_forget", 0))}
    make_cell: Any = {"RNN": elman, "LSTM": lstm}.get(op)
    if op == "GRU":
        make_cell = gru if attrs.get("linear_before_reset", 0) else gru_reset_before
    return tuple(make_cell(*group, **options) for group in _activations(op, attrs, directions))


def _activations(op: str, attrs: dict[str, Any], directions: int) -> list[Sequence[Activation]]:
    """The activations of each direction."""
    default = _DEFAULT_ACTIVATIONS[op]
    names = list(attrs.get("activations") or default * directions)
    if len(names) != len(default) * directions:
        raise InputError(f"activations={names}, expected {len(default) * directions} names")
    lists = {key: list(attrs.get(f"activation_{key}") or ()) for key in ("alpha", "beta")}
    functions = []
    for name in names:
        constants = _ACTIVATION_CONSTANTS.get(name.lower(), ())
        f = activation(name, **{key: lists[key].pop(0) for key in constants if lists[key]})
        # The ONNX standard has no identity: _activation_attributes writes it as affine.
        functions.append(activation("identity") if f == activation("affine", 1.0, 0.0) else f)
    return [functions[k * len(default) : (k + 1) * len(default)] for k in range(directions)]


def attributes_from_cell(cell: Cell, hidden: int, reverse: Sequence[bool]) -> dict[str, Any]:
    """The attributes of the operator that computes `cell`; reverse: for each direction, True if it is reversed.

    >>> attributes_from_cell(elman("relu", clip=3.0), 5, (False,))
    {'hidden_size': 5, 'direction': 'forward', 'activations': ['Relu'], 'clip': 3.0}
    """
    options = dict(cell.options or ())
    direction = "bidirectional" if len(reverse) == 2 else "reverse" if reverse[0] else "forward"
    out: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    names = _ACTIVATION_OPTIONS.get(cell.name, ("gate", "candidate"))
    out |= _activation_attributes([activation_from_config(options[name]) for name in names] * len(reverse))
    if options.get("clip") is not None:
        out["clip"] = options["clip"]
    if options.get("coupled"):
        out["input_forget"] = 1
    if cell.name == "gru":
        out["linear_before_reset"] = 1
    return out


def is_supported_activation(f: Activation) -> bool:
    """True if RNN, LSTM and GRU have this activation.

    >>> is_supported_activation(activation("elu", 0.5))
    True
    """
    names = {*_ACTIVATION_CONSTANTS, "tanh", "sigmoid", "relu", "softsign", "softplus", "identity"}
    return f.name in names and activation(f.name, f.alpha, f.beta) == f


def _activation_attributes(functions: list[Activation]) -> dict[str, Any]:
    """The attributes activations, activation_alpha and activation_beta."""
    names, constants = [], {"alpha": list[float](), "beta": list[float]()}
    for f in functions:
        key, values = f.name, {"alpha": f.alpha, "beta": f.beta}
        if key == "identity":  # the standard has no such activation
            key, values = "affine", {"alpha": 1.0, "beta": 0.0}
        names.append(_ONNX_NAMES.get(key, key.capitalize()))
        for constant in _ACTIVATION_CONSTANTS.get(key, ()):
            constants[constant].append(float(values[constant] or 0.0))
    out: dict[str, Any] = {"activations": names}
    return out | {f"activation_{k}": v for k, v in constants.items() if v}


# Operators that compute an activation, with their constants.
ACTIVATION_OPERATORS = {
    "Tanh": (),
    "Sigmoid": (),
    "Relu": (),
    "Softplus": (),
    "Softsign": (),
    "Elu": ("alpha",),
    "LeakyRelu": ("alpha",),
    "ThresholdedRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Celu": ("alpha",),
    "HardSwish": (),
}


def activation_from_operator(op: str, attrs: dict[str, Any]) -> Activation:
    """The activation that an operator computes; xprnn and ONNX have the same default constants.

    >>> activation_from_operator("HardSigmoid", {"beta": 0.25}).alpha
    0.2
    """
    return activation(op, **{key: attrs[key] for key in ACTIVATION_OPERATORS[op] if key in attrs})


def operator_from_activation(f: Activation) -> tuple[str, dict[str, Any]] | None:
    """The operator that computes an activation, and its attributes; None if ONNX has no such operator.

    >>> operator_from_activation(activation("elu", 0.5)), operator_from_activation(activation("affine"))
    (('Elu', {'alpha': 0.5}), None)
    """
    op = {op.lower(): op for op in ACTIVATION_OPERATORS}.get(f.name)
    if op is None or activation(f.name, f.alpha, f.beta) != f:
        return None
    return op, {key: float(getattr(f, key)) for key in ACTIVATION_OPERATORS[op]}


MERGE_MODES = {"Sum": "sum", "Mul": "mul", "Mean": "ave"}  # operator -> mode of MergeDirections
