"""The checker is checked: wrong backwards are planted, and check_gradients must catch each and name what is wrong."""

from __future__ import annotations

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


def test_the_right_backward_passes(elman_args):
    assert checker_message(elman_passes(), elman_args, NAMES) == ""


@pytest.mark.parametrize("bug", ELMAN_BUGS)
def test_a_wrong_backward_is_caught(elman_args, bug):
    said = checker_message(elman_passes(bug), elman_args, NAMES)
    assert said.startswith(ELMAN_BUGS[bug] + ":"), f"{bug}: {said or 'not caught'}"
    assert "backward says" in said
    assert "central differences say" in said


@pytest.mark.parametrize("bug", ELMAN_BUGS)
def test_a_bug_is_a_bug(elman_args, bug):
    """Each mutant really differs from the right backward, so that catching it means something."""
    forward, right = elman_passes()
    cotangents, tape = forward(*elman_args)
    ours, theirs = (f(tape, cotangents) for f in (right, elman_passes(bug)[1]))
    pairs = [(ours[0], theirs[0]), (ours[1], theirs[1]), *((ours[2][k], theirs[2][k]) for k in ours[2])]
    assert any(np.abs(a - b).max() > 1e-3 for a, b in pairs)


@pytest.mark.parametrize("bug", ["time reversed", "recurrent path dropped", "state off by one"])
def test_shapes_and_a_falling_loss_would_see_nothing(elman_args, bug):
    """Why random cotangents: along these wrong gradients the loss falls all the same."""
    forward, backward = elman_passes(bug)

    def loss(args):
        (h, last, logits), tape = forward(*args)
        outputs = (h, last, logits)
        return 0.5 * sum(float(np.sum(y * y)) for y in outputs), backward(tape, outputs)

    before, (_, _, dp) = loss(elman_args)
    x, h0, p = elman_args
    after, _ = loss((x, h0, {k: p[k] - 1e-3 * dp[k] for k in p}))
    assert after < before
    assert {k: g.shape for k, g in dp.items()} == {k: v.shape for k, v in p.items()}


# A wrong slope or adjoint planted in the library itself, in the kernel as well as in the generic scan.
CELL_BUGS = {
    "slope 1": lambda y: 0.0 * y + 1.0,
    "slope 0": lambda y: 0.0 * y,
    "1 - y": lambda y: 1.0 - y,
    "1 + y²": lambda y: 1.0 + y * y,
    "slope of the input": lambda y: y,
}


@pytest.mark.parametrize("generic", [True, False], ids=["generic", "kernel"])
@pytest.mark.parametrize("bug", [None, *CELL_BUGS])
def test_a_wrong_activation_in_a_layer_is_caught(rng, bug, generic):
    wrong = CELL_BUGS.get(bug, lambda y: 1.0 - y * y)
    act = Activation(f"tanh, {bug}", lambda xp: (xp.tanh, wrong))
    layer = xprnn.Recurrent(D, H, cell=cells.elman(act))
    params = layer.init(rng, like=np.zeros(0))

    def forward(params, x, state):
        y, final, tape = layer.forward(params, x, state)
        return (y, final), tape

    def backward(tape, u):
        dx, dstate, dparams = layer.backward(tape, *u)
        return dparams, dx, dstate

    args = (params, rng.normal(size=(T, N, D)), rng.normal(size=(1, N, H)))
    if generic:
        with reference_only():
            said = checker_message((forward, backward), args, ("params", "x", "state"))
    else:
        said = checker_message((forward, backward), args, ("params", "x", "state"))
    assert bool(said) == (bug is not None), said
