"""Which axis is time: a chain whose parts differ about it, or walk where none is left, is refused when it is made."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layers.test_shape_inference import assert_refused

import xprnn
from xprnn import GRU, LSTM, RNN, ContextShift, Embedding, InputError, Linear, Masking, MergeDirections, Sequential

REFUSED = {
    "rows for steps": (
        {"low": GRU(3, 4, batch_first=True), "up": Linear(4, 5), "high": LSTM(5, 2)},
        "high (LSTM) has batch_first=False, expected True: low (GRU) gives (N,T,...)",
    ),
    "steps for rows": (
        {"low": GRU(3, 4, bidirectional=True), "m": MergeDirections(4), "last": xprnn.LastStep(batch_first=True)},
        "last (LastStep) has batch_first=True, expected False: low (GRU) gives (T,N,...)",
    ),
    "through what has no time of its own": (
        {
            "turn": xprnn.ReverseTime(batch_first=True),
            "m": Masking(),
            "bend": xprnn.ActivationLayer("tanh"),
            "up": Linear(3, 3),
            "p": xprnn.Softmax(),
            "held": xprnn.HoldLastOutput(),
        },
        "held (HoldLastOutput) has batch_first=False, expected True: turn (ReverseTime) gives (N,T,...)",
    ),
    "around is time first": (
        {"rnn": RNN(3, 5, bidirectional=True, batch_first=True), "a": ContextShift(5)},
        "a (ContextShift) takes (T,N,...), but rnn (RNN) gives (N,T,...): give that part batch_first=False",
    ),
    "behind around, rows first": (
        {"a": ContextShift(2), "r": RNN(4, 5, batch_first=True)},
        "a (ContextShift) gives (T,N,...)",
    ),
    "rows for steps, inside": (
        {"low": Sequential(read=Embedding(7, 3), rnn=RNN(3, 4, batch_first=True)), "high": Sequential(rnn=RNN(4, 4))},
        "high.rnn (RNN) has batch_first=False, expected True: low.rnn (RNN) gives (N,T,...)",
    ),
    "no time left": (
        {"rnn": RNN(3, 4), "last": xprnn.LastStep(), "up": Linear(4, 4), "high": RNN(4, 2)},
        "high (RNN) walks along time, (T,N,...), but last (LastStep) leaves one output of each row, (N,...)",
    ),
    "no time left, rows first": (
        {"low": Sequential(l=xprnn.LastStep(batch_first=True)), "high": LSTM(4, 2, batch_first=True)},
        "but low.l (LastStep) leaves one output of each row",
    ),
    "the last of the last": ({"a": xprnn.LastStep(), "b": xprnn.LastStep()}, "b (LastStep) walks along time"),
    "held behind the last": (
        {"a": xprnn.LastStep(), "b": xprnn.HoldLastOutput()},
        "b (HoldLastOutput) walks along time",
    ),
    "turned behind the last": ({"a": xprnn.LastStep(), "b": xprnn.ReverseTime()}, "b (ReverseTime) walks along time"),
    "around behind the last": ({"a": xprnn.LastStep(), "b": ContextShift(2)}, "b (ContextShift) walks along time"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_when_it_is_made(case):
    assert_refused(*REFUSED[case])


ANY_ORDER = st.one_of(
    st.builds(
        lambda first, both: RNN(2, 2 - both, batch_first=first, bidirectional=both), st.booleans(), st.booleans()
    ),
    st.builds(lambda first: xprnn.ReverseTime(batch_first=first), st.booleans()),
    st.builds(lambda first: xprnn.HoldLastOutput(batch_first=first), st.booleans()),
    st.sampled_from([xprnn.ActivationLayer("tanh"), Linear(2, 2), ContextShift(1)]),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(ANY_ORDER, min_size=2, max_size=5))
@example([RNN(2, 2, batch_first=True), ContextShift(1)])
@example([RNN(2, 2, batch_first=True), Linear(2, 2), RNN(2, 2)])
def test_no_chain_mixes_rows(parts):
    """Of what is not refused, along one of the two axes the entries never meet: those are the rows."""
    parts = {f"p{k}": part for k, part in enumerate(parts)}
    try:
        model = Sequential(**parts)
    except InputError:
        assert {getattr(part, "batch_first", False) for part in parts.values()} == {False, True}
        return
    params = model.init(np.random.default_rng(0), np.zeros(0))
    x = np.random.default_rng(1).standard_normal((3, 4, 2))
    y, _ = model(params, x)
    mixed = []
    for axis in (0, 1):
        moved = x.copy()
        moved[(slice(None),) * axis + (1,)] += 1
        same = model(params, moved)[0] == y
        mixed.append(not np.delete(same, 1, axis=axis).all())
    assert not all(mixed)


class Turned(xprnn.layers.base.StatelessLayer):
    """(T, N, .) to (N, T, .), and back."""

    def forward(self, params, x, state=None, **flags):
        """The first two axes changed."""
        return np.swapaxes(x, 0, 1), None, None


class Repeated(xprnn.layers.base.StatelessLayer):
    """One output of each row as so many steps."""

    def __init__(self, steps):
        self.steps = steps

    def forward(self, params, x, state=None, **flags):
        """(N, D) to (T, N, D)."""
        return np.repeat(x[None], self.steps, axis=0), None, None


@pytest.mark.parametrize(
    ("model", "out"),
    [
        (Sequential(rows=RNN(3, 4), turn=Turned(), columns=RNN(4, 4, batch_first=True), back=Turned()), (5, 2, 4)),
        (Sequential(rnn=RNN(3, 4), last=xprnn.LastStep(), again=Repeated(7), on=RNN(4, 2)), (7, 2, 2)),
    ],
    ids=["order", "time"],
)
def test_what_parts_of_your_own_do_is_left_to_the_first_call(model, out):
    params = model.init(np.random.default_rng(0), np.zeros(0))
    assert model(params, np.ones((5, 2, 3)))[0].shape == out
