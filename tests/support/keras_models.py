"""Keras models with random weights and inputs, their outputs and gradients, and the comparison with xprnn.

The tests and tests/data/record_keras.py use the same models.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np

import xprnn

N, T, D, V = 3, 5, 3, 6


def build_model(keras: Any, name: str) -> Any:
    """Build the model with this name, one of MODEL_NAMES."""
    L = keras.layers
    sequence_input, id_input = L.Input((None, D)), L.Input((None,), dtype="int32")
    sequential_layers = {
        "simple_rnn_last": lambda: [sequence_input, L.SimpleRNN(4), L.Dense(2)],
        "lstm_alone": lambda: [sequence_input, L.LSTM(4, return_sequences=True, use_bias=False)],
        "lstm_stack": lambda: [
            sequence_input,
            L.LSTM(4, return_sequences=True, recurrent_activation="hard_sigmoid"),
            L.Dropout(0.5),
            L.LSTM(3, return_sequences=True),
            L.Dense(2, activation="softmax"),
        ],
        "gru_masked_backwards": lambda: [
            sequence_input,
            L.Masking(),
            L.GRU(4, return_sequences=True, go_backwards=True),
            L.GRU(3, reset_after=False, return_sequences=True, activation="softsign"),
            L.TimeDistributed(L.Dense(2, activation="elu")),
        ],
        "bidirectional": lambda: [
            id_input,
            L.Embedding(V, D, mask_zero=True),
            L.Bidirectional(L.LSTM(3, return_sequences=True)),
            L.Bidirectional(L.GRU(2), merge_mode="mul"),
            L.Dense(2, activation="tanh"),
        ],
        "masks_go_on": lambda: [
            sequence_input,
            L.Masking(),
            L.Bidirectional(L.GRU(3, return_sequences=True), merge_mode="ave"),
            L.LSTM(2, return_sequences=True, zero_output_for_mask=True, activation="leaky_relu"),
            L.Dense(2, activation="log_softmax"),
        ],
        "stacked_cells": lambda: [
            sequence_input,
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
    if name in sequential_layers:
        return keras.Sequential(sequential_layers[name]())
    assert name == "pair_with_states"
    masked = L.Masking(-1.0)(sequence_input)
    y, state = L.GRU(3, return_sequences=True, return_state=True)(masked)
    both_directions = L.Bidirectional(L.SimpleRNN(2, return_sequences=True), merge_mode=None)(y)
    return keras.Model(sequence_input, [*both_directions, state])


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
    """Set the dtype of all Keras variables and computations."""
    from keras.src.backend.common import dtypes

    # With this table, some Keras operations on JAX round float64 to float32, but the tests compare to 1e-10.
    dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)


def random_inputs(rng: np.random.Generator, name: str, dtype: str) -> Any:
    """Random inputs of a model, with masked steps in the middle of a row and a row that is completely masked."""
    masked = np.array([[0, 0, 1, 1, 0], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], bool)
    if name == "bidirectional":
        return np.where(masked, 0, rng.integers(1, V, size=(N, T))).astype("int32")
    mask_value = -1.0 if name == "pair_with_states" else 0.0
    return np.where(masked[..., None], mask_value, rng.normal(size=(N, T, D))).astype(dtype)


def randomize_weights(rng: np.random.Generator, model: Any) -> None:
    """Assign random numbers to all weights and biases."""
    for variable in model.trainable_variables:
        variable.assign((0.6 * rng.normal(size=variable.shape)).astype(variable.dtype))


def flatten(tree: Any) -> list[Any]:
    """Return the arrays of nested tuples, lists and dicts, in order."""
    if isinstance(tree, dict):
        return [a for v in tree.values() for a in flatten(v)]
    return [a for v in tree for a in flatten(v)] if isinstance(tree, (tuple, list)) else [tree]


def assert_same_gradients(gradients: dict[str, Any], expected: dict[str, Any], rtol: float) -> None:
    """Compare gradients with those of Keras; where Keras has one bias, bias_ih and bias_hh both have its gradient."""
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        ih_name = name.replace("bias_hh", "bias_ih")
        reference = expected[ih_name] if not np.any(gradient) else gradient
        np.testing.assert_allclose(gradients[name], reference, rtol=rtol, atol=rtol, err_msg=name)


def outputs_and_gradients(model: Any, params: Any, x: Any, dy: list[Any]) -> tuple[list[Any], Any]:
    """Return the outputs (for pair_with_states with the final state of the GRU) and the gradients of <outputs, dy>."""
    y, state, tape = model.forward(params, x)
    if not isinstance(y, tuple):
        return [y], model.backward(tape, dy[0])
    layer_name = next(iter(state))
    dstate = {k: None if k != layer_name else dy[2][None] for k in state}
    return [*y, state[layer_name][0]], model.backward(tape, (dy[0], dy[1]), dstate)


def assert_matches_keras(model: Any, params: Any, recorded: Any, rtol: float) -> None:
    """Compare outputs and gradients with the results of Keras, as from `keras_results`."""
    count = len([k for k in recorded if k.startswith("y")])
    y, gradients = outputs_and_gradients(model, params, recorded["x"], [recorded[f"dy{k}"] for k in range(count)])
    assert len(y) == count
    for k, output in enumerate(y):
        assert output.dtype == recorded[f"y{k}"].dtype
        np.testing.assert_allclose(output, recorded[f"y{k}"], rtol=rtol, atol=rtol, err_msg=f"y{k}")
    if "dx" in recorded:
        np.testing.assert_allclose(gradients.dx, recorded["dx"], rtol=rtol, atol=rtol, err_msg="dx")
    assert_same_gradients(gradients.dparams, {k[5:]: recorded[k] for k in recorded if k.startswith("grad.")}, rtol)


def keras_results(keras: Any, model: Any, x: Any, rng: np.random.Generator) -> dict[str, Any]:
    """Return x, Keras's outputs y0..., random cotangents dy0..., and gradients by jax.grad, under xprnn's names."""
    import jax

    weights = [v.value for v in model.trainable_variables]
    has_ids = x.dtype.kind == "i"

    def outputs(weights: Any, x: Any) -> Any:
        return flatten(model.stateless_call(weights, [v.value for v in model.non_trainable_variables], x)[0])

    y = [np.asarray(array) for array in outputs(weights, x)]
    dy = [rng.normal(size=array.shape).astype(array.dtype) for array in y]

    def pairing(weights: Any, x: Any) -> Any:
        return sum((array * cotangent).sum() for array, cotangent in zip(outputs(weights, x), dy, strict=True))

    dweights, *dx = jax.grad(pairing, argnums=(0,) if has_ids else (0, 1))(weights, x)
    for variable, gradient in zip(model.trainable_variables, dweights, strict=True):
        variable.assign(gradient)
    _, gradients = xprnn.from_keras(model)
    for variable, weight in zip(model.trainable_variables, weights, strict=True):
        variable.assign(weight)
    results = {f"y{k}": array for k, array in enumerate(y)} | {f"dy{k}": array for k, array in enumerate(dy)} | {"x": x}
    results |= {f"grad.{k}": array for k, array in gradients.items()}
    return results | ({} if has_ids else {"dx": np.asarray(dx[0])})


def keras_on_jax():
    """Import Keras with the JAX backend and float64."""
    os.environ["KERAS_BACKEND"] = "jax"
    import jax

    jax.config.update("jax_enable_x64", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import keras
    set_dtype(keras, "float64")
    return keras
