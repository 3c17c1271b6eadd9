"""check_layer detects each planted bug of LSTM and GRU cells, of stacked layers and of ragged batches.

Each case has one bug: a wrong term in the adjoint of a cell, or a wrong argument or result of a layer's backward pass.
The forward pass is right. Each bug has occurred in a library.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from support.layer_cases import random_cotangents, random_inputs

import xprnn
from xprnn import cells
from xprnn.gradcheck import check_layer
from xprnn.kernels.config import reference_only


def lstm_backward(dstate, saved, state, bug=""):
    """Return the adjoint of the LSTM cell with the named bug."""
    i, f, g, o, tc = saved
    dh, dc = dstate
    c_prev = state[1]
    if bug == "c_t for c_{t-1}":
        c_prev = f * state[1] + i * g
    do = dh * (tc * (1.0 if bug == "derivative of output gate missing" else o * (1.0 - o)))
    dc_from_h = dh * (o * (1.0 if bug == "derivative of tanh(c) missing" else 1.0 - tc * tc))
    if bug == "no path from h to c":
        dc_from_h = 0.0 * dc_from_h
    dc = dc_from_h if bug == "cell path dropped" else dc + dc_from_h
    if bug == "dc halved":
        dc = dc * 0.5
    di, df, dg = dc * (g * (i * (1.0 - i))), dc * (c_prev * (f * (1.0 - f))), dc * (i * (1.0 - g * g))
    if bug == "i and f swapped":
        di, df = df, di
    if bug == "g and o swapped":
        dg, do = do, dg
    if bug == "derivative of sigmoid for candidate":
        dg = dc * (i * (g * (1.0 - g)))
    dc_prev = dc * (i if bug == "i for f on the cell path" else f)
    x = (di, df, dg, do)
    h = tuple(0.0 * d for d in x) if bug == "recurrent path dropped" else x
    return x, h, (None, dc_prev), ()


def gru_backward(dstate, saved, state, bug=""):
    """Return the adjoint of the GRU cell with the named bug."""
    r, z, n, hn = saved
    (dh,), (h_prev,) = dstate, state
    dn = dh * ((z if bug == "z for 1-z" else 1.0 - z) * (1.0 - n * n))
    dz = dh * ((h_prev if bug == "-n missing in dz" else h_prev - n) * (z * (1.0 - z)))
    if bug == "dz zero":
        dz = 0.0 * dz
    dr = dn * ((h_prev if bug == "h for its recurrent product in dr" else hn) * (r * (1.0 - r)))
    if bug == "r and z swapped":
        dr, dz = dz, dr
    to_product = dn if bug == "reset gate missing in dh" else dn * r
    to_input = dn * r if bug == "reset gate on the input" else dn
    direct = None if bug == "direct path dropped" else dh * (1.0 - z if bug == "1-z on the direct path" else z)
    return (dr, dz, to_input), (dr, dz, to_product), (direct,), ()


LSTM_BUGS = [
    "c_t for c_{t-1}",
    "derivative of output gate missing",
    "derivative of tanh(c) missing",
    "cell path dropped",
    "no path from h to c",
    "dc halved",
    "i and f swapped",
    "g and o swapped",
    "derivative of sigmoid for candidate",
    "i for f on the cell path",
    "recurrent path dropped",
]
GRU_BUGS = [
    "z for 1-z",
    "-n missing in dz",
    "dz zero",
    "h for its recurrent product in dr",
    "r and z swapped",
    "reset gate missing in dh",
    "reset gate on the input",
    "direct path dropped",
    "1-z on the direct path",
]


def mutant(base, cell_backward, bug):
    """Return the cell with its step and the given adjoint with a bug."""

    def build(xp):
        def backward(dstate, saved, state, p):
            return cell_backward(dstate, saved, state, bug)

        return base.bind(xp).step, backward

    return xprnn.Cell(base.name, base.gates, build, base.states)  # same name and step: forward is compiled once


CELL_BUGS = [(cells.lstm(), lstm_backward, bug) for bug in LSTM_BUGS]
CELL_BUGS += [(cells.gru(), gru_backward, bug) for bug in GRU_BUGS]


def check_random(layer, rng, *, reference=False):
    """Run check_layer on random inputs."""
    p = random_inputs(rng, layer, T=4, N=3)
    with reference_only() if reference else nullcontext():
        return check_layer(layer, p.params, p.x, p.state)


def check_random_with_backward(layer, rng, backward):
    """Run check_layer on random inputs with another backward pass."""
    p = random_inputs(rng, layer, T=4, N=3)
    return check_layer(WrongBackward(layer, backward), p.params, p.x, p.state)


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    ("base", "backward"), [(cells.lstm(), lstm_backward), (cells.gru(), gru_backward)], ids=["lstm", "gru"]
)
def test_adjoints_of_this_file_without_a_bug_pass(rng, base, backward, reference):
    layer = xprnn.Recurrent(2, 3, cell=mutant(base, backward, ""))
    assert max(check_random(layer, rng, reference=reference).values()) < 1e-6


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
@pytest.mark.parametrize(("base", "backward", "bug"), CELL_BUGS, ids=[f"{b.name}: {bug}" for b, _, bug in CELL_BUGS])
def test_planted_bug_in_a_cell_is_detected(rng, base, backward, bug, reference):
    with pytest.raises(xprnn.GradientError, match="backward says"):
        check_random(xprnn.Recurrent(2, 3, cell=mutant(base, backward, bug)), rng, reference=reference)


class WrongBackward:
    """A layer with another backward pass, backward(layer, tape, dy, dstate) -> gradients."""

    def __init__(self, layer, backward, forward=None):
        self.layer, self.layer_backward = layer, backward
        self.forward = forward or layer.forward

    def backward(self, tape, dy, dstate):
        """Call the other backward pass."""
        return self.layer_backward(self.layer, tape, dy, dstate)


def state_arrays(state):
    return state if isinstance(state, tuple) else (state,)


def map_state(f, state):
    return tuple(f(s) for s in state) if isinstance(state, tuple) else f(state)


def dy_of_reverse_direction_reversed(layer, tape, dy, dstate):
    half = dy.shape[-1] // 2
    return layer.backward(tape, np.concatenate((dy[..., :half], dy[::-1, :, half:]), axis=-1), dstate)


def dx_of_reverse_direction_reversed(layer, tape, dy, dstate):
    half = dy.shape[-1] // 2
    ahead = layer.backward(tape, np.concatenate((dy[..., :half], 0 * dy[..., half:]), axis=-1), dstate)
    reverse = layer.backward(tape, np.concatenate((0 * dy[..., :half], dy[..., half:]), axis=-1))
    dparams = {k: ahead.dparams[k] + reverse.dparams[k] for k in ahead.dparams}
    dinitial = tuple(a + b for a, b in zip(state_arrays(ahead.dstate), state_arrays(reverse.dstate), strict=True))
    dinitial = dinitial if isinstance(ahead.dstate, tuple) else dinitial[0]
    return xprnn.Gradients(ahead.dx + reverse.dx[::-1], dinitial, dparams)


def directions_swapped(layer, tape, dy, dstate):
    half = dy.shape[-1] // 2
    return layer.backward(tape, np.concatenate((dy[..., half:], dy[..., :half]), axis=-1), dstate)


def time_reversed(layer, tape, dy, dstate):
    return layer.backward(tape, dy[::-1], dstate)


def dfinal_state_ignored(layer, tape, dy, dstate):
    return layer.backward(tape, dy)


def dfinal_state_of_another_direction(layer, tape, dy, dstate):
    return layer.backward(tape, dy, map_state(lambda s: s[::-1], dstate))


def dy_ignored(layer, tape, dy, dstate):
    return layer.backward(tape, None, dstate)


def dinitial_state_zero(layer, tape, dy, dstate):
    gradients = layer.backward(tape, dy, dstate)
    return gradients._replace(dstate=map_state(np.zeros_like, gradients.dstate))


def all_cotangents_zero(layer, tape, dy, dstate):
    return layer.backward(tape, 0 * dy)


def dbias_ih_for_dbias_hh(layer, tape, dy, dstate):
    """Right for the LSTM, whose two biases have the same gradient; wrong for the GRU because of the reset gate."""
    gradients = layer.backward(tape, dy, dstate)
    return gradients._replace(dparams=gradients.dparams | {"bias_hh_l0": gradients.dparams["bias_ih_l0"]})


LAYER_BUGS = [
    dy_of_reverse_direction_reversed,
    dx_of_reverse_direction_reversed,
    directions_swapped,
    time_reversed,
    dfinal_state_ignored,
    dfinal_state_of_another_direction,
    dy_ignored,
    dinitial_state_zero,
    all_cotangents_zero,
]


@pytest.mark.parametrize("backward", LAYER_BUGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.LSTM, xprnn.GRU])
def test_planted_bug_in_a_layer_is_detected(rng, kind, backward):
    with pytest.raises(xprnn.GradientError, match="backward says"):
        check_random_with_backward(kind(2, 3, bidirectional=True), rng, backward)


def test_equal_bias_gradients_are_wrong_for_gru_and_right_for_lstm(rng):
    with pytest.raises(xprnn.GradientError, match="bias_hh_l0"):
        check_random_with_backward(xprnn.GRU(2, 3), rng, dbias_ih_for_dbias_hh)
    check_random_with_backward(xprnn.LSTM(2, 3), rng, dbias_ih_for_dbias_hh)


def with_other_tape(layer, flags, tape_flags):
    """Return a layer whose backward pass uses the tape of a forward pass with other flags."""

    def forward(params, x, state, **_):
        y, final, _ = layer.forward(params, x, state, **flags)
        return y, final, layer.forward(params, x, state, **tape_flags)[2]

    return WrongBackward(layer, lambda layer, tape, dy, dstate: layer.backward(tape, dy, dstate), forward)


# bug -> the flags that the backward pass wrongly uses, from the flags of the forward pass
FLAG_BUGS = {
    "length one short": lambda f: f | {"lengths": np.maximum(f["lengths"] - 1, 0)},
    "length one long": lambda f: f | {"lengths": np.minimum(f["lengths"] + 1, 4)},
    "lengths forgotten": lambda f: {k: v for k, v in f.items() if k != "lengths"},
    "lengths in another order": lambda f: f | {"lengths": f["lengths"][::-1]},
    "mask forgotten": lambda f: {k: v for k, v in f.items() if k != "mask"},
    "mask one step late": lambda f: f | {"mask": np.roll(f["mask"], 1, axis=0)},
    "reset forgotten": lambda f: {k: v for k, v in f.items() if k != "reset"},
    "reset one step late": lambda f: f | {"reset": np.roll(f["reset"], 1, axis=0)},
}


@pytest.mark.parametrize("bug", FLAG_BUGS)
@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.LSTM, xprnn.GRU])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_planted_bug_in_a_ragged_batch_is_detected(rng, kind, bidirectional, bug):
    flags = {
        "lengths": np.array([3, 1, 4]),
        "mask": np.array([[1, 1, 0], [0, 1, 1], [1, 1, 1], [1, 1, 1]], bool),
        "reset": np.array([[0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]], bool),
    }
    layer = kind(2, 3, bidirectional=bidirectional)
    p = random_inputs(rng, layer, T=4, N=3)
    check_layer(layer, p.params, p.x, p.state, **flags)
    with pytest.raises(xprnn.GradientError, match="backward says"):
        check_layer(with_other_tape(layer, flags, FLAG_BUGS[bug](dict(flags))), p.params, p.x, p.state)


def test_backward_without_the_dropout_mask_is_detected(rng):
    layer = xprnn.GRU(2, 3, 2, dropout=0.5)

    def forward(params, x, state):
        y, final, _ = layer.forward(params, x, state, rng=np.random.default_rng(1))
        return y, final, layer.forward(params, x, state)[2]

    p = random_inputs(rng, layer, T=3, N=2)
    with pytest.raises(xprnn.GradientError):
        check_layer(WrongBackward(layer, lambda layer, *args: layer.backward(*args), forward), p.params, p.x, p.state)


def test_reversed_dy_changes_dx_for_random_cotangents_but_not_for_ones(rng):
    """Therefore check_gradients draws random cotangents."""
    layer = xprnn.LSTM(2, 3)
    p = random_inputs(rng, layer)
    y, _, tape = layer.forward(p.params, p.x, p.state)
    ones = np.ones_like(y)
    assert np.array_equal(layer.backward(tape, ones).dx, layer.backward(tape, ones[::-1]).dx)
    dy = random_cotangents(rng, y)
    assert not np.allclose(layer.backward(tape, dy).dx, layer.backward(tape, dy[::-1]).dx)
