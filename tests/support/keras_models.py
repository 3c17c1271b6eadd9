"""The Keras models that tests and tests/data/record_keras.py share, and what both do with them."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np

import xprnn

N, T, D, V = 3, 5, 3, 6


def build_model(keras: Any, name: str) -> Any:
    """The model of this name, its weights not yet drawn."""
    L = keras.layers
    rows, ids = L.Input((None, D)), L.Input((None,), dtype="int32")
    one = {
        "simple_rnn_last": lambda: [rows, L.SimpleRNN(4), L.Dense(2)],
        "lstm_alone": lambda: [rows, L.LSTM(4, return_sequences=True, use_bias=False)],
        "lstm_stack": lambda: [
            rows,
            L.LSTM(4, return_sequences=True, recurrent_activation="hard_sigmoid"),
            L.Dropout(0.5),
            L.LSTM(3, return_sequences=True),
            L.Dense(2, activation="softmax"),
        ],
        "gru_masked_backwards": lambda: [
            rows,
            L.Masking(),
            L.GRU(4, return_sequences=True, go_backwards=True),
            L.GRU(3, reset_after=False, return_sequences=True, activation="softsign"),
            L.TimeDistributed(L.Dense(2, activation="elu")),
        ],
        "bidirectional": lambda: [
            ids,
            L.Embedding(V, D, mask_zero=True),
            L.Bidirectional(L.LSTM(3, return_sequences=True)),
            L.Bidirectional(L.GRU(2), merge_mode="mul"),
            L.Dense(2, activation="tanh"),
        ],
        "masks_go_on": lambda: [
            rows,
            L.Masking(),
            L.Bidirectional(L.GRU(3, return_sequences=True), merge_mode="ave"),
            L.LSTM(2, return_sequences=True, zero_output_for_mask=True, activation="leaky_relu"),
            L.Dense(2, activation="log_softmax"),
        ],
        "stacked_cells": lambda: [
            rows,
            L.Masking(),
            L.RNN(
                L.StackedRNNCells([L.LSTMCell(3), L.GRUCell(2), L.SimpleRNNCell(4), L.GRUCell(3)]),
                return_sequences=True,
                zero_output_for_mask=True,
            ),
            keras.Sequential([L.Dense(2), L.LeakyReLU(0.1), L.SpatialDropout1D(0.2)]),
            L.LSTM(2, go_backwards=True),
        ],
    }
    if name in one:
        return keras.Sequential(one[name]())
    assert name == "pair_with_states"
    masked = L.Masking(-1.0)(rows)
    held, state = L.GRU(3, return_sequences=True, return_state=True)(masked)
    pair = L.Bidirectional(L.SimpleRNN(2, return_sequences=True), merge_mode=None)(held)
    return keras.Model(rows, [*pair, state])


MODEL_NAMES = (
    "simple_rnn_last",
    "lstm_alone",
    "lstm_stack",
    "gru_masked_backwards",
    "bidirectional",
    "masks_go_on",
    "stacked_cells",
    "pair_with_states",
)


def set_dtype(keras: Any, dtype: str) -> None:
    """Let Keras make and compute everything in this dtype."""
    from keras.src.backend.common import dtypes

    # On JAX some of its operations round float64 to float32, by this table; float64 proves 1e-10.
    dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)


def random_inputs(rng: np.random.Generator, name: str, dtype: str) -> Any:
    """Numbers, or ids, with holes and whole rows of padding."""
    skipped = np.array([[0, 0, 1, 1, 0], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], bool)
    if name == "bidirectional":
        return np.where(skipped, 0, rng.integers(1, V, size=(N, T))).astype("int32")
    value = -1.0 if name == "pair_with_states" else 0.0
    return np.where(skipped[..., None], value, rng.normal(size=(N, T, D))).astype(dtype)


def randomize_weights(rng: np.random.Generator, model: Any) -> None:
    """Random weights, biases included."""
    for variable in model.trainable_variables:
        variable.assign((0.6 * rng.normal(size=variable.shape)).astype(variable.dtype))


def flatten(tree: Any) -> list[Any]:
    """The arrays of nested tuples, lists and dicts in order."""
    if isinstance(tree, dict):
        return [a for v in tree.values() for a in flatten(v)]
    return [a for v in tree for a in flatten(v)] if isinstance(tree, (tuple, list)) else [tree]


def assert_same_gradients(got: dict[str, Any], want: dict[str, Any], rtol: float) -> None:
    """Hold our gradients to Keras's; where Keras has one bias, both of ours have its gradient."""
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        twin = name.replace("bias_hh", "bias_ih")
        expected = want[twin] if not np.any(gradient) else gradient
        np.testing.assert_allclose(got[name], expected, rtol=rtol, atol=rtol, err_msg=name)


def outputs_and_gradients(model: Any, params: Any, x: Any, dy: list[Any]) -> tuple[list[Any], Any]:
    """Outputs (the state of a GRU that returns it among them) and gradients of <outputs, dy>."""
    y, state, tape = model.forward(params, x)
    if not isinstance(y, tuple):
        return [y], model.backward(tape, dy[0])
    key = next(iter(state))
    dstate = {k: None if k != key else dy[2][None] for k in state}
    return [*y, state[key][0]], model.backward(tape, (dy[0], dy[1]), dstate)


def assert_matches_keras(model: Any, params: Any, numbers: Any, rtol: float) -> None:
    """The outputs and gradients that were recorded, or that Keras gives now."""
    count = len([k for k in numbers if k.startswith("y")])
    y, got = outputs_and_gradients(model, params, numbers["x"], [numbers[f"dy{k}"] for k in range(count)])
    assert len(y) == count
    for k, a in enumerate(y):
        assert a.dtype == numbers[f"y{k}"].dtype
        np.testing.assert_allclose(a, numbers[f"y{k}"], rtol=rtol, atol=rtol, err_msg=f"y{k}")
    if "dx" in numbers:
        np.testing.assert_allclose(got.dx, numbers["dx"], rtol=rtol, atol=rtol, err_msg="dx")
    assert_same_gradients(got.dparams, {k[5:]: numbers[k] for k in numbers if k.startswith("grad.")}, rtol)


def keras_results(keras: Any, model: Any, x: Any, rng: np.random.Generator) -> dict[str, Any]:
    """What Keras says: outputs, and by JAX's own differentiation every gradient, under our names."""
    import jax

    trained = [v.value for v in model.trainable_variables]
    integer = x.dtype.kind == "i"

    def outputs(trained: Any, x: Any) -> Any:
        return flatten(model.stateless_call(trained, [v.value for v in model.non_trainable_variables], x)[0])

    y = [np.asarray(a) for a in outputs(trained, x)]
    dy = [rng.normal(size=a.shape).astype(a.dtype) for a in y]

    def paired(trained: Any, x: Any) -> Any:
        return sum((a * c).sum() for a, c in zip(outputs(trained, x), dy, strict=True))

    dtrained, *dx = jax.grad(paired, argnums=(0,) if integer else (0, 1))(trained, x)
    for variable, gradient in zip(model.trainable_variables, dtrained, strict=True):
        variable.assign(gradient)
    _, named = xprnn.from_keras(model)
    for variable, value in zip(model.trainable_variables, trained, strict=True):
        variable.assign(value)
    found = {f"y{k}": a for k, a in enumerate(y)} | {f"dy{k}": a for k, a in enumerate(dy)} | {"x": x}
    found |= {f"grad.{k}": a for k, a in named.items()}
    return found | ({} if integer else {"dx": np.asarray(dx[0])})


def keras_on_jax():
    """Keras on JAX, in float64."""
    os.environ["KERAS_BACKEND"] = "jax"
    import jax

    jax.config.update("jax_enable_x64", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import keras
    set_dtype(keras, "float64")
    return keras
