"""Sparse gradients of looked-up tables: torch's numbers, the dense path's bits, on every way of running."""

from __future__ import annotations

import pickle
from contextlib import nullcontext

import numpy as np
import pytest
from support.layer_cases import CASES, RARE_CASES
from support.oracles import check_gradients_on

import xprnn
from xprnn import InputError, SparseGradient
from xprnn.kernels.config import allow_jit, reference_only
from xprnn.kernels.jit import compile_cache
from xprnn.training.data_parallel import DataParallel
from xprnn.training.truncated_bptt import window_gradients, windows

V, H, T, N = 23, 4, 7, 5
MAKES = {name: case.make for name, case in CASES.items()}
MAKES |= {name: make for name, make in RARE_CASES.items() if name.startswith("early")}
WAYS = {"generic": reference_only, "in place": lambda: allow_jit(False), "compiled": lambda: allow_jit(True)}


def counted(xp):
    """Where array-api-strict, which the fixture forbids it, may say how many classes occur."""
    if xp.library != "strict":
        return nullcontext()
    import array_api_strict

    return array_api_strict.ArrayAPIStrictFlags(data_dependent_shapes=True)


def classes(rng, shape=(T, N)):
    """Numbers from 1 on: what stands in padding is 0, which must not turn up."""
    return rng.integers(1, V, shape)


def flags_of(rng, name):
    lengths, mask = [T, 0, 3, 1, T], rng.random((T, N)) < 0.6
    return {
        "full": {},
        "lengths": {"lengths": lengths},
        "mask": {"mask": mask},
        "reset": {"reset": mask, "lengths": lengths},
        "checkpoint": {"checkpoint": 3},
        "all": {"lengths": lengths, "mask": mask, "checkpoint": 2},
    }[name]


def both_gradients(make, rng, flags, scale=0.5):
    """dparams of the dense path and of the sparse one, and the classes that took part."""
    dense, sparse = make(), make(sparse=True)
    params = {k: scale * rng.standard_normal(s) for k, s in dense.shapes().items()}
    ids = classes(rng)
    active = np.broadcast_to(flags.get("mask", np.ones((T, N), bool)), (T, N))
    active = active & (np.arange(T)[:, None] < np.asarray(flags.get("lengths", [T] * N)))
    y, final, tape = dense.forward(params, ids, **flags)
    dy = rng.standard_normal(y.shape)
    dstate = tuple(map(np.ones_like, final)) if isinstance(final, tuple) else np.ones_like(final)
    wanted = dense.backward(tape, dy, dstate).dparams
    found = sparse.backward(sparse.forward(params, ids, **flags)[2], dy, dstate).dparams
    return wanted, found, np.unique(ids[active])


def assert_same_bits(wanted, found, seen, ends=("l0",)):
    for name, a in wanted.items():
        g = found[name]
        if name in {f"weight_ih_{end}" for end in ends}:
            assert isinstance(g, SparseGradient)
            np.testing.assert_array_equal(g.indices, seen)
            assert g.shape == a.shape
            g = g.to_dense()
            assert g.strides == a.strides
        np.testing.assert_array_equal(g, a, strict=True)


@pytest.mark.parametrize("flags", ["full", "lengths", "mask", "reset", "checkpoint", "all"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKES)
def test_it_is_the_dense_gradient_to_the_bit(rng, name, way, flags):
    if way == "compiled" and not compile_cache.numba_available():
        pytest.skip("numba is not installed")
    with WAYS[way]():
        assert_same_bits(*both_gradients(lambda **k: MAKES[name](V, H, **k), rng, flags_of(rng, flags)))


LAYOUTS = {
    "stacked": ({"num_layers": 2}, ("l0",)),
    "both ways": ({"num_layers": 2, "bidirectional": True}, ("l0", "l0_reverse")),
    "reverse": ({"reverse": True, "bias": False}, ("l0",)),
}


@pytest.mark.parametrize("flags", ["full", "all"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_every_layout_only_the_look_up_is_sparse(rng, layout, way, flags):
    options, ends = LAYOUTS[layout]
    with WAYS[way]():
        found = both_gradients(lambda **k: xprnn.LSTM(V, H, **options, **k), rng, flags_of(rng, flags))
        assert_same_bits(*found, ends)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "int64"])
def test_batch_first_and_small_integers(xp, rng, dtype):
    layer, ids = xprnn.GRU(V, H, batch_first=True, sparse=True), xp.asarray(classes(rng, (N, T)), dtype)
    params = layer.init(rng, like=xp.asarray(np.zeros(1)))
    plain = xprnn.GRU(V, H, batch_first=True)
    y, _, tape = layer.forward(params, ids)
    dy = xp.asarray(rng.standard_normal((N, T, H)))
    with counted(xp):
        g = layer.backward(tape, dy).dparams["weight_ih_l0"]
    wanted = plain.backward(plain.forward(params, ids)[2], dy).dparams["weight_ih_l0"]
    xp.assert_close(g.to_dense(), wanted, condition=0)
    xp.assert_like((g.values, g.to_dense()), y)


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru", "gru-before", "lstm-proj"])
def test_every_array_library_gives_it(xp, rng, name):
    flags = {"lengths": [T, 0, 3, 1, T]}
    ids = xp.asarray(classes(rng))
    found = []
    for sparse in (False, True):
        layer = MAKES[name](V, H, 1, sparse=sparse)
        params = layer.init(np.random.default_rng(0), like=xp.asarray(np.zeros(1)))
        y, _, tape = layer.forward(params, ids, **flags)
        with counted(xp):
            dy = np.random.default_rng(1).standard_normal(tuple(y.shape))
            found.append(layer.backward(tape, xp.asarray(dy)).dparams["weight_ih_l0"])
    xp.assert_close(found[1].to_dense(), found[0], condition=0)
    seen = np.unique(xp.to_numpy(ids)[np.arange(T)[:, None] < np.asarray(flags["lengths"])])
    np.testing.assert_array_equal(xp.to_numpy(found[1].indices), seen)


@pytest.mark.needs("torch")
def test_an_embeddings_is_torchs(xp, dtype, rng):
    import torch

    weight, ids, dy = rng.standard_normal((V, H)), rng.integers(0, V, (T, N)), rng.standard_normal((T, N, H))
    theirs = torch.nn.Embedding(V, H, sparse=True, dtype=getattr(torch, dtype))
    theirs.weight.data[...] = torch.tensor(weight)
    theirs(torch.tensor(ids)).backward(torch.tensor(dy, dtype=theirs.weight.dtype))
    wanted = theirs.weight.grad.coalesce()
    part = xprnn.Embedding(V, H, sparse=True)
    _, _, tape = part.forward({"weight": xp.asarray(weight, dtype)}, xp.asarray(ids))
    with counted(xp):
        g = part.backward(tape, xp.asarray(dy, dtype)).dparams["weight"]
    np.testing.assert_array_equal(xp.to_numpy(g.indices), wanted.indices()[0].numpy())
    xp.assert_close(g.values, wanted.values().numpy(), condition=8)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_a_layers_is_what_torch_finds_for_one_hot_vectors(rng, name, way):
    import torch

    layer, ids = getattr(xprnn, name)(V, H, sparse=True), classes(rng)
    params = layer.init(rng, like=np.zeros(0))
    theirs = getattr(torch.nn, name)(V, H, dtype=torch.float64)
    theirs.load_state_dict({k: torch.tensor(np.ascontiguousarray(a)) for k, a in params.items()})
    dy = rng.standard_normal((T, N, H))
    theirs(torch.tensor(np.eye(V)[ids]))[0].backward(torch.tensor(dy))
    with WAYS[way]():
        g = layer.backward(layer.forward(params, ids)[2], dy).dparams["weight_ih_l0"]
    wanted = theirs.weight_ih_l0.grad.numpy()
    np.testing.assert_array_equal(g.indices, np.unique(ids))
    np.testing.assert_allclose(g.values, wanted[:, g.indices].T, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(np.asarray(g), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.not_on("strict", reason="the checker converts inside, where data-dependent shapes are off")
@pytest.mark.not_on("jax", reason="a hundred times slower; the same lines as on torch")
def test_random_cotangents_prove_it(xp, rng):
    ids = xp.asarray(classes(rng))
    for model in (
        xprnn.LSTM(V, H, 2, bidirectional=True, sparse=True),
        xprnn.Sequential(e=xprnn.Embedding(V, 3, sparse=True), rnn=xprnn.GRU(3, H), head=xprnn.Linear(H, 2)),
    ):
        params = model.init(rng, like=xp.asarray(np.zeros(1)))

        def forward(p, model=model):
            y, _, tape = model.forward(p, ids)
            return y, tape

        def backward(tape, dy, model=model):
            return model.backward(tape, dy).dparams

        errors = check_gradients_on(xp, forward, backward, [params], names=["params"])
        assert max(errors.values()) < 1e-6
    assert max(xprnn.check_layer(model, params, ids).values()) < 1e-6


def test_it_adds_up_over_windows_threads_and_shares_of_a_batch(rng):
    model = xprnn.Sequential(rnn=xprnn.LSTM(V, H, sparse=True), head=xprnn.Linear(H, V))
    dense = xprnn.Sequential(rnn=xprnn.LSTM(V, H), head=xprnn.Linear(H, V))
    params, ids = model.init(rng, like=np.zeros(0)), classes(rng, (40, 6))
    totals = []
    for m in (model, dense):
        state, some = None, []
        for window in windows([(ids[:-1], ids[1:])], k1=8, k2=12):
            _, g, state = window_gradients(m, params, window, state, xprnn.cross_entropy)
            some.append(g["rnn.weight_ih_l0"])
        totals.append(sum(some))
    assert isinstance(totals[0], SparseGradient)
    np.testing.assert_array_equal(totals[0].to_dense(), totals[1])
    with DataParallel(3) as crew:
        one, other = (crew.gradients(m, params, ids[:-1], ids[1:], None)[1] for m in (model, dense))
    assert isinstance(one["rnn.weight_ih_l0"], SparseGradient)
    np.testing.assert_array_equal(one["rnn.weight_ih_l0"].to_dense(), other["rnn.weight_ih_l0"])


def test_no_steps_no_rows_and_features(rng):
    layer = xprnn.LSTM(V, H, sparse=True)
    params = layer.init(rng, like=np.zeros(0))
    for shape in ((0, 3), (4, 0)):
        for way in WAYS.values():
            with way():
                y, _, tape = layer.forward(params, np.zeros(shape, int))
                g = layer.backward(tape, y).dparams["weight_ih_l0"]
                assert g.indices.shape == (0,)
                np.testing.assert_array_equal(g.to_dense(), np.zeros((4 * H, V)), strict=True)
                np.testing.assert_array_equal((g + g).to_dense(), 0 * params["weight_ih_l0"])
    x = rng.standard_normal((T, N, V))
    y, _, tape = layer.forward(params, x)
    plain = xprnn.LSTM(V, H)
    wanted = plain.backward(plain.forward(params, x)[2], y).dparams["weight_ih_l0"]
    np.testing.assert_array_equal(layer.backward(tape, y).dparams["weight_ih_l0"], wanted)


@pytest.mark.parametrize("kind", ["Embedding", "RNN", "LSTM", "GRU", "Recurrent"])
def test_the_option_is_kept(kind, tmp_path, rng):
    cell = {"cell": xprnn.cells.lstm(peepholes=True)} if kind == "Recurrent" else {}
    make = getattr(xprnn, kind)
    layer = make(5, 3, sparse=True, **cell)
    assert "sparse=True" in repr(layer)
    assert layer != make(5, 3, **cell)
    if not cell:  # a cell is a function over a namespace, which pickle does not know
        assert pickle.loads(pickle.dumps(layer)) == layer
    params = layer.init(rng, like=np.zeros(0))
    xprnn.save(tmp_path / "m.safetensors", xprnn.Sequential(part=layer), {f"part.{k}": a for k, a in params.items()})
    model, _ = xprnn.load(tmp_path / "m.safetensors")
    assert model.layers["part"] == layer
    with pytest.raises(InputError, match="sparse must be True or False"):
        make(5, 3, sparse=1, **cell)


@pytest.mark.needs("torch")
def test_the_option_is_torchs():
    import torch

    model, params = xprnn.from_torch(torch.nn.Sequential(torch.nn.Embedding(5, 2, sparse=True), torch.nn.Linear(2, 3)))
    assert next(iter(model.layers.values())).sparse
    _, constructor = xprnn.to_torch(model, params)
    assert "'sparse': True" in str(constructor)


@pytest.mark.needs("jax")
def test_jit_is_told_why_not():
    import jax

    part = xprnn.Embedding(V, H, sparse=True)

    def gradient(weight, ids):
        y, _, tape = part.forward({"weight": weight}, ids)
        return part.backward(tape, y).dparams["weight"].to_dense()

    given = jax.numpy.zeros((V, H)), jax.numpy.asarray([1, 2])
    assert gradient(*given).shape == (V, H)
    with pytest.raises(
        InputError, match=r"sparse=True: how many classes occur .* outside jax.jit, or with sparse=False"
    ):
        jax.jit(gradient)(*given)
