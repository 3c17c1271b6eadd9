"""Linear, Embedding and Sequential against NumPy formulas, one-hot products, torch and central differences."""

from __future__ import annotations

import numpy as np
import pytest
from support.oracles import check_gradients_on

import xprnn
from xprnn import RNN, Embedding, Linear, Sequential

float64_only = pytest.mark.not_on("strict:no_float64", reason="central differences need float64")
V, D, H, T, N = 7, 4, 5, 6, 3


def like(xp, dtype=None):
    return xp.asarray(np.zeros(1), dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (N,), (T, N), (0, N), (2, 3, 2)])
def test_linear_equals_numpy_products(xp, dtype, rng, bias, lead):
    layer = Linear(D, V, bias=bias)
    params = layer.init(rng, like(xp, dtype))
    x, dy = (xp.asarray(rng.normal(size=(*lead, k)), dtype) for k in (D, V))
    y, state, tape = layer.forward(params, x)
    dx, dstate, dparams = layer.backward(tape, dy)
    w, b = xp.to_numpy(params["weight"]).astype("float64"), xp.to_numpy(params["bias"]) if bias else 0.0
    np_x, np_dy = (xp.to_numpy(a).astype("float64") for a in (x, dy))
    xp.assert_close((y, dx), (np_x @ w.T + b, np_dy @ w), condition=30)
    flat_x, flat_dy = np_x.reshape(-1, D), np_dy.reshape(-1, V)
    expected = {"weight": flat_dy.T @ flat_x} | ({"bias": flat_dy.sum(0)} if bias else {})
    xp.assert_close(dparams, expected, condition=60)
    xp.assert_like((y, dx, dparams, params), x)
    assert state is dstate is None
    assert {k: tuple(p.shape) for k, p in params.items()} == layer.shapes()


@pytest.mark.parametrize("lead", [(N,), (T, N), (0, N), (T, 0), (2, 3, 2)])
def test_embedding_equals_one_hot_product(xp, dtype, rng, lead):
    layer = Embedding(V, D)
    params = layer.init(rng, like(xp, dtype))
    ids = rng.integers(V, size=lead)
    y, _, tape = layer.forward(params, xp.asarray(ids))
    dy = xp.asarray(rng.normal(size=(*lead, D)), dtype)
    dx, _, dparams = layer.backward(tape, dy)
    one_hot = np.eye(V)[ids].reshape(-1, V)
    xp.assert_close(y, xp.to_numpy(params["weight"])[ids], condition=0)
    xp.assert_close(dparams, {"weight": one_hot.T @ xp.to_numpy(dy).astype("float64").reshape(-1, D)}, condition=30)
    xp.assert_like((y, dparams), params["weight"])
    assert dx is None


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_integer_input_equals_one_hot_input(xp, rng, kind, num_layers):
    """A look-up of class numbers equals the product with one-hot vectors, forward and backward."""
    dtype = xp.float_dtypes[0]
    layer = getattr(xprnn, kind)(V, H, num_layers=num_layers)
    params = layer.init(rng, like(xp))
    ids = rng.integers(V - 1, size=(T, N))  # the last class never occurs: its gradient is zero
    one_hot = xp.asarray(np.eye(V)[ids], dtype)
    dy = xp.asarray(rng.normal(size=(T, N, H)), dtype)
    results = []
    for x in (xp.asarray(ids), one_hot):
        y, state, tape = layer.forward(params, x)
        dx, dstate, dparams = layer.backward(tape, dy)
        results.append({"y": y, "state": state, "dstate": dstate, "params": dparams})
        assert (dx is None) == (x is not one_hot)
    xp.assert_close(results[0], tree_to_numpy(xp, results[1]), condition=60)
    assert not xp.to_numpy(results[0]["params"]["weight_ih_l0"])[:, V - 1].any()


def tree_to_numpy(xp, tree):
    """Convert every array of nested dicts and tuples to NumPy."""
    if isinstance(tree, dict):
        return {k: tree_to_numpy(xp, v) for k, v in tree.items()}
    return tuple(tree_to_numpy(xp, v) for v in tree) if isinstance(tree, tuple) else xp.to_numpy(tree)


def test_integer_input_allocates_no_one_hot_matrix(rng):
    import tracemalloc

    layer = RNN(5000, 2)
    params = layer.init(rng, np.zeros(1, "float32"))
    ids, dy = rng.integers(5000, size=(100, 20)), np.ones((100, 20, 2), "float32")
    layer.backward(layer.forward(params, ids)[2], dy)  # imports and compiles
    tracemalloc.start()
    try:
        layer.backward(layer.forward(params, ids)[2], dy)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 * 20 * 5000 * 4 / 20, "one-hot vectors would take 40 MB"


def make_model(kind="RNN"):
    return Sequential(embed=Embedding(V, D), rnn=getattr(xprnn, kind)(D, H), head=Linear(H, V))


@float64_only
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_gradients_of_a_model_and_its_loss(xp, rng, kind):
    """Central differences of a model with cross-entropy, with respect to parameters and initial state."""
    model = make_model(kind)
    params = model.init(rng, like(xp))
    ids, targets = xp.asarray(rng.integers(V, size=(T, N))), xp.asarray(rng.integers(V, size=(T, N)))
    h = xp.asarray(rng.normal(size=(1, N, H)))
    state = (h, 0.5 * h) if kind == "LSTM" else h

    def forward(params, state):
        y, final, tape = model.forward(params, ids, state)
        loss, dy = xprnn.cross_entropy(y, targets)
        return (loss, final), (tape, dy)

    def backward(tape, u):
        dx, dstate, dparams = model.backward(tape[0], u[0] * tape[1], u[1])
        assert dx is None
        return dparams, dstate

    worst = check_gradients_on(xp, forward, backward, (params, state), names=("params", "state"))
    assert {name for name in worst if name.startswith("params")} == {f"params[{k!r}]" for k in params}
    assert max(worst.values()) < 1e-6


def test_sequential_equals_its_layers_called_in_order(xp, rng):
    model = make_model()
    params = model.init(rng, like(xp))
    by_layer = {n: {k.partition(".")[2]: a for k, a in params.items() if k.startswith(n + ".")} for n in model.layers}
    ids, dy = xp.asarray(rng.integers(V, size=(T, N))), xp.asarray(rng.normal(size=(T, N, V)))
    initial, dfinal = (xp.asarray(rng.normal(size=(1, N, H))) for _ in range(2))
    embed, rnn, head = model.layers.values()
    e, _, tape_e = embed.forward(by_layer["embed"], ids)
    h, final, tape_r = rnn.forward(by_layer["rnn"], e, initial)
    y, _, tape_h = head.forward(by_layer["head"], h)
    grads_h = head.backward(tape_h, dy)
    grads_r = rnn.backward(tape_r, grads_h.dx, dfinal)
    grads_e = embed.backward(tape_e, grads_r.dx)
    layer_grads = {"embed": grads_e, "rnn": grads_r, "head": grads_h}
    expected_dparams = {f"{n}.{k}": a for n, g in layer_grads.items() for k, a in g.dparams.items()}
    model_y, model_final, tape = model.forward(params, ids, initial)
    grads = model.backward(tape, dy, dfinal)
    assert grads.dparams.keys() == params.keys()
    expected = tree_to_numpy(xp, (y, final, grads_r.dstate, expected_dparams))
    xp.assert_close((model_y, model_final, grads.dstate, grads.dparams), expected, condition=0)
    for result in (model(params, ids, initial), run_step_by_step(xp, model, params, ids, initial)):
        xp.assert_close(result, tree_to_numpy(xp, (y, final)), condition=60)
    grads_again = model.backward(tape, dy, dfinal)
    xp.assert_close(grads_again.dparams, tree_to_numpy(xp, grads.dparams), condition=0)


def run_step_by_step(xp, model, params, ids, state):
    """Return y and the final state of `model.step` called T times."""
    rows = []
    for t in range(T):
        y, state = model.step(params, ids[t, ...], state)
        rows.append(y)
    return xp.xp.stack(rows), state


def test_lengths_reach_the_recurrent_layer(xp, rng):
    model = make_model()
    params = model.init(rng, like(xp))
    ids = rng.integers(V, size=(T, N))
    lengths = [T, 2, 0]
    _, final = model(params, xp.asarray(ids), lengths=lengths)
    for n, length in enumerate(lengths):
        _, final_of_row = model(params, xp.asarray(ids[:length, n : n + 1]))
        xp.assert_close(final[:, n : n + 1, :], xp.to_numpy(final_of_row), condition=30)


def test_explain_has_a_line_for_each_layer_of_each_recurrent_layer(xp, rng):
    nested = Sequential(skip=xprnn.Masking(), low=RNN(D, H, 2), last=xprnn.LastStep())
    head = Sequential(flat=Linear(H, V))
    for model, names in (
        (Sequential(read=Embedding(V, D), inner=nested, head=head), ["inner, low, layer 0", "inner, low, layer 1"]),
        (Sequential(read=Embedding(V, D), a=RNN(D, H), b=xprnn.LSTM(H, H)), ["a, layer 0", "b, layer 0"]),
        (Sequential(read=Embedding(V, D), flat=Linear(D, V)), []),
    ):
        params = model.init(rng, like(xp))
        report = model.explain(params, xp.asarray(rng.integers(V, size=(T, N))), lengths=[T, 2, 0]).splitlines()
        assert [line.partition(", forward: ")[0] for line in report] == names
        assert all(line.partition(", forward: ")[2] for line in report)
    with pytest.raises(xprnn.InputError, match="lengths"):
        make_model().explain(make_model().init(rng, like(xp)), xp.asarray(rng.integers(V, size=(T, N))), lengths=[T])


def test_several_recurrent_layers_have_named_states(xp, rng):
    model = Sequential(low=RNN(D, H), mid=Linear(H, D), high=xprnn.LSTM(D, H))
    params = model.init(rng, like(xp))
    x = xp.asarray(rng.normal(size=(T, N, D)))
    y, state, tape = model.forward(params, x)
    assert state.keys() == {"low", "high"}
    y_start, middle = model(params, x[:2, ...])
    y_end, final = model(params, x[2:, ...], middle)
    xp.assert_close((xp.xp.concat((y_start, y_end)), final), tree_to_numpy(xp, (y, state)), condition=60)
    dstate = model.backward(tape, None, state).dstate
    assert dstate.keys() == {"low", "high"}
    with pytest.raises(xprnn.InputError, match="keys low, high"):
        model(params, x, {"low": state["low"]})


@pytest.mark.needs("torch")
def test_gradients_equal_those_of_torch(xp, rng):
    import torch

    dtype = xp.float_dtypes[0]
    model = make_model("GRU")
    np_params = {k: np.asarray(p, dtype) for k, p in model.init(rng, np.zeros(1)).items()}
    torch_dtype = getattr(torch, dtype)
    modules = {"embed": torch.nn.Embedding(V, D), "rnn": torch.nn.GRU(D, H), "head": torch.nn.Linear(H, V)}
    net = torch.nn.ModuleDict(modules).to(torch_dtype)
    net.load_state_dict({k: torch.tensor(p) for k, p in np_params.items()})
    ids, targets = rng.integers(V, size=(T, N)), rng.integers(V, size=(T, N))
    logits = net["head"](net["rnn"](net["embed"](torch.tensor(ids)))[0])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()
    y, _, tape = model.forward(xp.asarray(np_params), xp.asarray(ids))
    value, dy = xprnn.cross_entropy(y, xp.asarray(targets))
    xp.assert_close((y, value), (logits.detach().numpy(), loss.detach().numpy()), condition=60)
    grads = model.backward(tape, dy).dparams
    xp.assert_close(grads, {k: p.grad.numpy() for k, p in net.named_parameters()}, condition=200)


def test_init_is_the_same_on_every_library(xp, dtype):
    params = make_model().init(np.random.default_rng(3), like(xp, dtype))
    np_params = make_model().init(np.random.default_rng(3), np.zeros(1))
    xp.assert_close(params, {k: p.astype(dtype) for k, p in np_params.items()}, condition=0)
    assert np.abs(np_params["head.weight"]).max() <= 1 / np.sqrt(H)
    assert list(params) == list(make_model().shapes())


def test_sequential_is_a_frozen_configuration():
    from xprnn.layers.sequential import from_config

    model = make_model()
    assert model == make_model()
    assert hash(model) == hash(make_model())
    assert model != make_model("LSTM")
    assert from_config(model.config()) == model
    with pytest.raises(AttributeError, match="frozen"):
        model.layers = {}


@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.LSTM, xprnn.GRU])
@pytest.mark.parametrize("integers", [True, False])
def test_fortran_ordered_input_weight_gives_the_same_numbers(kind, integers):
    """`init` returns a wide weight_ih in Fortran order for look-ups; C order must give the same results."""
    rng = np.random.default_rng(0)
    layer = kind(90, 4)
    params = layer.init(rng, like=np.zeros(0))
    assert params["weight_ih_l0"].shape == layer.shapes()["weight_ih_l0"]
    assert params["weight_ih_l0"].flags.f_contiguous
    assert params["weight_hh_l0"].flags.c_contiguous
    c_ordered = {k: np.ascontiguousarray(a) for k, a in params.items()}
    x = rng.integers(0, 90, (6, 5)) if integers else rng.standard_normal((6, 5, 90))
    dy = rng.standard_normal((6, 5, 4))
    (y, _, tape), (c_y, _, c_tape) = layer.forward(params, x), layer.forward(c_ordered, x)
    np.testing.assert_allclose(y, c_y, rtol=1e-13, atol=1e-14)
    grads, c_grads = layer.backward(tape, dy).dparams, layer.backward(c_tape, dy).dparams
    for name in params:
        np.testing.assert_allclose(grads[name], c_grads[name], rtol=1e-12, atol=1e-13)
    for result, expected in zip(layer.step(params, x[0]), layer.step(c_ordered, x[0]), strict=True):
        np.testing.assert_allclose(np.asarray(result), np.asarray(expected), rtol=1e-13, atol=1e-14)
