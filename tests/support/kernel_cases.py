"""Masks, resets, memory layouts and unusual cells that the tests of all kernels share."""

from __future__ import annotations

import numpy as np

import xprnn

# Options of a call with T = 6 steps and N = 4 rows.
PATTERNS = {
    "full": {},
    "sorted": {"lengths": [6, 4, 1, 0]},
    "any-order": {"lengths": [1, 6, 0, 3]},
    "nearly-full": {"lengths": [5, 6, 6, 6]},
    "equal": {"lengths": [3, 3, 3, 3]},
    "none": {"lengths": [0, 0, 0, 0]},
    "holes": {
        "mask": np.array([[1, 0, 1, 1], [0, 0, 1, 1], [1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]], bool)
    },
    "resets": {
        "reset": np.array([[1, 0, 0, 1], [0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1]], bool)
    },
}
PATTERNS["all"] = {"lengths": [4, 6, 2, 5], **PATTERNS["holes"], **PATTERNS["resets"]}


def every_other(a):
    """Return the values of `a` as a strided view."""
    return np.repeat(a, 2, axis=-1)[..., ::2]


def everything_cell():
    """Make a cell whose step calls every function that can be traced."""

    def build(xp):
        def step(x, h, state, p):
            a = xp.tanh(x[0] + h[0])
            b = 0.5 + a * a
            c = xp.log(b) + xp.log1p(b) + xp.sqrt(b) + b**1.5 + xp.square(a) + xp.positive(a) + (-a)
            d = xp.sin(a) + xp.cos(a) + xp.sinh(a) + xp.cosh(a) + xp.exp(a) + xp.expm1(a) + abs(a) + xp.sign(a)
            e = (
                xp.where(a < b, a, b)
                + xp.where(a <= 0.0, 1.0, a)
                + xp.where(a > 0.25, a, 2.0)
                + xp.where(a >= b, a, 3.0)
            )
            f = xp.maximum(a, 0.1) - xp.minimum(a, -0.1) + xp.where(a == b, 1.0, a) + xp.where(a != b, a, 1.0) + 1.0 / b
            return (0.05 * (c + d + e + f),), (a,)

        def back(dstate, saved, state, p):
            da = dstate[0] * (1.0 - saved[0] * saved[0])
            return (da,), (da,), (None,), ()

        return step, back

    return xprnn.Cell("everything", 1, build)


def untraceable_cell():
    """Make a cell that calls xp.atan, which is in the array API standard but is not traced."""

    def build(xp):
        def step(x, h, state, p):
            a = x[0] + h[0]
            return (xp.atan(a),), (a,)

        def back(dstate, saved, state, p):
            da = dstate[0] / (1.0 + saved[0] * saved[0])
            return (da,), (da,), (None,), ()

        return step, back

    return xprnn.Cell("atan", 1, build)


def branching_cell():
    """Make a cell that branches on a value, which cannot be traced but can be computed."""

    def build(xp):
        def step(x, h, state, p):
            a = x[0] + h[0]
            y = a if not bool(xp.any(xp.abs(a) > 1e9)) else xp.zeros_like(a)
            return (y,), ()

        def back(dstate, saved, state, p):
            return (dstate[0],), (dstate[0],), (None,), ()

        return step, back

    return xprnn.Cell("branch", 1, build)
