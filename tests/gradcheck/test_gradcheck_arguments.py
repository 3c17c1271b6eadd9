"""check_gradients: errors for wrong arguments and for wrong results of forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import xprnn

pytestmark = pytest.mark.regression


def square(*args: Any) -> Any:
    return args[0] * args[0], args


def square_backward(tape: Any, dy: Any) -> Any:
    return 2 * dy * tape[0], *(None for _ in tape[1:])


X = np.ones(3)


@pytest.mark.parametrize(
    ("forward", "backward", "args", "names", "message"),
    [
        (square, square_backward, (X, X), ["x"], r"names must be 2, one for each of args, found \['x'\]"),
        (square, square_backward, (X, X), "xy", "names must be 2, one for each of args, found 'xy'"),
        (square, square_backward, X, None, "args must be a list or tuple of arguments, found ndarray"),
        (lambda x: x * x, square_backward, (X,), None, r"forward must return a pair \(outputs, tape\), found ndarray"),
        (
            lambda x: (x, x, x),
            square_backward,
            (X,),
            None,
            r"forward must return a pair \(outputs, tape\), found 3 results",
        ),
    ],
)
def test_invalid_arguments_raise_input_error(forward, backward, args, names, message):
    with pytest.raises(xprnn.InputError, match=f"^check_gradients: {message}$"):
        xprnn.check_gradients(forward, backward, args, names=names)


@pytest.mark.parametrize(("result", "found"), [(None, "NoneType"), (np.zeros((2, 3)), "ndarray")])
def test_backward_without_a_tuple_raises_gradient_error(result, found):
    with pytest.raises(xprnn.GradientError, match=f"must return 2 gradients in a tuple, found {found}"):
        xprnn.check_gradients(square, lambda tape, dy: result, (X, X))
