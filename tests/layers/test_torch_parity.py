"""Parity with torch in float64 to 1e-10: outputs, final states and every gradient, final-state cotangents included.

The in-place scan on NumPy arrays and the reference scan on torch tensors are each compared with torch's own layers.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.backends import Backend
from support.layer_cases import inputs_on, random_cotangents, random_inputs, to_backend
from support.torch_autograd import grads, leaf, pairing

import xprnn

pytestmark = pytest.mark.needs("torch")
backends = pytest.mark.parametrize("backend", [Backend.NUMPY, Backend.TORCH], ids=str)

KINDS = {
    "tanh": (xprnn.RNN, {"nonlinearity": "tanh"}),
    "relu": (xprnn.RNN, {"nonlinearity": "relu"}),
    "lstm": (xprnn.LSTM, {}),
    "lstm-proj": (xprnn.LSTM, {"proj_size": 2}),
    "gru": (xprnn.GRU, {}),
}
kinds = pytest.mark.parametrize("name", KINDS)


def build(name, D=3, H=4, L=1, **options):
    kind, extra = KINDS[name]
    return kind(D, H, L, **extra, **options)


def torch_layer(name, layer, params):
    """Return torch's layer with the same parameters; xprnn's names are those of its state_dict."""
    import torch

    module = getattr(torch.nn, type(layer).__name__)(
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        bias=layer.bias,
        batch_first=layer.batch_first,
        bidirectional=layer.bidirectional,
        dtype=torch.float64,
        **KINDS[name][1],
    )
    module.load_state_dict({k: torch.tensor(v) for k, v in params.items()})
    return module


def torch_results(module, x, state, dy, dstate, lengths=None):
    """Return y, final, dx, dstate, dparams of torch, which uses packed sequences if there are lengths."""
    import torch

    x, state = leaf(x), leaf(state)
    if lengths is None:
        y, final = module(x, state)
    else:
        batch_first = module.batch_first
        pack, pad = torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence
        packed = pack(x, torch.tensor(lengths), batch_first=batch_first, enforce_sorted=False)
        y, final = module(packed, state)
        y, _ = pad(y, batch_first=batch_first, total_length=x.shape[1 if batch_first else 0])
    pairing((y, final), (dy, dstate)).backward()
    np_final = tuple(f.detach().numpy() for f in final) if isinstance(final, tuple) else final.detach().numpy()
    return (
        y.detach().numpy(),
        np_final,
        grads(x),
        grads(state),
        {k: p.grad.numpy() for k, p in module.named_parameters()},
    )


def compare_with_torch(backend, name, layer, rng, T=5, N=4, lengths=None):
    p = random_inputs(rng, layer, T, N)
    x = np.swapaxes(p.x, 0, 1) if layer.batch_first else p.x
    params, backend_x, state, _ = inputs_on(backend, p._replace(x=x), "float64")
    y, final, tape = layer.forward(params, backend_x, state, lengths=lengths)
    dy, dstate = random_cotangents(rng, y), random_cotangents(rng, final)
    result = layer.backward(tape, to_backend(backend, dy), to_backend(backend, dstate))
    expected = torch_results(torch_layer(name, layer, p.params), x, p.state, dy, dstate, lengths)
    assert result.dparams.keys() == expected[-1].keys()
    names = ("y", "final", "dx", "dstate", "dparams")
    for quantity, a, b in zip(names, (y, final, *result), expected, strict=True):
        assert_close(backend, quantity, a, b)


def assert_close(backend, name, actual, expected):
    """Compare nested dicts and tuples of float64 arrays to 1e-10."""
    if isinstance(expected, dict):
        for key in expected:
            assert_close(backend, f"{name}[{key}]", actual[key], expected[key])
    elif isinstance(expected, tuple):
        for key, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_close(backend, f"{name}[{key}]", a, b)
    else:
        actual = backend.to_numpy(actual)
        assert actual.shape == expected.shape, name
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10, err_msg=name)


@backends
@kinds
@pytest.mark.parametrize(
    ("L", "bidirectional", "bias", "batch_first"),
    [*itertools.product((1, 2, 3), (False, True), (True,), (False,)), (2, True, False, False), (2, True, True, True)],
)
def test_parity_of_stacks_and_directions(backend, rng, name, L, bidirectional, bias, batch_first):
    layer = build(name, L=L, bidirectional=bidirectional, bias=bias, batch_first=batch_first)
    compare_with_torch(backend, name, layer, rng)


@backends
@kinds
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [[5, 5, 5, 5], [5, 3, 2, 1], [1, 4, 2, 5], [3, 3, 3, 3], [5, 5, 4, 5]], ids=str)
def test_lengths_equal_packed_sequences(backend, rng, name, bidirectional, batch_first, lengths):
    layer = build(name, L=2, bidirectional=bidirectional, batch_first=batch_first)
    compare_with_torch(backend, name, layer, rng, lengths=lengths)


@backends
@kinds
@pytest.mark.parametrize("lengths", [[0, 4, 0, 2], [3, 0, 1, 0]], ids=str)
def test_rows_of_length_zero_do_not_influence_the_others(backend, rng, name, lengths):
    """torch rejects a length of 0, so the other rows are compared with torch's results without the empty rows."""
    layer = build(name, L=2, bidirectional=True)
    p = random_inputs(rng, layer, N=4)
    nonempty = [k for k, n in enumerate(lengths) if n]
    params, x, state, _ = inputs_on(backend, p, "float64")
    y, final, tape = layer.forward(params, x, state, lengths=lengths)
    dy, dfinal = random_cotangents(rng, y), random_cotangents(rng, final)
    dx, dstate, dparams = layer.backward(tape, to_backend(backend, dy), to_backend(backend, dfinal))

    def rows(tree, index):
        if isinstance(tree, tuple):
            return tuple(rows(a, index) for a in tree)
        return np.ascontiguousarray((tree if isinstance(tree, np.ndarray) else backend.to_numpy(tree))[:, index])

    lengths_left = [lengths[k] for k in nonempty]
    expected = torch_results(
        torch_layer(name, layer, p.params),
        rows(p.x, nonempty),
        rows(p.state, nonempty),
        rows(dy, nonempty),
        rows(dfinal, nonempty),
        lengths_left,
    )
    assert_close(
        backend, "nonempty", tuple(to_backend(backend, rows(a, nonempty)) for a in (y, final, dx, dstate)), expected[:4]
    )
    assert_close(backend, "dparams", dparams, expected[4])
    empty = [k for k in range(4) if k not in nonempty]
    assert not rows(y, empty).any()
    assert not rows(dx, empty).any()
    for a, b in ((final, p.state), (dstate, dfinal)):
        assert_close(backend, "empty", to_backend(backend, rows(a, empty)), rows(b, empty))


@backends
@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh"])
def test_parity_of_layers_of_different_sizes(backend, rng, kind):
    """torch has one size for all layers, so the reference is one torch layer after another."""
    sizes, layer = (4, 2, 3), build(kind, H=(4, 2, 3), L=3, bidirectional=True)
    p = random_inputs(rng, layer)
    params, x, state, _ = inputs_on(backend, p, "float64")
    y, final, tape = layer.forward(params, x, state)
    dy, dfinal = random_cotangents(rng, y), random_cotangents(rng, final)
    dx, dstate, dparams = layer.backward(tape, to_backend(backend, dy), to_backend(backend, dfinal))
    is_lstm = isinstance(p.state[0], tuple)

    def of_layer(tree, k):
        return tuple(per_layer[k] for per_layer in tree) if is_lstm else tree[k]

    hidden, width, modules = leaf(p.x), 3, []
    x_leaf, states, loss = hidden, [], 0
    for k, size in enumerate(sizes):
        layer_params = {n.replace(f"_l{k}", "_l0"): v for n, v in p.params.items() if f"_l{k}" in n}
        modules.append(torch_layer(kind, build(kind, D=width, H=size, bidirectional=True), layer_params))
        states.append(leaf(of_layer(p.state, k)))
        hidden, last = modules[-1](hidden, states[-1])
        loss = loss + pairing(last, of_layer(dfinal, k))
        assert_close(
            backend,
            f"final {k}",
            of_layer(final, k),
            tuple(a.detach().numpy() for a in last) if is_lstm else last.detach().numpy(),
        )
        width = 2 * size
    (loss + pairing(hidden, dy)).backward()
    assert_close(backend, "y", y, hidden.detach().numpy())
    assert_close(backend, "dx", dx, grads(x_leaf))
    for k, module in enumerate(modules):
        assert_close(backend, f"dstate {k}", of_layer(dstate, k), grads(states[k]))
        for name, w in module.named_parameters():
            assert_close(backend, name, dparams[name.replace("_l0", f"_l{k}")], w.grad.numpy())


@pytest.mark.parametrize("T", [0, 1])
def test_sequences_of_zero_and_one_step(rng, T):
    """T = 1 is compared with torch. torch rejects T = 0; there, the final state must be the initial state."""
    layer = build("lstm", L=2, bidirectional=True)
    if T:
        compare_with_torch(Backend.NUMPY, "lstm", layer, rng, T=T, N=1)
        return
    p = random_inputs(rng, layer, T=0)
    with pytest.raises(RuntimeError):
        torch_results(torch_layer("lstm", layer, p.params), p.x, p.state, p.x, p.state)
    y, final = layer(p.params, p.x, p.state)
    assert y.shape == (0, 3, 8)
    np.testing.assert_array_equal(final, p.state)
