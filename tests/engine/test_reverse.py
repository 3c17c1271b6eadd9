"""Layers with reverse=True: the results of a forward layer on rows whose valid steps are reversed."""

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

finite_differences = pytest.mark.not_on(
    "strict:no_float64", "strict:device1", "numpy:readonly", reason="finite differences are taken on the plain variant"
)
main_cases = pytest.mark.parametrize("name", MAIN_CASES)
LENGTHS = np.array([5, 0, 3, 1])


def reverse_rows(a, lengths=LENGTHS):
    """Reverse the valid steps of each row (axis 1); leave the padding as it is."""
    out = a.copy()
    for n, length in enumerate(lengths):
        out[:length, n] = a[:length, n][::-1]
    return out


@pytest.mark.parametrize("flags", ["", "l", "lmr"])
@pytest.mark.parametrize("name", CASES)
def test_reverse_layer_equals_the_naive_reference(xp, rng, name, flags):
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
def test_reverse_layer_equals_forward_layer_on_reversed_rows(xp, rng, name, flags):
    """Outputs, final states and every gradient. The expected values do not use a reverse layer."""
    reverse, forward = (CASES[name].make(2, 3, 2, reverse=r) for r in (True, False))
    assert list(reverse.shapes()) == list(forward.shapes())
    p = random_inputs(rng, forward, T=5, N=4, flags=flags)
    p.flags["lengths"] = LENGTHS
    reversed_flags = {k: v if k == "lengths" else reverse_rows(v) for k, v in p.flags.items()}
    y, final, tape = forward.forward(p.params, reverse_rows(p.x), p.state, **reversed_flags)
    dy, dstate = random_cotangents(rng, y), random_cotangents(rng, final)
    expected = forward.backward(tape, reverse_rows(dy), dstate)
    params, x, state, on_flags = inputs_on(xp, p)
    actual_y, actual_final, tape = reverse.forward(params, x, state, **on_flags)
    actual = reverse.backward(tape, to_backend(xp, dy), to_backend(xp, dstate))
    xp.assert_close((actual_y, actual_final), (reverse_rows(y), final), condition=64)
    xp.assert_close(tuple(actual), (reverse_rows(expected.dx), *expected[1:]), condition=500)


@finite_differences
@pytest.mark.parametrize("flags", ["", "lmr"])
@main_cases
@pytest.mark.applies_if(
    lambda xp, name, flags: xp.library not in SLOW_LIBRARIES or (name, flags) == ("lstm", "lmr"),
    reason="slow: one case with all flags is enough on these libraries",
)
def test_gradients_of_a_reverse_layer(xp, rng, name, flags):
    layer = CASES[name].make(2, 3, 2, reverse=True)
    params, x, state, on_flags = inputs_on(xp, random_inputs(rng, layer, T=4, flags=flags), "float64")
    assert max(check_layer(layer, params, x, state, **on_flags).values()) < 1e-6


@pytest.mark.parametrize("options", [{"batch_first": True}, {"learned_state": True}, {"bias": False}], ids=str)
def test_gradients_of_a_reverse_layer_with_options(rng, options):
    layer = xprnn.GRU(2, 3, 2, reverse=True, **options)
    p = random_inputs(rng, layer, T=4, N=3, flags="" if layer.batch_first else "l")
    x = np.swapaxes(p.x, 0, 1) if layer.batch_first else p.x
    check_layer(layer, p.params, x, None, **p.flags)


@main_cases
def test_states_of_a_reverse_layer_equal_final_states_of_suffixes(rng, name):
    """The state at t is the final state of the reverse layer on the steps from t to the end."""
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
def test_reverse_layer_equals_the_reverse_direction_of_torch(rng, kind, lengths):
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
    expected_grads = torch.autograd.grad(total, [x, *weights.values()])
    actual_y, actual_final, tape = layer.forward(params, x.detach().numpy(), lengths=lengths)
    actual = layer.backward(tape, dy, tuple(dfinals) if kind == "LSTM" else dfinals[0])
    actual_finals = actual_final if kind == "LSTM" else (actual_final,)
    names = ("y", *("final" for _ in finals), "dx", *params)
    arrays = (actual_y, *actual_finals, actual.dx, *(actual.dparams[name] for name in params))
    for name, a, b in zip(names, arrays, (y, *finals, *expected_grads), strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.LSTM, xprnn.GRU])
def test_reverse_is_saved_in_config_and_files(rng, tmp_path, kind):
    layer = kind(2, 3, 2, reverse=True)
    assert from_config(layer.config()) == layer
    assert layer != kind(2, 3, 2)
    config_without_reverse = {k: v for k, v in kind(2, 3).config().items() if k != "reverse"}
    assert from_config(config_without_reverse) == kind(2, 3)
    params = layer.init(rng, like=np.zeros(0))
    xprnn.save(tmp_path / "m.safetensors", layer, params)
    loaded, loaded_params = xprnn.load(tmp_path / "m.safetensors")
    x = rng.normal(size=(4, 2, 2))
    np.testing.assert_array_equal(loaded(loaded_params, x)[0], layer(params, x)[0])


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
def test_invalid_use_of_reverse_raises(build, message):
    with pytest.raises(xprnn.InputError, match=message):
        build()
