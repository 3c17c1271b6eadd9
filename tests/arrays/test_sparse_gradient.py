"""Sparse gradients of look-up tables, compared bitwise with the dense gradients and within rounding with torch's."""

from __future__ import annotations

import pickle

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
MAKES |= {name: make for name, make in RARE_CASES.items() if "peepholes" not in name}
IMPLEMENTATIONS = {"reference": reference_only, "ufunc": lambda: allow_jit(False), "jit": lambda: allow_jit(True)}
has_implementation = pytest.mark.applies_if(
    lambda implementation: implementation != "jit" or compile_cache.numba_available(), reason="numba is not installed"
)


def classes(rng, shape=(T, N)):
    """Return class numbers >= 1. Padding holds 0, which must not occur in the gradient."""
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
    """Return dparams with sparse=False and with sparse=True, and the classes that occur outside the padding."""
    dense, sparse = make(), make(sparse=True)
    params = {k: scale * rng.standard_normal(s) for k, s in dense.shapes().items()}
    ids = classes(rng)
    active = np.broadcast_to(flags.get("mask", np.ones((T, N), bool)), (T, N))
    active = active & (np.arange(T)[:, None] < np.asarray(flags.get("lengths", [T] * N)))
    y, final, tape = dense.forward(params, ids, **flags)
    dy = rng.standard_normal(y.shape)
    dstate = tuple(map(np.ones_like, final)) if isinstance(final, tuple) else np.ones_like(final)
    dense_gradients = dense.backward(tape, dy, dstate).dparams
    sparse_gradients = sparse.backward(sparse.forward(params, ids, **flags)[2], dy, dstate).dparams
    return dense_gradients, sparse_gradients, np.unique(ids[active])


def assert_equal_bitwise(dense_gradients, sparse_gradients, occurring, suffixes=("l0",)):
    for name, a in dense_gradients.items():
        g = sparse_gradients[name]
        if name in {f"weight_ih_{suffix}" for suffix in suffixes}:
            assert isinstance(g, SparseGradient)
            np.testing.assert_array_equal(g.indices, occurring)
            assert g.shape == a.shape
            g = g.to_dense()
            assert g.strides == a.strides
        np.testing.assert_array_equal(g, a, strict=True)


@has_implementation
@pytest.mark.parametrize("flags", ["full", "lengths", "mask", "reset", "checkpoint", "all"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MAKES)
def test_sparse_gradient_equals_dense_gradient_bitwise(rng, name, implementation, flags):
    with IMPLEMENTATIONS[implementation]():
        assert_equal_bitwise(*both_gradients(lambda **k: MAKES[name](V, H, **k), rng, flags_of(rng, flags)))


LAYOUTS = {
    "stacked": ({"num_layers": 2}, ("l0",)),
    "bidirectional": ({"num_layers": 2, "bidirectional": True}, ("l0", "l0_reverse")),
    "reverse": ({"reverse": True, "bias": False}, ("l0",)),
}


@pytest.mark.parametrize("flags", ["full", "all"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_table_of_the_first_layer_is_sparse(rng, layout, implementation, flags):
    options, suffixes = LAYOUTS[layout]
    with IMPLEMENTATIONS[implementation]():
        gradients = both_gradients(lambda **k: xprnn.LSTM(V, H, **options, **k), rng, flags_of(rng, flags))
        assert_equal_bitwise(*gradients, suffixes)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "int64"])
def test_batch_first_and_any_integer_dtype(xp, rng, dtype):
    layer, ids = xprnn.GRU(V, H, batch_first=True, sparse=True), xp.asarray(classes(rng, (N, T)), dtype)
    params = layer.init(rng, like=xp.asarray(np.zeros(1)))
    dense_layer = xprnn.GRU(V, H, batch_first=True)
    y, _, tape = layer.forward(params, ids)
    dy = xp.asarray(rng.standard_normal((N, T, H)))
    with xp.allow_data_dependent_shapes():
        g = layer.backward(tape, dy).dparams["weight_ih_l0"]
    expected = dense_layer.backward(dense_layer.forward(params, ids)[2], dy).dparams["weight_ih_l0"]
    xp.assert_close(g.to_dense(), expected, condition=0)
    xp.assert_like((g.values, g.to_dense()), y)


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru", "gru-before", "lstm-proj"])
def test_sparse_gradient_on_every_array_library(xp, rng, name):
    flags = {"lengths": [T, 0, 3, 1, T]}
    ids = xp.asarray(classes(rng))
    gradients = []
    for sparse in (False, True):
        layer = MAKES[name](V, H, 1, sparse=sparse)
        params = layer.init(np.random.default_rng(0), like=xp.asarray(np.zeros(1)))
        y, _, tape = layer.forward(params, ids, **flags)
        with xp.allow_data_dependent_shapes():
            dy = np.random.default_rng(1).standard_normal(tuple(y.shape))
            gradients.append(layer.backward(tape, xp.asarray(dy)).dparams["weight_ih_l0"])
    dense, g = gradients
    xp.assert_close(g.to_dense(), dense, condition=0)
    occurring = np.unique(xp.to_numpy(ids)[np.arange(T)[:, None] < np.asarray(flags["lengths"])])
    np.testing.assert_array_equal(xp.to_numpy(g.indices), occurring)


@pytest.mark.needs("torch")
def test_embedding_gradient_equals_torchs_coalesced_gradient(xp, dtype, rng):
    import torch

    weight, ids, dy = rng.standard_normal((V, H)), rng.integers(0, V, (T, N)), rng.standard_normal((T, N, H))
    torch_layer = torch.nn.Embedding(V, H, sparse=True, dtype=getattr(torch, dtype))
    torch_layer.weight.data[...] = torch.tensor(weight)
    torch_layer(torch.tensor(ids)).backward(torch.tensor(dy, dtype=torch_layer.weight.dtype))
    expected = torch_layer.weight.grad.coalesce()
    layer = xprnn.Embedding(V, H, sparse=True)
    _, _, tape = layer.forward({"weight": xp.asarray(weight, dtype)}, xp.asarray(ids))
    with xp.allow_data_dependent_shapes():
        g = layer.backward(tape, xp.asarray(dy, dtype)).dparams["weight"]
    np.testing.assert_array_equal(xp.to_numpy(g.indices), expected.indices()[0].numpy())
    xp.assert_close(g.values, expected.values().numpy(), condition=8)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_layer_gradient_equals_torchs_for_one_hot_vectors(rng, name, implementation):
    import torch

    layer, ids = getattr(xprnn, name)(V, H, sparse=True), classes(rng)
    params = layer.init(rng, like=np.zeros(0))
    torch_layer = getattr(torch.nn, name)(V, H, dtype=torch.float64)
    torch_layer.load_state_dict({k: torch.tensor(np.ascontiguousarray(a)) for k, a in params.items()})
    dy = rng.standard_normal((T, N, H))
    torch_layer(torch.tensor(np.eye(V)[ids]))[0].backward(torch.tensor(dy))
    with IMPLEMENTATIONS[implementation]():
        g = layer.backward(layer.forward(params, ids)[2], dy).dparams["weight_ih_l0"]
    expected = torch_layer.weight_ih_l0.grad.numpy()
    np.testing.assert_array_equal(g.indices, np.unique(ids))
    np.testing.assert_allclose(g.values, expected[:, g.indices].T, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(np.asarray(g), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.not_on("strict", reason="check_gradients converts arrays where data-dependent shapes are off")
@pytest.mark.not_on("jax", reason="a hundred times slower; the same code path as on torch")
def test_sparse_gradients_pass_check_gradients(xp, rng):
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


def test_sparse_gradients_add_up_over_windows_and_shards_of_a_batch(rng):
    model = xprnn.Sequential(rnn=xprnn.LSTM(V, H, sparse=True), head=xprnn.Linear(H, V))
    dense = xprnn.Sequential(rnn=xprnn.LSTM(V, H), head=xprnn.Linear(H, V))
    params, ids = model.init(rng, like=np.zeros(0)), classes(rng, (40, 6))
    totals = []
    for m in (model, dense):
        state, gradients = None, []
        for window in windows([(ids[:-1], ids[1:])], k1=8, k2=12):
            _, g, state = window_gradients(m, params, window, state, xprnn.cross_entropy)
            gradients.append(g["rnn.weight_ih_l0"])
        totals.append(sum(gradients))
    assert isinstance(totals[0], SparseGradient)
    np.testing.assert_array_equal(totals[0].to_dense(), totals[1])
    with DataParallel(3) as data_parallel:
        sparse_g, dense_g = (data_parallel.gradients(m, params, ids[:-1], ids[1:], None)[1] for m in (model, dense))
    assert isinstance(sparse_g["rnn.weight_ih_l0"], SparseGradient)
    np.testing.assert_array_equal(sparse_g["rnn.weight_ih_l0"].to_dense(), dense_g["rnn.weight_ih_l0"])


def test_empty_sequences_and_batches_have_no_classes_and_features_a_dense_gradient(rng):
    layer = xprnn.LSTM(V, H, sparse=True)
    params = layer.init(rng, like=np.zeros(0))
    for shape in ((0, 3), (4, 0)):
        for implementation in IMPLEMENTATIONS.values():
            with implementation():
                y, _, tape = layer.forward(params, np.zeros(shape, int))
                g = layer.backward(tape, y).dparams["weight_ih_l0"]
                assert g.indices.shape == (0,)
                np.testing.assert_array_equal(g.to_dense(), np.zeros((4 * H, V)), strict=True)
                np.testing.assert_array_equal((g + g).to_dense(), 0 * params["weight_ih_l0"])
    x = rng.standard_normal((T, N, V))
    y, _, tape = layer.forward(params, x)
    dense_layer = xprnn.LSTM(V, H)
    expected = dense_layer.backward(dense_layer.forward(params, x)[2], y).dparams["weight_ih_l0"]
    np.testing.assert_array_equal(layer.backward(tape, y).dparams["weight_ih_l0"], expected)


@pytest.mark.parametrize("kind", ["Embedding", "RNN", "LSTM", "GRU", "Recurrent"])
def test_sparse_option_is_in_repr_equality_pickle_and_files(kind, tmp_path, rng):
    cell = {"cell": xprnn.cells.lstm(peepholes=True)} if kind == "Recurrent" else {}
    make = getattr(xprnn, kind)
    layer = make(5, 3, sparse=True, **cell)
    assert "sparse=True" in repr(layer)
    assert layer != make(5, 3, **cell)
    assert pickle.loads(pickle.dumps(layer)) == layer
    params = layer.init(rng, like=np.zeros(0))
    xprnn.save(tmp_path / "m.safetensors", xprnn.Sequential(table=layer), {f"table.{k}": a for k, a in params.items()})
    model, _ = xprnn.load(tmp_path / "m.safetensors")
    assert model.layers["table"] == layer
    with pytest.raises(InputError, match="sparse must be True or False"):
        make(5, 3, sparse=1, **cell)


@pytest.mark.needs("torch")
def test_sparse_option_converts_from_and_to_torch():
    import torch

    model, params = xprnn.from_torch(torch.nn.Sequential(torch.nn.Embedding(5, 2, sparse=True), torch.nn.Linear(2, 3)))
    assert next(iter(model.layers.values())).sparse
    _, constructor = xprnn.to_torch(model, params)
    assert "'sparse': True" in str(constructor)


@pytest.mark.needs("jax")
def test_sparse_gradient_inside_jax_jit_raises_with_a_hint():
    import jax

    layer = xprnn.Embedding(V, H, sparse=True)

    def gradient(weight, ids):
        y, _, tape = layer.forward({"weight": weight}, ids)
        return layer.backward(tape, y).dparams["weight"].to_dense()

    args = jax.numpy.zeros((V, H)), jax.numpy.asarray([1, 2])
    assert gradient(*args).shape == (V, H)
    with pytest.raises(InputError, match=r"sparse=True: the number of classes .* outside jax.jit, or set sparse=False"):
        jax.jit(gradient)(*args)
