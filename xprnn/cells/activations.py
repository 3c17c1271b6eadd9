"""Elementwise functions with their derivatives, by name: ONNX's of RNN, LSTM and GRU, and more of torch's and Keras's.

The derivative of y = f(x) is written with y alone, so that a pass saves outputs and recomputes nothing; cells take such
functions in each of their places. Where one y stands for several x (silu and its like), it is written with x.
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
    """An elementwise f and its derivative in terms of its output, or of its input.

    Args:
        name: how configurations and errors call it.
        build: given a namespace, returns (f, slope) with y = f(x) and slope(y) = f'(x), both elementwise.
        alpha, beta: the constants, kept for files.
        from_input: whether it is slope(x) = f'(x): an output alone does not tell. Apply takes these, cells don't.

    >>> import numpy as np
    >>> cube = Activation("cube", lambda xp: (lambda x: x * x * x, lambda y: 3 * xp.abs(y) ** (2 / 3)))
    >>> f, slope = cube.build(np)
    >>> f(2.0), round(float(slope(8.0)), 6)
    (8.0, 12.0)
    """

    name: str
    build: Callable[[Any], ActivationPair]
    alpha: float | None = None
    beta: float | None = None
    from_input: bool = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        try:
            known = activation(self.name, self.alpha, self.beta) == self
        except InputError:
            known = False
        return (activation, (self.name, self.alpha, self.beta)) if known else super().__reduce_ex__(protocol)


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
    """Klambauer et al. 2017, with the constants of their appendix."""
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
    """y = (x + sqrt(x^2 + alpha)) / 2, whose inverse is x = y - alpha / (4 y); without a difference where x < 0."""

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
# name -> (factory, default alpha, default beta), the defaults of the ONNX specification.
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
_CONSTRAINTS = dict.fromkeys(("leakyrelu", "thresholdedrelu", "elu", "softshrink", "hardshrink"), "alpha >= 0")
_CONSTRAINTS |= {"celu": "alpha > 0", "squareplus": "alpha > 0", "scaledtanh": "alpha != 0"}
_cache: dict[tuple[str, float | None, float | None], Activation] = {}


def activation(name: str | Activation, alpha: float | None = None, beta: float | None = None) -> Activation:
    """The activation called `name`, case ignored: one object for each name and constants, so cells compare equal.

    Args:
        name: tanh, sigmoid, relu, identity, softsign, softplus, selu, relu6, hardtanh, exponential, logsigmoid,
            sparseplus; with constants affine, scaledtanh, leakyrelu, thresholdedrelu, hardsigmoid, elu, celu,
            squareplus, softshrink, hardshrink; of their input silu, gelu, gelutanh, mish, hardswish, tanhshrink. An
            Activation is returned as it is.
        alpha, beta: constants of the ten that have some; None takes the default of ONNX, torch or Keras.

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
        least = _CONSTRAINTS.get(key, "")
        fits = {"alpha >= 0": alpha >= 0, "alpha > 0": alpha > 0, "alpha != 0": alpha != 0}
        if not fits.get(least, True):
            raise InputError(f"activation: {name} needs {least}, found {alpha}")
        return _cache.setdefault((key, alpha, beta), Activation(key, factory(alpha, beta), alpha, beta))
    plain = {**_WITHOUT_CONSTANTS, **FROM_INPUT}
    if key not in plain or alpha is not None or beta is not None:
        known = ", ".join(activation_names())
        count = len(_WITH_CONSTANTS)
        found = f"{name!r} with constants" if key in plain else repr(name)
        raise InputError(f"activation: expected one of {known} (the last {count} take alpha and beta), found {found}")
    return _cache.setdefault((key, None, None), Activation(key, plain[key], from_input=key in FROM_INPUT))


def activation_names() -> tuple[str, ...]:
    """Every name that `activation` knows, those with constants last."""
    return (*_WITHOUT_CONSTANTS, *FROM_INPUT, *_WITH_CONSTANTS)
