"""Parity with torch in float64, to 1e-10: outputs, final states and every gradient, final-state cotangents included.

torch is the oracle; what is tested is NumPy's in-place scan and the generic scan on torch's own arrays.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.backends import Backend
from support.layer_cases import inputs_on, random_cotangents, random_inputs, to_backend

import xprnn

pytestmark = pytest.mark.needs("torch")
homes = pytest.mark.parametrize("home", [Backend.NUMPY, Backend.TORCH], ids=str)

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


def oracle(name, layer, params):
    """torch's own layer with the same parameters: its state_dict takes xprnn's names as they are."""
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


def leaf(tree):
    import torch

    if isinstance(tree, tuple):
        return tuple(leaf(a) for a in tree)
    return torch.tensor(tree, requires_grad=True)


def grads(tree):
    return tuple(grads(a) for a in tree) if isinstance(tree, tuple) else tree.grad.numpy()


def pairing(outputs, cots):
    """<outputs, cotangents>, whose torch gradient is the adjoint."""
    import torch

    if isinstance(outputs, tuple):
        return sum(pairing(a, b) for a, b in zip(outputs, cots, strict=True))
    return (outputs * torch.tensor(cots)).sum()


def torch_answer(module, x, state, dy, dstate, lengths=None):
    """y, final, dx, dstate, dparams of torch; with lengths through its packed sequences."""
    import torch

    x, state = leaf(x), leaf(state)
    if lengths is None:
        y, final = module(x, state)
    else:
        first = module.batch_first
        pack, pad = torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence
        given_ = pack(x, torch.tensor(lengths), batch_first=first, enforce_sorted=False)
        y, final = module(given_, state)
        y, _ = pad(y, batch_first=first, total_length=x.shape[1 if first else 0])
    pairing((y, final), (dy, dstate)).backward()
    numbers = tuple(f.detach().numpy() for f in final) if isinstance(final, tuple) else final.detach().numpy()
    return (
        y.detach().numpy(),
        numbers,
        grads(x),
        grads(state),
        {k: p.grad.numpy() for k, p in module.named_parameters()},
    )


def compare(home, name, layer, rng, T=5, N=4, lengths=None):
    p = random_inputs(rng, layer, T, N)
    x = np.swapaxes(p.x, 0, 1) if layer.batch_first else p.x
    params, x_here, state, _ = inputs_on(home, p._replace(x=x), "float64")
    y, final, tape = layer.forward(params, x_here, state, lengths=lengths)
    dy, dstate = random_cotangents(rng, y), random_cotangents(rng, final)
    got = layer.backward(tape, to_backend(home, dy), to_backend(home, dstate))
    want = torch_answer(oracle(name, layer, p.params), x, p.state, dy, dstate, lengths)
    assert got.dparams.keys() == want[-1].keys()
    for part, have, wanted in zip(("y", "final", "dx", "dstate", "dparams"), (y, final, *got), want, strict=True):
        within(home, part, have, wanted)


def within(home, name, have, want):
    if isinstance(want, dict):
        for key in want:
            within(home, f"{name}[{key}]", have[key], want[key])
    elif isinstance(want, tuple):
        for key, (a, b) in enumerate(zip(have, want, strict=True)):
            within(home, f"{name}[{key}]", a, b)
    else:
        have = home.to_numpy(have)
        assert have.shape == want.shape, name
        assert have.dtype == np.float64
        np.testing.assert_allclose(have, want, rtol=1e-10, atol=1e-10, err_msg=name)


@homes
@kinds
@pytest.mark.parametrize(
    ("L", "bidirectional", "bias", "batch_first"),
    [*itertools.product((1, 2, 3), (False, True), (True,), (False,)), (2, True, False, False), (2, True, True, True)],
)
def test_parity(home, rng, name, L, bidirectional, bias, batch_first):
    layer = build(name, L=L, bidirectional=bidirectional, bias=bias, batch_first=batch_first)
    compare(home, name, layer, rng)


@homes
@kinds
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [[5, 5, 5, 5], [5, 3, 2, 1], [1, 4, 2, 5], [3, 3, 3, 3], [5, 5, 4, 5]], ids=str)
def test_lengths_are_packed_sequences(home, rng, name, bidirectional, batch_first, lengths):
    layer = build(name, L=2, bidirectional=bidirectional, batch_first=batch_first)
    compare(home, name, layer, rng, lengths=lengths)


@homes
@kinds
@pytest.mark.parametrize("lengths", [[0, 4, 0, 2], [3, 0, 1, 0]], ids=str)
def test_empty_rows_leave_the_others_alone(home, rng, name, lengths):
    """torch refuses a length of 0: the rows that have one must be as if they were not there."""
    layer = build(name, L=2, bidirectional=True)
    p = random_inputs(rng, layer, N=4)
    full = [k for k, n in enumerate(lengths) if n]
    params, x, state, _ = inputs_on(home, p, "float64")
    y, final, tape = layer.forward(params, x, state, lengths=lengths)
    dy, dfinal = random_cotangents(rng, y), random_cotangents(rng, final)
    dx, dstate, dparams = layer.backward(tape, to_backend(home, dy), to_backend(home, dfinal))

    def rows(tree, keep):
        if isinstance(tree, tuple):
            return tuple(rows(a, keep) for a in tree)
        return np.ascontiguousarray((tree if isinstance(tree, np.ndarray) else home.to_numpy(tree))[:, keep])

    some = [lengths[k] for k in full]
    want = torch_answer(
        oracle(name, layer, p.params), rows(p.x, full), rows(p.state, full), rows(dy, full), rows(dfinal, full), some
    )
    within(home, "full", tuple(to_backend(home, rows(a, full)) for a in (y, final, dx, dstate)), want[:4])
    within(home, "dparams", dparams, want[4])
    empty = [k for k in range(4) if k not in full]
    assert not rows(y, empty).any()
    assert not rows(dx, empty).any()
    for a, b in ((final, p.state), (dstate, dfinal)):
        within(home, "empty", to_backend(home, rows(a, empty)), rows(b, empty))


@homes
@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh"])
def test_parity_of_layers_of_different_sizes(home, rng, kind):
    """torch has one size for all: its layers are chained one by one."""
    sizes, layer = (4, 2, 3), build(kind, H=(4, 2, 3), L=3, bidirectional=True)
    p = random_inputs(rng, layer)
    params, x, state, _ = inputs_on(home, p, "float64")
    y, final, tape = layer.forward(params, x, state)
    dy, dfinal = random_cotangents(rng, y), random_cotangents(rng, final)
    dx, dstate, dparams = layer.backward(tape, to_backend(home, dy), to_backend(home, dfinal))
    pair = isinstance(p.state[0], tuple)

    def of(tree, k):
        return tuple(part[k] for part in tree) if pair else tree[k]

    inner, width, modules = leaf(p.x), 3, []
    start, carried, total = inner, [], 0
    for k, size in enumerate(sizes):
        own = {n.replace(f"_l{k}", "_l0"): v for n, v in p.params.items() if f"_l{k}" in n}
        modules.append(oracle(kind, build(kind, D=width, H=size, bidirectional=True), own))
        carried.append(leaf(of(p.state, k)))
        inner, last = modules[-1](inner, carried[-1])
        total = total + pairing(last, of(dfinal, k))
        within(
            home, f"final {k}", of(final, k), tuple(a.detach().numpy() for a in last) if pair else last.detach().numpy()
        )
        width = 2 * size
    (total + pairing(inner, dy)).backward()
    within(home, "y", y, inner.detach().numpy())
    within(home, "dx", dx, grads(start))
    for k, module in enumerate(modules):
        within(home, f"dstate {k}", of(dstate, k), grads(carried[k]))
        for name, w in module.named_parameters():
            within(home, name, dparams[name.replace("_l0", f"_l{k}")], w.grad.numpy())


@pytest.mark.parametrize("T", [0, 1])
def test_the_shortest_sequences(rng, T):
    """T = 1 against torch, which refuses T = 0; there, the engine hands everything through."""
    layer = build("lstm", L=2, bidirectional=True)
    if T:
        compare(Backend.NUMPY, "lstm", layer, rng, T=T, N=1)
        return
    p = random_inputs(rng, layer, T=0)
    with pytest.raises(RuntimeError):
        torch_answer(oracle("lstm", layer, p.params), p.x, p.state, p.x, p.state)
    y, final = layer(p.params, p.x, p.state)
    assert y.shape == (0, 3, 8)
    np.testing.assert_array_equal(final, p.state)
