"""A single direction that walks each row from its last valid step to its first: the forward one on turned rows."""

from __future__ import annotations

import numpy as np
import pytest
from support.layer_cases import (
    CASES,
    MAIN_CASES,
    SLOW_LIBRARIES,
    inputs_on,
    random_cotangents,
    random_inputs,
    reference_outputs,
    to_backend,
)

import xprnn
from xprnn.gradcheck import check_layer
from xprnn.layers.sequential import from_config

differences = pytest.mark.not_on(
    "strict:no_float64", "strict:device1", "numpy:readonly", reason="differences are taken on the plain variant"
)
main_cases = pytest.mark.parametrize("name", MAIN_CASES)
LENGTHS = np.array([5, 0, 3, 1])


def turned(a, lengths=LENGTHS):
    """Each row (axis 1) turned around within its own length; what lies beyond stays."""
    out = a.copy()
    for n, length in enumerate(lengths):
        out[:length, n] = a[:length, n][::-1]
    return out


@pytest.mark.parametrize("flags", ["", "l", "lmr"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_naive_reference(xp, rng, name, flags):
    case = CASES[name]
    layer = case.make(3, 4, 2, reverse=True)
    p = random_inputs(rng, layer, flags=flags)
    params, x, state, on_flags = inputs_on(xp, p)
    y, final, tape = layer.forward(params, x, state, **on_flags)
    xp.assert_close((y, final), reference_outputs(case, layer, p), condition=64)
    xp.assert_close(layer(params, x, state, **on_flags)[0], xp.to_numpy(y), condition=0)
    assert "reverse" in tape.explain()


@pytest.mark.parametrize("flags", ["l", "lmr"])
@main_cases
def test_is_the_forward_layer_on_turned_rows(xp, rng, name, flags):
    """Outputs, final states and every gradient; nothing of the reverse walk itself is used for what is expected."""
    reverse, forward = (CASES[name].make(2, 3, 2, reverse=r) for r in (True, False))
    assert list(reverse.shapes()) == list(forward.shapes())
    p = random_inputs(rng, forward, T=5, N=4, flags=flags)
    p.flags["lengths"] = LENGTHS
    back = {k: v if k == "lengths" else turned(v) for k, v in p.flags.items()}
    y, final, tape = forward.forward(p.params, turned(p.x), p.state, **back)
    dy, dstate = random_cotangents(rng, y), random_cotangents(rng, final)
    want = forward.backward(tape, turned(dy), dstate)
    params, x, state, on_flags = inputs_on(xp, p)
    got_y, got_final, tape = reverse.forward(params, x, state, **on_flags)
    got = reverse.backward(tape, to_backend(xp, dy), to_backend(xp, dstate))
    xp.assert_close((got_y, got_final), (turned(y), final), condition=64)
    xp.assert_close(tuple(got), (turned(want.dx), *want[1:]), condition=500)


@differences
@pytest.mark.parametrize("flags", ["", "lmr"])
@main_cases
def test_gradients(xp, rng, name, flags):
    if xp.library in SLOW_LIBRARIES and (name, flags) != ("lstm", "lmr"):
        pytest.skip("the richest one is enough on the slowest libraries")
    layer = CASES[name].make(2, 3, 2, reverse=True)
    params, x, state, on_flags = inputs_on(xp, random_inputs(rng, layer, T=4, flags=flags), "float64")
    assert max(check_layer(layer, params, x, state, **on_flags).values()) < 1e-6


@pytest.mark.parametrize("options", [{"batch_first": True}, {"learned_state": True}, {"bias": False}], ids=str)
def test_options(rng, options):
    layer = xprnn.GRU(2, 3, 2, reverse=True, **options)
    p = random_inputs(rng, layer, T=4, N=3, flags="" if layer.batch_first else "l")
    x = np.swapaxes(p.x, 0, 1) if layer.batch_first else p.x
    check_layer(layer, p.params, x, None, **p.flags)


@main_cases
def test_states_after_every_step(rng, name):
    """The state at t is where a walk from the end to t has come: the final state of the sequence cut before t."""
    layer = CASES[name].make(2, 3, 2, reverse=True)
    p = random_inputs(rng, layer, T=4)
    _, _, tape = layer.forward(p.params, p.x, p.state)
    for t in range(4):
        _, final = layer(p.params, p.x[t:], p.state)
        finals = final if isinstance(final, tuple) else (final,)
        for k, states in enumerate(tape.states()):
            for s, f in zip(states, finals, strict=True):
                np.testing.assert_allclose(s[t], f[k], rtol=1e-12)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("lengths", [None, [5, 2, 4]], ids=str)
def test_is_the_reverse_half_of_torchs_layer(rng, kind, lengths):
    import torch

    module = getattr(torch.nn, kind)(3, 4, bidirectional=True, dtype=torch.float64)
    layer = getattr(xprnn, kind)(3, 4, reverse=True)
    weights = {k.removesuffix("_reverse"): v for k, v in module.named_parameters() if k.endswith("_reverse")}
    params = {k: v.detach().numpy() for k, v in weights.items()}
    x = torch.tensor(rng.normal(size=(5, 3, 3)), requires_grad=True)
    if lengths is None:
        y, final = module(x)
    else:
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        y, final = module(packed)
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, total_length=5)
    y, finals = y[..., 4:], [f[1:] for f in (final if isinstance(final, tuple) else (final,))]
    dy, dfinals = rng.normal(size=(5, 3, 4)), [rng.normal(size=(1, 3, 4)) for _ in finals]
    total = sum((a * torch.tensor(c)).sum() for a, c in zip((y, *finals), (dy, *dfinals), strict=True))
    wanted = torch.autograd.grad(total, [x, *weights.values()])
    got_y, got_final, tape = layer.forward(params, x.detach().numpy(), lengths=lengths)
    got = layer.backward(tape, dy, tuple(dfinals) if kind == "LSTM" else dfinals[0])
    got_finals = got_final if kind == "LSTM" else (got_final,)
    names = ("y", *("final" for _ in finals), "dx", *params)
    have = (got_y, *got_finals, got.dx, *(got.dparams[name] for name in params))
    for name, a, b in zip(names, have, (y, *finals, *wanted), strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.LSTM, xprnn.GRU])
def test_config_and_files(rng, tmp_path, kind):
    layer = kind(2, 3, 2, reverse=True)
    assert from_config(layer.config()) == layer
    assert layer != kind(2, 3, 2)
    older = {k: v for k, v in kind(2, 3).config().items() if k != "reverse"}
    assert from_config(older) == kind(2, 3)
    params = layer.init(rng, like=np.zeros(0))
    xprnn.save(tmp_path / "m.safetensors", layer, params)
    again, read = xprnn.load(tmp_path / "m.safetensors")
    x = rng.normal(size=(4, 2, 2))
    np.testing.assert_array_equal(again(read, x)[0], layer(params, x)[0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: xprnn.LSTM(2, 3, bidirectional=True, reverse=True), r"LSTM: reverse .* bidirectional .* choose one"),
        (lambda: xprnn.RNN(2, 3, reverse="yes"), r"RNN: reverse must be True or False, found 'yes'"),
        (
            lambda: xprnn.GRU(2, 3, reverse=True).step({}, np.zeros((1, 2))),
            r"GRU\.step: a reverse layer needs the whole",
        ),
    ],
)
def test_what_cannot_be(build, message):
    with pytest.raises(xprnn.InputError, match=message):
        build()
