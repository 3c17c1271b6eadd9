"""The parts that learn nothing, alone and in a model: values against plain loops, gradients against differences."""

from __future__ import annotations

import numpy as np
import pytest
from support.layer_cases import to_backend
from support.oracles import check_gradients_on

import xprnn
from xprnn import ActivationLayer, HoldLastOutput, LastStep, Masking, MergeDirections, ReverseTime, Softmax
from xprnn.layers.sequential import from_config

T, N, D = 5, 4, 4
differences = pytest.mark.not_on(
    "strict:no_float64", "strict:device1", "numpy:readonly", reason="differences are taken on the plain variant"
)


def valid_steps(flags):
    valid = np.ones((T, N), bool) if flags.get("mask") is None else flags["mask"].copy()
    for n, length in enumerate(flags.get("lengths", [T] * N)):
        valid[length:, n] = False
    return valid


def held(x, valid, walk):
    out = np.zeros_like(x)
    for n in range(N):
        for d in range(D):
            reverse = walk == "reverse" or (walk == "both" and d >= D // 2)
            last = 0.0
            for t in reversed(range(T)) if reverse else range(T):
                last = out[t, n, d] = x[t, n, d] if valid[t, n] else last
    return out


def last(x, valid, walk, only_valid=True):
    y = held(x, valid, walk) if only_valid else x
    first = [walk == "reverse" or (walk == "both" and d >= D // 2) for d in range(D)]
    return np.where(first, y[0], y[-1])


FLAGS = {
    "none": {},
    "holes": {"mask": np.random.default_rng(3).random((T, N)) < 0.5},
    "ragged": {"lengths": np.array([5, 0, 3, 1])},
    "both": {"mask": np.random.default_rng(4).random((T, N)) < 0.7, "lengths": np.array([3, 5, 0, 4])},
}
OVER_TIME = {
    **{
        f"hold-{w}": (HoldLastOutput(direction=w), lambda x, v, w=w: held(x, v, w))
        for w in ("forward", "reverse", "both")
    },
    **{f"last-{w}": (LastStep(direction=w), lambda x, v, w=w: last(x, v, w)) for w in ("forward", "reverse", "both")},
    "last-any": (LastStep(direction="both", valid_only=False), lambda x, v: last(x, v, "both", False)),
    "flip": (ReverseTime(), lambda x, v: x[::-1]),
}
over_time = pytest.mark.parametrize("name", OVER_TIME)
flagged = pytest.mark.parametrize("flags", FLAGS.values(), ids=list(FLAGS))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


POINTWISE = {
    **{
        f"apply-{f}": (ActivationLayer(f), reference)
        for f, reference in {
            "tanh": np.tanh,
            "relu": lambda x: np.maximum(x, 0),
            "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
            "softplus": lambda x: np.log1p(np.exp(x)),
        }.items()
    },
    "apply-own-constants": (ActivationLayer(xprnn.activation("leakyrelu", 0.3)), lambda x: np.where(x > 0, x, 0.3 * x)),
    "softmax": (Softmax(), softmax),
    "log-softmax": (Softmax(log=True), lambda x: np.log(softmax(x))),
    "sum": (MergeDirections(2, "sum"), lambda x: x[..., :2] + x[..., 2:]),
    "mul": (MergeDirections(2, "mul"), lambda x: x[..., :2] * x[..., 2:]),
    "ave": (MergeDirections(2, "ave"), lambda x: (x[..., :2] + x[..., 2:]) / 2),
    "pair": (MergeDirections(2, "pair"), lambda x: (x[..., :2], x[..., 2:])),
}
pointwise = pytest.mark.parametrize("name", POINTWISE)


def check_part(xp, part, x, **flags):
    check_gradients_on(
        xp,
        lambda x: part.forward({}, x, **flags)[::2],
        lambda tape, dy: part.backward(tape, dy).dx,
        [x],
        names=["x"],
    )


@pytest.mark.parametrize("batch_first", [False, True])
@flagged
@over_time
def test_along_time(xp, dtype, rng, name, flags, batch_first):
    part, reference = OVER_TIME[name]
    x = rng.normal(size=(T, N, D)).astype("float32").astype("float64")
    want, given = reference(x, valid_steps(flags)), dict(flags)
    if batch_first:
        part = from_config(part.config() | {"batch_first": True})
        x, want = np.swapaxes(x, 0, 1), np.swapaxes(want, 0, 1) if want.ndim == 3 else want
        given |= {"mask": None if flags.get("mask") is None else flags["mask"].T}
    here = xp.asarray(x, dtype)
    y, _, tape = part.forward({}, here, **to_backend(xp, given))
    xp.assert_like(y, here)
    xp.assert_close(y, want, condition=0)
    xp.assert_close(part({}, here, **to_backend(xp, given))[0], want, condition=0)
    dy = rng.normal(size=want.shape)
    dx = part.backward(tape, xp.asarray(dy, dtype)).dx
    xp.assert_like(dx, here)
    # The parts here are linear: <dy, part(v)> = <dx, v> for any v, nothing else is the adjoint.
    for v in rng.normal(size=(3, T, N, D)):
        pushed = reference(v, valid_steps(flags))
        pushed = np.swapaxes(pushed, 0, 1) if batch_first and pushed.ndim == 3 else pushed
        pulled = np.swapaxes(xp.to_numpy(dx), 0, 1) if batch_first else xp.to_numpy(dx)
        np.testing.assert_allclose((pulled * v).sum(), (dy * pushed).sum(), atol=1e-4 if dtype == "float32" else 1e-12)


@differences
@flagged
@over_time
def test_gradients_along_time(xp, rng, name, flags):
    check_part(xp, OVER_TIME[name][0], xp.asarray(rng.normal(size=(T, N, D))), **to_backend(xp, flags))


@pointwise
def test_pointwise(xp, dtype, rng, name):
    part, reference = POINTWISE[name]
    x = rng.normal(size=(2, 3, D))
    here = xp.asarray(x, dtype)
    y, _, tape = part.forward({}, here)
    xp.assert_like(y, here)
    xp.assert_close(y, reference(x), condition=32)
    xp.assert_close(part.step({}, here[0, ...])[0], on_rows(reference(x)), condition=32)
    dy = tuple(xp.asarray(rng.normal(size=a.shape), dtype) for a in y) if isinstance(y, tuple) else y
    xp.assert_like(part.backward(tape, dy).dx, here)


def on_rows(y):
    return tuple(a[0] for a in y) if isinstance(y, tuple) else y[0]


@differences
@pointwise
def test_gradients_pointwise(xp, rng, name):
    check_part(xp, POINTWISE[name][0], xp.asarray(rng.normal(size=(2, 3, D))))


def test_softmax_of_scores_far_apart(xp):
    x = xp.asarray(np.array([[0.0, 1e4], [-1e4, 0.0]]), "float32")
    xp.assert_close(Softmax()({}, x)[0], np.array([[0.0, 1.0], [0.0, 1.0]]), condition=0)
    xp.assert_close(Softmax(log=True)({}, x)[0], np.array([[-1e4, 0.0], [-1e4, 0.0]]), condition=1)


def padded(rng, value=0.0):
    """x (T, N, 2) whose skipped steps hold `value`, and which steps are valid."""
    valid = FLAGS["both"]["mask"]
    return np.where(valid[..., None], rng.normal(size=(T, N, 2)), value), valid


@pytest.mark.parametrize("value", [0.0, -1.5, 3])
def test_masking_is_the_mask_given(xp, dtype, rng, value):
    rnn, head = xprnn.LSTM(2, 3, 2), xprnn.Linear(3, 2)
    model = xprnn.Sequential(mask=Masking(value), rnn=rnn, hold=HoldLastOutput(), head=head, last=LastStep())
    plain = xprnn.Sequential(rnn=rnn, hold=HoldLastOutput(), head=head, last=LastStep())
    x, valid = padded(rng, value)
    params = xp.asarray({n: rng.normal(size=s) for n, s in model.shapes().items()}, dtype)
    here, mask, lengths = xp.asarray(x, dtype), xp.asarray(valid), [5, 4, 5, 2]
    assert model.shapes() == plain.shapes()
    y, state, tape = model.forward(params, here, lengths=lengths)
    want, want_state, want_tape = plain.forward(params, here, mask=mask, lengths=lengths)
    xp.assert_close((y, state), on_host(xp, (want, want_state)), condition=0)
    xp.assert_close(model(params, here, lengths=lengths)[0], xp.to_numpy(want), condition=0)
    dy = xp.asarray(rng.normal(size=(N, 2)), dtype)
    got, wanted = model.backward(tape, dy, state), plain.backward(want_tape, dy, want_state)
    xp.assert_close(tuple(got), on_host(xp, tuple(wanted)), condition=0)
    assert not np.any(xp.to_numpy(got.dx)[~valid])
    assert np.any(xp.to_numpy(got.dx))


def on_host(xp, tree):
    if isinstance(tree, dict):
        return {k: on_host(xp, v) for k, v in tree.items()}
    return tuple(on_host(xp, a) for a in tree) if isinstance(tree, tuple) else xp.to_numpy(tree)


def test_a_mask_found_and_a_mask_given_hold_both(xp, rng):
    x, valid = padded(rng)
    more = valid & (rng.random((T, N)) < 0.6)
    assert more.sum() < valid.sum()
    model = xprnn.Sequential(mask=Masking(), rnn=xprnn.RNN(2, 3))
    params = xp.asarray({n: rng.normal(size=s) for n, s in model.shapes().items()})
    given = (rng.random((T, N)) < 0.5) | valid  # what is given allows padding too: both must allow
    for mask, both in ((more, more), (given, valid)):
        got = model(params, xp.asarray(x), mask=xp.asarray(mask))
        plain = {n.removeprefix("rnn."): a for n, a in params.items()}
        want = model.layers["rnn"](plain, xp.asarray(x), mask=xp.asarray(both))
        xp.assert_close(got, on_host(xp, want), condition=0)


@differences
def test_gradients_of_a_model_with_a_mask_of_its_own(xp, rng):
    """The mask jumps where x meets the value: x is moved at valid steps only."""
    model = xprnn.Sequential(
        mask=Masking(),
        rnn=xprnn.GRU(2, 3, bidirectional=True, batch_first=True),
        merge=MergeDirections(3, "mul"),
        hold=HoldLastOutput(batch_first=True),
        last=LastStep(batch_first=True),
        softmax=Softmax(),
    )
    x, valid = padded(rng)
    x, valid = np.swapaxes(x, 0, 1), xp.asarray(valid.T[..., None])
    params = xp.asarray({n: 0.7 * rng.normal(size=s) for n, s in model.shapes().items()})

    def forward(params, x):
        moved = xp.xp.where(valid, x, xp.xp.zeros_like(x))
        y, state, tape = model.forward(params, moved)
        return (y, state), tape

    def backward(tape, cotangents):
        dx, _, dparams = model.backward(tape, *cotangents)
        return dparams, xp.xp.where(valid, dx, xp.xp.zeros_like(dx))

    check_gradients_on(xp, forward, backward, [params, xp.asarray(x)], names=["params", "x"])


def test_masks_of_integers_and_of_nested_models(xp, rng):
    """Padding before an embedding, inside a model of its own, holds for what follows outside it."""
    inner = xprnn.Sequential(mask=Masking(0), table=xprnn.Embedding(5, 3))
    model = xprnn.Sequential(inner=inner, rnn=xprnn.RNN(3, 2), last=LastStep())
    ids = np.array([[1, 0], [0, 3], [4, 2], [0, 0]])
    params = xp.asarray({n: rng.normal(size=s) for n, s in model.shapes().items()})
    y, state, tape = model.forward(params, xp.asarray(ids))
    flat = xprnn.Sequential(table=xprnn.Embedding(5, 3), rnn=xprnn.RNN(3, 2))
    renamed = {n.removeprefix("inner."): a for n, a in params.items()}
    want, final = flat(renamed, xp.asarray(ids), mask=xp.asarray(ids != 0))
    xp.assert_close((y, state), (xp.to_numpy(want)[2], xp.to_numpy(final)), condition=0)
    xp.assert_close(model(params, xp.asarray(ids))[0], xp.to_numpy(y), condition=0)
    got = model.backward(tape, y)
    assert got.dx is None
    assert not np.any(xp.to_numpy(got.dparams["inner.table.weight"])[0])
    assert from_config(model.config()) == model


@pytest.mark.parametrize("batch_first", [False, True])
def test_flip_turns_the_flags_too(xp, rng, batch_first):
    """A reverse layer is a forward one between two flips, whatever the lengths, masks and resets."""
    options = {"batch_first": batch_first}
    layer = xprnn.LSTM(2, 3, reverse=True, **options)
    turned = xprnn.Sequential(flip=ReverseTime(**options), rnn=xprnn.LSTM(2, 3, **options), back=ReverseTime(**options))
    params = {n: rng.normal(size=s) for n, s in layer.shapes().items()}
    x, flags = rng.normal(size=(T, N, 2)), FLAGS["both"] | {"reset": rng.random((T, N)) < 0.3}
    if batch_first:
        x, flags = np.swapaxes(x, 0, 1), {k: a if k == "lengths" else a.T for k, a in flags.items()}
    want = layer(xp.asarray(params), xp.asarray(x), **to_backend(xp, flags))
    got = turned(xp.asarray({f"rnn.{n}": a for n, a in params.items()}), xp.asarray(x), **to_backend(xp, flags))
    xp.assert_close(got, on_host(xp, want), condition=64)
    kept = ReverseTime(**options, reverse_mask=False)
    assert kept.transform_mask(xp.asarray(x), {"mask": 1}) == {"mask": 1}
