"""Starting values have the distribution, the structure and, on every library, the very numbers they promise."""

from __future__ import annotations

import numpy as np
import pytest
from support.layer_cases import LEAKY_CELL, inputs_on, random_cotangents, random_inputs

import xprnn

SCHEMES = ["uniform", "glorot", "orthogonal", "glorot_orthogonal", "identity"]
HOST = np.zeros(0)


def init(layer, seed=0, like=HOST, **options):
    return layer.init(np.random.default_rng(seed), like, **options)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.LSTM, xprnn.GRU])
def test_every_library_gets_the_same_numbers(xp, dtype, kind, scheme):
    layer = kind(3, 4, 2, bidirectional=True, learned_state=True)
    like = xp.asarray(np.zeros(1), dtype)
    here = init(layer, like=like, scheme=scheme)
    xp.assert_like(here, like)
    xp.assert_close(here, {k: v.astype(dtype) for k, v in init(layer, scheme=scheme).items()}, condition=0)
    assert {k: tuple(v.shape) for k, v in here.items()} == layer.shapes()
    assert list(here) == list(layer.shapes())


def test_the_seed_decides():
    layer = xprnn.LSTM(3, 4)
    one, same, other = init(layer, 1), init(layer, 1), init(layer, 2)
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])
        assert (one[name] != other[name]).all()


@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.LSTM, xprnn.GRU])
def test_uniform_is_torchs(kind):
    """U(-1/sqrt(H), 1/sqrt(H)) for weights and both biases, whatever the input size."""
    H = 25
    for name, a in init(kind(400, H, 2)).items():
        bound = 1 / np.sqrt(H)
        assert np.abs(a).max() <= bound, name
        # Of 25 and more uniform numbers the largest is close to the bound, and their variance is bound^2/3.
        assert np.abs(a).max() > 0.8 * bound, name
        assert 0.5 < a.var() / (bound**2 / 3) < 1.7, name


@pytest.mark.needs("torch")
def test_uniform_has_torchs_spread():
    """The same names, and every parameter's largest value within 2% of torch's own draw."""
    import torch

    torch.manual_seed(0)
    theirs = torch.nn.LSTM(50, 100, 2, bidirectional=True, proj_size=30).state_dict()
    ours = init(xprnn.LSTM(50, 100, 2, bidirectional=True, proj_size=30))
    assert list(ours) == list(theirs)
    for name, a in theirs.items():
        assert ours[name].shape == tuple(a.shape)
        np.testing.assert_allclose(np.abs(ours[name]).max(), a.abs().max().item(), rtol=0.05, err_msg=name)


@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.LSTM, xprnn.GRU])
@pytest.mark.parametrize(("scheme", "also_input"), [("orthogonal", True), ("glorot_orthogonal", False)])
def test_each_gate_is_orthogonal_by_itself(kind, scheme, also_input):
    D, H = 7, 5
    params = init(kind(D, H), scheme=scheme)
    for k in range(kind(D, H).resolved_cell.gates):
        u = params["weight_hh_l0"][k * H : (k + 1) * H]
        np.testing.assert_allclose(u @ u.T, np.eye(H), atol=1e-14)
        w = params["weight_ih_l0"][k * H : (k + 1) * H]
        assert np.allclose(w @ w.T, np.eye(H), atol=1e-12) == also_input
    assert not params["bias_ih_l0"].any()
    assert not params["bias_hh_l0"].any()


def test_orthogonal_draws_are_uniform():
    """QR's sign convention alone would make every diagonal of R positive and the first column lean one way."""
    firsts = [init(xprnn.RNN(2, 3), seed, scheme="orthogonal")["weight_hh_l0"][0, 0] for seed in range(400)]
    assert abs(np.mean(firsts)) < 0.1
    np.testing.assert_allclose(np.var(firsts), 1 / 3, rtol=0.2)  # a coordinate of a uniform point on the sphere


def test_a_projection_has_orthonormal_columns():
    params = init(xprnn.LSTM(3, 6, proj_size=2), scheme="orthogonal")
    for k in range(4):
        block = params["weight_hh_l0"][k * 6 : (k + 1) * 6]
        np.testing.assert_allclose(block.T @ block, np.eye(2), atol=1e-14)


def test_glorot_has_its_bound_by_gate():
    D, H = 30, 20
    params = init(xprnn.LSTM(D, H), scheme="glorot")
    for name, width in (("weight_ih_l0", D), ("weight_hh_l0", H)):
        bound = np.sqrt(6 / (H + width))
        assert 0.97 * bound < np.abs(params[name]).max() <= bound


def test_identity_starts_by_remembering(rng):
    params = init(xprnn.RNN(3, 4, nonlinearity="relu"), scheme="identity")
    np.testing.assert_array_equal(params["weight_hh_l0"], np.eye(4))
    assert 0 < np.abs(params["weight_ih_l0"]).max() < 0.01
    start = rng.random((1, 2, 4))
    _, end = xprnn.RNN(3, 4, nonlinearity="relu")(params, np.zeros((50, 2, 3)), start)
    np.testing.assert_array_equal(end, start)


@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.GRU])
@pytest.mark.parametrize("radius", [0.9, 1.2])
def test_spectral_radius(kind, radius):
    layer = kind(3, 8, 2)
    params = init(layer, spectral_radius=radius)
    for name in ("weight_hh_l0", "weight_hh_l1"):
        for block in np.split(params[name], layer.resolved_cell.gates):
            np.testing.assert_allclose(np.abs(np.linalg.eigvals(block)).max(), radius, rtol=1e-12)
    assert np.abs(params["weight_ih_l0"]).max() <= 1 / np.sqrt(8)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_forget_bias_is_the_sum_of_two(scheme):
    plain, lifted = (init(xprnn.LSTM(3, 4, 2), scheme=scheme, forget_bias=b) for b in (None, 1.5))
    for k in (0, 1):
        total = lifted[f"bias_ih_l{k}"] + lifted[f"bias_hh_l{k}"]
        np.testing.assert_array_equal(total[4:8], 1.5)
        for name in (f"bias_ih_l{k}", f"bias_hh_l{k}"):  # no other gate is touched, no other number drawn
            np.testing.assert_array_equal(np.delete(lifted[name], slice(4, 8)), np.delete(plain[name], slice(4, 8)))
        np.testing.assert_array_equal(lifted[f"weight_ih_l{k}"], plain[f"weight_ih_l{k}"])


def test_a_learned_state_starts_at_zero():
    params = init(xprnn.LSTM(3, (4, 2), 2, learned_state=True))
    learned = {k: v for k, v in params.items() if k.startswith("initial_")}
    assert sorted(learned) == ["initial_c_l0", "initial_c_l1", "initial_h_l0", "initial_h_l1"]
    assert not any(v.any() for v in learned.values())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cells_own_vectors_are_drawn_too(scheme):
    params = init(xprnn.Recurrent(3, 4, 2, cell=LEAKY_CELL, bidirectional=True), scheme=scheme)
    assert params["rate_l1_reverse"].shape == (4,)


@pytest.mark.parametrize(
    ("layer", "options", "says"),
    [
        (xprnn.RNN(2, 3), {"scheme": "xavier"}, "scheme must be one of uniform, .*found 'xavier'"),
        (xprnn.RNN(2, 3), {"forget_bias": 1.0}, "forget_bias needs an LSTM"),
        (xprnn.LSTM(2, 3, bias=False), {"forget_bias": 1.0}, "forget_bias needs an LSTM with biases"),
        (xprnn.LSTM(2, 3, proj_size=2), {"spectral_radius": 0.9}, r"square weight_hh, found \(3, 2\)"),
    ],
)
def test_bad_options(layer, options, says):
    with pytest.raises(xprnn.InputError, match=says):
        init(layer, **options)


@pytest.mark.parametrize("rng_given", [0, None, np.random.RandomState(0)])
def test_rng_is_a_generator(rng_given):
    with pytest.raises(xprnn.InputError, match=r"rng must be a numpy\.random\.Generator"):
        xprnn.GRU(2, 3).init(rng_given, HOST)


# Dropout is the other place where numbers are drawn ----------------------------------------------


def test_dropout_drops_the_same_on_every_library(xp, rng):
    layer = xprnn.GRU(2, 5, 3, dropout=0.5, bidirectional=True)
    p = random_inputs(rng, layer)
    want, _, tape = layer.forward(p.params, p.x, p.state, rng=np.random.default_rng(3))
    dy = random_cotangents(rng, want)
    want_dx = layer.backward(tape, dy).dx
    params, x, state, _ = inputs_on(xp, p)
    y, _, tape = layer.forward(params, x, state, rng=np.random.default_rng(3))
    xp.assert_close((y, layer.backward(tape, xp.asarray(dy)).dx), (want, want_dx), condition=100)
    xp.assert_like(y, x)


def test_dropout_zeroes_a_share_and_keeps_the_mean():
    """A second layer that copies its input shows what it was given: dropped, or scaled by 1/(1-p)."""
    p, H = 0.3, 50
    layer = xprnn.RNN(H, H, 2, nonlinearity="identity", dropout=p, bias=False)
    params = {k: np.eye(H) if "weight_ih" in k else np.zeros((H, H)) for k in layer.shapes()}
    x = np.random.default_rng(0).uniform(1, 2, size=(40, 20, H))
    y, _, _ = layer.forward(params, x, rng=np.random.default_rng(1))
    dropped = y == 0
    np.testing.assert_allclose(y[~dropped], (x / (1 - p))[~dropped], rtol=1e-14)
    # 40,000 coins: five standard deviations.
    assert abs(dropped.mean() - p) < 5 * np.sqrt(p * (1 - p) / y.size)
    assert (dropped.any(axis=(0, 1))).all()
    assert not np.array_equal(dropped[0], dropped[1])


def test_dropout_is_for_training_and_between_layers_only(rng):
    for layer in (xprnn.GRU(2, 3, 2, dropout=0.5), xprnn.GRU(2, 3, dropout=0.5)):
        p = random_inputs(rng, layer)
        called, _ = layer(p.params, p.x)
        without, _, _ = layer.forward(p.params, p.x)
        drawn, _, _ = layer.forward(p.params, p.x, rng=np.random.default_rng(0))
        # A call that keeps no tape may add up its products in another order: the last bits differ.
        np.testing.assert_allclose(called, without, rtol=1e-13, atol=1e-15)
        assert np.array_equal(drawn, without) == (layer.num_layers == 1)
