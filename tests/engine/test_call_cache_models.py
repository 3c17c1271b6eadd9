"""Quick steps of whole models are the checked steps of their parts."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from engine.test_call_cache_step import WAYS, XP

import xprnn
from xprnn.kernels.config import allow_jit, reference_only
from xprnn.layers.elementwise import ActivationLayer, Softmax


def models():
    """Models whose steps are quick, and the kind of their input."""
    inner = xprnn.Sequential(rnn=xprnn.GRU(6, 5), head=xprnn.Linear(5, 2))
    return {
        "text": (xprnn.Sequential(embed=xprnn.Embedding(7, 4), rnn=xprnn.GRU(4, 6), head=xprnn.Linear(6, 7)), int),
        "classes": (xprnn.Sequential(rnn=xprnn.LSTM(7, 6, 2), head=xprnn.Linear(6, 7, bias=False)), int),
        "two": (xprnn.Sequential(one=xprnn.LSTM(7, 6), two=xprnn.RNN(6, 5)), float),
        "none": (xprnn.Sequential(embed=xprnn.Embedding(7, 4), head=xprnn.Linear(4, 2)), int),
        "nested": (xprnn.Sequential(rnn=xprnn.RNN(7, 6), inner=inner), float),
        "other parts": (xprnn.Sequential(rnn=xprnn.RNN(7, 6), apply=ActivationLayer("relu"), out=Softmax()), float),
    }


@WAYS
@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("n", [1, 3])
def test_a_model_steps_as_its_parts_do(rng, name, n, fast):
    model, kind = models()[name]
    params = model.init(rng, like=np.zeros(0))
    x = rng.integers(0, 7, n) if kind is int else rng.normal(size=(n, 7))
    with reference_only():
        _, state = model.step(params, x)
        assert model._fast_step(params, x, state) is None
        want = model.step(params, x, state)
    with allow_jit(fast):
        found = model._fast_step(params, x, state)
        assert found is not None
        XP.assert_close(found[0], want[0], condition=32)
        XP.assert_close(dict(flat(found[1])), dict(flat(want[1])), condition=32)
        XP.assert_close(model.step(params, x, state)[0], want[0], condition=32)


def flat(state, name="state"):
    """(name, array) of every array in a model's state."""
    if isinstance(state, dict):
        return [leaf for key, part in state.items() for leaf in flat(part, f"{name}.{key}")]
    parts = state if isinstance(state, tuple) else (state,)
    return [(f"{name}[{k}]", part) for k, part in enumerate(parts) if part is not None]


@WAYS
def test_a_model_given_what_does_not_fit_says_so(rng, fast):
    model = models()["text"][0]
    params, ids = model.init(rng, like=np.zeros(0)), np.array([1])
    with allow_jit(fast):
        _, state = model.step(params, ids)
        assert model._fast_step(params, ids, state) is not None
        for match, arguments in {
            "x must hold integers in 0..6, found 7": (params, np.array([7]), state),
            "x must hold integers in 0..6, found -1": (params, np.array([-1]), state),
            "Embedding.forward: x must be integers": (params, np.array([1.0]), state),
            "missing head.bias": ({k: v for k, v in params.items() if k != "head.bias"}, ids, state),
            "unexpected more": (params | {"more": params["head.bias"]}, ids, state),
            r"weight \(V,H\)|weight must have shape": (params | {"head.weight": np.ones((7, 5))}, ids, state),
            "state h": (params, ids, np.zeros((1, 2, 6))),
        }.items():
            with pytest.raises(xprnn.InputError, match=match):
                model.step(*arguments)
    several = models()["two"][0]
    params = several.init(rng, like=np.zeros(0))
    _, state = several.step(params, np.ones((1, 7)))
    for wrong in (state | {"three": state["two"]}, {"one": state["one"]}, (state["one"], state["two"])):
        with pytest.raises(xprnn.InputError, match="state must be a dict with the keys one, two"):
            several.step(params, np.ones((1, 7)), wrong)


def test_a_layer_that_has_stepped_can_be_copied_and_pickled(rng):
    for part in (xprnn.LSTM(3, 4), xprnn.Linear(3, 2), *(model for model, _ in models().values())):
        params = part.init(rng, like=np.zeros(0))
        x = (
            np.array([1])
            if "embed" in getattr(part, "layers", {})
            else np.ones((1, 7 if hasattr(part, "layers") else 3))
        )
        want = part.step(params, x)
        for twin in (copy.copy(part), copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
            assert twin == part
            assert hash(twin) == hash(part)
            XP.assert_close(twin.step(params, x)[0], want[0])


class Doubled(xprnn.Linear):
    """A part of one's own that differs in its step alone."""

    def step(self, params, x, state=None):  # noqa: D102 - as the layer's own
        y, state = super().step(params, x, state)
        return 2 * y, state


class Slower(xprnn.GRU):
    """A recurrent one."""

    def step(self, params, x, state=None):  # noqa: D102 - as the layer's own
        return super().step(params, x / 2, state)


def test_a_step_of_ones_own_is_not_passed_over(rng):
    params = xprnn.Sequential(rnn=xprnn.GRU(3, 4), head=xprnn.Linear(4, 2)).init(rng, like=np.zeros(0))
    x, plain = rng.standard_normal((1, 3)), xprnn.Sequential(rnn=xprnn.GRU(3, 4), head=xprnn.Linear(4, 2))
    wanted, _ = plain.step(params, x / 2)
    found, _ = xprnn.Sequential(rnn=Slower(3, 4), head=Doubled(4, 2)).step(params, x)
    np.testing.assert_allclose(found, 2 * wanted, rtol=1e-13)
