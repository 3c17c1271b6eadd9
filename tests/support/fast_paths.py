"""Layers, inputs and comparisons for the tests of fast steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from support.backends import Backend
from support.layer_cases import random_inputs

import xprnn
from xprnn.engine import stack

XP = Backend.NUMPY

# Parametrizes `jit`, for `allow_jit`: compiled kernels where numba is installed, and NumPy kernels.
with_and_without_jit = pytest.mark.parametrize("jit", [pytest.param(True, marks=pytest.mark.needs("numba")), False])


def projected_lstm(D: int, H: int, *args: Any, **options: Any) -> xprnn.LSTM:
    """An LSTM of H + 1 units that projects h to about half as many features."""
    return xprnn.LSTM(D, H + 1, *args, proj_size=(H + 1) // 2, **options)


LAYERS: dict[str, Callable[..., Any]] = {
    "rnn": xprnn.RNN,
    "lstm": xprnn.LSTM,
    "gru": xprnn.GRU,
    "gru-before": partial(xprnn.GRU, reset_after=False),
    "lstm-proj": projected_lstm,
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)  # make(D, H, num_layers, **options)


def step_inputs(rng: np.random.Generator, layer: Any, n: int, dtype: str = "float64") -> tuple[Any, Any, Any]:
    """Random params, x (n, D) and state for one step."""
    p = random_inputs(rng, layer, 1, N=n)
    state = tuple(s.astype(dtype) for s in p.state) if isinstance(p.state, tuple) else p.state.astype(dtype)
    return {k: v.astype(dtype) for k, v in p.params.items()}, p.x[0].astype(dtype), state


def output_arrays(result: tuple[Any, Any]) -> list[Any]:
    """y and the arrays of the state."""
    y, state = result
    return [y, *(state if isinstance(state, tuple) else (state,))]


def check_fast_step(layer: Any, params: Any, x: Any, state: Any) -> tuple[Any, Any]:
    """Assert that the fast step applies, equals the validated step and keeps its arguments; return its result."""
    inputs = [x, *params.values(), *output_arrays((x, state))]
    copies = [a.copy() for a in inputs]
    result, validated = layer._fast_step(params, x, state), stack.step(layer, params, x, state)
    assert result is not None
    XP.assert_close(result, validated, condition=32)
    for a, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(a, copy)
    outputs = output_arrays(result)
    for k, a in enumerate(outputs):
        assert a.flags.writeable
        assert not any(np.shares_memory(a, b) for b in (*outputs[:k], *inputs))
    return result
