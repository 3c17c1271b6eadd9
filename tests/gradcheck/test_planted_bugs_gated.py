"""Planted bugs of gated cells, stacks and ragged batches: the checker has to find every one of them.

A backward is wrong in one way at a time: a slip in a cell's adjoint (the forward is untouched), or around a layer's
backward. Each has been seen in a library. What the checker missed would be missing from the proof of the right ones.
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


def lstm_back(dstate, saved, state, **slip):
    """The right adjoint, unless one of its ingredients is replaced."""
    i, f, g, o, tc = saved
    dh, dc = dstate
    c_prev = state[1]
    if slip.get("c_t for c_{t-1}"):
        c_prev = f * state[1] + i * g
    do = dh * (tc * (1.0 if slip.get("output gate's slope forgotten") else o * (1.0 - o)))
    through = dh * (o * (1.0 if slip.get("tanh of c forgotten") else 1.0 - tc * tc))
    dc = through if slip.get("cell path dropped") else dc + (0.0 if slip.get("h does not reach c") else 1.0) * through
    if slip.get("final c left out"):
        dc = dc * 0.5
    di, df, dg = dc * (g * (i * (1.0 - i))), dc * (c_prev * (f * (1.0 - f))), dc * (i * (1.0 - g * g))
    if slip.get("i and f swapped"):
        di, df = df, di
    if slip.get("g and o swapped"):
        dg, do = do, dg
    if slip.get("candidate's slope is the sigmoid's"):
        dg = dc * (i * (g * (1.0 - g)))
    back_to_c = dc * (i if slip.get("i for f on the cell path") else f)
    x = (di, df, dg, do)
    h = tuple(0.0 * d for d in x) if slip.get("recurrent path dropped") else x
    return x, h, (None, back_to_c), ()


def gru_back(dstate, saved, state, **slip):
    r, z, n, hn = saved
    (dh,), (h_prev,) = dstate, state
    dn = dh * ((z if slip.get("z for 1-z") else 1.0 - z) * (1.0 - n * n))
    dz = dh * ((h_prev if slip.get("dropped -n") else h_prev - n) * (z * (1.0 - z)))
    if slip.get("dropped z path"):
        dz = 0.0 * dz
    dr = dn * ((h_prev if slip.get("h for its product in dr") else hn) * (r * (1.0 - r)))
    if slip.get("r and z swapped"):
        dr, dz = dz, dr
    to_product = dn if slip.get("reset gate on the wrong side") else dn * r
    to_input = dn * r if slip.get("reset gate on the input") else dn
    direct = None if slip.get("direct path dropped") else dh * (1.0 - z if slip.get("1-z on the direct path") else z)
    return (dr, dz, to_input), (dr, dz, to_product), (direct,), ()


LSTM_SLIPS = [
    "c_t for c_{t-1}",
    "output gate's slope forgotten",
    "tanh of c forgotten",
    "cell path dropped",
    "h does not reach c",
    "final c left out",
    "i and f swapped",
    "g and o swapped",
    "candidate's slope is the sigmoid's",
    "i for f on the cell path",
    "recurrent path dropped",
]
GRU_SLIPS = [
    "z for 1-z",
    "dropped -n",
    "dropped z path",
    "h for its product in dr",
    "r and z swapped",
    "reset gate on the wrong side",
    "reset gate on the input",
    "direct path dropped",
    "1-z on the direct path",
]


def mutant(base, back, slip):
    """The cell with its own step and this adjoint."""

    def build(xp):
        def wrong(dstate, saved, state, p):
            return back(dstate, saved, state, **({slip: True} if slip else {}))

        return base.bind(xp).step, wrong

    return xprnn.Cell(base.name, base.gates, build, base.states)  # one name, one text: its forward is compiled once


TABLE = [(cells.lstm(), lstm_back, s) for s in LSTM_SLIPS] + [(cells.gru(), gru_back, s) for s in GRU_SLIPS]


def checked(layer, rng, *, wrong=None, generic=False):
    """check_layer on random numbers, of the layer or of what `wrong` makes of it."""
    p = random_inputs(rng, layer, T=4, N=3)
    with reference_only() if generic else nullcontext():
        return check_layer(Around(layer, wrong) if wrong else layer, p.params, p.x, p.state)


@pytest.mark.parametrize("generic", [False, True], ids=["in place", "generic"])
@pytest.mark.parametrize(("base", "back"), [(cells.lstm(), lstm_back), (cells.gru(), gru_back)], ids=["lstm", "gru"])
def test_without_a_slip_nothing_is_found(rng, base, back, generic):
    """The table's adjoints are right, so whatever is found below is the slip."""
    assert max(checked(xprnn.Recurrent(2, 3, cell=mutant(base, back, "")), rng, generic=generic).values()) < 1e-6


@pytest.mark.parametrize("generic", [False, True], ids=["in place", "generic"])
@pytest.mark.parametrize(("base", "back", "slip"), TABLE, ids=[f"{b.name}: {s}" for b, _, s in TABLE])
def test_a_slip_in_a_cell_is_found(rng, base, back, slip, generic):
    with pytest.raises(xprnn.GradientError, match="backward says"):
        checked(xprnn.Recurrent(2, 3, cell=mutant(base, back, slip)), rng, generic=generic)


class Around:
    """A layer whose backward is wrapped: wrong(layer, tape, dy, dstate) -> gradients."""

    def __init__(self, layer, wrong, forward=None):
        self.layer, self.wrong = layer, wrong
        self.forward = forward or layer.forward

    def backward(self, tape, dy, dstate):
        """The wrong one."""
        return self.wrong(self.layer, tape, dy, dstate)


def parts(state):
    return state if isinstance(state, tuple) else (state,)


def mapped(f, state):
    return tuple(f(s) for s in state) if isinstance(state, tuple) else f(state)


def backward_direction_not_turned_back(layer, tape, dy, dstate):
    """The reverse direction's dx and dy stay in the order of its walk."""
    half = dy.shape[-1] // 2
    return layer.backward(tape, np.concatenate((dy[..., :half], dy[::-1, :, half:]), axis=-1), dstate)


def dx_not_turned_back(layer, tape, dy, dstate):
    half = dy.shape[-1] // 2
    one = layer.backward(tape, np.concatenate((dy[..., :half], 0 * dy[..., half:]), axis=-1), dstate)
    two = layer.backward(tape, np.concatenate((0 * dy[..., :half], dy[..., half:]), axis=-1))
    sums = {k: one.dparams[k] + two.dparams[k] for k in one.dparams}
    dinitial = tuple(a + b for a, b in zip(parts(one.dstate), parts(two.dstate), strict=True))
    dinitial = dinitial if isinstance(one.dstate, tuple) else dinitial[0]
    return xprnn.Gradients(one.dx + two.dx[::-1], dinitial, sums)


def directions_swapped(layer, tape, dy, dstate):
    half = dy.shape[-1] // 2
    return layer.backward(tape, np.concatenate((dy[..., half:], dy[..., :half]), axis=-1), dstate)


def time_reversed(layer, tape, dy, dstate):
    return layer.backward(tape, dy[::-1], dstate)


def final_state_left_out(layer, tape, dy, dstate):
    return layer.backward(tape, dy)


def final_state_of_another_layer(layer, tape, dy, dstate):
    return layer.backward(tape, dy, mapped(lambda s: s[::-1], dstate))


def outputs_left_out(layer, tape, dy, dstate):
    return layer.backward(tape, None, dstate)


def initial_state_left_out(layer, tape, dy, dstate):
    got = layer.backward(tape, dy, dstate)
    return got._replace(dstate=mapped(np.zeros_like, got.dstate))


def all_zero(layer, tape, dy, dstate):
    return layer.backward(tape, 0 * dy)


def one_bias_for_two(layer, tape, dy, dstate):
    """Right for the LSTM, whose biases have one gradient; the GRU's differ by the reset gate."""
    got = layer.backward(tape, dy, dstate)
    return got._replace(dparams=got.dparams | {"bias_hh_l0": got.dparams["bias_ih_l0"]})


AROUND = [
    backward_direction_not_turned_back,
    dx_not_turned_back,
    directions_swapped,
    time_reversed,
    final_state_left_out,
    final_state_of_another_layer,
    outputs_left_out,
    initial_state_left_out,
    all_zero,
]


@pytest.mark.parametrize("wrong", AROUND, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.LSTM, xprnn.GRU])
def test_a_slip_around_a_layer_is_found(rng, kind, wrong):
    with pytest.raises(xprnn.GradientError, match="backward says"):
        checked(kind(2, 3, bidirectional=True), rng, wrong=wrong)


def test_one_bias_for_two_is_found_where_it_is_wrong(rng):
    with pytest.raises(xprnn.GradientError, match="bias_hh_l0"):
        checked(xprnn.GRU(2, 3), rng, wrong=one_bias_for_two)
    checked(xprnn.LSTM(2, 3), rng, wrong=one_bias_for_two)


def by_another_tape(change):
    """Backward with the tape of a forward whose flags were a little different."""

    def make(layer, flags):
        def forward(params, x, state, **_):
            y, final, _ = layer.forward(params, x, state, **flags)
            return y, final, layer.forward(params, x, state, **change(dict(flags)))[2]

        return Around(layer, lambda layer, tape, dy, dstate: layer.backward(tape, dy, dstate), forward)

    return make


RAGGED = {
    "length one short": lambda f: f | {"lengths": np.maximum(f["lengths"] - 1, 0)},
    "length one long": lambda f: f | {"lengths": np.minimum(f["lengths"] + 1, 4)},
    "lengths forgotten": lambda f: {k: v for k, v in f.items() if k != "lengths"},
    "lengths in another order": lambda f: f | {"lengths": f["lengths"][::-1]},
    "mask forgotten": lambda f: {k: v for k, v in f.items() if k != "mask"},
    "mask one step late": lambda f: f | {"mask": np.roll(f["mask"], 1, axis=0)},
    "reset forgotten": lambda f: {k: v for k, v in f.items() if k != "reset"},
    "reset one step late": lambda f: f | {"reset": np.roll(f["reset"], 1, axis=0)},
}


@pytest.mark.parametrize("slip", RAGGED)
@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.LSTM, xprnn.GRU])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_slip_in_a_ragged_batch_is_found(rng, kind, bidirectional, slip):
    flags = {
        "lengths": np.array([3, 1, 4]),
        "mask": np.array([[1, 1, 0], [0, 1, 1], [1, 1, 1], [1, 1, 1]], bool),
        "reset": np.array([[0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]], bool),
    }
    layer = kind(2, 3, bidirectional=bidirectional)
    p = random_inputs(rng, layer, T=4, N=3)
    check_layer(layer, p.params, p.x, p.state, **flags)
    with pytest.raises(xprnn.GradientError, match="backward says"):
        check_layer(by_another_tape(RAGGED[slip])(layer, flags), p.params, p.x, p.state)


def test_a_dropped_mask_of_dropout_is_found(rng):
    layer = xprnn.GRU(2, 3, 2, dropout=0.5)

    def forward(params, x, state):
        y, final, _ = layer.forward(params, x, state, rng=np.random.default_rng(1))
        return y, final, layer.forward(params, x, state)[2]

    p = random_inputs(rng, layer, T=3, N=2)
    with pytest.raises(xprnn.GradientError):
        check_layer(Around(layer, lambda layer, *args: layer.backward(*args), forward), p.params, p.x, p.state)


def test_a_cotangent_of_ones_would_miss_what_random_ones_find(rng):
    """Why the checker draws its cotangents: dy.sum() is the same read backwards (reference: reversed dy)."""
    layer = xprnn.LSTM(2, 3)
    p = random_inputs(rng, layer)
    y, _, tape = layer.forward(p.params, p.x, p.state)
    ones = np.ones_like(y)
    assert np.array_equal(layer.backward(tape, ones).dx, layer.backward(tape, ones[::-1]).dx)
    dy = random_cotangents(rng, y)
    assert not np.allclose(layer.backward(tape, dy).dx, layer.backward(tape, dy[::-1]).dx)
