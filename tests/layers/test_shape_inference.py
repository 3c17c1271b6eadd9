"""A Sequential whose layers do not fit raises at construction; one that might run does not."""

from __future__ import annotations

import copy
import pickle
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.sequential_checks import assert_construction_raises

import xprnn
from xprnn import (
    GRU,
    LSTM,
    RNN,
    ContextShift,
    Embedding,
    InputError,
    Linear,
    Masking,
    MergeDirections,
    Recurrent,
    Sequential,
)

INCOMPATIBLE = {
    "wrong in_features": (
        {"rnn": LSTM(3, 16), "head": Linear(8, 3)},
        "head (Linear) has in_features=8, expected 16: rnn (LSTM) giv",
    ),
    "second direction ignored": (
        {"rnn": GRU(3, 16, bidirectional=True), "head": Linear(16, 3)},
        "head (Linear) has in_features=16, expected 32: rnn (GRU), both directions side by side, gives 32 features",
    ),
    "projection ignored": (
        {"rnn": LSTM(3, 16, proj_size=4), "head": Linear(16, 3)},
        "head (Linear) has in_features=16, expected 4: rnn (LSTM) gives 4 features",
    ),
    "last hidden size of several": (
        {"rnn": RNN(3, (5, 6), 2), "on": LSTM(5, 2)},
        "on (LSTM) has input_size=5, expected 6",
    ),
    "through layers that keep the width": (
        {
            "up": Linear(3, 4),
            "act": xprnn.ActivationLayer("relu"),
            "m": Masking(),
            "h": xprnn.HoldLastOutput(),
            "f": xprnn.ReverseTime(),
            "rnn": RNN(5, 2),
        },
        "rnn (RNN) has input_size=5, expected 4: up (Linear) gives 4 features",
    ),
    "embedding": (
        {"read": Embedding(7, 4), "rnn": RNN(7, 2)},
        "rnn (RNN) has input_size=7, expected 4: read (Embedding)",
    ),
    "embedding after floats": (
        {"rnn": RNN(3, 4), "read": Embedding(7, 4)},
        "read (Embedding) takes integers, but rnn (RNN) gives floats: put the Embedding first",
    ),
    "step accepts it but forward does not": (
        {"rnn": RNN(3, 4), "h": xprnn.HoldLastOutput(), "read": Embedding(7, 4)},
        "rnn (RNN) gives floats",
    ),
    "embedding after floats of unknown width": (
        {"act": xprnn.Softmax(), "read": Embedding(7, 4)},
        "but act (Softmax) gives floats",
    ),
    "merge": (
        {"rnn": RNN(3, 8), "m": MergeDirections(8)},
        "m (MergeDirections) has hidden_size=8, twice that in features, but rnn (RNN)",
    ),
    "context shift after one direction": (
        {"rnn": RNN(3, 5), "a": ContextShift(5)},
        "gives 5 features: put it after a bidirectional layer",
    ),
    "after a merge": (
        {"m": MergeDirections(4, "ave"), "head": Linear(8, 2)},
        "expected 4: m (MergeDirections) gives 4 features",
    ),
    "after a context shift": (
        {"a": ContextShift(4), "last": xprnn.LastStep(), "head": Linear(4, 2)},
        "expected 8: a (ContextShift) gives 8 features",
    ),
    "after a pair": (
        {"m": MergeDirections(4, "pair"), "head": Linear(4, 2)},
        "takes one array, but m (MergeDirections) gives a pair",
    ),
    "nested": (
        {"low": Sequential(rnn=RNN(3, 4), last=xprnn.LastStep()), "high": Sequential(head=Linear(5, 2))},
        "high.head (Linear) has in_features=5, expected 4: low.rnn (RNN) gives 4 features",
    ),
    "one feature": ({"up": Linear(3, 1), "rnn": RNN(2, 3)}, "expected 1: up (Linear) gives 1 feature"),
}


@pytest.mark.parametrize("case", INCOMPATIBLE)
def test_incompatible_widths_raise_at_construction(case):
    assert_construction_raises(*INCOMPATIBLE[case])


WIDTHS = st.integers(1, 4)
CHECKED_LAYERS = st.one_of(
    st.builds(Linear, WIDTHS, WIDTHS),
    st.builds(Embedding, WIDTHS, WIDTHS),
    st.builds(RNN, WIDTHS, WIDTHS, bidirectional=st.booleans()),
    st.builds(lambda d, h, p: LSTM(d, h + 1, proj_size=min(p, h)), WIDTHS, WIDTHS, st.integers(0, 2)),
    st.builds(MergeDirections, WIDTHS, st.sampled_from(["sum", "pair"])),
    st.builds(ContextShift, WIDTHS),
    st.sampled_from(
        [
            xprnn.ActivationLayer("tanh"),
            xprnn.Softmax(),
            xprnn.ReverseTime(),
            xprnn.HoldLastOutput(),
            xprnn.LastStep(),
            Masking(),
        ]
    ),
)


def unchecked_sequential(layers):
    """Return a Sequential without the checks of its constructor."""
    model = object.__new__(Sequential)
    object.__setattr__(model, "layers", MappingProxyType(layers))
    return model


@settings(deadline=None, max_examples=300)
@given(st.lists(CHECKED_LAYERS, min_size=2, max_size=4), st.integers(1, 8))
@example([MergeDirections(1, "pair"), xprnn.HoldLastOutput()], 1)
@example([xprnn.LastStep(), Embedding(1, 1)], 2)
def test_models_that_run_do_not_raise_at_construction(layers, cut):
    """A model that raises at construction fails for every input, and a nested Sequential raises the same error.

    After LastStep, `step` still works with a layer along time, so only the call is tested there. ContextShift is left
    out, because it would shift rows without an error.
    """
    flat = {f"p{k}": layer for k, layer in enumerate(layers)}
    inner = dict(list(flat.items())[:cut])
    nested = {"inner": unchecked_sequential(inner), **{k: layer for k, layer in flat.items() if k not in inner}}
    errors = []
    for named in (flat, nested):
        try:
            Sequential(**named)
        except InputError as error:
            errors.append(str(error).replace("inner.", ""))
        else:
            errors.append("")
    assert errors[0] == errors[1]
    no_time_axis = "runs along time" in errors[0]
    if not errors[0] or (no_time_axis and "(ContextShift)" in errors[0]):
        return
    model = unchecked_sequential(flat)
    params = model.init(np.random.default_rng(0), np.zeros(0))
    inputs = [np.ones((3, 2, d)) for d in range(1, 9)] + [np.ones((2, d)) for d in range(1, 9)]
    for x in [*inputs, np.zeros((3, 2), int), np.zeros(2, int)]:
        for run in (model,) if no_time_axis else (model, model.step):
            with pytest.raises(InputError):
                run(params, x)


class Doubled(xprnn.layers.base.StatelessLayer):
    """A user-defined layer with 2 D output features."""

    def forward(self, params, x, state=None, **flags):
        """Return x twice."""
        return np.concatenate((x, x), axis=-1), None, None


class Wide(Linear):
    """A subclass of Linear with more output features than its options say."""

    def __call__(self, params, x, state=None, **flags):
        """Return y twice."""
        y, _ = super().__call__(params, x)
        return np.concatenate((y, y), axis=-1), None


class SkipConnection(Sequential):
    """A subclass of Sequential that transforms arrays between its layers."""

    def __call__(self, params, x, state=None, lengths=None, mask=None, reset=None):
        """Pass x and the output of a to b."""
        split = {n: {k[len(n) + 1 :]: a for k, a in params.items() if k.startswith(n)} for n in self.layers}
        y, _ = self.layers["a"](split["a"], x)
        return self.layers["b"](split["b"], np.concatenate((x, y), axis=-1))


@pytest.mark.parametrize(
    ("model", "out"),
    [
        (Sequential(rnn=RNN(3, 4), double=Doubled(), head=Linear(8, 2)), 2),
        (Sequential(up=Linear(3, 3), wide=Wide(3, 4), rnn=RNN(8, 2)), 2),
        (SkipConnection(a=Linear(3, 4), b=Linear(7, 2)), 2),
        (Sequential(skip=SkipConnection(a=Linear(3, 4), b=Linear(7, 2)), head=Linear(2, 5)), 5),
        (Sequential(mask=Masking(), rnn=Recurrent(3, 4, cell=xprnn.cells.elman()), head=Linear(4, 1)), 1),
    ],
    ids=["user-defined layer", "subclass of Linear", "subclass of Sequential", "nested subclass", "masked"],
)
def test_user_defined_layers_are_not_checked_at_construction(model, out):
    params = model.init(np.random.default_rng(0), np.zeros(0))
    assert model(params, np.ones((5, 2, 3)))[0].shape == (5, 2, out)


def test_masking_before_embedding_is_accepted():
    model = Sequential(mask=Masking(0), read=Embedding(5, 4), rnn=RNN(4, 2))
    params = model.init(np.random.default_rng(0), np.zeros(0))
    assert model(params, np.ones((5, 2), int))[0].shape == (5, 2, 2)


def test_layers_are_read_only():
    layers = {"rnn": RNN(3, 4), "head": Linear(4, 2)}
    model = Sequential(**layers)
    for change in (
        lambda: model.layers.__setitem__("head", Linear(4, 9)),
        lambda: model.layers.pop("head"),
        lambda: model.layers.update(more=Linear(2, 2)),
    ):
        with pytest.raises((TypeError, AttributeError)):
            change()
    with pytest.raises(TypeError):
        model.layers["more"] = Linear(2, 2)
    with pytest.raises(TypeError):
        del model.layers["head"]
    layers["head"] = Linear(4, 9)
    assert model.layers["head"] == Linear(4, 2)


@pytest.mark.parametrize("after_a_step", [False, True])
@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, *(lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(2, 6))],
    ids=["copy", "deepcopy", *(f"pickle {p}" for p in range(2, 6))],
)
def test_copies_and_pickles_are_equal_and_read_only(duplicate, after_a_step):
    model = Sequential(low=Sequential(rnn=RNN(3, 4)), head=Linear(4, 2))
    params = model.init(np.random.default_rng(0), np.zeros(0))
    x = np.ones((1, 3))
    expected = model.step(params, x)[0]
    if after_a_step:
        assert "_fast_step" in vars(model)
    else:
        model = Sequential(**model.layers)
    copied = duplicate(model)
    assert copied == model
    assert hash(copied) == hash(model)
    assert list(copied.layers) == ["low", "head"]
    assert copied.shapes() == model.shapes()
    np.testing.assert_array_equal(copied.step(params, x)[0], expected)
    with pytest.raises(TypeError):
        copied.layers["head"] = Linear(4, 9)
    with pytest.raises(AttributeError, match="frozen"):
        copied.layers = {}


def test_pickle_with_a_dict_of_layers_is_accepted():
    """Early pickles of Sequential hold a dict instead of a mappingproxy."""
    model = object.__new__(Sequential)
    model.__setstate__({"layers": {"rnn": RNN(3, 4)}})
    assert model == Sequential(rnn=RNN(3, 4))
    with pytest.raises(TypeError):
        model.layers["rnn"] = RNN(1, 1)
