"""Invalid arguments of recurrent layers raise one line: the function, the argument, the expected and found value."""

from __future__ import annotations

import numpy as np
import pytest
from support.layer_cases import LEAKY_CELL, inputs_on, random_inputs, to_backend

import xprnn
from xprnn import InputError

T, N = 4, 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: xprnn.LSTM(0, 3), "LSTM: input_size must be an integer >= 1, found 0"),
        (lambda: xprnn.LSTM(2, 0), "LSTM: hidden_size must be an integer >= 1, found 0"),
        (lambda: xprnn.LSTM(2, 3.0), "LSTM: hidden_size must"),
        (lambda: xprnn.LSTM(2, True), "LSTM: hidden_size must"),
        (lambda: xprnn.GRU(2, 3, 0), "GRU: num_layers must be an integer >= 1, found 0"),
        (lambda: xprnn.GRU(2, (3, 4)), "GRU: hidden_size has 2 entries but num_layers is 1"),
        (lambda: xprnn.GRU(2, (3, 0), 2), "GRU: hidden_size must be an integer >= 1, found 0"),
        (lambda: xprnn.GRU(2, 3, dropout=1.0), r"GRU: dropout must be in \[0, 1\), found 1.0"),
        (lambda: xprnn.GRU(2, 3, dropout=-0.1), "GRU: dropout must be in"),
        (lambda: xprnn.LSTM(2, 3, proj_size=3), "LSTM: proj_size must be smaller than hidden_size 3, found 3"),
        (lambda: xprnn.LSTM(2, 3, proj_size=-1), "LSTM: proj_size must be an integer >= 0, found -1"),
        (lambda: xprnn.LSTM(2, (5, 3), 2, proj_size=4), "LSTM: proj_size must be smaller than hidden_size 3"),
        (lambda: xprnn.Recurrent(2, 3), "Recurrent: a cell is needed"),
        (lambda: xprnn.Recurrent(2, 3, cell="lstm"), "Recurrent: cell must be an xprnn.Cell, found str"),
        (lambda: xprnn.RNN(2, 3, nonlinearity="swish"), "expected one of tanh.*found 'swish'"),
        (
            lambda: xprnn.Recurrent(2, 3, cell=LEAKY_CELL).config(),
            "Recurrent: a layer with a user-defined cell has no file form",
        ),
    ],
)
def test_invalid_options_raise_input_error(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def layer_inputs(xp, rng, layer):
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T, N))
    return params, x, state


@pytest.mark.parametrize("method", ["forward", "call"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lengths": [1, 2]}, r"lengths \(N,\) must have shape \(3,\), found \(2,\)"),
        ({"lengths": [[1, 2, 3]]}, r"lengths \(N,\) must have shape \(3,\), found \(1, 3\)"),
        ({"lengths": [1, 2, 5]}, r"lengths must be in 0..T=4, found \[1, 2, 5\]"),
        ({"lengths": [-1, 2, 3]}, r"lengths must be in 0..T=4, found \[-1, 2, 3\]"),
        ({"lengths": [1.0, 2.0, 3.0]}, "lengths must be integers, found float64"),
        ({"lengths": np.ones(3, bool)}, "lengths must be integers, found bool"),
        ({"mask": np.ones((3, 4), bool)}, r"mask \(T,N\) must have shape \(4, 3\), found \(3, 4\)"),
        ({"mask": np.ones((4, 3, 1), bool)}, r"mask \(T,N\) must have shape \(4, 3\), found \(4, 3, 1\)"),
        ({"mask": np.ones((4, 3), np.int64)}, "mask must be boolean, found .*int64"),
        ({"mask": np.ones((4, 3))}, "mask must be boolean, found .*float"),
        ({"reset": np.ones((4, 1), bool)}, r"reset \(T,N\) must have shape \(4, 3\), found \(4, 1\)"),
        ({"reset": np.ones((4, 3), np.int64)}, "reset must be boolean, found .*int64"),
    ],
)
def test_invalid_flags_raise_input_error(xp, rng, method, flags, message):
    layer = xprnn.GRU(2, 3, 2)
    params, x, state = layer_inputs(xp, rng, layer)
    backend_flags = {k: v if k == "lengths" else to_backend(xp, v) for k, v in flags.items()}
    where, call = ("GRU.forward", layer.forward) if method == "forward" else ("GRU", layer)
    with pytest.raises(InputError, match=f"^{where}: {message}") as caught:
        call(params, x, state, **backend_flags)
    assert "\n" not in str(caught.value)


@pytest.mark.not_on("numpy", reason="NumPy flags are allowed with NumPy arrays")
@pytest.mark.parametrize("flag", ["mask", "reset"])
def test_flags_of_another_library_raise_input_error(xp, rng, flag):
    layer = xprnn.GRU(2, 3)
    params, x, state = layer_inputs(xp, rng, layer)
    with pytest.raises(InputError, match=f"GRU.forward: {flag} is a numpy array but x is a"):
        layer.forward(params, x, state, **{flag: np.ones((T, N), bool)})


def test_flags_of_a_batch_first_layer_are_batch_first(xp, rng):
    layer = xprnn.GRU(2, 3, batch_first=True)
    p = random_inputs(rng, layer, N, T)  # x (N, T, D): N rows of T steps for a batch-first layer
    params, x, _, _ = inputs_on(xp, p)
    with pytest.raises(InputError, match=r"mask \(N,T\) must have shape \(3, 4\), found \(4, 3\)"):
        layer(params, x, mask=to_backend(xp, np.ones((T, N), bool)))


@pytest.mark.parametrize(
    ("kind", "state", "message"),
    [
        (xprnn.LSTM, lambda h: h, r"LSTM.forward: state must be the pair \(h, c\), found an array of shape"),
        (xprnn.LSTM, lambda h: (h,), r"state must be the pair \(h, c\), found a tuple of 1"),
        (xprnn.LSTM, lambda h: (h, h, h), r"state must be the pair \(h, c\), found a tuple of 3"),
        (xprnn.LSTM, lambda h: (h, h[:1, ...]), r"state c .* must have shape \(2, 3, 3\), found \(1, 3, 3\)"),
        (xprnn.LSTM, lambda h: (h, h[..., :2]), r"state c .* must have shape \(2, 3, 3\), found \(2, 3, 2\)"),
        (xprnn.GRU, lambda h: (h, h), "GRU.forward: state h must be one array, found a tuple of 2"),
        (xprnn.GRU, lambda h: h[:, 0, :], r"state h .* must have shape \(2, 3, 3\), found \(2, 3\)"),
        (xprnn.GRU, lambda h: h[:, :1, :], r"state h .* must have shape \(2, 3, 3\), found \(2, 1, 3\)"),
        (xprnn.GRU, lambda h: 0.0, "GRU.forward: state must be an array .* found float"),
    ],
)
def test_invalid_states_raise_input_error(xp, rng, kind, state, message):
    layer = kind(2, 3, 2)
    params, x, _ = layer_inputs(xp, rng, layer)
    with pytest.raises(InputError, match=message):
        layer.forward(params, x, state(xp.asarray(np.zeros((2, 3, 3)))))


def test_invalid_states_of_layers_of_different_sizes_raise_input_error(xp, rng):
    layer = xprnn.GRU(2, (3, 2), 2)
    params, x, (h0, h1) = layer_inputs(xp, rng, layer)
    for state, message in (
        (h0, "state h must have an array for each of 2 layers, found an array of shape"),
        ((h0,), "state h must have an array for each of 2 layers, found a tuple of 1"),
        ((h1, h0), r"state h\[0\] .* must have shape \(1, 3, 3\), found \(1, 3, 2\)"),
    ):
        with pytest.raises(InputError, match=message):
            layer(params, x, state)


@pytest.mark.not_on("strict:no_float64", reason="has one real dtype only")
def test_mixed_dtypes_raise_input_error(xp, rng):
    layer = xprnn.LSTM(2, 3)
    params, x, (h, c) = layer_inputs(xp, rng, layer)
    float32_state = [xp.xp.astype(a, xp.xp.float32) for a in (h, c)]
    for state, name in (((float32_state[0], c), "state"), ((h, float32_state[1]), r"state\[1\]")):
        with pytest.raises(InputError, match=f"LSTM: {name} is float32 but x is float64"):
            layer(params, x, state)
    y, _, tape = layer.forward(params, x)
    with pytest.raises(InputError, match=r"LSTM\.backward: dy is float32 but params is float64"):
        layer.backward(tape, xp.xp.astype(y, xp.xp.float32))


@pytest.mark.parametrize(
    ("dy", "dstate", "message"),
    [
        ((T, N, 2), None, r"LSTM.backward: dy \(the shape of y\) must have shape \(4, 3, 3\), found \(4, 3, 2\)"),
        ((N, T, 3), None, r"dy .* must have shape \(4, 3, 3\), found \(3, 4, 3\)"),
        (None, [(1, N, 3)], r"state must be the pair \(h, c\), found a tuple of 1"),
        (None, [(1, N, 3), (1, 1, 3)], r"state c .* must have shape \(1, 3, 3\), found \(1, 1, 3\)"),
    ],
)
def test_invalid_cotangents_raise_input_error(xp, rng, dy, dstate, message):
    layer = xprnn.LSTM(2, 3)
    params, x, state = layer_inputs(xp, rng, layer)
    _, _, tape = layer.forward(params, x, state)
    zeros = [None if s is None else xp.asarray(np.zeros(s)) for s in (dy, *(dstate or []))]
    with pytest.raises(InputError, match=message):
        layer.backward(tape, zeros[0], tuple(zeros[1:]) if dstate else None)


@pytest.mark.parametrize(
    ("dstates", "message"),
    [
        (lambda a: [(a, a)], "LSTM.backward: dstates must have 2 entries, as tape.states.. has, found 1"),
        (lambda a: [(a,), None], r"dstates\[0\] must have 2 entries \(h, c\), found 1"),
        (lambda a: [None, (a, a[:2, ...])], r"dstates\[1\] c \(T,N,H\) must have shape \(4, 3, 3\), found \(2, 3, 3\)"),
        (lambda a: [None, (a[..., :1], a)], r"dstates\[1\] h \(T,N,H\) must have shape \(4, 3, 3\), found \(4, 3, 1\)"),
    ],
)
def test_invalid_dstates_raise_input_error(xp, rng, dstates, message):
    layer = xprnn.LSTM(2, 3, 2)
    params, x, state = layer_inputs(xp, rng, layer)
    _, _, tape = layer.forward(params, x, state)
    with pytest.raises(InputError, match=message):
        layer.backward(tape, None, dstates=dstates(xp.asarray(np.zeros((T, N, 3)))))


@pytest.mark.parametrize("wrong_rng", [0, np.random.RandomState(0), "seed"])
def test_rng_of_dropout_must_be_a_generator(xp, rng, wrong_rng):
    layer = xprnn.GRU(2, 3, 2, dropout=0.5)
    params, x, state = layer_inputs(xp, rng, layer)
    with pytest.raises(InputError, match=r"GRU\.forward: rng must be a numpy\.random\.Generator"):
        layer.forward(params, x, state, rng=wrong_rng)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((T, N)), r"x must be \(T,N,D\), 3 axes, found shape \(4, 3\)"),
        (np.zeros((T, N, 5)), r"x has 5 features but weight_ih_l0 expects 2"),
        (np.zeros((T, N, 2), np.int64), r"integer x must be \(T,N\), the numbers of one-hot classes"),
        (np.zeros((T, N, 2), bool), r"x must be of a real floating or an integer dtype, found \S*bool$"),
        (
            np.zeros((T, N), bool),
            "a real floating or an integer dtype, found .*bool: as class numbers, convert it to int",
        ),
    ],
)
def test_invalid_x_raises_input_error(xp, rng, x, message):
    layer = xprnn.GRU(2, 3)
    params, _, state = layer_inputs(xp, rng, layer)
    with pytest.raises(InputError, match=message):
        layer(params, to_backend(xp, x), state)


def test_invalid_x_of_a_step_raises_input_error(xp, rng):
    layer = xprnn.GRU(2, 3)
    params, x, state = layer_inputs(xp, rng, layer)
    with pytest.raises(InputError, match=r"GRU.step: x must be \(N,D\), 2 axes, found shape \(4, 3, 2\)"):
        layer.step(params, x, state)
    with pytest.raises(
        InputError, match=r"GRU\.step: x must be of .* found .*bool: as class numbers, convert it to int"
    ):
        layer.step(params, to_backend(xp, np.ones(N, bool)), state)
    with pytest.raises(InputError, match=r"GRU\.step: x has 1 features but weight_ih_l0 expects 2"):
        layer.step(params, x[0, :, :1], state)
