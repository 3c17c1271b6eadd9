"""Fast steps of models: composed of the fast steps of library layers; user-defined code runs once a step."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from support.fast_paths import XP, with_and_without_jit

import xprnn
from xprnn.kernels.config import allow_jit, reference_only
from xprnn.layers.elementwise import ActivationLayer, Softmax


def models():
    """Models with a fast step, and the type of their input."""
    inner = xprnn.Sequential(rnn=xprnn.GRU(6, 5), head=xprnn.Linear(5, 2))
    return {
        "text": (xprnn.Sequential(embed=xprnn.Embedding(7, 4), rnn=xprnn.GRU(4, 6), head=xprnn.Linear(6, 7)), int),
        "classes": (xprnn.Sequential(rnn=xprnn.LSTM(7, 6, 2), head=xprnn.Linear(6, 7, bias=False)), int),
        "two": (xprnn.Sequential(one=xprnn.LSTM(7, 6), two=xprnn.RNN(6, 5)), float),
        "none": (xprnn.Sequential(embed=xprnn.Embedding(7, 4), head=xprnn.Linear(4, 2)), int),
        "nested": (xprnn.Sequential(rnn=xprnn.RNN(7, 6), inner=inner), float),
        "elementwise": (xprnn.Sequential(rnn=xprnn.RNN(7, 6), act=ActivationLayer("relu"), out=Softmax()), float),
    }


@with_and_without_jit
@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("n", [1, 3])
def test_fast_step_of_a_model_equals_its_validated_step(rng, name, n, jit):
    model, kind = models()[name]
    params = model.init(rng, like=np.zeros(0))
    x = rng.integers(0, 7, n) if kind is int else rng.normal(size=(n, 7))
    with reference_only():
        _, state = model.step(params, x)
        assert model._fast_step(params, x, state) is None
        expected = model.step(params, x, state)
    with allow_jit(jit):
        result = model._fast_step(params, x, state)
        assert result is not None
        XP.assert_close(result[0], expected[0], condition=32)
        XP.assert_close(dict(named_arrays(result[1])), dict(named_arrays(expected[1])), condition=32)
        XP.assert_close(model.step(params, x, state)[0], expected[0], condition=32)


def named_arrays(state, name="state"):
    """(name, array) of every array in a model's state."""
    if isinstance(state, dict):
        return [pair for key, value in state.items() for pair in named_arrays(value, f"{name}.{key}")]
    arrays = state if isinstance(state, tuple) else (state,)
    return [(f"{name}[{k}]", a) for k, a in enumerate(arrays) if a is not None]


@with_and_without_jit
def test_wrong_arguments_of_a_model_raise(rng, jit):
    model = models()["text"][0]
    params, ids = model.init(rng, like=np.zeros(0)), np.array([1])
    with allow_jit(jit):
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
    model = models()["two"][0]
    params = model.init(rng, like=np.zeros(0))
    _, state = model.step(params, np.ones((1, 7)))
    for wrong in (state | {"three": state["two"]}, {"one": state["one"]}, (state["one"], state["two"])):
        with pytest.raises(xprnn.InputError, match="state must be a dict with the keys one, two"):
            model.step(params, np.ones((1, 7)), wrong)


def test_layers_can_be_copied_and_pickled_after_a_step(rng):
    for layer in (xprnn.LSTM(3, 4), xprnn.Linear(3, 2), *(model for model, _ in models().values())):
        params = layer.init(rng, like=np.zeros(0))
        x = (
            np.array([1])
            if "embed" in getattr(layer, "layers", {})
            else np.ones((1, 7 if hasattr(layer, "layers") else 3))
        )
        expected = layer.step(params, x)
        for other in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other == layer
            assert hash(other) == hash(layer)
            XP.assert_close(other.step(params, x)[0], expected[0])


class Doubled(xprnn.Linear):
    """A user-defined layer that overrides only `step`."""

    def step(self, params, x, state=None):
        """Return twice the y of Linear."""
        y, state = super().step(params, x, state)
        return 2 * y, state


class HalfInput(xprnn.GRU):
    """A user-defined recurrent layer that overrides only `step`."""

    def step(self, params, x, state=None):
        """Run the step of GRU on x / 2."""
        return super().step(params, x / 2, state)


def test_model_runs_an_overridden_step(rng):
    plain = xprnn.Sequential(rnn=xprnn.GRU(3, 4), head=xprnn.Linear(4, 2))
    params, x = plain.init(rng, like=np.zeros(0)), rng.standard_normal((1, 3))
    expected, _ = plain.step(params, x / 2)
    y, _ = xprnn.Sequential(rnn=HalfInput(3, 4), head=Doubled(4, 2)).step(params, x)
    np.testing.assert_allclose(y, 2 * expected, rtol=1e-13)


class CountedStep(xprnn.Linear):
    """Counts the calls of its `step`, and raises if x holds a negative number."""

    def step(self, params, x, state=None):
        """Count the call; then as Linear."""
        self.calls.append(1)
        if (x < 0).any():
            raise RuntimeError("negative x")
        return super().step(params, x, state)


class CountedForward(xprnn.Linear):
    """As CountedStep, in `forward`, which the step of Linear calls."""

    def forward(self, params, x, state=None, **flags):
        """Count the call; then as Linear."""
        self.calls.append(1)
        if (x < 0).any():
            raise RuntimeError("negative x")
        return super().forward(params, x, state, **flags)


def counted(kind):
    """A layer of this class, and the list to which it appends one entry for each call."""
    layer, calls = kind(4, 4), []
    object.__setattr__(layer, "calls", calls)
    return layer, calls


def counted_activation():
    """A layer with a user-defined activation that appends to a list at each call."""
    calls = []

    def build(xp):
        def f(x):
            calls.append(1)
            if (x < 0).any():
                raise RuntimeError("negative x")
            return x * x

        return f, lambda y: 2 * xp.sqrt(y)

    layer = ActivationLayer(xprnn.Activation("counted", build))
    return layer, calls


COUNTED = {
    "step": lambda: counted(CountedStep),
    "forward": lambda: counted(CountedForward),
    "activation": counted_activation,
}


@with_and_without_jit
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("make", COUNTED.values(), ids=COUNTED)
def test_user_defined_layer_runs_once_a_step(rng, make, nested, jit):
    """Before a stateful layer, whose first step has no state; in a nested Sequential too; and if it raises."""
    layer, calls = make()
    model = xprnn.Sequential(user=layer, rnn=xprnn.GRU(4, 4), head=xprnn.Linear(4, 2))
    if nested:
        model = xprnn.Sequential(first=xprnn.Linear(4, 4), inner=model, last=xprnn.LSTM(2, 3))
    params, state = model.init(rng, like=np.zeros(0)), None
    params = {name: abs(a) for name, a in params.items()}
    with allow_jit(jit):
        for k in range(3):
            _, state = model.step(params, np.ones((1, 4)), state)
            assert len(calls) == k + 1
        for old in (None, state):
            calls.clear()
            with pytest.raises(RuntimeError, match="negative x"):
                model.step(params, np.full((1, 4), -100.0), old)
            assert len(calls) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_user_defined_layer_runs_once_if_a_later_layer_rejects_its_arguments(rng, nested):
    layer, calls = counted(CountedStep)
    model = xprnn.Sequential(user=layer, rnn=xprnn.GRU(4, 4))
    if nested:
        model = xprnn.Sequential(inner=model)
    params = model.init(rng, like=np.zeros(0))
    with pytest.raises(xprnn.InputError, match="state h"):
        model.step(params, np.ones((1, 4)), np.zeros((1, 2, 4)))
    assert len(calls) == 1


def branching_cell(calls):
    """A cell that cannot be traced, because it branches on a value; it appends to `calls` for each step on arrays."""

    def step(x, h, state, p):
        if isinstance(x[0], np.ndarray):
            calls.append(1)
            if (x[0] > 50).any():
                raise RuntimeError("large x")
        y = x[0] + h[0]
        return (y if bool((y == y).all()) else 0.0 * y,), ()

    def backward(dstate, saved, state, p):
        return dstate, dstate, (None,), ()

    return xprnn.Cell("branching", 1, lambda xp: (step, backward))


@with_and_without_jit
def test_untraceable_user_defined_cell_runs_once_a_step(rng, jit):
    calls = []
    layer = xprnn.Recurrent(3, 4, cell=branching_cell(calls))
    params, x = layer.init(rng, like=np.zeros(0)), np.ones((1, 3))
    with allow_jit(jit):
        _, state = layer.step(params, x)
        _, state = layer.step(params, x, state)
        assert len(calls) == 2
        with pytest.raises(RuntimeError, match="large x"):
            layer.step({name: 1000.0 + a for name, a in params.items()}, x, state)
        assert len(calls) == 3
