"""Activations whose derivative is a function of the input x, not of the output y = f(x); also erf and sigmoid.

For silu, gelu, mish and hardswish two x can have the same y. tanhshrink has an inverse, but not in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["FROM_INPUT", "erf", "sigmoid"]

ActivationPair = tuple[Callable[[Any], Any], Callable[[Any], Any]]


def sigmoid(xp: Any) -> Callable[[Any], Any]:
    """Return 1 / (1 + exp(-x)): `xp.sigmoid` if it exists, else computed by tanh, which cannot overflow."""
    native = getattr(xp, "sigmoid", None)
    return native or (lambda x: 0.5 * xp.tanh(0.5 * x) + 0.5)


def _silu(xp: Any) -> ActivationPair:
    s = sigmoid(xp)

    def derivative(x: Any) -> Any:
        y = s(x)
        return y * (1.0 + x * (1.0 - y))

    return lambda x: x * s(x), derivative


def _gelu(xp: Any) -> ActivationPair:
    """GELU: x times the standard normal distribution function of x (Hendrycks & Gimpel 2016)."""
    erf_ = erf(xp)

    def normal_cdf(x: Any) -> Any:
        return 0.5 + 0.5 * erf_(0.7071067811865476 * x)

    return lambda x: x * normal_cdf(x), lambda x: normal_cdf(x) + 0.3989422804014327 * x * xp.exp(-0.5 * x * x)


def _gelu_tanh(xp: Any) -> ActivationPair:
    """GELU with the tanh approximation of the distribution function (Hendrycks & Gimpel 2016)."""
    a, b = 0.7978845608028654, 0.044715

    def cdf_tanh(x: Any) -> Any:
        return 0.5 + 0.5 * xp.tanh(a * x * (1.0 + b * x * x))

    def derivative(x: Any) -> Any:
        p = cdf_tanh(x)
        return p + 2.0 * a * p * (1.0 - p) * x * (1.0 + 3.0 * b * x * x)

    return lambda x: x * cdf_tanh(x), derivative


def _mish(xp: Any) -> ActivationPair:
    s = sigmoid(xp)

    def tanh_softplus(x: Any) -> Any:
        return xp.tanh(xp.maximum(x, 0.0) + xp.log1p(xp.exp(-xp.abs(x))))

    def derivative(x: Any) -> Any:
        t = tanh_softplus(x)
        return t + x * (1.0 - t * t) * s(x)

    return lambda x: x * tanh_softplus(x), derivative


def _hardswish(xp: Any) -> ActivationPair:
    def f(x: Any) -> Any:
        return x * xp.minimum(xp.maximum(x / 6.0 + 0.5, 0.0), 1.0)

    def derivative(x: Any) -> Any:
        return xp.where(xp.abs(x) < 3.0, x / 3.0 + 0.5, xp.where(x < 0.0, 0.0 * x, 0.0 * x + 1.0))

    return f, derivative


def _tanhshrink(xp: Any) -> ActivationPair:
    def derivative(x: Any) -> Any:
        t = xp.tanh(x)
        return t * t

    return lambda x: x - xp.tanh(x), derivative


FROM_INPUT: dict[str, Callable[[Any], ActivationPair]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelutanh": _gelu_tanh,
    "mish": _mish,
    "hardswish": _hardswish,
    "tanhshrink": _tanhshrink,
}

# Coefficients of erf(x) = x A(x^2) / B(x^2) for 0 <= x < 0.46875 and erf(x) = 1 - exp(-x^2) C(x) / D(x) above.
# Cody, Math. Comp. 23 (1969), 631-637. His third range (x >= 4) improves only 1 - erf(x) and is left out.
_A = (1.85777706184603153e-1, 3.16112374387056560, 1.13864154151050156e2, 3.77485237685302021e2, 3.20937758913846947e3)
_B = (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3)
_C = (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594, 6.61191906371416295e1, 2.98635138197400131e2,
      8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3, 1.23033935479799725e3)  # fmt: skip
_D = (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
      3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3)  # fmt: skip


def _polynomial(coefficients: Sequence[float], x: Any) -> Any:
    """Evaluate a polynomial by Horner's rule; the coefficient of the highest power comes first."""
    y = coefficients[0] * x + coefficients[1]
    for c in coefficients[2:]:
        y = y * x + c
    return y


def erf(xp: Any) -> Callable[[Any], Any]:
    """Return the error function: `xp.erf` if it exists, else Cody's rational approximation.

    erf is not in the Array API standard. The approximation has a relative error of at most 1e-15 in float64, tested in
    tests/cells/test_activations.py.

    >>> import numpy as np
    >>> abs(erf(np)(np.asarray(0.5)) - 0.5204998778130465) < 1e-15
    np.True_
    """
    native = getattr(xp, "erf", None)

    def f(x: Any) -> Any:
        # For |x| >= 6, erf is 1 in float64.
        size = xp.minimum(xp.abs(x), 6.0)
        near, far = xp.minimum(size, 0.46875), xp.maximum(size, 0.46875)
        small = near * (_polynomial(_A, near * near) / _polynomial(_B, near * near))
        large = 1.0 - xp.exp(-far * far) * (_polynomial(_C, far) / _polynomial(_D, far))
        return xp.sign(x) * xp.where(size < 0.46875, small, large)

    return native or f
