"""check_gradients detects each planted bug of an Elman network and names the argument with the wrong gradient."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from support.mutants import ELMAN_BUGS, checker_message, elman_passes

import xprnn
from xprnn import Activation, cells
from xprnn.kernels.config import reference_only

T, N, D, H, V = 5, 3, 4, 4, 2  # D = H: a gradient from the wrong weight then has the right shape
NAMES = ("x", "h0", "p")


@pytest.fixture
def elman_args(rng):
    shapes = {"W": (H, D), "U": (H, H), "b": (H,), "V": (V, H), "c": (V,)}
    p = {name: 0.6 * rng.normal(size=shape) for name, shape in shapes.items()}
    return rng.normal(size=(T, N, D)), rng.normal(size=(N, H)), p


def test_right_backward_passes(elman_args):
    assert checker_message(elman_passes(), elman_args, NAMES) == ""


@pytest.mark.parametrize("bug", ELMAN_BUGS)
def test_planted_bug_is_detected(elman_args, bug):
    message = checker_message(elman_passes(bug), elman_args, NAMES)
    assert message.startswith(ELMAN_BUGS[bug] + ":"), f"{bug}: {message or 'not detected'}"
    assert "backward says" in message
    assert "central differences say" in message


@pytest.mark.parametrize("bug", ELMAN_BUGS)
def test_planted_bug_changes_a_gradient(elman_args, bug):
    forward, backward = elman_passes()
    cotangents, tape = forward(*elman_args)
    right, wrong = (f(tape, cotangents) for f in (backward, elman_passes(bug)[1]))
    pairs = [(right[0], wrong[0]), (right[1], wrong[1]), *((right[2][k], wrong[2][k]) for k in right[2])]
    assert any(np.abs(a - b).max() > 1e-3 for a, b in pairs)


@pytest.mark.parametrize("bug", ["time reversed", "recurrent path dropped", "state off by one"])
def test_loss_falls_along_some_wrong_gradients(elman_args, bug):
    """Right shapes and a falling loss do not prove a gradient: a check against central differences is needed."""
    forward, backward = elman_passes(bug)

    def loss(args):
        (h, final, logits), tape = forward(*args)
        outputs = (h, final, logits)
        return 0.5 * sum(float(np.sum(y * y)) for y in outputs), backward(tape, outputs)

    before, (_, _, dp) = loss(elman_args)
    x, h0, p = elman_args
    after, _ = loss((x, h0, {k: p[k] - 1e-3 * dp[k] for k in p}))
    assert after < before
    assert {k: g.shape for k, g in dp.items()} == {k: v.shape for k, v in p.items()}


# Wrong derivatives of tanh, for a layer of the library on the reference path and on generated kernels.
WRONG_DERIVATIVES = {
    "1": lambda y: 0.0 * y + 1.0,
    "0": lambda y: 0.0 * y,
    "1 - y": lambda y: 1.0 - y,
    "1 + y²": lambda y: 1.0 + y * y,
    "y": lambda y: y,
}


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "kernel"])
@pytest.mark.parametrize("bug", [None, *WRONG_DERIVATIVES])
def test_wrong_activation_derivative_in_a_layer_is_detected(rng, bug, reference):
    derivative = WRONG_DERIVATIVES.get(bug, lambda y: 1.0 - y * y)
    act = Activation(f"tanh, {bug}", lambda xp: (xp.tanh, derivative))
    layer = xprnn.Recurrent(D, H, cell=cells.elman(act))
    params = layer.init(rng, like=np.zeros(0))

    def forward(params, x, state):
        y, final, tape = layer.forward(params, x, state)
        return (y, final), tape

    def backward(tape, u):
        dx, dstate, dparams = layer.backward(tape, *u)
        return dparams, dx, dstate

    args = (params, rng.normal(size=(T, N, D)), rng.normal(size=(1, N, H)))
    with reference_only() if reference else nullcontext():
        message = checker_message((forward, backward), args, ("params", "x", "state"))
    assert bool(message) == (bug is not None), message
