"""Activations whose outputs do not tell their slopes: each y = f(x) with its derivative in terms of x.

Of silu, gelu, mish and hardswish one y can stand for two x; tanhshrink has an inverse, but none in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["FROM_INPUT", "erf", "sigmoid"]

ActivationPair = tuple[Callable[[Any], Any], Callable[[Any], Any]]


def sigmoid(xp: Any) -> Callable[[Any], Any]:
    """The namespace's own where it has one; else through tanh, which cannot overflow, as exp(-x) does."""
    own = getattr(xp, "sigmoid", None)
    return own or (lambda x: 0.5 * xp.tanh(0.5 * x) + 0.5)


def _silu(xp: Any) -> ActivationPair:
    s = sigmoid(xp)

    def slope(x: Any) -> Any:
        y = s(x)
        return y * (1.0 + x * (1.0 - y))

    return lambda x: x * s(x), slope


def _gelu(xp: Any) -> ActivationPair:
    """x P(X < x) for a normal X (Hendrycks & Gimpel 2016)."""
    phi = erf(xp)

    def below(x: Any) -> Any:
        return 0.5 + 0.5 * phi(0.7071067811865476 * x)

    return lambda x: x * below(x), lambda x: below(x) + 0.3989422804014327 * x * xp.exp(-0.5 * x * x)


def _gelu_tanh(xp: Any) -> ActivationPair:
    """Their approximation: P(X < x) by a tanh."""
    a, b = 0.7978845608028654, 0.044715

    def half(x: Any) -> Any:
        return 0.5 + 0.5 * xp.tanh(a * x * (1.0 + b * x * x))

    def slope(x: Any) -> Any:
        p = half(x)
        return p + 2.0 * a * p * (1.0 - p) * x * (1.0 + 3.0 * b * x * x)

    return lambda x: x * half(x), slope


def _mish(xp: Any) -> ActivationPair:
    s = sigmoid(xp)

    def bent(x: Any) -> Any:
        return xp.tanh(xp.maximum(x, 0.0) + xp.log1p(xp.exp(-xp.abs(x))))

    def slope(x: Any) -> Any:
        t = bent(x)
        return t + x * (1.0 - t * t) * s(x)

    return lambda x: x * bent(x), slope


def _hardswish(xp: Any) -> ActivationPair:
    def f(x: Any) -> Any:
        return x * xp.minimum(xp.maximum(x / 6.0 + 0.5, 0.0), 1.0)

    def slope(x: Any) -> Any:
        return xp.where(xp.abs(x) < 3.0, x / 3.0 + 0.5, xp.where(x < 0.0, 0.0 * x, 0.0 * x + 1.0))

    return f, slope


def _tanhshrink(xp: Any) -> ActivationPair:
    def slope(x: Any) -> Any:
        t = xp.tanh(x)
        return t * t

    return lambda x: x - xp.tanh(x), slope


FROM_INPUT: dict[str, Callable[[Any], ActivationPair]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelutanh": _gelu_tanh,
    "mish": _mish,
    "hardswish": _hardswish,
    "tanhshrink": _tanhshrink,
}

# Rational functions of two ranges: x A(x^2) / B(x^2), and 1 - exp(-x^2) C(x) / D(x) from 0.46875 on.
# Cody, Math. Comp. 23 (1969), 631-637; his third range, from 4 on, is of use to 1 - erf alone.
_A = (1.85777706184603153e-1, 3.16112374387056560, 1.13864154151050156e2, 3.77485237685302021e2, 3.20937758913846947e3)
_B = (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3)
_C = (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594, 6.61191906371416295e1, 2.98635138197400131e2,
      8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3, 1.23033935479799725e3)  # fmt: skip
_D = (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
      3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3)  # fmt: skip


def _polynomial(coefficients: Sequence[float], x: Any) -> Any:
    """Highest power first."""
    y = coefficients[0] * x + coefficients[1]
    for c in coefficients[2:]:
        y = y * x + c
    return y


def erf(xp: Any) -> Callable[[Any], Any]:
    """The error function: the namespace's own where it has one, for it is not in the array standard.

    >>> import numpy as np
    >>> abs(erf(np)(np.asarray(0.5)) - 0.5204998778130465) < 1e-15
    np.True_
    """
    own = getattr(xp, "erf", None)

    def f(x: Any) -> Any:
        # Beyond 6 it is 1 to the last digit of a double.
        size = xp.minimum(xp.abs(x), 6.0)
        near, far = xp.minimum(size, 0.46875), xp.maximum(size, 0.46875)
        small = near * (_polynomial(_A, near * near) / _polynomial(_B, near * near))
        large = 1.0 - xp.exp(-far * far) * (_polynomial(_C, far) / _polynomial(_D, far))
        return xp.sign(x) * xp.where(size < 0.46875, small, large)

    return own or f
