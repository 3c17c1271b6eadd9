"""What someone found who had only the README: mistakes that once went through, or failed without saying why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import xprnn
from xprnn.training.truncated_bptt import window_gradients, windows

ZERO = np.zeros(0)


def made(layer: Any) -> Any:
    return layer.init(np.random.default_rng(0), like=ZERO)


@pytest.mark.not_on("jax", "strict", "cupy", reason="their integers are not read: that could wait for a device")
def test_numbers_out_of_range_are_refused_wherever_reading_them_costs_nothing(xp):
    layer, table = xprnn.RNN(3, 4), xprnn.Embedding(5, 2)
    params = xp.asarray(made(layer))
    bad, logits = xp.asarray(np.asarray([[-1]])), xp.asarray(np.zeros((3, 4)))
    with pytest.raises(xprnn.InputError, match=r"x must hold integers in 0\.\.2, found -1"):
        layer(params, bad)
    with pytest.raises(xprnn.InputError, match=r"x must hold integers in 0\.\.4, found -1"):
        table(xp.asarray(made(table)), bad)
    with pytest.raises(xprnn.InputError, match=r"targets must hold integers in 0\.\.3, found 9"):
        xprnn.cross_entropy(logits, xp.asarray(np.asarray([0, 1, 9])))
    x = xp.asarray(np.zeros((4, 2, 3)))
    with pytest.raises(xprnn.InputError, match=r"lengths must be in 0\.\.T=4, found \[9, -3\]"):
        layer(params, x, lengths=xp.asarray(np.asarray([9, -3])))


def test_small_integer_types_are_integers(xp):
    layer = xprnn.RNN(3, 4)
    params, ids = xp.asarray(made(layer)), np.asarray([[0, 2], [1, 1]], np.uint8)
    y, _, tape = layer.forward(params, xp.asarray(ids))
    wide, _, wide_tape = layer.forward(params, xp.asarray(ids.astype(np.int32)))
    xp.assert_close(y, wide, condition=0)
    xp.assert_close(layer.backward(tape, y).dparams, layer.backward(wide_tape, y).dparams, condition=0)
    logits = xp.asarray(np.arange(6.0).reshape(2, 3))
    one, other = (xprnn.cross_entropy(logits, xp.asarray(ids[0].astype(d)))[1] for d in (np.uint8, np.int32))
    xp.assert_close(one, other, condition=0)


def branching(xp: Any) -> Any:
    def step(x: Any, h: Any, s: Any, p: Any) -> Any:
        a = x[0] + h[0]
        return (xp.where(a > 0, a, 0.1 * a),), (a,)

    def back(d: Any, saved: Any, s: Any, p: Any) -> Any:
        positive = saved[0] > 0
        da = xp.where(positive, d[0], 0.1 * d[0])
        return (da,), (da,), (None,), ()

    return step, back


def saving_truth(xp: Any) -> Any:
    def step(x: Any, h: Any, s: Any, p: Any) -> Any:
        a = x[0] + h[0]
        return (xp.where(a > 0, a, 0.1 * a),), (a > 0,)

    def back(d: Any, saved: Any, s: Any, p: Any) -> Any:
        da = xp.where(saved[0], d[0], 0.1 * d[0])
        return (da,), (da,), (None,), ()

    return step, back


@pytest.mark.parametrize("build", [branching, saving_truth])
def test_a_cell_may_compare(build, rng):
    layer = xprnn.Recurrent(3, 4, cell=xprnn.Cell("leaky relu", gates=1, build=build))
    params, x = layer.init(rng, like=ZERO), rng.standard_normal((5, 2, 3))
    assert max(xprnn.check_layer(layer, params, x).values()) < 1e-6
    y, _ = layer(params, x)
    wanted, _ = xprnn.RNN(3, 4, nonlinearity=xprnn.activation("leakyrelu", 0.1))(params, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-14)


@pytest.mark.parametrize(("gates", "build"), [(0, branching), (1, None), ("two", branching)])
def test_a_cell_that_is_none_is_refused(gates, build):
    with pytest.raises(xprnn.InputError, match=r"^Cell c: (gates|build) must be"):
        xprnn.Cell("c", gates=gates, build=build)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rmsprop", "adam", "adamw"])
@pytest.mark.parametrize("rate", [np.float64(0.1), np.float32(0.1), lambda step: np.float64(0.1)])
def test_numpy_numbers_do_not_widen_parameters(name, rate):
    grads = {"w": np.ones(3, np.float32)}
    optimizer = getattr(xprnn, name)(rate)
    params, _ = optimizer.update(grads, grads, optimizer.init(grads))
    assert params["w"].dtype == np.float32
    assert xprnn.clip_by_global_norm(grads, np.float64(1))[0]["w"].dtype == np.float32
    assert xprnn.clip_by_value(grads, np.float64(0.5))["w"].dtype == np.float32


def test_the_tape_cannot_be_written_through_its_views(rng):
    layer = xprnn.RNN(2, 3)
    y, _, tape = layer.forward(made(layer), rng.standard_normal((4, 1, 2)))
    for view in (y, tape.states()[0][0]):
        with pytest.raises(ValueError, match="read-only"):
            view[...] = 9


@pytest.mark.parametrize("options", [{"batch_first": True}, {"bidirectional": True}, {"reverse": True}])
def test_windows_need_a_model_that_walks_forward_in_time(options):
    layer = xprnn.RNN(3, 4, **options)
    chunk = np.zeros((4, 4, 3)), np.zeros((4, 4, layer.output_size))
    (window,) = windows([chunk], 4)
    with pytest.raises(xprnn.InputError, match=rf"window_gradients: .*{next(iter(options))}=True"):
        window_gradients(layer, made(layer), window, None, xprnn.mse)


def test_counts_may_be_numpy_integers(rng):
    layer = xprnn.RNN(3, 4)
    assert layer.forward(made(layer), rng.standard_normal((9, 2, 3)), checkpoint=np.int64(4))[2] is not None
    assert len(list(windows([(np.zeros(8), np.zeros(8))], np.int64(4)))) == 2


def test_another_layers_tape_is_refused(rng):
    layer, other = xprnn.LSTM(3, 4), xprnn.GRU(3, 4)
    y, _, tape = layer.forward(made(layer), rng.standard_normal((4, 2, 3)))
    model = xprnn.Sequential(rnn=layer, head=xprnn.Linear(4, 2))
    for wrong in (other, xprnn.LSTM(3, 5), model, xprnn.Linear(3, 4)):
        with pytest.raises(xprnn.InputError, match="tape must be what"):
            wrong.backward(tape, y)
    for nothing in (None, "tape", {}):
        with pytest.raises(xprnn.InputError, match=r"LSTM.backward: tape must be what"):
            layer.backward(nothing, y)


def calls() -> dict[str, Any]:
    layer, head = xprnn.LSTM(3, 4), xprnn.Linear(4, 2)
    params, x, h = made(layer), np.zeros((5, 2, 3)), np.zeros((1, 2, 4))
    article = {"Wax": (4, 3), "Waa": (4, 4), "Wya": (2, 4), "ba": (4, 1), "by": (2, 1)}
    p = {name: np.zeros(shape) for name, shape in article.items()}
    flat = np.zeros((3, 2, 5))
    return {
        "x None": lambda: layer.forward(params, None),
        "a parameter None": lambda: layer(params | {"bias_ih_l0": None}, x),
        "half a state": lambda: layer(params, x, (h, None)),
        "head without dy": lambda: head.backward(head.forward(made(head), np.zeros((2, 4)))[2], None),
        "a0 None": lambda: xprnn.rnn_forward(flat, None, p),
        "ba None": lambda: xprnn.rnn_forward(flat, np.zeros((4, 2)), p | {"ba": None}),
        "nested lengths": lambda: layer(params, x, lengths=[[1], [1, 2]]),
        "axis 1.0": lambda: xprnn.softmax(x, axis=1.0),
        "radius nan": lambda: layer.init(np.random.default_rng(0), ZERO, spectral_radius=float("nan")),
        "radius a word": lambda: layer.init(np.random.default_rng(0), ZERO, spectral_radius="a"),
        "bidirectional no": lambda: xprnn.LSTM(3, 4, bidirectional="no"),
    }


@pytest.mark.parametrize("name", calls())
def test_one_line_says_what_is_wrong(name):
    with pytest.raises(xprnn.InputError) as caught:
        calls()[name]()
    message = str(caught.value)
    assert "\n" not in message
    assert "  " not in message
    assert "found" in message
