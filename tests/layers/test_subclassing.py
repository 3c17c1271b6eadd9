"""User-defined subclasses: the method that they override runs when the layer is called, alone or in a Sequential."""

from __future__ import annotations

import numpy as np
import pytest

import xprnn

T, N, D, H = 5, 2, 3, 3
FLAGS = {"lengths": [4, 2], "mask": np.arange(T * N).reshape(T, N) % 3 > 0}


def doubling(kind):
    """Return a subclass that overrides `forward` only, and passes 2 x on."""

    class Doubling(kind):
        """Layer applied to 2 x."""

        def forward(self, params, x, state=None, **options):
            """Call the base class with 2 x."""
            return super().forward(params, 2 * x, state, **options)

    return Doubling


CLASSES = {"RNN": xprnn.RNN, "LSTM": xprnn.LSTM, "GRU": xprnn.GRU, "Linear": xprnn.Linear}
every_class = pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)


def params_and_x(rng, model, n=N):
    return model.init(rng, like=np.zeros(0)), rng.standard_normal((T, n, D))


def assert_same(result, expected):
    """Compare y and state up to rounding, because a pass with a tape may sum in another order than one without."""
    for a, b in zip(result, expected, strict=True):
        if b is not None:
            np.testing.assert_allclose(np.concatenate([a]), np.concatenate([b]), rtol=1e-13, atol=1e-15)


@every_class
@pytest.mark.parametrize("n", [1, N])
@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["no flags", "flags"])
def test_call_runs_an_overridden_forward(rng, kind, n, flags):
    subclassed, base = doubling(kind)(D, H), kind(D, H)
    params, x = params_and_x(rng, base, n)
    flags = {"lengths": flags["lengths"][:n], "mask": flags["mask"][:, :n]} if flags else {}
    assert_same(subclassed(params, x, **flags), base(params, 2 * x, **flags))
    assert_same(subclassed(params, x, None, **flags), subclassed.forward(params, x, None, **flags)[:2])
    state = base(params, x)[1]
    assert_same(subclassed(params, x, state, **flags), base(params, 2 * x, state, **flags))
    subsubclassed = type("SubSubclass", (type(subclassed),), {})(D, H)
    assert_same(subsubclassed(params, x, **flags), base(params, 2 * x, **flags))


@every_class
def test_sequential_runs_an_overridden_forward(rng, kind):
    subclassed, base = (xprnn.Sequential(a=k(D, H), b=xprnn.Linear(H, 2)) for k in (doubling(kind), kind))
    params, x = params_and_x(rng, base)
    for flags in ({}, FLAGS):
        assert_same(subclassed(params, x, **flags), base(params, 2 * x, **flags))
        assert_same(subclassed.forward(params, x, **flags)[:2], base(params, 2 * x, **flags))


def test_subclass_of_sequential_alone_and_nested(rng):
    """A nested Sequential usually passes its mask on without `forward`; a subclass must go through `forward`."""
    layers = {"rnn": xprnn.GRU(D, H), "head": xprnn.Linear(H, D)}
    subclassed, base = doubling(xprnn.Sequential)(**layers), xprnn.Sequential(**layers)
    params, x = params_and_x(rng, base)
    for flags in ({}, FLAGS):
        assert_same(subclassed(params, x, **flags), base(params, 2 * x, **flags))
    subclassed, base = (xprnn.Sequential(inner=inner, head=xprnn.Linear(D, 1)) for inner in (subclassed, base))
    params = base.init(rng, like=np.zeros(0))
    assert_same(subclassed(params, x), base(params, 2 * x))


def test_overridden_call_is_kept(rng):
    class Both(xprnn.LSTM):
        """Layer whose call differs from its forward."""

        def __call__(self, params, x, state=None, **flags):
            """Call the base class with x / 2."""
            return super().__call__(params, x / 2, state, **flags)

        def forward(self, params, x, state=None, **options):
            """Call the base class with 2 x."""
            return super().forward(params, 2 * x, state, **options)

    subclassed, base = Both(D, H), xprnn.LSTM(D, H)
    params, x = params_and_x(rng, base)
    assert_same(subclassed(params, x), base(params, x / 2))
    assert_same(subclassed.forward(params, x)[:2], base(params, 2 * x))


@pytest.mark.parametrize("method", ["forward", "__call__"])
def test_step_of_a_linear_subclass_runs_its_override(rng, method):
    def twice(self, params, x, state=None, **options):
        return getattr(super(subclass, self), method)(params, 2 * x)

    subclass = type("Doubling", (xprnn.Linear,), {method: twice})
    params, x = params_and_x(rng, xprnn.Linear(D, H))
    expected = xprnn.Linear(D, H)(params, 2 * x[0])[0]
    np.testing.assert_array_equal(subclass(D, H).step(params, x[0])[0], expected)
    model = xprnn.Sequential(head=subclass(D, H))
    np.testing.assert_array_equal(model.step({f"head.{k}": a for k, a in params.items()}, x[0])[0], expected)
    nested = xprnn.Sequential(inner=model)
    assert nested._fast_step({f"inner.head.{k}": a for k, a in params.items()}, x[0], None) is None
    np.testing.assert_array_equal(nested.step({f"inner.head.{k}": a for k, a in params.items()}, x[0])[0], expected)


def test_step_of_an_embedding_subclass_runs_its_forward(rng):
    class Next(xprnn.Embedding):
        """Embedding of x + 1."""

        def forward(self, params, x, state=None, **flags):
            """Call the base class with x + 1."""
            return super().forward(params, x + 1)

    params = Next(5, D).init(rng, like=np.zeros(0))
    np.testing.assert_array_equal(Next(5, D).step(params, np.array([1, 3]))[0], params["weight"][[2, 4]])


def test_call_without_override_is_the_library_method():
    """A subclass that does not override `forward` keeps the fast path of a call."""
    for kind in (xprnn.RNN, xprnn.LSTM, xprnn.GRU, xprnn.Recurrent, type("Named", (xprnn.LSTM,), {})):
        assert kind.__call__ is xprnn.Recurrent.__call__
