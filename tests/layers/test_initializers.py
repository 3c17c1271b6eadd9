"""Initial parameters and dropout: distribution, structure, and the same numbers on every array library."""

from __future__ import annotations

import numpy as np
import pytest
from support.layer_cases import LEAKY_CELL, inputs_on, random_cotangents, random_inputs

import xprnn

SCHEMES = ["uniform", "glorot", "orthogonal", "glorot_orthogonal", "identity"]
NUMPY_LIKE = np.zeros(0)


def init(layer, seed=0, like=NUMPY_LIKE, **options):
    return layer.init(np.random.default_rng(seed), like, **options)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.LSTM, xprnn.GRU])
def test_every_library_gets_the_same_numbers(xp, dtype, kind, scheme):
    layer = kind(3, 4, 2, bidirectional=True, learned_state=True)
    like = xp.asarray(np.zeros(1), dtype)
    params = init(layer, like=like, scheme=scheme)
    xp.assert_like(params, like)
    xp.assert_close(params, {k: v.astype(dtype) for k, v in init(layer, scheme=scheme).items()}, condition=0)
    assert {k: tuple(v.shape) for k, v in params.items()} == layer.shapes()
    assert list(params) == list(layer.shapes())


def test_seed_determines_the_numbers():
    layer = xprnn.LSTM(3, 4)
    one, same, other = init(layer, 1), init(layer, 1), init(layer, 2)
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])
        assert (one[name] != other[name]).all()


@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.LSTM, xprnn.GRU])
def test_uniform_bound_depends_on_hidden_size_only(kind):
    """Weights and both biases are drawn from U(-1/sqrt(H), 1/sqrt(H)) for any input size, as in torch."""
    H = 25
    for name, a in init(kind(400, H, 2)).items():
        bound = 1 / np.sqrt(H)
        assert np.abs(a).max() <= bound, name
        # Of 25 and more uniform numbers the largest is close to the bound, and their variance is bound^2/3.
        assert np.abs(a).max() > 0.8 * bound, name
        assert 0.5 < a.var() / (bound**2 / 3) < 1.7, name


@pytest.mark.needs("torch")
def test_uniform_has_the_names_and_range_of_torch():
    """Every parameter has the name and shape of torch's, and a largest value within 5% of torch's draw."""
    import torch

    torch.manual_seed(0)
    torch_params = torch.nn.LSTM(50, 100, 2, bidirectional=True, proj_size=30).state_dict()
    params = init(xprnn.LSTM(50, 100, 2, bidirectional=True, proj_size=30))
    assert list(params) == list(torch_params)
    for name, a in torch_params.items():
        assert params[name].shape == tuple(a.shape)
        np.testing.assert_allclose(np.abs(params[name]).max(), a.abs().max().item(), rtol=0.05, err_msg=name)


@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.LSTM, xprnn.GRU])
@pytest.mark.parametrize(("scheme", "also_input"), [("orthogonal", True), ("glorot_orthogonal", False)])
def test_each_gate_is_orthogonal(kind, scheme, also_input):
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
    """Without the sign correction after QR the mean of the first entry would not be 0."""
    first_entries = [init(xprnn.RNN(2, 3), seed, scheme="orthogonal")["weight_hh_l0"][0, 0] for seed in range(400)]
    assert abs(np.mean(first_entries)) < 0.1
    np.testing.assert_allclose(np.var(first_entries), 1 / 3, rtol=0.2)  # a coordinate of a uniform point on the sphere


def test_projected_gates_have_orthonormal_columns():
    params = init(xprnn.LSTM(3, 6, proj_size=2), scheme="orthogonal")
    for k in range(4):
        block = params["weight_hh_l0"][k * 6 : (k + 1) * 6]
        np.testing.assert_allclose(block.T @ block, np.eye(2), atol=1e-14)


def test_glorot_bound_uses_the_shape_of_one_gate():
    D, H = 30, 20
    params = init(xprnn.LSTM(D, H), scheme="glorot")
    for name, width in (("weight_ih_l0", D), ("weight_hh_l0", H)):
        bound = np.sqrt(6 / (H + width))
        assert 0.97 * bound < np.abs(params[name]).max() <= bound


def test_identity_scheme_carries_the_state_unchanged(rng):
    params = init(xprnn.RNN(3, 4, nonlinearity="relu"), scheme="identity")
    np.testing.assert_array_equal(params["weight_hh_l0"], np.eye(4))
    assert 0 < np.abs(params["weight_ih_l0"]).max() < 0.01
    initial = rng.random((1, 2, 4))
    _, final = xprnn.RNN(3, 4, nonlinearity="relu")(params, np.zeros((50, 2, 3)), initial)
    np.testing.assert_array_equal(final, initial)


@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.GRU])
@pytest.mark.parametrize("radius", [0.9, 1.2])
def test_spectral_radius_of_each_gate(kind, radius):
    layer = kind(3, 8, 2)
    params = init(layer, spectral_radius=radius)
    for name in ("weight_hh_l0", "weight_hh_l1"):
        for block in np.split(params[name], layer.resolved_cell.gates):
            np.testing.assert_allclose(np.abs(np.linalg.eigvals(block)).max(), radius, rtol=1e-12)
    assert np.abs(params["weight_ih_l0"]).max() <= 1 / np.sqrt(8)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_forget_bias_is_the_sum_of_both_biases(scheme):
    without, with_bias = (init(xprnn.LSTM(3, 4, 2), scheme=scheme, forget_bias=b) for b in (None, 1.5))
    for k in (0, 1):
        total = with_bias[f"bias_ih_l{k}"] + with_bias[f"bias_hh_l{k}"]
        np.testing.assert_array_equal(total[4:8], 1.5)
        for name in (f"bias_ih_l{k}", f"bias_hh_l{k}"):  # the other gates and all random numbers stay the same
            np.testing.assert_array_equal(
                np.delete(with_bias[name], slice(4, 8)), np.delete(without[name], slice(4, 8))
            )
        np.testing.assert_array_equal(with_bias[f"weight_ih_l{k}"], without[f"weight_ih_l{k}"])


def test_learned_state_is_initialised_to_zero():
    params = init(xprnn.LSTM(3, (4, 2), 2, learned_state=True))
    learned = {k: v for k, v in params.items() if k.startswith("initial_")}
    assert sorted(learned) == ["initial_c_l0", "initial_c_l1", "initial_h_l0", "initial_h_l1"]
    assert not any(v.any() for v in learned.values())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_vectors_of_a_user_defined_cell_are_initialised(scheme):
    params = init(xprnn.Recurrent(3, 4, 2, cell=LEAKY_CELL, bidirectional=True), scheme=scheme)
    assert params["rate_l1_reverse"].shape == (4,)


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (xprnn.RNN(2, 3), {"scheme": "xavier"}, "scheme must be one of uniform, .*found 'xavier'"),
        (xprnn.RNN(2, 3), {"forget_bias": 1.0}, "forget_bias needs an LSTM"),
        (xprnn.LSTM(2, 3, bias=False), {"forget_bias": 1.0}, "forget_bias needs an LSTM with biases"),
        (xprnn.LSTM(2, 3, proj_size=2), {"spectral_radius": 0.9}, r"square weight_hh, found \(3, 2\)"),
    ],
)
def test_invalid_options_raise_input_error(layer, options, message):
    with pytest.raises(xprnn.InputError, match=message):
        init(layer, **options)


@pytest.mark.parametrize("wrong_rng", [0, None, np.random.RandomState(0)])
def test_rng_must_be_a_generator(wrong_rng):
    with pytest.raises(xprnn.InputError, match=r"rng must be a numpy\.random\.Generator"):
        xprnn.GRU(2, 3).init(wrong_rng, NUMPY_LIKE)


def test_dropout_masks_are_the_same_on_every_library(xp, rng):
    layer = xprnn.GRU(2, 5, 3, dropout=0.5, bidirectional=True)
    p = random_inputs(rng, layer)
    expected, _, tape = layer.forward(p.params, p.x, p.state, rng=np.random.default_rng(3))
    dy = random_cotangents(rng, expected)
    expected_dx = layer.backward(tape, dy).dx
    params, x, state, _ = inputs_on(xp, p)
    y, _, tape = layer.forward(params, x, state, rng=np.random.default_rng(3))
    xp.assert_close((y, layer.backward(tape, xp.asarray(dy)).dx), (expected, expected_dx), condition=100)
    xp.assert_like(y, x)


def test_dropout_zeroes_a_fraction_p_and_scales_the_rest():
    """The second layer copies its input, so y shows the outputs of the first: zero, or scaled by 1/(1-p)."""
    p, H = 0.3, 50
    layer = xprnn.RNN(H, H, 2, nonlinearity="identity", dropout=p, bias=False)
    params = {k: np.eye(H) if "weight_ih" in k else np.zeros((H, H)) for k in layer.shapes()}
    x = np.random.default_rng(0).uniform(1, 2, size=(40, 20, H))
    y, _, _ = layer.forward(params, x, rng=np.random.default_rng(1))
    dropped = y == 0
    np.testing.assert_allclose(y[~dropped], (x / (1 - p))[~dropped], rtol=1e-14)
    # The bound is five standard deviations of the mean of 40,000 Bernoulli draws.
    assert abs(dropped.mean() - p) < 5 * np.sqrt(p * (1 - p) / y.size)
    assert (dropped.any(axis=(0, 1))).all()
    assert not np.array_equal(dropped[0], dropped[1])


def test_dropout_acts_in_forward_with_rng_and_between_layers_only(rng):
    for layer in (xprnn.GRU(2, 3, 2, dropout=0.5), xprnn.GRU(2, 3, dropout=0.5)):
        p = random_inputs(rng, layer)
        inference, _ = layer(p.params, p.x)
        without_rng, _, _ = layer.forward(p.params, p.x)
        with_rng, _, _ = layer.forward(p.params, p.x, rng=np.random.default_rng(0))
        # A call without a tape may sum products in another order, so the last bits may differ.
        np.testing.assert_allclose(inference, without_rng, rtol=1e-13, atol=1e-15)
        assert np.array_equal(with_rng, without_rng) == (layer.num_layers == 1)
