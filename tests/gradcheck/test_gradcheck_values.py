"""check_gradients compares floats, NumPy scalars, 0-d arrays and nested results; what it cannot compare it refuses."""

from __future__ import annotations

from collections import OrderedDict
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

import xprnn
from xprnn import GradientError, InputError, NotDifferentiableError, check_gradients

pytestmark = pytest.mark.regression
X = np.array([0.3, -1.2, 2.0])


class Pair(NamedTuple):
    """Two results."""

    first: Any
    second: Any


# result: sum of squares in some type -> the cotangent of the sum, from a cotangent of that type
SCALAR_RESULTS = {
    "float": (float, lambda u: u),
    "np.float64": (np.float64, lambda u: u),
    "0-d array": (np.asarray, lambda u: u),
    "list": (lambda s: [float(s)], lambda u: u[0]),
    "nested": (lambda s: {"loss": (None, [3, float(s)])}, lambda u: u["loss"][1][1]),
    "named tuple": (lambda s: Pair(7, float(s)), lambda u: u.second),
    "mapping": (lambda s: MappingProxyType({"a": np.float64(s)}), lambda u: u["a"]),
    "ordered dict": (lambda s: OrderedDict(a=float(s)), lambda u: u["a"]),
}


@pytest.mark.parametrize("kind", SCALAR_RESULTS)
@pytest.mark.parametrize("factor", [2.0, 2.001, 0.0, -2.0])
def test_scalar_results_are_compared(kind, factor):
    """The gradient of a sum of squares is 2 x: every other factor is a planted bug."""
    wrap, unwrap = SCALAR_RESULTS[kind]

    def backward(x: Any, cotangents: Any) -> Any:
        return factor * x * unwrap(cotangents)

    def forward(x: Any) -> Any:
        return wrap((x**2).sum()), x

    if factor == 2.0:
        assert check_gradients(forward, backward, [X])["args[0]"] < 1e-9
    else:
        with pytest.raises(GradientError, match=r"args\[0\]: backward says"):
            check_gradients(forward, backward, [X])


@pytest.mark.parametrize("factor", [2.0, 1.9])
@pytest.mark.parametrize("scale", [3.0, np.float64(3.0), np.float32(3.0), np.asarray(3.0)])
def test_float_arguments_are_varied(factor, scale):
    """y = s^2 sum(x), so that ds = 2 s sum(x) u."""

    def backward(tape: Any, u: Any) -> Any:
        x, s = tape
        return np.full_like(x, s * s * u), factor * s * x.sum() * u

    passes = lambda x, s: (float(s * s * x.sum()), (x, s)), backward
    if factor == 2.0:
        assert check_gradients(*passes, [X, scale], names=["x", "s"]).keys() == {"x", "s"}
    else:
        with pytest.raises(GradientError, match=r"^s: backward says"):
            check_gradients(*passes, [X, scale], names=["x", "s"])


def test_structure_of_arguments_is_kept():
    def forward(pair: Any, rows: Any) -> Any:
        assert isinstance(pair, Pair)
        assert isinstance(rows, list)
        return [pair.first * rows[0]], (pair, rows)

    def backward(tape: Any, u: Any) -> Any:
        assert isinstance(u, list)
        pair, rows = tape
        return Pair(u[0] * rows[0], None), [u[0] * pair.first]

    assert check_gradients(forward, backward, [Pair(X, 2), [X + 1]]).keys() == {"args[0][0]", "args[1][0]"}


def test_cotangent_overwritten_by_backward_does_not_hide_a_wrong_gradient():
    def backward(tape: Any, u: Any) -> Any:
        u *= 2  # the gradient of the identity is u
        return u

    with pytest.raises(GradientError):
        check_gradients(lambda x: (x + 0, None), backward, [X])


NOTHING_TO_COMPARE = {
    "integers": (lambda x: (np.round(x).astype(int), x), "forward returns no array or number of a floating dtype"),
    "integer": (lambda x: (3, x), "forward returns no array or number of a floating dtype"),
    "None": (lambda x: (None, x), "forward returns no array or number of a floating dtype"),
    "empty dict": (lambda x: ({}, x), "forward returns no array or number of a floating dtype"),
    "complex array": (lambda x: ((x, x * 1j), x), r"output \[1\]: .* found dtype complex128"),
    "complex number": (lambda x: ([x, complex(x.sum())], x), r"output \[1\]: .* found a complex number"),
    "objects": (lambda x: ((x, x.astype(object)), x), r"output \[1\]: .* found dtype object"),
    "other type": (lambda x: ({"a": x, "b": SimpleNamespace(y=x)}, x), r"output \['b'\]: .* found SimpleNamespace"),
    "generator": (lambda x: ((row for row in x), x), "output : .* found generator"),
    "large constant": (lambda x: (x.sum() + 1e13, x), "nothing can be compared; leave large constants out"),
}


@pytest.mark.parametrize("case", NOTHING_TO_COMPARE)
def test_outputs_that_cannot_be_compared_raise(case):
    forward, message = NOTHING_TO_COMPARE[case]
    with pytest.raises(InputError, match=message):
        check_gradients(forward, lambda x, u: 0 * x, [X])


@pytest.mark.parametrize("argument", [X * 1j, 2j, X.astype(object)])
def test_arguments_that_cannot_be_varied_raise(argument):
    with pytest.raises(InputError, match=r"argument w\['k'\]: expected real floats or integers"):
        check_gradients(lambda x, w: (x, None), lambda _, u: (u, None), [X, {"k": argument}], names=["x", "w"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": 0}, "directions must be at least 1, found 0"),
        ({"rtol": np.inf}, "rtol must be above 0 and below 1, found inf"),
        ({"rtol": np.nan}, "rtol must be above 0 and below 1, found nan"),
    ],
)
def test_limits_that_accept_every_gradient_raise(options, message):
    with pytest.raises(InputError, match=message):
        check_gradients(lambda x: (x, None), lambda _, u: 0 * u, [X], **options)


def test_float_that_becomes_an_integer_raises():
    """max(0, s) is the integer 0 where s is negative: the output would be left out."""
    with pytest.raises(NotDifferentiableError, match="a float at some arguments and none at others"):
        check_gradients(lambda x: ([max(0, float(x[0])), x], x), lambda x, u: u[1], [np.array([-1e-7])])


def test_check_layer_accepts_a_loss_beside_the_state():
    """A layer of a user: its output is a Python float."""

    class Loss:
        def forward(self, params: Any, x: Any, state: Any) -> Any:
            return float((params["w"] * x).sum()), None, (params, x)

        def backward(self, tape: Any, dy: Any, dstate: Any) -> Any:
            params, x = tape
            return dy * params["w"], None, {"w": self.factor * dy * x}

        factor = 1.0

    layer, wrong = Loss(), Loss()
    wrong.factor = 0.5
    assert xprnn.gradcheck.check_layer(layer, {"w": X}, X + 1).keys() == {"params['w']", "x"}
    with pytest.raises(GradientError, match=r"params\['w'\]: backward says"):
        xprnn.gradcheck.check_layer(wrong, {"w": X}, X + 1)
