"""Which axis is time: a chain whose parts differ about it, or walk where none is left, is refused when it is made."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layers.test_shape_inference import assert_refused

import xprnn
from xprnn import GRU, LSTM, RNN, Around, Embedding, InputError, Linear, Masking, Merge, Sequential

REFUSED = {
    "rows for steps": (
        {"low": GRU(3, 4, batch_first=True), "up": Linear(4, 5), "high": LSTM(5, 2)},
        "high (LSTM) has batch_first=False, expected True: low (GRU) gives (N,T,...)",
    ),
    "steps for rows": (
        {"low": GRU(3, 4, bidirectional=True), "m": Merge(4), "last": xprnn.Last(batch_first=True)},
        "last (Last) has batch_first=True, expected False: low (GRU) gives (T,N,...)",
    ),
    "through what has no time of its own": (
        {
            "turn": xprnn.Flip(batch_first=True),
            "m": Masking(),
            "bend": xprnn.Apply("tanh"),
            "up": Linear(3, 3),
            "p": xprnn.Softmax(),
            "held": xprnn.Hold(),
        },
        "held (Hold) has batch_first=False, expected True: turn (Flip) gives (N,T,...)",
    ),
    "around is time first": (
        {"rnn": RNN(3, 5, bidirectional=True, batch_first=True), "a": Around(5)},
        "a (Around) takes (T,N,...), but rnn (RNN) gives (N,T,...): give that part batch_first=False",
    ),
    "behind around, rows first": ({"a": Around(2), "r": RNN(4, 5, batch_first=True)}, "a (Around) gives (T,N,...)"),
    "rows for steps, inside": (
        {"low": Sequential(read=Embedding(7, 3), rnn=RNN(3, 4, batch_first=True)), "high": Sequential(rnn=RNN(4, 4))},
        "high.rnn (RNN) has batch_first=False, expected True: low.rnn (RNN) gives (N,T,...)",
    ),
    "no time left": (
        {"rnn": RNN(3, 4), "last": xprnn.Last(), "up": Linear(4, 4), "high": RNN(4, 2)},
        "high (RNN) walks along time, (T,N,...), but last (Last) leaves one output of each row, (N,...)",
    ),
    "no time left, rows first": (
        {"low": Sequential(l=xprnn.Last(batch_first=True)), "high": LSTM(4, 2, batch_first=True)},
        "but low.l (Last) leaves one output of each row",
    ),
    "the last of the last": ({"a": xprnn.Last(), "b": xprnn.Last()}, "b (Last) walks along time"),
    "held behind the last": ({"a": xprnn.Last(), "b": xprnn.Hold()}, "b (Hold) walks along time"),
    "turned behind the last": ({"a": xprnn.Last(), "b": xprnn.Flip()}, "b (Flip) walks along time"),
    "around behind the last": ({"a": xprnn.Last(), "b": Around(2)}, "b (Around) walks along time"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_when_it_is_made(case):
    assert_refused(*REFUSED[case])


ANY_ORDER = st.one_of(
    st.builds(
        lambda first, both: RNN(2, 2 - both, batch_first=first, bidirectional=both), st.booleans(), st.booleans()
    ),
    st.builds(lambda first: xprnn.Flip(batch_first=first), st.booleans()),
    st.builds(lambda first: xprnn.Hold(batch_first=first), st.booleans()),
    st.sampled_from([xprnn.Apply("tanh"), Linear(2, 2), Around(1)]),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(ANY_ORDER, min_size=2, max_size=5))
@example([RNN(2, 2, batch_first=True), Around(1)])
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


class Turned(xprnn.layers.base.Part):
    """(T, N, .) to (N, T, .), and back."""

    def forward(self, params, x, state=None, **flags):
        """The first two axes changed."""
        return np.swapaxes(x, 0, 1), None, None


class Repeated(xprnn.layers.base.Part):
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
        (Sequential(rnn=RNN(3, 4), last=xprnn.Last(), again=Repeated(7), on=RNN(4, 2)), (7, 2, 2)),
    ],
    ids=["order", "time"],
)
def test_what_parts_of_your_own_do_is_left_to_the_first_call(model, out):
    params = model.init(np.random.default_rng(0), np.zeros(0))
    assert model(params, np.ones((5, 2, 3)))[0].shape == out
