"""Elementwise functions a cell can put in each of its places, each with its derivative in terms of its output.

The derivative of y = f(x) is written with y alone, so that a pass saves outputs and recomputes nothing. The names are
those of the ONNX operators (section "activations" of RNN, LSTM and GRU), which include torch's and Keras's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xprnn.arrays import InputError

__all__ = ["Activation", "activation"]

Pair = tuple[Callable[[Any], Any], Callable[[Any], Any]]


@dataclass(frozen=True)
class Activation:
    """An elementwise f and its derivative in terms of its output.

    Args:
        name: how configurations and errors call it.
        build: given a namespace, returns (f, slope) with y = f(x) and slope(y) = f'(x), both elementwise.
        alpha, beta: the constants, kept for files.

    >>> import numpy as np
    >>> cube = Activation("cube", lambda xp: (lambda x: x * x * x, lambda y: 3 * xp.abs(y) ** (2 / 3)))
    >>> f, slope = cube.build(np)
    >>> f(2.0), round(float(slope(8.0)), 6)
    (8.0, 12.0)
    """

    name: str
    build: Callable[[Any], Pair]
    alpha: float | None = None
    beta: float | None = None


def _tanh(xp: Any) -> Pair:
    return xp.tanh, lambda y: 1.0 - y * y


def _sigmoid(xp: Any) -> Pair:
    # The namespace's own where it has one; else through tanh, which cannot overflow, as exp(-x) does.
    own = getattr(xp, "sigmoid", None)
    return own or (lambda x: 0.5 * xp.tanh(0.5 * x) + 0.5), lambda y: y * (1.0 - y)


def _relu(xp: Any) -> Pair:
    return lambda x: xp.maximum(x, 0.0), xp.sign


def _identity(xp: Any) -> Pair:
    return lambda x: x, lambda y: 0.0 * y + 1.0


def _softsign(xp: Any) -> Pair:
    return lambda x: x / (1.0 + xp.abs(x)), lambda y: (1.0 - xp.abs(y)) * (1.0 - xp.abs(y))


def _softplus(xp: Any) -> Pair:
    def f(x: Any) -> Any:
        return xp.maximum(x, 0.0) + xp.log1p(xp.exp(-xp.abs(x)))

    return f, lambda y: 1.0 - xp.exp(-y)


def _affine(alpha: float, beta: float) -> Callable[[Any], Pair]:
    return lambda xp: (lambda x: alpha * x + beta, lambda y: 0.0 * y + alpha)


def _scaled_tanh(alpha: float, beta: float) -> Callable[[Any], Pair]:
    return lambda xp: (lambda x: alpha * xp.tanh(beta * x), lambda y: beta * (alpha - y * y / alpha))


def _leaky_relu(alpha: float, beta: float) -> Callable[[Any], Pair]:
    return lambda xp: (
        lambda x: xp.where(x >= 0.0, x, alpha * x),
        lambda y: xp.where(y >= 0.0, 1.0, 0.0 * y + alpha),
    )


def _thresholded_relu(alpha: float, beta: float) -> Callable[[Any], Pair]:
    return lambda xp: (lambda x: xp.where(x > alpha, x, 0.0), lambda y: xp.abs(xp.sign(y)))


def _hard_sigmoid(alpha: float, beta: float) -> Callable[[Any], Pair]:
    def f(xp: Any) -> Pair:
        return (
            lambda x: xp.minimum(xp.maximum(alpha * x + beta, 0.0), 1.0),
            lambda y: alpha * xp.sign(y * (1.0 - y)),
        )

    return f


def _elu(alpha: float, beta: float) -> Callable[[Any], Pair]:
    def f(xp: Any) -> Pair:
        return (
            lambda x: xp.where(x >= 0.0, x, alpha * xp.expm1(xp.minimum(x, 0.0))),
            lambda y: xp.where(y >= 0.0, 1.0, y + alpha),
        )

    return f


_PLAIN: dict[str, Callable[[Any], Pair]] = {
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "relu": _relu,
    "identity": _identity,
    "softsign": _softsign,
    "softplus": _softplus,
}
# name -> (factory, default alpha, default beta), the defaults of the ONNX specification.
_WITH_CONSTANTS: dict[str, tuple[Callable[[float, float], Callable[[Any], Pair]], float, float]] = {
    "affine": (_affine, 1.0, 0.0),
    "scaledtanh": (_scaled_tanh, 1.0, 1.0),
    "leakyrelu": (_leaky_relu, 0.01, 0.0),
    "thresholdedrelu": (_thresholded_relu, 1.0, 0.0),
    "hardsigmoid": (_hard_sigmoid, 0.2, 0.5),
    "elu": (_elu, 1.0, 0.0),
}
_made: dict[tuple[str, float | None, float | None], Activation] = {}


def activation(name: str | Activation, alpha: float | None = None, beta: float | None = None) -> Activation:
    """The activation called `name`, case ignored: one object for each name and constants, so cells compare equal.

    Args:
        name: tanh, sigmoid, relu, identity, softsign, softplus, affine, scaledtanh, leakyrelu, thresholdedrelu,
            hardsigmoid or elu; an Activation is returned as it is.
        alpha, beta: constants of the last six; None takes the standard's default.

    Raises:
        InputError: no such name, or constants that the function does not have or cannot take.

    >>> activation("HardSigmoid").alpha
    0.2
    """
    if isinstance(name, Activation):
        return name
    key = str(name).lower()
    if key in _WITH_CONSTANTS:
        factory, a, b = _WITH_CONSTANTS[key]
        alpha, beta = float(a if alpha is None else alpha), float(b if beta is None else beta)
        # An output alone must tell which branch it came from.
        if (key in ("leakyrelu", "thresholdedrelu", "elu") and alpha < 0) or (key == "scaledtanh" and alpha == 0):
            raise InputError(f"activation: {name} needs alpha {'!=' if key == 'scaledtanh' else '>='} 0, found {alpha}")
        return _made.setdefault((key, alpha, beta), Activation(key, factory(alpha, beta), alpha, beta))
    if key not in _PLAIN or alpha is not None or beta is not None:
        known = ", ".join((*_PLAIN, *_WITH_CONSTANTS))
        found = f"{name!r} with constants" if key in _PLAIN else repr(name)
        raise InputError(f"activation: expected one of {known} (the last six take alpha and beta), found {found}")
    return _made.setdefault((key, None, None), Activation(key, _PLAIN[key]))
