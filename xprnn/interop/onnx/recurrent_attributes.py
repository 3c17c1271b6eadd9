"""The attributes of RNN, LSTM and GRU, and the cells they mean, both ways.

Sources: the standard's text of the three operators. Which constant belongs to which activation is not said there: as
in ONNX Runtime, the lists hold those of the functions that have such a constant, in order.
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


GATE_COUNTS = {"RNN": 1, "LSTM": 4, "GRU": 3}  # and their numbers of gates
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
        InputError: an attribute that no cell has; says which.

    >>> cells_from_attributes("GRU", {"linear_before_reset": 1}, False, 1) == (gru(),)
    True
    """
    clip = attrs.get("clip")
    if clip is not None and not clip > 0:
        raise InputError(f"clip={clip}: expected a number above 0")
    options: dict[str, Any] = {"clip": clip}
    if op == "LSTM":
        options |= {"peepholes": peepholes, "coupled": bool(attrs.get("input_forget", 0))}
    make: Any = {"RNN": elman, "LSTM": lstm}.get(op)
    if op == "GRU":
        make = gru if attrs.get("linear_before_reset", 0) else gru_reset_before
    return tuple(make(*group, **options) for group in _activations(op, attrs, directions))


def _activations(op: str, attrs: dict[str, Any], directions: int) -> list[Sequence[Activation]]:
    default = _DEFAULT_ACTIVATIONS[op]
    names = list(attrs.get("activations") or default * directions)
    if len(names) != len(default) * directions:
        raise InputError(f"activations={names}: expected {len(default) * directions}")
    lists = {key: list(attrs.get(f"activation_{key}") or ()) for key in ("alpha", "beta")}
    made = []
    for name in names:
        has = _ACTIVATION_CONSTANTS.get(name.lower(), ())
        f = activation(name, **{key: lists[key].pop(0) for key in has if lists[key]})
        made.append(activation("identity") if f == activation("affine", 1.0, 0.0) else f)  # it has no name there
    return [made[k * len(default) : (k + 1) * len(default)] for k in range(directions)]


def attributes_from_cell(cell: Cell, hidden: int, reverse: Sequence[bool]) -> dict[str, Any]:
    """The attributes of the operator that does what `cell` does, in these directions (True: from the end).

    >>> attributes_from_cell(elman("relu", clip=3.0), 5, (False,))
    {'hidden_size': 5, 'direction': 'forward', 'activations': ['Relu'], 'clip': 3.0}
    """
    options = dict(cell.options or ())
    way = "bidirectional" if len(reverse) == 2 else "reverse" if reverse[0] else "forward"
    out: dict[str, Any] = {"hidden_size": hidden, "direction": way}
    places = _ACTIVATION_OPTIONS.get(cell.name, ("gate", "candidate"))
    out |= _activation_attributes([activation_from_config(options[p]) for p in places] * len(reverse))
    if options.get("clip") is not None:
        out["clip"] = options["clip"]
    if options.get("coupled"):
        out["input_forget"] = 1
    if cell.name == "gru":
        out["linear_before_reset"] = 1
    return out


def is_supported_activation(f: Activation) -> bool:
    """Whether RNN, LSTM and GRU have this activation.

    >>> is_supported_activation(activation("elu", 0.5))
    True
    """
    names = {*_ACTIVATION_CONSTANTS, "tanh", "sigmoid", "relu", "softsign", "softplus", "identity"}
    return f.name in names and activation(f.name, f.alpha, f.beta) == f


def _activation_attributes(chosen: list[Activation]) -> dict[str, Any]:
    """Names, and the constants of those functions that have them, in order."""
    names, constants = [], {"alpha": list[float](), "beta": list[float]()}
    for f in chosen:
        key, values = f.name, {"alpha": f.alpha, "beta": f.beta}
        if key == "identity":  # which the standard does not name
            key, values = "affine", {"alpha": 1.0, "beta": 0.0}
        names.append(_ONNX_NAMES.get(key, key.capitalize()))
        for constant in _ACTIVATION_CONSTANTS.get(key, ()):
            constants[constant].append(float(values[constant] or 0.0))
    out: dict[str, Any] = {"activations": names}
    return out | {f"activation_{k}": v for k, v in constants.items() if v}


# Activations that are operators of their own, with the constants that they have there.
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
    """The activation that an operator of its own computes: their defaults are the same.

    >>> activation_from_operator("HardSigmoid", {"beta": 0.25}).alpha
    0.2
    """
    return activation(op, **{key: attrs[key] for key in ACTIVATION_OPERATORS[op] if key in attrs})


def operator_from_activation(f: Activation) -> tuple[str, dict[str, Any]] | None:
    """The operator that computes an activation, and its attributes; None where there is none.

    >>> operator_from_activation(activation("elu", 0.5)), operator_from_activation(activation("affine"))
    (('Elu', {'alpha': 0.5}), None)
    """
    found = {op.lower(): op for op in ACTIVATION_OPERATORS}.get(f.name)
    if found is None or activation(f.name, f.alpha, f.beta) != f:
        return None
    return found, {key: float(getattr(f, key)) for key in ACTIVATION_OPERATORS[found]}


MERGE_MODES = {"Sum": "sum", "Mul": "mul", "Mean": "ave"}
