"""A Sequential raises at construction if its layers disagree on the time axis, or if one follows LastStep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.sequential_checks import assert_construction_raises

import xprnn
from xprnn import GRU, LSTM, RNN, ContextShift, Embedding, InputError, Linear, Masking, MergeDirections, Sequential

INCOMPATIBLE = {
    "rows read as steps": (
        {"low": GRU(3, 4, batch_first=True), "up": Linear(4, 5), "high": LSTM(5, 2)},
        "high (LSTM) has batch_first=False, expected True: low (GRU) gives (N,T,...)",
    ),
    "steps read as rows": (
        {"low": GRU(3, 4, bidirectional=True), "m": MergeDirections(4), "last": xprnn.LastStep(batch_first=True)},
        "last (LastStep) has batch_first=True, expected False: low (GRU) gives (T,N,...)",
    ),
    "through layers without a time axis": (
        {
            "reverse": xprnn.ReverseTime(batch_first=True),
            "m": Masking(),
            "act": xprnn.ActivationLayer("tanh"),
            "up": Linear(3, 3),
            "p": xprnn.Softmax(),
            "held": xprnn.HoldLastOutput(),
        },
        "held (HoldLastOutput) has batch_first=False, expected True: reverse (ReverseTime) gives (N,T,...)",
    ),
    "context shift is time-major": (
        {"rnn": RNN(3, 5, bidirectional=True, batch_first=True), "a": ContextShift(5)},
        "a (ContextShift) takes (T,N,...), but rnn (RNN) gives (N,T,...): give that layer batch_first=False",
    ),
    "after a context shift, batch-major": (
        {"a": ContextShift(2), "r": RNN(4, 5, batch_first=True)},
        "a (ContextShift) gives (T,N,...)",
    ),
    "rows read as steps, nested": (
        {"low": Sequential(read=Embedding(7, 3), rnn=RNN(3, 4, batch_first=True)), "high": Sequential(rnn=RNN(4, 4))},
        "high.rnn (RNN) has batch_first=False, expected True: low.rnn (RNN) gives (N,T,...)",
    ),
    "after LastStep": (
        {"rnn": RNN(3, 4), "last": xprnn.LastStep(), "up": Linear(4, 4), "high": RNN(4, 2)},
        "high (RNN) runs along time, (T,N,...), but last (LastStep) gives one output for each row, (N,...)",
    ),
    "after LastStep, batch-major": (
        {"low": Sequential(l=xprnn.LastStep(batch_first=True)), "high": LSTM(4, 2, batch_first=True)},
        "but low.l (LastStep) gives one output for each row",
    ),
    "LastStep after LastStep": ({"a": xprnn.LastStep(), "b": xprnn.LastStep()}, "b (LastStep) runs along time"),
    "HoldLastOutput after LastStep": (
        {"a": xprnn.LastStep(), "b": xprnn.HoldLastOutput()},
        "b (HoldLastOutput) runs along time",
    ),
    "ReverseTime after LastStep": (
        {"a": xprnn.LastStep(), "b": xprnn.ReverseTime()},
        "b (ReverseTime) runs along time",
    ),
    "ContextShift after LastStep": ({"a": xprnn.LastStep(), "b": ContextShift(2)}, "b (ContextShift) runs along time"),
}


@pytest.mark.parametrize("case", INCOMPATIBLE)
def test_incompatible_time_axes_raise_at_construction(case):
    assert_construction_raises(*INCOMPATIBLE[case])


EITHER_AXIS_ORDER = st.one_of(
    st.builds(
        lambda first, both: RNN(2, 2 - both, batch_first=first, bidirectional=both), st.booleans(), st.booleans()
    ),
    st.builds(lambda first: xprnn.ReverseTime(batch_first=first), st.booleans()),
    st.builds(lambda first: xprnn.HoldLastOutput(batch_first=first), st.booleans()),
    st.sampled_from([xprnn.ActivationLayer("tanh"), Linear(2, 2), ContextShift(1)]),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(EITHER_AXIS_ORDER, min_size=2, max_size=5))
@example([RNN(2, 2, batch_first=True), ContextShift(1)])
@example([RNN(2, 2, batch_first=True), Linear(2, 2), RNN(2, 2)])
def test_accepted_models_do_not_mix_rows(layers):
    """In a model that is accepted, entries along one of the two axes do not influence each other: the batch axis."""
    try:
        model = Sequential(**{f"p{k}": layer for k, layer in enumerate(layers)})
    except InputError:
        assert {getattr(layer, "batch_first", False) for layer in layers} == {False, True}
        return
    params = model.init(np.random.default_rng(0), np.zeros(0))
    x = np.random.default_rng(1).standard_normal((3, 4, 2))
    y, _ = model(params, x)
    mixed = []
    for axis in (0, 1):
        changed = x.copy()
        changed[(slice(None),) * axis + (1,)] += 1
        unchanged = model(params, changed)[0] == y
        mixed.append(not np.delete(unchanged, 1, axis=axis).all())
    assert not all(mixed)


class SwapAxes(xprnn.layers.base.StatelessLayer):
    """A user-defined layer from (T, N, D) to (N, T, D)."""

    def forward(self, params, x, state=None, **flags):
        """Swap the first two axes."""
        return np.swapaxes(x, 0, 1), None, None


class Repeat(xprnn.layers.base.StatelessLayer):
    """A user-defined layer that adds a time axis."""

    def __init__(self, steps):
        self.steps = steps

    def forward(self, params, x, state=None, **flags):
        """Repeat x (N, D) to (T, N, D)."""
        return np.repeat(x[None], self.steps, axis=0), None, None


@pytest.mark.parametrize(
    ("model", "out"),
    [
        (Sequential(low=RNN(3, 4), swap=SwapAxes(), high=RNN(4, 4, batch_first=True), back=SwapAxes()), (5, 2, 4)),
        (Sequential(rnn=RNN(3, 4), last=xprnn.LastStep(), repeat=Repeat(7), rnn2=RNN(4, 2)), (7, 2, 2)),
    ],
    ids=["swapped axes", "new time axis"],
)
def test_user_defined_layers_may_change_the_time_axis(model, out):
    params = model.init(np.random.default_rng(0), np.zeros(0))
    assert model(params, np.ones((5, 2, 3)))[0].shape == out
