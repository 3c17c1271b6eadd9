"""Layers without parameters, alone and in a model: values against loops, gradients against central differences."""

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


def hold_loop(x, valid, direction):
    """HoldLastOutput, one number at a time."""
    out = np.zeros_like(x)
    for n in range(N):
        for d in range(D):
            reverse = direction == "reverse" or (direction == "both" and d >= D // 2)
            last = 0.0
            for t in reversed(range(T)) if reverse else range(T):
                last = out[t, n, d] = x[t, n, d] if valid[t, n] else last
    return out


def last_step_loop(x, valid, direction, valid_only=True):
    """LastStep by HoldLastOutput: the last row in the order of the direction."""
    y = hold_loop(x, valid, direction) if valid_only else x
    reverse = [direction == "reverse" or (direction == "both" and d >= D // 2) for d in range(D)]
    return np.where(reverse, y[0], y[-1])


FLAGS = {
    "none": {},
    "gaps": {"mask": np.random.default_rng(3).random((T, N)) < 0.5},
    "ragged": {"lengths": np.array([5, 0, 3, 1])},
    "both": {"mask": np.random.default_rng(4).random((T, N)) < 0.7, "lengths": np.array([3, 5, 0, 4])},
}
TIME_LAYERS = {
    **{
        f"hold-{w}": (HoldLastOutput(direction=w), lambda x, v, w=w: hold_loop(x, v, w))
        for w in ("forward", "reverse", "both")
    },
    **{
        f"last-{w}": (LastStep(direction=w), lambda x, v, w=w: last_step_loop(x, v, w))
        for w in ("forward", "reverse", "both")
    },
    "last-any": (LastStep(direction="both", valid_only=False), lambda x, v: last_step_loop(x, v, "both", False)),
    "reverse": (ReverseTime(), lambda x, v: x[::-1]),
}
time_layers = pytest.mark.parametrize("name", TIME_LAYERS)
all_flags = pytest.mark.parametrize("flags", FLAGS.values(), ids=list(FLAGS))


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
    "apply-constants": (ActivationLayer(xprnn.activation("leakyrelu", 0.3)), lambda x: np.where(x > 0, x, 0.3 * x)),
    "softmax": (Softmax(), softmax),
    "log-softmax": (Softmax(log=True), lambda x: np.log(softmax(x))),
    "sum": (MergeDirections(2, "sum"), lambda x: x[..., :2] + x[..., 2:]),
    "mul": (MergeDirections(2, "mul"), lambda x: x[..., :2] * x[..., 2:]),
    "ave": (MergeDirections(2, "ave"), lambda x: (x[..., :2] + x[..., 2:]) / 2),
    "pair": (MergeDirections(2, "pair"), lambda x: (x[..., :2], x[..., 2:])),
}
pointwise = pytest.mark.parametrize("name", POINTWISE)


def check_layer_gradient(xp, layer, x, **flags):
    check_gradients_on(
        xp,
        lambda x: layer.forward({}, x, **flags)[::2],
        lambda tape, dy: layer.backward(tape, dy).dx,
        [x],
        names=["x"],
    )


@pytest.mark.parametrize("batch_first", [False, True])
@all_flags
@time_layers
def test_time_layers_equal_reference_loops(xp, dtype, rng, name, flags, batch_first):
    layer, reference = TIME_LAYERS[name]
    x = rng.normal(size=(T, N, D)).astype("float32").astype("float64")
    expected, layer_flags = reference(x, valid_steps(flags)), dict(flags)
    if batch_first:
        layer = from_config(layer.config() | {"batch_first": True})
        x, expected = np.swapaxes(x, 0, 1), np.swapaxes(expected, 0, 1) if expected.ndim == 3 else expected
        layer_flags |= {"mask": None if flags.get("mask") is None else flags["mask"].T}
    backend_x = xp.asarray(x, dtype)
    y, _, tape = layer.forward({}, backend_x, **to_backend(xp, layer_flags))
    xp.assert_like(y, backend_x)
    xp.assert_close(y, expected, condition=0)
    xp.assert_close(layer({}, backend_x, **to_backend(xp, layer_flags))[0], expected, condition=0)
    dy = rng.normal(size=expected.shape)
    dx = layer.backward(tape, xp.asarray(dy, dtype)).dx
    xp.assert_like(dx, backend_x)
    # These layers are linear, so dx is the gradient if <dy, layer(v)> = <dx, v> for all v.
    for v in rng.normal(size=(3, T, N, D)):
        y_of_v = reference(v, valid_steps(flags))
        y_of_v = np.swapaxes(y_of_v, 0, 1) if batch_first and y_of_v.ndim == 3 else y_of_v
        np_dx = np.swapaxes(xp.to_numpy(dx), 0, 1) if batch_first else xp.to_numpy(dx)
        np.testing.assert_allclose((np_dx * v).sum(), (dy * y_of_v).sum(), atol=1e-4 if dtype == "float32" else 1e-12)


@differences
@all_flags
@time_layers
def test_gradients_of_time_layers(xp, rng, name, flags):
    check_layer_gradient(xp, TIME_LAYERS[name][0], xp.asarray(rng.normal(size=(T, N, D))), **to_backend(xp, flags))


@pointwise
def test_pointwise_layers_equal_reference(xp, dtype, rng, name):
    layer, reference = POINTWISE[name]
    x = rng.normal(size=(2, 3, D))
    backend_x = xp.asarray(x, dtype)
    y, _, tape = layer.forward({}, backend_x)
    xp.assert_like(y, backend_x)
    xp.assert_close(y, reference(x), condition=32)
    xp.assert_close(layer.step({}, backend_x[0, ...])[0], first_step(reference(x)), condition=32)
    dy = tuple(xp.asarray(rng.normal(size=a.shape), dtype) for a in y) if isinstance(y, tuple) else y
    xp.assert_like(layer.backward(tape, dy).dx, backend_x)


def first_step(y):
    return tuple(a[0] for a in y) if isinstance(y, tuple) else y[0]


@differences
@pointwise
def test_gradients_of_pointwise_layers(xp, rng, name):
    check_layer_gradient(xp, POINTWISE[name][0], xp.asarray(rng.normal(size=(2, 3, D))))


def test_softmax_of_large_differences_does_not_overflow(xp):
    x = xp.asarray(np.array([[0.0, 1e4], [-1e4, 0.0]]), "float32")
    xp.assert_close(Softmax()({}, x)[0], np.array([[0.0, 1.0], [0.0, 1.0]]), condition=0)
    xp.assert_close(Softmax(log=True)({}, x)[0], np.array([[-1e4, 0.0], [-1e4, 0.0]]), condition=1)


def padded_input(rng, value=0.0):
    """Return x (T, N, 2) with `value` at padded steps, and the (T, N) mask of valid steps."""
    valid = FLAGS["both"]["mask"]
    return np.where(valid[..., None], rng.normal(size=(T, N, 2)), value), valid


@pytest.mark.parametrize("value", [0.0, -1.5, 3])
def test_masking_equals_an_explicit_mask(xp, dtype, rng, value):
    rnn, head = xprnn.LSTM(2, 3, 2), xprnn.Linear(3, 2)
    model = xprnn.Sequential(mask=Masking(value), rnn=rnn, hold=HoldLastOutput(), head=head, last=LastStep())
    without_masking = xprnn.Sequential(rnn=rnn, hold=HoldLastOutput(), head=head, last=LastStep())
    x, valid = padded_input(rng, value)
    params = xp.asarray({n: rng.normal(size=s) for n, s in model.shapes().items()}, dtype)
    backend_x, mask, lengths = xp.asarray(x, dtype), xp.asarray(valid), [5, 4, 5, 2]
    assert model.shapes() == without_masking.shapes()
    y, state, tape = model.forward(params, backend_x, lengths=lengths)
    expected_y, expected_state, expected_tape = without_masking.forward(params, backend_x, mask=mask, lengths=lengths)
    xp.assert_close((y, state), tree_to_numpy(xp, (expected_y, expected_state)), condition=0)
    xp.assert_close(model(params, backend_x, lengths=lengths)[0], xp.to_numpy(expected_y), condition=0)
    dy = xp.asarray(rng.normal(size=(N, 2)), dtype)
    grads = model.backward(tape, dy, state)
    expected = without_masking.backward(expected_tape, dy, expected_state)
    xp.assert_close(tuple(grads), tree_to_numpy(xp, tuple(expected)), condition=0)
    assert not np.any(xp.to_numpy(grads.dx)[~valid])
    assert np.any(xp.to_numpy(grads.dx))


def tree_to_numpy(xp, tree):
    if isinstance(tree, dict):
        return {k: tree_to_numpy(xp, v) for k, v in tree.items()}
    return tuple(tree_to_numpy(xp, a) for a in tree) if isinstance(tree, tuple) else xp.to_numpy(tree)


def test_masking_and_an_explicit_mask_are_combined(xp, rng):
    x, valid = padded_input(rng)
    stricter = valid & (rng.random((T, N)) < 0.6)
    assert stricter.sum() < valid.sum()
    model = xprnn.Sequential(mask=Masking(), rnn=xprnn.RNN(2, 3))
    params = xp.asarray({n: rng.normal(size=s) for n, s in model.shapes().items()})
    looser = (rng.random((T, N)) < 0.5) | valid  # True at some padded steps
    for mask, combined in ((stricter, stricter), (looser, valid)):
        result = model(params, xp.asarray(x), mask=xp.asarray(mask))
        rnn_params = {n.removeprefix("rnn."): a for n, a in params.items()}
        expected = model.layers["rnn"](rnn_params, xp.asarray(x), mask=xp.asarray(combined))
        xp.assert_close(result, tree_to_numpy(xp, expected), condition=0)


@differences
def test_gradients_of_a_model_with_masking(xp, rng):
    """Differences are taken at valid steps only, because the mask is discontinuous in x at padded steps."""
    model = xprnn.Sequential(
        mask=Masking(),
        rnn=xprnn.GRU(2, 3, bidirectional=True, batch_first=True),
        merge=MergeDirections(3, "mul"),
        hold=HoldLastOutput(batch_first=True),
        last=LastStep(batch_first=True),
        softmax=Softmax(),
    )
    x, valid = padded_input(rng)
    x, valid = np.swapaxes(x, 0, 1), xp.asarray(valid.T[..., None])
    params = xp.asarray({n: 0.7 * rng.normal(size=s) for n, s in model.shapes().items()})

    def forward(params, x):
        masked_x = xp.xp.where(valid, x, xp.xp.zeros_like(x))
        y, state, tape = model.forward(params, masked_x)
        return (y, state), tape

    def backward(tape, cotangents):
        dx, _, dparams = model.backward(tape, *cotangents)
        return dparams, xp.xp.where(valid, dx, xp.xp.zeros_like(dx))

    check_gradients_on(xp, forward, backward, [params, xp.asarray(x)], names=["params", "x"])


def test_mask_of_a_nested_model_applies_to_later_layers(xp, rng):
    """Integers are masked before an embedding in a nested model; the outer recurrent layer skips the same steps."""
    inner = xprnn.Sequential(mask=Masking(0), table=xprnn.Embedding(5, 3))
    model = xprnn.Sequential(inner=inner, rnn=xprnn.RNN(3, 2), last=LastStep())
    ids = np.array([[1, 0], [0, 3], [4, 2], [0, 0]])
    params = xp.asarray({n: rng.normal(size=s) for n, s in model.shapes().items()})
    y, state, tape = model.forward(params, xp.asarray(ids))
    reference = xprnn.Sequential(table=xprnn.Embedding(5, 3), rnn=xprnn.RNN(3, 2))
    renamed = {n.removeprefix("inner."): a for n, a in params.items()}
    expected_y, expected_state = reference(renamed, xp.asarray(ids), mask=xp.asarray(ids != 0))
    xp.assert_close((y, state), (xp.to_numpy(expected_y)[2], xp.to_numpy(expected_state)), condition=0)
    xp.assert_close(model(params, xp.asarray(ids))[0], xp.to_numpy(y), condition=0)
    grads = model.backward(tape, y)
    assert grads.dx is None
    assert not np.any(xp.to_numpy(grads.dparams["inner.table.weight"])[0])
    assert from_config(model.config()) == model


@pytest.mark.parametrize("batch_first", [False, True])
def test_reverse_time_reverses_the_flags(xp, rng, batch_first):
    """A reverse layer equals a forward layer between two ReverseTime, with lengths, mask and reset."""
    options = {"batch_first": batch_first}
    layer = xprnn.LSTM(2, 3, reverse=True, **options)
    model = xprnn.Sequential(
        reverse=ReverseTime(**options), rnn=xprnn.LSTM(2, 3, **options), back=ReverseTime(**options)
    )
    params = {n: rng.normal(size=s) for n, s in layer.shapes().items()}
    x, flags = rng.normal(size=(T, N, 2)), FLAGS["both"] | {"reset": rng.random((T, N)) < 0.3}
    if batch_first:
        x, flags = np.swapaxes(x, 0, 1), {k: a if k == "lengths" else a.T for k, a in flags.items()}
    expected = layer(xp.asarray(params), xp.asarray(x), **to_backend(xp, flags))
    result = model(xp.asarray({f"rnn.{n}": a for n, a in params.items()}), xp.asarray(x), **to_backend(xp, flags))
    xp.assert_close(result, tree_to_numpy(xp, expected), condition=64)
    mask_unchanged = ReverseTime(**options, reverse_mask=False)
    assert mask_unchanged.transform_mask(xp.asarray(x), {"mask": 1}) == {"mask": 1}
