"""check_gradients: it accepts right gradients, names wrong ones, and rejects functions without a gradient."""

from __future__ import annotations

import numpy as np
import pytest
from support.backends import Backend
from support.oracles import check_gradients_on

import xprnn
from xprnn import GradientError, NotDifferentiableError, check_gradients
from xprnn.gradcheck import check_layer

float64_only = pytest.mark.not_on("strict:no_float64", reason="central differences need float64")


def elementwise(f, derivative):
    """Return forward and backward of y = f(x)."""
    return lambda x: (f(x), x), lambda x, dy: dy * derivative(x)


@float64_only
@pytest.mark.parametrize("args_dtype", ["float64", "float32"])
def test_right_gradients_pass(xp, rng, args_dtype):
    a, b = (xp.asarray(rng.normal(size=s).astype("float32"), args_dtype) for s in ((3, 4), (4, 2)))

    def backward(tape, dy):
        return dy @ xp.xp.permute_dims(tape[1], (1, 0)), xp.xp.permute_dims(tape[0], (1, 0)) @ dy

    worst = check_gradients_on(xp, lambda a, b: (a @ b, (a, b)), backward, [a, b], names=["a", "b"])
    assert worst.keys() == {"a", "b"}
    assert max(worst.values()) < 1e-9


@float64_only
def test_error_names_the_argument_and_both_values(xp):
    x, w = xp.asarray(np.asarray([2.0])), xp.asarray(np.asarray([3.0]))
    passes = lambda x, w: (x * w, (x, w)), lambda t, dy: (dy * t[1], dy * t[0] * 2)
    with pytest.raises(GradientError) as error:
        check_gradients_on(xp, *passes, [x, w], names=["x", "w"])
    message = str(error.value)
    assert message.startswith("w: backward says ")
    words = message.replace(",", " ").split()
    analytic, numeric = float(words[3]), float(words[7])
    assert analytic == pytest.approx(2 * numeric, rel=1e-8)
    assert numeric != 0


def test_default_names_are_the_positions_in_args():
    passes = lambda x, w: (x * w["k"][1], (x, w)), lambda t, dy: (dy * t[1]["k"][1], {"k": (None, 3 * dy * t[0])})
    with pytest.raises(GradientError, match=r"args\[1\]\['k'\]\[1\]: backward says"):
        check_gradients(*passes, [np.ones(2), {"k": (None, np.ones(2))}])


def test_one_wrong_entry_among_many_is_detected(rng):
    """A random direction depends on every entry; a check of a few coordinates would miss this one."""

    def backward(x, dy):
        dx = dy * 2 * x
        dx[17, 31] *= 1.01
        return dx

    with pytest.raises(GradientError):
        check_gradients(lambda x: (x * x, x), backward, [rng.normal(size=(40, 50))])


@pytest.mark.parametrize("factor", [0.0, -1.0, 1 + 1e-4, 2.0])
def test_wrong_factor_is_detected(rng, factor):
    forward, backward = elementwise(np.tanh, lambda x: factor * (1 - np.tanh(x) ** 2))
    with pytest.raises(GradientError, match="relative difference"):
        check_gradients(forward, backward, [rng.normal(size=5)])


def test_reversed_cotangent_is_detected(rng):
    """With a cotangent of ones (the gradient of `y.sum()`), a reversed dy gives the right gradient."""
    w = rng.normal(size=6)
    forward, backward = (lambda x: (x * w, None)), (lambda tape, dy: dy[::-1] * w)
    np.testing.assert_array_equal(backward(None, np.ones(6)), np.ones(6) * w)
    with pytest.raises(GradientError):
        check_gradients(forward, backward, [rng.normal(size=6)])


KINKS = {
    "relu at 0": (lambda x: np.maximum(x, 0), lambda x: np.where(x > 0, 1.0, 0.0), 0.0),
    "abs at 0": (np.abs, np.sign, 0.0),
    "abs at 0 with derivative 0": (np.abs, lambda x: 0 * x, 0.0),
    "a jump": (np.floor, lambda x: 0 * x, 1.0),
    "a step": (np.sign, lambda x: 0 * x, 0.0),
    "a kink of max": (lambda x: np.maximum(x, 2 - x), np.sign, 1.0),
}


@pytest.mark.parametrize("case", KINKS)
@pytest.mark.parametrize("size", [1, 20])
def test_kinks_and_jumps_raise(rng, case, size):
    f, derivative, position = KINKS[case]
    x = position + np.where(np.arange(size) == 0, 0.0, rng.uniform(0.2, 0.8, size))
    with pytest.raises(NotDifferentiableError, match="x"):
        check_gradients(*elementwise(f, derivative), [x], names=["x"])


@pytest.mark.parametrize("distance", [1e-2, 2e-3, 1e-4])
@pytest.mark.parametrize("right", [True, False])
def test_gradient_near_a_kink_is_checked(rng, distance, right):
    """relu is differentiable at 1e-4: the right gradient passes there and a wrong one does not."""
    x = distance * np.where(rng.random(10) < 0.5, -1, 1)
    passes = elementwise(lambda x: np.maximum(x, 0), lambda x: np.where(x > 0, 1.0 if right else 1.1, 0.0))
    if right:
        check_gradients(*passes, [x])
    else:
        with pytest.raises(GradientError):
            check_gradients(*passes, [x])


def test_relu_network_away_from_its_kinks_passes(rng):
    layer = xprnn.RNN(3, 6, num_layers=2, nonlinearity="relu")
    params = layer.init(rng, like=np.zeros(0))
    x, state = rng.normal(size=(5, 2, 3)), rng.uniform(0.5, 1, size=(2, 2, 6))
    assert max(check_layer(layer, params, x, state).values()) < 1e-6


def test_random_forward_raises(rng):
    with pytest.raises(NotDifferentiableError, match="different outputs for the same arguments"):
        check_gradients(lambda x: (x * rng.random(), x), lambda x, dy: dy, [np.ones(3)])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_raise(bad):
    with pytest.raises(NotDifferentiableError, match="nan or infinity"):
        check_gradients(lambda x: (x * 0 + bad, x), lambda x, dy: dy, [np.ones(3)])


def test_nested_arguments_and_outputs(rng):
    """Arguments and outputs are dicts, tuples and lists; integers and None are ignored; a None gradient is zero."""
    ids = np.asarray([1, 0, 1])
    args = ({"w": rng.normal(size=(2, 4)), "unused": rng.normal(size=3)}, ids, None, [rng.normal(size=(3, 4))])

    def forward(p, ids, none, scale):
        rows = p["w"][ids] * scale[0]
        return {"rows": rows, "ids": ids, "none": None, "squares": (rows**2,)}, (p, ids, scale, rows)

    def backward(tape, u):
        p, ids, scale, rows = tape
        assert u["none"] is None
        d = u["rows"] + 2 * rows * u["squares"][0]
        dw = np.zeros_like(p["w"])
        np.add.at(dw, ids, d * scale[0])
        return {"w": dw, "unused": None}, None, None, [d * p["w"][ids]]

    worst = check_gradients(forward, backward, args, names=["p", "ids", "none", "scale"])
    assert worst.keys() == {"p['w']", "p['unused']", "scale[0]"}


def test_none_gradient_of_an_argument_with_influence_is_detected():
    with pytest.raises(GradientError, match="w: backward says 0,"):
        check_gradients(lambda x, w: (x * w, w), lambda w, dy: (dy * w, None), [np.ones(2)] * 2, names=["x", "w"])


WRONG_STRUCTURES = {
    "shape": (lambda dx: dx[None], "must have shape"),
    "dtype": (lambda dx: dx.astype("float32"), "dtype float64"),
    "number of gradients": (lambda dx: (dx, dx), "must be an array, found tuple"),
    "missing key": (lambda dx: {}, "no gradient for it"),
}


@pytest.mark.parametrize("case", WRONG_STRUCTURES)
def test_gradients_of_wrong_structure_raise(case):
    change, message = WRONG_STRUCTURES[case]
    nested = case == "missing key"
    forward = (lambda p: (p["w"] * 2, None)) if nested else (lambda x: (x * 2, None))
    with pytest.raises(GradientError, match=message):
        check_gradients(forward, lambda tape, dy: change(2 * dy), [{"w": np.ones(3)} if nested else np.ones(3)])


def test_too_many_gradients_raise():
    with pytest.raises(GradientError, match="3 gradients for 2 arguments"):
        check_gradients(lambda x, w: (x * w, None), lambda tape, dy: (dy, dy, dy), [np.ones(3)] * 2)


def test_scalar_gradient_of_an_array_raises():
    with pytest.raises(GradientError, match="x: its gradient must be an array"):
        check_gradients(lambda x: (x * 2, None), lambda tape, dy: 2.0, [np.ones(3)], names=["x"])


def test_arguments_without_floats_raise():
    with pytest.raises(xprnn.InputError, match="no argument of a floating dtype"):
        check_gradients(lambda x: (x, x), lambda x, dy: dy, [np.arange(3)])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_result_does_not_depend_on_the_scale(rng, scale):
    forward, backward = elementwise(lambda x: scale * np.sin(x), lambda x: scale * np.cos(x))
    assert check_gradients(forward, backward, [rng.normal(size=8)])["args[0]"] < 1e-8
    with pytest.raises(GradientError):
        check_gradients(forward, lambda x, dy: 1.001 * backward(x, dy), [rng.normal(size=8)])


def test_directions_depend_on_rng(rng):
    forward, backward = elementwise(np.sin, lambda x: np.cos(x) * (1 + 1e-9))
    runs = [
        check_gradients(forward, backward, [np.ones(5)], rng=np.random.default_rng(k))["args[0]"] for k in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("shape", [(0,), (), (3, 0)])
def test_empty_and_zero_dimensional_arguments_pass(shape):
    assert check_gradients(*elementwise(np.sin, np.cos), [np.full(shape, 0.3)])["args[0]"] < 1e-8


@pytest.mark.needs("array_api_strict")
def test_device_without_float64_raises():
    xp = Backend.STRICT_NO_FLOAT64
    with xp.forbid_host_conversion(), pytest.raises(xprnn.InputError, match="float64 is not available"):
        check_gradients_on(xp, lambda x: (x, x), lambda x, dy: dy, [xp.asarray([1.0, 2.0])])
