"""What a quick step does not take: the checked step does, or says why not."""

from __future__ import annotations

import numpy as np
import pytest
from engine.test_call_cache_step import WAYS, XP, agree, each_layer, given

import xprnn
from xprnn.engine import stack
from xprnn.kernels.config import allow_jit, reference_only


def wrong_arguments(params, x, state):
    """name -> arguments that do not fit a layer of input size 3 and hidden size 8, two rows."""
    parts = state if isinstance(state, tuple) else (state,)

    def each(f):
        return tuple(f(s) for s in parts) if isinstance(state, tuple) else f(state)

    less = {k: v for k, v in params.items() if k != "bias_hh_l0"}
    u = params["weight_hh_l0"]
    return {
        "a parameter less": (less, x, state),
        "another name": (less | {"bias": params["bias_hh_l0"]}, x, state),
        "one more": (params | {"bias": params["bias_hh_l0"]}, x, state),
        "no dict": (list(params.values()), x, state),
        "a smaller weight": (params | {"weight_hh_l0": u[:, :-1]}, x, state),
        "a longer bias": (params | {"bias_ih_l0": np.append(params["bias_ih_l0"], 0.0)}, x, state),
        "a weight of another dtype": (params | {"weight_hh_l0": u.astype("float32")}, x, state),
        "a weight that is a list": (params | {"weight_hh_l0": u.tolist()}, x, state),
        "a weight that is None": (params | {"weight_hh_l0": None}, x, state),
        "an integer weight": (params | {"weight_hh_l0": u.astype(int)}, x, state),
        "more features": (params, np.ones((2, 4)), state),
        "x without rows": (params, x[0], state),
        "x of three axes": (params, x[None], state),
        "x of no axis": (params, np.array(1.0), state),
        "x of another dtype": (params, x.astype("float32"), state),
        "complex x": (params, x + 0j, state),
        "boolean x": (params, np.array([True, False]), state),
        "x is None": (params, None, state),
        "x is a list": (params, x.tolist(), state),
        "a class too many": (params, np.array([0, 3]), state),
        "a negative class": (params, np.array([-1, 0]), state),
        "a class beyond int64": (params, np.array([2**64 - 1, 0], np.uint64), state),
        "classes in a matrix": (params, np.array([[0, 1]]), state),
        "a state of one row": (params, x, each(lambda s: s[:, :1])),
        "a state of more rows": (params, x, each(lambda s: np.repeat(s, 2, axis=1))),
        "a state of another dtype": (params, x, each(lambda s: s.astype("float32"))),
        "a state without layers": (params, x, each(lambda s: s[0])),
        "a state of two layers": (params, x, each(lambda s: np.repeat(s, 2, axis=0))),
        "a smaller state": (params, x, each(lambda s: s[:, :, :7])),
        "one state too many": (params, x, (*parts, parts[0])),
        "states in an array": (params, x, np.stack((parts[0], parts[0]))),
    }


@WAYS
@each_layer
def test_what_does_not_fit_gets_the_checks_own_words(rng, make, fast):
    layer = make(3, 8)
    fitting = given(rng, layer, 2)
    with allow_jit(fast):
        agree(layer, *fitting)  # so that a quick step is at hand
        for name, arguments in wrong_arguments(*fitting).items():
            with pytest.raises(xprnn.InputError) as checked:
                stack.step(layer, *arguments)
            with pytest.raises(xprnn.InputError) as found:
                layer.step(*arguments)
            assert str(found.value) == str(checked.value), name
        agree(layer, *fitting)


@WAYS
def test_a_learned_state_is_checked_though_no_step_needs_it(rng, fast):
    layer = xprnn.GRU(3, 8, 2, learned_state=True)
    params, x, state = given(rng, layer, 1)
    start = params["initial_h"]
    with allow_jit(fast):
        agree(layer, params, x, state)
        for other in (start[:1], start.astype("float32"), start.tolist(), None):
            with pytest.raises(xprnn.InputError, match="initial_h"):
                layer.step(params | {"initial_h": other}, x, state)


@each_layer
def test_what_only_the_checked_step_takes(rng, make):
    """A list of states, a subclass of an array, a state that is left out, other floats."""
    layer = make(3, 8)
    params, x, state = given(rng, layer, 2)
    want = layer.step(params, x, state)
    for arguments in [(params, x.view(np.memmap), state), *([(params, x, list(state))] * isinstance(state, tuple))]:
        XP.assert_close(layer.step(*arguments), want, condition=32)
    XP.assert_close(layer.step(params, x), stack.step(layer, params, x, None), condition=32)
    half = given(rng, layer, 2, "float16")
    assert layer.step(*half)[0].dtype == np.float16
    with reference_only():
        assert layer._fast_step(params, x, state) is None
