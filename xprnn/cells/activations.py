"""Activations by name, each with its derivative: those of the ONNX operators RNN, LSTM and GRU, of torch and of Keras.

The derivative of y = f(x) is written as a function of y. A forward pass then saves only outputs, and the backward pass
recomputes nothing. Cells take only such activations. For the others, such as silu, several x have the same y, so that
the derivative is written as a function of x (module `activations_from_input`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xprnn.arrays.namespace import InputError
from xprnn.cells.activations_from_input import FROM_INPUT, sigmoid

__all__ = ["FROM_INPUT", "Activation", "activation", "activation_names"]

ActivationPair = tuple[Callable[[Any], Any], Callable[[Any], Any]]


@dataclass(frozen=True)
class Activation:
    """An elementwise function y = f(x) with its derivative f'(x), written as a function of y.

    Args:
        name: name in errors and configurations.
        build: function of a namespace that returns (f, derivative), both elementwise, with derivative(y) = f'(x).
        alpha: first constant of the function, or None. Saved in configurations.
        beta: second constant of the function, or None. Saved in configurations.
        from_input: True if the derivative is a function of x instead: derivative(x) = f'(x). ActivationLayer accepts
            such activations, cells do not.

    >>> import numpy as np
    >>> cube = Activation("cube", lambda xp: (lambda x: x * x * x, lambda y: 3 * xp.abs(y) ** (2 / 3)))
    >>> f, derivative = cube.build(np)
    >>> f(2.0), round(float(derivative(8.0)), 6)
    (8.0, 12.0)
    """

    name: str
    build: Callable[[Any], ActivationPair]
    alpha: float | None = None
    beta: float | None = None
    from_input: bool = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        # An activation of this module pickles by name, a user-defined one by reference to its functions.
        try:
            is_named = activation(self.name, self.alpha, self.beta) == self
        except InputError:
            is_named = False
        return (activation, (self.name, self.alpha, self.beta)) if is_named else super().__reduce_ex__(protocol)


def _tanh(xp: Any) -> ActivationPair:
    return xp.tanh, lambda y: 1.0 - y * y


def _sigmoid(xp: Any) -> ActivationPair:
    return sigmoid(xp), lambda y: y * (1.0 - y)


def _relu(xp: Any) -> ActivationPair:
    return lambda x: xp.maximum(x, 0.0), xp.sign


def _identity(xp: Any) -> ActivationPair:
    return lambda x: x, lambda y: 0.0 * y + 1.0


def _softsign(xp: Any) -> ActivationPair:
    return lambda x: x / (1.0 + xp.abs(x)), lambda y: (1.0 - xp.abs(y)) * (1.0 - xp.abs(y))


def _softplus(xp: Any) -> ActivationPair:
    def f(x: Any) -> Any:
        return xp.maximum(x, 0.0) + xp.log1p(xp.exp(-xp.abs(x)))

    return f, lambda y: 1.0 - xp.exp(-y)


def _affine(alpha: float, beta: float) -> Callable[[Any], ActivationPair]:
    return lambda xp: (lambda x: alpha * x + beta, lambda y: 0.0 * y + alpha)


def _scaled_tanh(alpha: float, beta: float) -> Callable[[Any], ActivationPair]:
    return lambda xp: (lambda x: alpha * xp.tanh(beta * x), lambda y: beta * (alpha - y * y / alpha))


def _leaky_relu(alpha: float, beta: float) -> Callable[[Any], ActivationPair]:
    return lambda xp: (
        lambda x: xp.where(x >= 0.0, x, alpha * x),
        lambda y: xp.where(y >= 0.0, 1.0, 0.0 * y + alpha),
    )


def _thresholded_relu(alpha: float, beta: float) -> Callable[[Any], ActivationPair]:
    return lambda xp: (lambda x: xp.where(x > alpha, x, 0.0), lambda y: xp.abs(xp.sign(y)))


def _hard_sigmoid(alpha: float, beta: float) -> Callable[[Any], ActivationPair]:
    def f(xp: Any) -> ActivationPair:
        return (
            lambda x: xp.minimum(xp.maximum(alpha * x + beta, 0.0), 1.0),
            lambda y: alpha * xp.sign(y * (1.0 - y)),
        )

    return f


def _elu(alpha: float, beta: float) -> Callable[[Any], ActivationPair]:
    def f(xp: Any) -> ActivationPair:
        return (
            lambda x: xp.where(x >= 0.0, x, alpha * xp.expm1(xp.minimum(x, 0.0))),
            lambda y: xp.where(y >= 0.0, 1.0, y + alpha),
        )

    return f


def _selu(xp: Any) -> ActivationPair:
    """SELU; the constants are those of the appendix of Klambauer et al. 2017."""
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    f, _ = _elu(alpha, 0.0)(xp)
    return lambda x: scale * f(x), lambda y: xp.where(y >= 0.0, scale, y + scale * alpha)


def _celu(alpha: float, beta: float) -> Callable[[Any], ActivationPair]:
    return lambda xp: (
        lambda x: xp.where(x >= 0.0, x, alpha * xp.expm1(xp.minimum(x, 0.0) / alpha)),
        lambda y: xp.where(y >= 0.0, 1.0, y / alpha + 1.0),
    )


def _relu6(xp: Any) -> ActivationPair:
    return lambda x: xp.minimum(xp.maximum(x, 0.0), 6.0), lambda y: xp.sign(y * (6.0 - y))


def _hard_tanh(xp: Any) -> ActivationPair:
    return lambda x: xp.minimum(xp.maximum(x, -1.0), 1.0), lambda y: xp.sign((1.0 - y) * (1.0 + y))


def _exponential(xp: Any) -> ActivationPair:
    return xp.exp, lambda y: y


def _log_sigmoid(xp: Any) -> ActivationPair:
    f, _ = _softplus(xp)
    return lambda x: -f(-x), lambda y: 1.0 - xp.exp(y)


def _squareplus(alpha: float, beta: float) -> Callable[[Any], ActivationPair]:
    """y = (x + sqrt(x^2 + alpha)) / 2 with the inverse x = y - alpha / (4 y).

    For x < 0 it is computed as alpha / (2 (|x| + sqrt(x^2 + alpha))), which does not cancel.
    """

    def f(xp: Any) -> ActivationPair:
        def value(x: Any) -> Any:
            root = xp.abs(x) + xp.sqrt(x * x + alpha)
            return xp.where(x >= 0.0, 0.5 * root, 0.5 * alpha / root)

        return value, lambda y: y * y / (y * y + 0.25 * alpha)

    return f


def _sparse_plus(xp: Any) -> ActivationPair:
    def f(x: Any) -> Any:
        inner = xp.minimum(xp.maximum(x, -1.0), 1.0) + 1.0
        return xp.where(x < 1.0, 0.25 * inner * inner, x)

    return f, lambda y: xp.minimum(xp.sqrt(y), 1.0)


def _soft_shrink(alpha: float, beta: float) -> Callable[[Any], ActivationPair]:
    return lambda xp: (lambda x: xp.sign(x) * xp.maximum(xp.abs(x) - alpha, 0.0), lambda y: xp.abs(xp.sign(y)))


def _hard_shrink(alpha: float, beta: float) -> Callable[[Any], ActivationPair]:
    return lambda xp: (lambda x: xp.where(xp.abs(x) > alpha, x, 0.0 * x), lambda y: xp.abs(xp.sign(y)))


_WITHOUT_CONSTANTS: dict[str, Callable[[Any], ActivationPair]] = {
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "relu": _relu,
    "identity": _identity,
    "softsign": _softsign,
    "softplus": _softplus,
    "selu": _selu,
    "relu6": _relu6,
    "hardtanh": _hard_tanh,
    "exponential": _exponential,
    "logsigmoid": _log_sigmoid,
    "sparseplus": _sparse_plus,
}
# name -> (factory, default alpha, default beta). Functions of the ONNX specification have its defaults.
_WITH_CONSTANTS: dict[str, tuple[Callable[[float, float], Callable[[Any], ActivationPair]], float, float]] = {
    "affine": (_affine, 1.0, 0.0),
    "scaledtanh": (_scaled_tanh, 1.0, 1.0),
    "leakyrelu": (_leaky_relu, 0.01, 0.0),
    "thresholdedrelu": (_thresholded_relu, 1.0, 0.0),
    "hardsigmoid": (_hard_sigmoid, 0.2, 0.5),
    "elu": (_elu, 1.0, 0.0),
    "celu": (_celu, 1.0, 0.0),
    "squareplus": (_squareplus, 4.0, 0.0),
    "softshrink": (_soft_shrink, 0.5, 0.0),
    "hardshrink": (_hard_shrink, 0.5, 0.0),
}
# Constants for which f can be inverted, so that the derivative is a function of y.
_CONSTRAINTS = dict.fromkeys(("leakyrelu", "thresholdedrelu", "elu", "softshrink", "hardshrink"), "alpha >= 0")
_CONSTRAINTS |= {"celu": "alpha > 0", "squareplus": "alpha > 0", "scaledtanh": "alpha != 0"}
_cache: dict[tuple[str, float | None, float | None], Activation] = {}


def activation(name: str | Activation, alpha: float | None = None, beta: float | None = None) -> Activation:
    """Return the activation called `name`; the same object for the same name and constants.

    Args:
        name: case is ignored. Without constants: tanh, sigmoid, relu, identity, softsign, softplus, selu, relu6,
            hardtanh, exponential, logsigmoid, sparseplus. With constants: affine, scaledtanh, leakyrelu,
            thresholdedrelu, hardsigmoid, elu, celu, squareplus, softshrink, hardshrink. With a derivative that needs
            the input, for ActivationLayer only: silu, gelu, gelutanh, mish, hardswish, tanhshrink. An Activation is
            returned unchanged.
        alpha: first constant; None: the default of ONNX, torch or Keras.
        beta: second constant; None: the default. Only affine, scaledtanh and hardsigmoid use it.

    Raises:
        InputError: the name is unknown, or the function does not accept these constants.

    >>> activation("HardSigmoid").alpha
    0.2
    """
    if isinstance(name, Activation):
        return name
    key = str(name).lower()
    if key in _WITH_CONSTANTS:
        factory, a, b = _WITH_CONSTANTS[key]
        alpha, beta = float(a if alpha is None else alpha), float(b if beta is None else beta)
        constraint = _CONSTRAINTS.get(key, "")
        satisfied = {"alpha >= 0": alpha >= 0, "alpha > 0": alpha > 0, "alpha != 0": alpha != 0}
        if not satisfied.get(constraint, True):
            raise InputError(f"activation: {name} needs {constraint}, found {alpha}")
        return _cache.setdefault((key, alpha, beta), Activation(key, factory(alpha, beta), alpha, beta))
    builders = {**_WITHOUT_CONSTANTS, **FROM_INPUT}
    if key not in builders or alpha is not None or beta is not None:
        known = ", ".join(activation_names())
        count = len(_WITH_CONSTANTS)
        found = f"{name!r} with constants" if key in builders else repr(name)
        raise InputError(f"activation: expected one of {known} (the last {count} take alpha and beta), found {found}")
    return _cache.setdefault((key, None, None), Activation(key, builders[key], from_input=key in FROM_INPUT))


def activation_names() -> tuple[str, ...]:
    """Return all names that `activation` accepts; the functions with constants come last."""
    return (*_WITHOUT_CONSTANTS, *FROM_INPUT, *_WITH_CONSTANTS)
