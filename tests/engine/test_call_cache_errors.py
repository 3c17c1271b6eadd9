"""Arguments to which the no fast step applies: the checked step accepts them or raises its error."""

from __future__ import annotations

import numpy as np
import pytest
from support.fast_paths import XP, check_fast_step, each_layer, step_inputs, with_and_without_jit

import xprnn
from xprnn.engine import stack
from xprnn.kernels.config import allow_jit, reference_only


def wrong_arguments(params, x, state):
    """name -> wrong arguments of a step of a layer with input size 3 and hidden size 8, for two rows."""
    states = state if isinstance(state, tuple) else (state,)

    def map_state(f):
        return tuple(f(s) for s in states) if isinstance(state, tuple) else f(state)

    without_bias = {k: v for k, v in params.items() if k != "bias_hh_l0"}
    u = params["weight_hh_l0"]
    return {
        "missing parameter": (without_bias, x, state),
        "wrong parameter name": (without_bias | {"bias": params["bias_hh_l0"]}, x, state),
        "extra parameter": (params | {"bias": params["bias_hh_l0"]}, x, state),
        "parameters in a list": (list(params.values()), x, state),
        "weight too small": (params | {"weight_hh_l0": u[:, :-1]}, x, state),
        "bias too long": (params | {"bias_ih_l0": np.append(params["bias_ih_l0"], 0.0)}, x, state),
        "weight of another dtype": (params | {"weight_hh_l0": u.astype("float32")}, x, state),
        "weight is a list": (params | {"weight_hh_l0": u.tolist()}, x, state),
        "weight is None": (params | {"weight_hh_l0": None}, x, state),
        "integer weight": (params | {"weight_hh_l0": u.astype(int)}, x, state),
        "too many features": (params, np.ones((2, 4)), state),
        "x with one axis": (params, x[0], state),
        "x with three axes": (params, x[None], state),
        "x with no axis": (params, np.array(1.0), state),
        "x of another dtype": (params, x.astype("float32"), state),
        "complex x": (params, x + 0j, state),
        "boolean x": (params, np.array([True, False]), state),
        "x without features": (params, np.ones((2, 0)), state),
        "x and weights of another input size": (
            params | {"weight_ih_l0": np.ones((len(u), 4))},
            np.ones((2, 4)),
            state,
        ),
        "weights for more classes": (params | {"weight_ih_l0": np.ones((len(u), 4))}, np.array([0, 2]), state),
        "weight is None, and no state": (params | {"weight_hh_l0": None}, np.array([0, 2]), None),
        "x is None": (params, None, state),
        "x is a list": (params, x.tolist(), state),
        "class number too large": (params, np.array([0, 3]), state),
        "negative class number": (params, np.array([-1, 0]), state),
        "class number beyond int64": (params, np.array([2**64 - 1, 0], np.uint64), state),
        "class numbers with two axes": (params, np.array([[0, 1]]), state),
        "state of one row": (params, x, map_state(lambda s: s[:, :1])),
        "state of four rows": (params, x, map_state(lambda s: np.repeat(s, 2, axis=1))),
        "state of another dtype": (params, x, map_state(lambda s: s.astype("float32"))),
        "state without a layer axis": (params, x, map_state(lambda s: s[0])),
        "state of one number": (params, x, map_state(lambda s: s[0, 0, 0])),
        "state without axes": (params, x, map_state(lambda s: s[0, 0, 0].reshape(()))),
        "state of two layers": (params, x, map_state(lambda s: np.repeat(s, 2, axis=0))),
        "state too small": (params, x, map_state(lambda s: s[:, :, :7])),
        "one state too many": (params, x, (*states, states[0])),
        "states in one array": (params, x, np.stack((states[0], states[0]))),
    }


@with_and_without_jit
@each_layer
def test_wrong_arguments_raise_the_error_of_the_checked_step(rng, make, jit):
    layer = make(3, 8)
    right = step_inputs(rng, layer, 2)
    with allow_jit(jit):
        check_fast_step(layer, *right)  # builds the fast step
        for name, arguments in wrong_arguments(*right).items():
            with pytest.raises(xprnn.InputError) as checked:
                stack.step(layer, *arguments)
            with pytest.raises(xprnn.InputError) as raised:
                layer.step(*arguments)
            assert str(raised.value) == str(checked.value), name
        check_fast_step(layer, *right)


@with_and_without_jit
def test_step_checks_the_learned_state_that_it_does_not_read(rng, jit):
    layer = xprnn.GRU(3, 8, 2, learned_state=True)
    params, x, state = step_inputs(rng, layer, 1)
    start = params["initial_h"]
    with allow_jit(jit):
        check_fast_step(layer, params, x, state)
        for other in (start[:1], start.astype("float32"), start.tolist(), None):
            with pytest.raises(xprnn.InputError, match="initial_h"):
                layer.step(params | {"initial_h": other}, x, state)


@each_layer
def test_step_accepts_arguments_that_only_the_checked_step_supports(rng, make):
    """A list of states, a subclass of ndarray, no state, float16."""
    layer = make(3, 8)
    params, x, state = step_inputs(rng, layer, 2)
    expected = layer.step(params, x, state)
    for arguments in [(params, x.view(np.memmap), state), *([(params, x, list(state))] * isinstance(state, tuple))]:
        XP.assert_close(layer.step(*arguments), expected, condition=32)
    XP.assert_close(layer.step(params, x), stack.step(layer, params, x, None), condition=32)
    half = step_inputs(rng, layer, 2, "float16")
    assert layer.step(*half)[0].dtype == np.float16
    with reference_only():
        assert layer._fast_step(params, x, state) is None
