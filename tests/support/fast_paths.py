"""Layers, inputs and comparisons for the tests of fast steps and of planned calls."""

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
from xprnn.kernels.config import reference_only

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
    """Assert that the fast step applies, equals the checked step and keeps its arguments; return its result."""
    inputs = [x, *params.values(), *output_arrays((x, state))]
    copies = [a.copy() for a in inputs]
    result, checked = layer._fast_step(params, x, state), stack.step(layer, params, x, state)
    assert result is not None
    XP.assert_close(result, checked, condition=32)
    for a, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(a, copy)
    outputs = output_arrays(result)
    for k, a in enumerate(outputs):
        assert a.flags.writeable
        assert not any(np.shares_memory(a, b) for b in (*outputs[:k], *inputs))
    return result


def as_dtype(tree: Any, dtype: Any) -> Any:
    """Convert the arrays of nested tuples and dicts."""
    if isinstance(tree, dict):
        return {name: as_dtype(a, dtype) for name, a in tree.items()}
    return tuple(as_dtype(a, dtype) for a in tree) if isinstance(tree, tuple) else tree.astype(dtype)


def state_arrays(state: Any) -> tuple[Any, ...]:
    """Return the arrays of a state: of a tuple, one array, or None."""
    return () if state is None else state if isinstance(state, tuple) else (state,)


def reference_call(layer: Any, params: Any, x: Any, state: Any, lengths: Any = None) -> tuple[Any, Any, Any]:
    """Return y, the final state and the tape of the checked path and the reference scan."""
    with reference_only():
        return stack.forward(layer, params, x, state, lengths=lengths, record_tape=True)


def planned_call(layer: Any, params: Any, x: Any, state: Any, lengths: Any = None, *, record_tape: bool) -> Any:
    """Let the checked path make the plan of a call; return what the plan returns: y, the state and the tape."""
    layer(params, x, state, lengths)
    assert layer._calls.key(x, lengths) in layer._calls.plans
    result = layer._calls.forward(params, x, state, lengths, record_tape=record_tape)
    assert result is not None
    return result


def check_planned_call(
    layer: Any, params: Any, x: Any, state: Any, lengths: Any = None, *, condition: float = 64
) -> tuple[Any, Any]:
    """Assert that a plan runs inference, equals the reference scan, and keeps its arguments; return y and the state."""
    inputs = [x, *params.values(), *state_arrays(state)]
    copies = [a.copy() for a in inputs]
    y, final, tape = planned_call(layer, params, x, state, lengths, record_tape=False)
    assert tape is None
    XP.assert_close((y, final), reference_call(layer, params, x, state, lengths)[:2], condition=condition)
    for a, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(a, copy)
    outputs = [y, *state_arrays(final)]
    for k, a in enumerate(outputs):
        assert a.flags.writeable
        assert not any(np.shares_memory(a, b) for b in (*inputs, *outputs[:k]))
    return y, final


def check_planned_pass(
    layer: Any, params: Any, x: Any, state: Any, dy: Any, lengths: Any = None, *, condition: float = 256
) -> Any:
    """Assert that plans run forward and backward, and equal the reference scan; return y, the state and the tape."""
    y, final, tape = planned_call(layer, params, x, state, lengths, record_tape=True)
    assert type(tape).__name__ == "KernelTape"
    grads = layer._calls.backward(tape, dy, final, None)
    assert grads is not None
    expected_y, expected_final, expected_tape = reference_call(layer, params, x, state, lengths)
    expected = layer.backward(expected_tape, dy, expected_final)
    XP.assert_close((y, final, grads), (expected_y, expected_final, expected), condition=condition)
    assert list(grads.dparams) == list(params)
    np.testing.assert_equal(tuple(layer.backward(tape, dy, final)), tuple(grads))  # a tape may be used again
    XP.assert_close(tape.states(), expected_tape.states(), condition=condition)
    inputs = [x, *params.values(), *state_arrays(state), *(a for states in tape.states() for a in states)]
    for a in state_arrays(final):
        assert a.flags.writeable
        assert not any(np.shares_memory(a, b) for b in inputs)
    assert not y.flags.writeable
    return y, final, tape
