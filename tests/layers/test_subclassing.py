"""Classes of a user's own: a verb that they override is the one that runs, called or inside a Sequential."""

from __future__ import annotations

import numpy as np
import pytest

import xprnn

T, N, D, H = 5, 2, 3, 3
FLAGS = {"lengths": [4, 2], "mask": np.arange(T * N).reshape(T, N) % 3 > 0}


def doubling(kind):
    """A class whose `forward` reads twice the input, and says nothing else."""

    class Doubling(kind):
        """Of twice the input."""

        def forward(self, params, x, state=None, **options):
            """As the layer's own, of 2 x."""
            return super().forward(params, 2 * x, state, **options)

    return Doubling


CELLS = {"RNN": xprnn.RNN, "LSTM": xprnn.LSTM, "GRU": xprnn.GRU, "Linear": xprnn.Linear}
each = pytest.mark.parametrize("kind", CELLS.values(), ids=CELLS)


def given(rng, model, n=N):
    return model.init(rng, like=np.zeros(0)), rng.standard_normal((T, n, D))


def same(found, wanted):
    """y and the state, to the last digits: a pass with a tape may sum in another order than one without."""
    for a, b in zip(found, wanted, strict=True):
        if b is not None:
            np.testing.assert_allclose(np.concatenate([a]), np.concatenate([b]), rtol=1e-13, atol=1e-15)


@each
@pytest.mark.parametrize("n", [1, N])
@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["plain", "flags"])
def test_calling_runs_a_forward_of_ones_own(rng, kind, n, flags):
    own, plain = doubling(kind)(D, H), kind(D, H)
    params, x = given(rng, plain, n)
    flags = {"lengths": flags["lengths"][:n], "mask": flags["mask"][:, :n]} if flags else {}
    same(own(params, x, **flags), plain(params, 2 * x, **flags))
    same(own(params, x, None, **flags), own.forward(params, x, None, **flags)[:2])
    state = plain(params, x)[1]
    same(own(params, x, state, **flags), plain(params, 2 * x, state, **flags))
    below = type("Below", (type(own),), {})(D, H)
    same(below(params, x, **flags), plain(params, 2 * x, **flags))


@each
def test_a_sequential_runs_it(rng, kind):
    own, plain = (xprnn.Sequential(a=k(D, H), b=xprnn.Linear(H, 2)) for k in (doubling(kind), kind))
    params, x = given(rng, plain)
    for flags in ({}, FLAGS):
        same(own(params, x, **flags), plain(params, 2 * x, **flags))
        same(own.forward(params, x, **flags)[:2], plain(params, 2 * x, **flags))


def test_a_sequential_of_ones_own(rng):
    """Alone, and inside another, where the mask of one part is otherwise handed to the parts after it."""
    parts = {"rnn": xprnn.GRU(D, H), "head": xprnn.Linear(H, D)}
    own, plain = doubling(xprnn.Sequential)(**parts), xprnn.Sequential(**parts)
    params, x = given(rng, plain)
    for flags in ({}, FLAGS):
        same(own(params, x, **flags), plain(params, 2 * x, **flags))
    own, plain = (xprnn.Sequential(inner=inner, head=xprnn.Linear(D, 1)) for inner in (own, plain))
    params = plain.init(rng, like=np.zeros(0))
    same(own(params, x), plain(params, 2 * x))


def test_a_call_of_ones_own_stays(rng):
    class Both(xprnn.LSTM):
        """Calls and passes that differ."""

        def __call__(self, params, x, state=None, **flags):
            """Of half the input."""
            return super().__call__(params, x / 2, state, **flags)

        def forward(self, params, x, state=None, **options):
            """Of twice the input."""
            return super().forward(params, 2 * x, state, **options)

    own, plain = Both(D, H), xprnn.LSTM(D, H)
    params, x = given(rng, plain)
    same(own(params, x), plain(params, x / 2))
    same(own.forward(params, x)[:2], plain(params, 2 * x))


@pytest.mark.parametrize("verb", ["forward", "__call__"])
def test_a_linears_step_is_its_call(rng, verb):
    def twice(self, params, x, state=None, **options):
        return getattr(super(own, self), verb)(params, 2 * x)

    own = type("Own", (xprnn.Linear,), {verb: twice})
    params, x = given(rng, xprnn.Linear(D, H))
    want = xprnn.Linear(D, H)(params, 2 * x[0])[0]
    np.testing.assert_array_equal(own(D, H).step(params, x[0])[0], want)
    chain = xprnn.Sequential(head=own(D, H))
    np.testing.assert_array_equal(chain.step({f"head.{k}": a for k, a in params.items()}, x[0])[0], want)
    again = xprnn.Sequential(inner=chain)
    assert again._fast_step({f"inner.head.{k}": a for k, a in params.items()}, x[0], None) is not None
    np.testing.assert_array_equal(again.step({f"inner.head.{k}": a for k, a in params.items()}, x[0])[0], want)


def test_an_embeddings_step_is_its_call(rng):
    class Next(xprnn.Embedding):
        """Of the number after."""

        def forward(self, params, x, state=None, **flags):
            """Of x + 1."""
            return super().forward(params, x + 1)

    params = Next(5, D).init(rng, like=np.zeros(0))
    np.testing.assert_array_equal(Next(5, D).step(params, np.array([1, 3]))[0], params["weight"][[2, 4]])


def test_the_ordinary_call_is_its_own():
    """Nothing stands between a call and the layer's quick ways."""
    for kind in (xprnn.RNN, xprnn.LSTM, xprnn.GRU, xprnn.Recurrent, type("Named", (xprnn.LSTM,), {})):
        assert kind.__call__ is xprnn.Recurrent.__call__
