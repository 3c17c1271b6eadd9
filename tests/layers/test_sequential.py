"""Linear, Embedding and Sequential: against plain formulas, one-hot products, their parts, torch and differences."""

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
def test_linear(xp, dtype, rng, bias, lead):
    layer = Linear(D, V, bias=bias)
    params = layer.init(rng, like(xp, dtype))
    x, dy = (xp.asarray(rng.normal(size=(*lead, k)), dtype) for k in (D, V))
    y, state, tape = layer.forward(params, x)
    dx, dstate, dparams = layer.backward(tape, dy)
    w, b = xp.to_numpy(params["weight"]).astype("float64"), xp.to_numpy(params["bias"]) if bias else 0.0
    hx, hdy = (xp.to_numpy(a).astype("float64") for a in (x, dy))
    xp.assert_close((y, dx), (hx @ w.T + b, hdy @ w), condition=30)
    flat_x, flat_dy = hx.reshape(-1, D), hdy.reshape(-1, V)
    want = {"weight": flat_dy.T @ flat_x} | ({"bias": flat_dy.sum(0)} if bias else {})
    xp.assert_close(dparams, want, condition=60)
    xp.assert_like((y, dx, dparams, params), x)
    assert state is dstate is None
    assert {k: tuple(p.shape) for k, p in params.items()} == layer.shapes()


@pytest.mark.parametrize("lead", [(N,), (T, N), (0, N), (T, 0), (2, 3, 2)])
def test_embedding_is_a_one_hot_product(xp, dtype, rng, lead):
    layer = Embedding(V, D)
    params = layer.init(rng, like(xp, dtype))
    ids = rng.integers(V, size=lead)
    y, _, tape = layer.forward(params, xp.asarray(ids))
    dy = xp.asarray(rng.normal(size=(*lead, D)), dtype)
    dx, _, dparams = layer.backward(tape, dy)
    hot = np.eye(V)[ids].reshape(-1, V)
    xp.assert_close(y, xp.to_numpy(params["weight"])[ids], condition=0)
    xp.assert_close(dparams, {"weight": hot.T @ xp.to_numpy(dy).astype("float64").reshape(-1, D)}, condition=30)
    xp.assert_like((y, dparams), params["weight"])
    assert dx is None


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_integer_input_is_a_one_hot_input(xp, rng, kind, num_layers):
    """The look-up equals the product with one-hot vectors, forward and backward, and needs none of them."""
    dtype = xp.float_dtypes[0]
    layer = getattr(xprnn, kind)(V, H, num_layers=num_layers)
    params = layer.init(rng, like(xp))
    ids = rng.integers(V - 1, size=(T, N))  # the last class never occurs: its gradient is zero
    hot = xp.asarray(np.eye(V)[ids], dtype)
    dy = xp.asarray(rng.normal(size=(T, N, H)), dtype)
    results = []
    for x in (xp.asarray(ids), hot):
        y, state, tape = layer.forward(params, x)
        dx, dstate, dparams = layer.backward(tape, dy)
        results.append({"y": y, "state": state, "dstate": dstate, "params": dparams})
        assert (dx is None) == (x is not hot)
    xp.assert_close(results[0], walk(xp, results[1]), condition=60)
    assert not xp.to_numpy(results[0]["params"]["weight_ih_l0"])[:, V - 1].any()


def walk(xp, tree):
    """A result with every array brought home."""
    if isinstance(tree, dict):
        return {k: walk(xp, v) for k, v in tree.items()}
    return tuple(walk(xp, v) for v in tree) if isinstance(tree, tuple) else xp.to_numpy(tree)


def test_integer_input_makes_no_one_hot_matrix(rng):
    import tracemalloc

    layer = RNN(5000, 2)
    params = layer.init(rng, np.zeros(1, "float32"))
    ids, dy = rng.integers(5000, size=(100, 20)), np.ones((100, 20, 2), "float32")
    layer.backward(layer.forward(params, ids)[2], dy)  # the first pass may import and compile
    tracemalloc.start()
    try:
        layer.backward(layer.forward(params, ids)[2], dy)
        used = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert used < 100 * 20 * 5000 * 4 / 20, "one-hot vectors would take 40 MB"


def model_of(kind="RNN"):
    return Sequential(embed=Embedding(V, D), rnn=getattr(xprnn, kind)(D, H), head=Linear(H, V))


@float64_only
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_chain_by_central_differences(xp, rng, kind):
    """Embedding, recurrent layer, head and cross-entropy as one function, initial and final state included."""
    model = model_of(kind)
    params = model.init(rng, like(xp))
    ids, targets = xp.asarray(rng.integers(V, size=(T, N))), xp.asarray(rng.integers(V, size=(T, N)))
    one = xp.asarray(rng.normal(size=(1, N, H)))
    state = (one, 0.5 * one) if kind == "LSTM" else one

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


def test_chain_is_its_parts(xp, rng):
    """What Sequential does, done by hand."""
    model = model_of()
    params = model.init(rng, like(xp))
    parts = {n: {k.partition(".")[2]: a for k, a in params.items() if k.startswith(n + ".")} for n in model.layers}
    ids, dy = xp.asarray(rng.integers(V, size=(T, N))), xp.asarray(rng.normal(size=(T, N, V)))
    start, dlast = (xp.asarray(rng.normal(size=(1, N, H))) for _ in range(2))
    embed, rnn, head = model.layers.values()
    e, _, tape_e = embed.forward(parts["embed"], ids)
    h, last, tape_r = rnn.forward(parts["rnn"], e, start)
    y, _, tape_h = head.forward(parts["head"], h)
    back_h = head.backward(tape_h, dy)
    back_r = rnn.backward(tape_r, back_h.dx, dlast)
    back_e = embed.backward(tape_e, back_r.dx)
    want = {
        f"{n}.{k}": a for n, g in (("embed", back_e), ("rnn", back_r), ("head", back_h)) for k, a in g.dparams.items()
    }
    got_y, got_last, tape = model.forward(params, ids, start)
    got = model.backward(tape, dy, dlast)
    assert got.dparams.keys() == params.keys()
    xp.assert_close((got_y, got_last, got.dstate, got.dparams), walk(xp, (y, last, back_r.dstate, want)), condition=0)
    for given in (model(params, ids, start), streamed(xp, model, params, ids, start)):
        xp.assert_close(given, walk(xp, (y, last)), condition=60)
    replay = model.backward(tape, dy, dlast)
    xp.assert_close(replay.dparams, walk(xp, got.dparams), condition=0)


def streamed(xp, model, params, ids, state):
    """The sequence one step at a time."""
    rows = []
    for t in range(T):
        y, state = model.step(params, ids[t, ...], state)
        rows.append(y)
    return xp.xp.stack(rows), state


def test_flags_reach_the_recurrent_part(xp, rng):
    model = model_of()
    params = model.init(rng, like(xp))
    ids = rng.integers(V, size=(T, N))
    lengths = [T, 2, 0]
    _, last = model(params, xp.asarray(ids), lengths=lengths)
    for n, length in enumerate(lengths):
        _, alone = model(params, xp.asarray(ids[:length, n : n + 1]))
        xp.assert_close(last[:, n : n + 1, :], xp.to_numpy(alone), condition=30)


def test_explain_has_a_line_for_each_layer_of_each_recurrent_part(xp, rng):
    inner = Sequential(skip=xprnn.Masking(), low=RNN(D, H, 2), last=xprnn.LastStep())
    alone = Sequential(flat=Linear(H, V))
    for model, ways in (
        (Sequential(read=Embedding(V, D), inner=inner, head=alone), ["inner, low, layer 0", "inner, low, layer 1"]),
        (Sequential(read=Embedding(V, D), a=RNN(D, H), b=xprnn.LSTM(H, H)), ["a, layer 0", "b, layer 0"]),
        (Sequential(read=Embedding(V, D), flat=Linear(D, V)), []),
    ):
        params = model.init(rng, like(xp))
        said = model.explain(params, xp.asarray(rng.integers(V, size=(T, N))), lengths=[T, 2, 0]).splitlines()
        assert [line.partition(", forward: ")[0] for line in said] == ways
        assert all(line.partition(", forward: ")[2] for line in said)
    with pytest.raises(xprnn.InputError, match="lengths"):
        model_of().explain(model_of().init(rng, like(xp)), xp.asarray(rng.integers(V, size=(T, N))), lengths=[T])


def test_several_recurrent_parts_have_named_states(xp, rng):
    model = Sequential(low=RNN(D, H), mid=Linear(H, D), high=xprnn.LSTM(D, H))
    params = model.init(rng, like(xp))
    x = xp.asarray(rng.normal(size=(T, N, D)))
    y, state, tape = model.forward(params, x)
    assert state.keys() == {"low", "high"}
    half, between = model(params, x[:2, ...])
    rest, last = model(params, x[2:, ...], between)
    xp.assert_close((xp.xp.concat((half, rest)), last), walk(xp, (y, state)), condition=60)
    dstate = model.backward(tape, None, state).dstate
    assert dstate.keys() == {"low", "high"}
    with pytest.raises(xprnn.InputError, match="keys low, high"):
        model(params, x, {"low": state["low"]})


@pytest.mark.needs("torch")
def test_chain_is_torchs(xp, rng):
    import torch

    dtype = xp.float_dtypes[0]
    model = model_of("GRU")
    host = {k: np.asarray(p, dtype) for k, p in model.init(rng, np.zeros(1)).items()}
    kind = getattr(torch, dtype)
    nets = {"embed": torch.nn.Embedding(V, D), "rnn": torch.nn.GRU(D, H), "head": torch.nn.Linear(H, V)}
    net = torch.nn.ModuleDict(nets).to(kind)
    net.load_state_dict({k: torch.tensor(p) for k, p in host.items()})
    ids, targets = rng.integers(V, size=(T, N)), rng.integers(V, size=(T, N))
    logits = net["head"](net["rnn"](net["embed"](torch.tensor(ids)))[0])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()
    y, _, tape = model.forward(xp.asarray(host), xp.asarray(ids))
    value, dy = xprnn.cross_entropy(y, xp.asarray(targets))
    xp.assert_close((y, value), (logits.detach().numpy(), loss.detach().numpy()), condition=60)
    grads = model.backward(tape, dy).dparams
    xp.assert_close(grads, {k: p.grad.numpy() for k, p in net.named_parameters()}, condition=200)


def test_init_is_the_same_on_every_library(xp, dtype):
    params = model_of().init(np.random.default_rng(3), like(xp, dtype))
    host = model_of().init(np.random.default_rng(3), np.zeros(1))
    xp.assert_close(params, {k: p.astype(dtype) for k, p in host.items()}, condition=0)
    assert np.abs(host["head.weight"]).max() <= 1 / np.sqrt(H)
    assert list(params) == list(model_of().shapes())


def test_sequential_is_a_frozen_configuration():
    from xprnn.layers.sequential import from_config

    model = model_of()
    assert model == model_of()
    assert hash(model) == hash(model_of())
    assert model != model_of("LSTM")
    assert from_config(model.config()) == model
    with pytest.raises(AttributeError, match="frozen"):
        model.layers = {}


@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.LSTM, xprnn.GRU])
@pytest.mark.parametrize("integers", [True, False])
def test_a_wide_weight_lies_by_class_and_means_the_same(kind, integers):
    """`init` lays it so that a look-up reads one stretch of memory; torch's order gives the same numbers."""
    rng = np.random.default_rng(0)
    layer = kind(90, 4)
    params = layer.init(rng, like=np.zeros(0))
    assert params["weight_ih_l0"].shape == layer.shapes()["weight_ih_l0"]
    assert params["weight_ih_l0"].flags.f_contiguous
    assert params["weight_hh_l0"].flags.c_contiguous
    plain = {k: np.ascontiguousarray(a) for k, a in params.items()}
    x = rng.integers(0, 90, (6, 5)) if integers else rng.standard_normal((6, 5, 90))
    dy = rng.standard_normal((6, 5, 4))
    (y, _, tape), (plain_y, _, plain_tape) = layer.forward(params, x), layer.forward(plain, x)
    np.testing.assert_allclose(y, plain_y, rtol=1e-13, atol=1e-14)
    grads, plain_grads = layer.backward(tape, dy).dparams, layer.backward(plain_tape, dy).dparams
    for name in params:
        np.testing.assert_allclose(grads[name], plain_grads[name], rtol=1e-12, atol=1e-13)
    for one, two in zip(layer.step(params, x[0]), layer.step(plain, x[0]), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(two), rtol=1e-13, atol=1e-14)
