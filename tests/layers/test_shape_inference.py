"""A chain whose parts do not fit is refused when it is made; what might run is not."""

from __future__ import annotations

import copy
import pickle
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

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
from xprnn.layers.sequential import from_config

REFUSED = {
    "head": (
        {"rnn": LSTM(3, 16), "head": Linear(8, 3)},
        "head (Linear) has in_features=8, expected 16: rnn (LSTM) giv",
    ),
    "forgotten direction": (
        {"rnn": GRU(3, 16, bidirectional=True), "head": Linear(16, 3)},
        "head (Linear) has in_features=16, expected 32: rnn (GRU), both directions side by side, gives 32 features",
    ),
    "forgotten projection": (
        {"rnn": LSTM(3, 16, proj_size=4), "head": Linear(16, 3)},
        "head (Linear) has in_features=16, expected 4: rnn (LSTM) gives 4 features",
    ),
    "last of several sizes": ({"rnn": RNN(3, (5, 6), 2), "on": LSTM(5, 2)}, "on (LSTM) has input_size=5, expected 6"),
    "through what keeps the width": (
        {
            "up": Linear(3, 4),
            "bend": xprnn.ActivationLayer("relu"),
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
    "embedding of floats": (
        {"rnn": RNN(3, 4), "read": Embedding(7, 4)},
        "read (Embedding) takes integers, but rnn (RNN) gives floats: an Embedding comes first",
    ),
    "one verb of it would run": (
        {"rnn": RNN(3, 4), "h": xprnn.HoldLastOutput(), "read": Embedding(7, 4)},
        "rnn (RNN) gives floats",
    ),
    "embedding of any floats": ({"bend": xprnn.Softmax(), "read": Embedding(7, 4)}, "but bend (Softmax) gives floats"),
    "merge": (
        {"rnn": RNN(3, 8), "m": MergeDirections(8)},
        "m (MergeDirections) has hidden_size=8, twice that in features, but rnn (RNN)",
    ),
    "around": ({"rnn": RNN(3, 5), "a": ContextShift(5)}, "gives 5 features: it stands behind a bidirectional layer"),
    "behind a merge": (
        {"m": MergeDirections(4, "ave"), "head": Linear(8, 2)},
        "expected 4: m (MergeDirections) gives 4 features",
    ),
    "behind around": (
        {"a": ContextShift(4), "last": xprnn.LastStep(), "head": Linear(4, 2)},
        "expected 8: a (ContextShift) gives 8 features",
    ),
    "behind a pair": (
        {"m": MergeDirections(4, "pair"), "head": Linear(4, 2)},
        "takes one array, but m (MergeDirections) gives a pair",
    ),
    "one inside another": (
        {"low": Sequential(rnn=RNN(3, 4), last=xprnn.LastStep()), "high": Sequential(head=Linear(5, 2))},
        "high.head (Linear) has in_features=5, expected 4: low.rnn (RNN) gives 4 features",
    ),
    "one feature": ({"up": Linear(3, 1), "rnn": RNN(2, 3)}, "expected 1: up (Linear) gives 1 feature"),
}


def assert_refused(parts, words):
    """Made from parts or read from a file, with these words."""
    with pytest.raises(InputError) as caught:
        Sequential(**parts)
    assert str(caught.value).startswith("Sequential: ")
    assert words in str(caught.value)
    with pytest.raises(InputError, match="Sequential"):
        from_config({"type": "Sequential", "layers": {name: part.config() for name, part in parts.items()}})


@pytest.mark.parametrize("case", REFUSED)
def test_refused_when_it_is_made(case):
    assert_refused(*REFUSED[case])


WIDTHS = st.integers(1, 4)
KNOWN = st.one_of(
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


def unchecked(parts):
    """A Sequential that was never looked at."""
    model = object.__new__(Sequential)
    object.__setattr__(model, "layers", MappingProxyType(parts))
    return model


@settings(deadline=None, max_examples=300)
@given(st.lists(KNOWN, min_size=2, max_size=4), st.integers(1, 8))
@example([MergeDirections(1, "pair"), xprnn.HoldLastOutput()], 1)
@example([xprnn.LastStep(), Embedding(1, 1)], 2)
def test_nothing_that_runs_is_refused(parts, cut):
    """What is refused fails for every input; a chain inside the chain changes nothing about it.

    A step has no time to lose, so what would walk along a lost time axis runs there; Around would move rows instead.
    """
    parts = {f"p{k}": part for k, part in enumerate(parts)}
    nested = dict(list(parts.items())[:cut])
    nested = {"inner": unchecked(nested), **{k: p for k, p in parts.items() if k not in nested}}
    verdicts = []
    for chain in (parts, nested):
        try:
            Sequential(**chain)
        except InputError as error:
            verdicts.append(str(error).replace("inner.", ""))
        else:
            verdicts.append("")
    assert verdicts[0] == verdicts[1]
    lost = "walks along time" in verdicts[0]
    if not verdicts[0] or (lost and "(ContextShift)" in verdicts[0]):
        return
    model = unchecked(parts)
    params = model.init(np.random.default_rng(0), np.zeros(0))
    inputs = [np.ones((3, 2, d)) for d in range(1, 9)] + [np.ones((2, d)) for d in range(1, 9)]
    for x in [*inputs, np.zeros((3, 2), int), np.zeros(2, int)]:
        for verb in (model,) if lost else (model, model.step):
            with pytest.raises(InputError):
                verb(params, x)


class Doubled(xprnn.layers.base.StatelessLayer):
    """A part of one's own, which says nothing of its widths."""

    def forward(self, params, x, state=None, **flags):
        """The input twice."""
        return np.concatenate((x, x), axis=-1), None, None


class Wide(Linear):
    """A Linear that gives more than its options say."""

    def __call__(self, params, x, state=None, **flags):
        """The output twice."""
        y, _ = super().__call__(params, x)
        return np.concatenate((y, y), axis=-1), None


class Skip(Sequential):
    """A chain that does more between its parts."""

    def __call__(self, params, x, state=None, lengths=None, mask=None, reset=None):
        """The second part reads the input too."""
        own = {n: {k[len(n) + 1 :]: a for k, a in params.items() if k.startswith(n)} for n in self.layers}
        y, _ = self.layers["a"](own["a"], x)
        return self.layers["b"](own["b"], np.concatenate((x, y), axis=-1))


@pytest.mark.parametrize(
    ("model", "out"),
    [
        (Sequential(rnn=RNN(3, 4), own=Doubled(), head=Linear(8, 2)), 2),
        (Sequential(up=Linear(3, 3), wide=Wide(3, 4), rnn=RNN(8, 2)), 2),
        (Skip(a=Linear(3, 4), b=Linear(7, 2)), 2),
        (Sequential(skip=Skip(a=Linear(3, 4), b=Linear(7, 2)), head=Linear(2, 5)), 5),
        (Sequential(mask=Masking(), rnn=Recurrent(3, 4, cell=xprnn.cells.elman()), head=Linear(4, 1)), 1),
    ],
    ids=["own part", "own Linear", "own chain", "own chain inside", "masked"],
)
def test_what_is_not_known_is_left_to_the_first_call(model, out):
    params = model.init(np.random.default_rng(0), np.zeros(0))
    assert model(params, np.ones((5, 2, 3)))[0].shape == (5, 2, out)


def test_integers_may_pass_a_mask():
    model = Sequential(mask=Masking(0), read=Embedding(5, 4), rnn=RNN(4, 2))
    params = model.init(np.random.default_rng(0), np.zeros(0))
    assert model(params, np.ones((5, 2), int))[0].shape == (5, 2, 2)


def test_parts_are_read_only():
    parts = {"rnn": RNN(3, 4), "head": Linear(4, 2)}
    model = Sequential(**parts)
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
    parts["head"] = Linear(4, 9)
    assert model.layers["head"] == Linear(4, 2)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, *(lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(2, 6))],
    ids=["copy", "deepcopy", *(f"pickle {p}" for p in range(2, 6))],
)
def test_copies_and_pickles(duplicate, used):
    model = Sequential(low=Sequential(rnn=RNN(3, 4)), head=Linear(4, 2))
    params = model.init(np.random.default_rng(0), np.zeros(0))
    x = np.ones((1, 3))
    want = model.step(params, x)[0]
    if used:
        assert "_fast_step" in vars(model)
    else:
        model = Sequential(**model.layers)
    found = duplicate(model)
    assert found == model
    assert hash(found) == hash(model)
    assert list(found.layers) == ["low", "head"]
    assert found.shapes() == model.shapes()
    np.testing.assert_array_equal(found.step(params, x)[0], want)
    with pytest.raises(TypeError):
        found.layers["head"] = Linear(4, 9)
    with pytest.raises(AttributeError, match="frozen"):
        found.layers = {}


def test_a_pickle_of_a_plain_dict_of_parts_is_read():
    """As Sequential was pickled before its parts were read-only."""
    model = object.__new__(Sequential)
    model.__setstate__({"layers": {"rnn": RNN(3, 4)}})
    assert model == Sequential(rnn=RNN(3, 4))
    with pytest.raises(TypeError):
        model.layers["rnn"] = RNN(1, 1)
