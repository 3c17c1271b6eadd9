"""More of what someone found who had only the README: mistakes that ended in a traceback, or in a wrong answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from xprnn.cli.main import main
from xprnn.training.truncated_bptt import windows

ZERO = np.zeros(0)


def made(layer: Any) -> Any:
    return layer.init(np.random.default_rng(0), like=ZERO)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("x", [np.array(3), np.array(3.0)])
def test_a_stream_of_a_number_is_refused_as_the_number_is(tmp_path, capsys, x, batch_first):
    layer = xprnn.RNN(3, 4, batch_first=batch_first)
    model, number = tmp_path / "model.safetensors", tmp_path / "x.npy"
    xprnn.save(model, layer, made(layer))
    np.save(number, x)
    assert main(["run", str(model), str(number)]) == 2
    whole = capsys.readouterr().err
    assert main(["run", str(model), str(number), "--stream"]) == 2
    assert capsys.readouterr().err == whole
    assert whole.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])  # the disk is full at the end of the command, or in its midst
def test_a_full_disk_is_one_line(tmp_path, unbuffered):
    layer = xprnn.RNN(3, 4)
    xprnn.save(tmp_path / "model.safetensors", layer, made(layer))
    command = [sys.executable, "-m", "xprnn", "info", str(tmp_path / "model.safetensors")]
    paths = os.pathsep.join([str(Path(xprnn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=env)
    assert done.returncode == 1
    assert done.stderr == "xprnn info: output: cannot be written or read (No space left on device)\n"


def test_onnx_into_a_directory_is_refused():
    pytest.importorskip("onnx")
    layer = xprnn.RNN(3, 4)
    for place in (".", "", "/"):
        with pytest.raises(xprnn.InputError, match="cannot be written"):
            xprnn.to_onnx(layer, made(layer), place)


def masked_calls() -> dict[str, Any]:
    layer, model = xprnn.LSTM(3, 4), xprnn.Sequential(rnn=xprnn.RNN(3, 4), head=xprnn.Linear(4, 2))
    params, all_params = made(layer), made(model)
    x, row = np.zeros((5, 2, 3)), np.zeros((2, 3))
    h, m = np.zeros((1, 2, 4)), np.ma.masked_array
    return {
        "step": lambda: layer.step(params, m(row, mask=row == 0)),
        "call": lambda: layer(params, m(x, mask=x == 0)),
        "forward": lambda: layer.forward(params, m(x)),
        "model": lambda: model(all_params, m(x)),
        "model's step": lambda: model.step(all_params, m(row)),
        "state": lambda: layer.forward(params, x, (h, m(h))),
        "parameter": lambda: layer.forward(params | {"bias_ih_l0": m(params["bias_ih_l0"])}, x),
        "integers": lambda: layer(params, m(np.zeros((5, 2), int))),
        "lengths": lambda: layer(params, x, lengths=m(np.asarray([2, 3]))),
        "mask": lambda: layer(params, x, mask=m(np.ones((5, 2), bool))),
        "loss": lambda: xprnn.mse(x, m(x)),
    }


@pytest.mark.parametrize("name", masked_calls())
def test_masked_arrays_are_refused(name):
    with pytest.raises(xprnn.InputError, match=r"must be a plain array, found a numpy\.ma one: .*mask="):
        masked_calls()[name]()


def test_gradients_as_a_whole_are_refused(rng):
    layer = xprnn.RNN(3, 4)
    params = made(layer)
    y, _, tape = layer.forward(params, rng.standard_normal((5, 2, 3)))
    whole, adam = layer.backward(tape, y), xprnn.adam()
    for call in (
        lambda: xprnn.clip_by_global_norm(whole, 1.0),
        lambda: xprnn.clip_by_value(whole, 1.0),
        lambda: adam.update(params, whole, adam.init(params)),
    ):
        with pytest.raises(xprnn.InputError, match=r"grads must be a dict of arrays, found Gradients: .*\.dparams"):
            call()


def test_windows_refuse_chunks_of_another_width():
    first = np.zeros((4, 2, 3)), np.zeros((4, 2))
    for x, target in ((np.zeros((4, 3, 3)), np.zeros((4, 3))), (np.zeros((4, 2, 3)), np.zeros((4, 1)))):
        for k1 in (3, 4):  # something is left of the first chunk, or nothing is
            with pytest.raises(xprnn.InputError, match=r"windows: (x|target) of every chunk .* found \(any, "):
                list(windows([first, (x, target)], k1))
    assert len(list(windows([(np.zeros((0, 2, 3)), np.zeros(0)), first], 2))) == 2


def square(*args: Any) -> Any:
    return args[0] * args[0], args


def slope(tape: Any, dy: Any) -> Any:
    return 2 * dy * tape[0], *(None for _ in tape[1:])


X = np.ones(3)


@pytest.mark.parametrize(
    ("forward", "backward", "args", "names", "says"),
    [
        (square, slope, (X, X), ["x"], r"names must be 2, one for each of args, found \['x'\]"),
        (square, slope, (X, X), "xy", "names must be 2, one for each of args, found 'xy'"),
        (square, slope, X, None, "args must be a list or tuple of arguments, found ndarray"),
        (lambda x: x * x, slope, (X,), None, r"forward must return a pair \(outputs, tape\), found ndarray"),
        (lambda x: (x, x, x), slope, (X,), None, r"forward must return a pair \(outputs, tape\), found 3 results"),
    ],
)
def test_check_gradients_says_what_it_was_given(forward, backward, args, names, says):
    with pytest.raises(xprnn.InputError, match=f"^check_gradients: {says}$"):
        xprnn.check_gradients(forward, backward, args, names=names)


@pytest.mark.parametrize(("result", "found"), [(None, "NoneType"), (np.zeros((2, 3)), "ndarray")])
def test_a_backward_that_returns_no_tuple(result, found):
    with pytest.raises(xprnn.GradientError, match=f"must return 2 gradients in a tuple, found {found}"):
        xprnn.check_gradients(square, lambda tape, dy: result, (X, X))


def test_padding_may_be_nan(rng, xp):
    model = xprnn.Sequential(mask=xprnn.Masking(float("nan")), rnn=xprnn.GRU(3, 4))
    params, x = made(model), rng.standard_normal((6, 2, 3))
    valid = np.ones((6, 2), bool)
    valid[4:, 0] = valid[1, 1] = False
    plain = xp.asarray(np.where(valid[..., None], x, 0.0))
    padded = xp.asarray(np.where(valid[..., None], x, np.nan))
    rnn = {name.removeprefix("rnn."): xp.asarray(a) for name, a in params.items()}
    y, final, tape = model.forward({name: xp.asarray(a) for name, a in params.items()}, padded)
    want_y, want_final, want_tape = model.layers["rnn"].forward(rnn, plain, mask=xp.asarray(valid))
    xp.assert_close(y, want_y, condition=0)
    xp.assert_close(final, want_final, condition=0)
    dx, _, dparams = model.backward(tape, y)
    want = model.layers["rnn"].backward(want_tape, want_y)
    xp.assert_close(dx, want.dx, condition=0)
    xp.assert_close({name.removeprefix("rnn."): d for name, d in dparams.items()}, want.dparams, condition=0)


def test_masking_by_nan_or_infinity_skips_no_integers():
    x = np.asarray([[1, 0]])
    for value in (float("nan"), float("inf"), 0.5):
        assert xprnn.Masking(value).transform_mask(x, {})["mask"].all()


def test_masking_by_nan_goes_through_a_file(tmp_path):
    model = xprnn.Sequential(mask=xprnn.Masking(float("nan")), rnn=xprnn.GRU(3, 4))
    xprnn.save(tmp_path / "m.safetensors", model, made(model))
    assert np.isnan(xprnn.load(tmp_path / "m.safetensors")[0].layers["mask"].value)


def step(x: Any, h: Any, s: Any, p: Any) -> Any:
    c = s[1] + x[0] + h[0]
    return (p[0] * c, c), (c,)


def back(d: Any, saved: Any, s: Any, p: Any) -> Any:
    da = d[0] * p[0] + d[1]
    return (da,), (da,), (None, da), (d[0] * saved[0],)


def cell_of(*functions: Any, pregates: int = 0) -> xprnn.Cell:
    return xprnn.Cell("mine", 1 + pregates, lambda xp: functions, ("h", "c"), ("rate",), pregates)


BAD_STEPS = {
    "step that returns 1": (lambda x, h, s, p: ((x[0] + h[0],), ()), r"state that step returns .* of 2, found 1"),
    "bare": (lambda x, h, s, p: (x[0], ()), r"state that step returns must be a tuple, found \w+"),
    "array": (lambda x, h, s, p: x[0] + h[0], r"step must return \(state, saved\), found \w+"),
    "saved bare": (lambda x, h, s, p: (s, x[0]), r"saved that step returns must be a tuple, found \w+"),
}
BAD_BACKS = {
    "two results": (
        lambda d, v, s, p: ((d[0],), (d[0],)),
        r"backward must return \(dx, dh, dstate, dp\) of 4, found 2",
    ),
    "nothing": (lambda d, v, s, p: None, r"backward must return \(dx, dh, dstate, dp\), found NoneType"),
    "dx": (
        lambda d, v, s, p: ((), (d[0],), (None, d[1]), (d[0],)),
        "dx that backward returns must be a tuple of 1, found 0",
    ),
    "dstate": (
        lambda d, v, s, p: ((d[0],), (d[0],), (None,), (d[0],)),
        "dstate that backward returns .* of 2, found 1",
    ),
    "dp": (
        lambda d, v, s, p: ((d[0],), (d[0],), (None, d[1]), ()),
        "dp that backward returns must be a tuple of 1, found 0",
    ),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_a_cell_whose_step_returns_something_else_is_refused(name, xp, rng):
    function, says = BAD_STEPS[name]
    layer = xprnn.Recurrent(3, 4, cell=cell_of(function, back))
    params, x = xp.asarray(made(layer)), xp.asarray(rng.standard_normal((5, 2, 3)))
    for call in (layer, layer.forward, lambda p, x: layer.step(p, x[0, ...])):
        with pytest.raises(xprnn.InputError, match=f"^Cell mine: {says}$"):
            call(params, x)


@pytest.mark.parametrize("name", BAD_BACKS)
def test_a_cell_whose_back_returns_something_else_is_refused(name, xp, rng):
    function, says = BAD_BACKS[name]
    layer = xprnn.Recurrent(3, 4, cell=cell_of(step, function))
    y, _, tape = layer.forward(xp.asarray(made(layer)), xp.asarray(rng.standard_normal((5, 2, 3))))
    with pytest.raises(xprnn.InputError, match=f"^Cell mine: {says}$"):
        layer.backward(tape, y)


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        (xprnn.Cell("mine", 1, lambda xp: None), "NoneType"),
        (xprnn.Cell("mine", 1, lambda xp: step), "function"),
        (xprnn.Cell("mine", 1, lambda xp: (step,)), "1 of them"),
        (cell_of(step, 3), "2 of them"),
        (cell_of(step, back, pregates=1), "2 of them"),
        (cell_of(step, back, step, back), "4 of them"),
    ],
)
def test_a_cell_built_of_something_else_is_refused(cell, found):
    layer = xprnn.Recurrent(3, 4, cell=cell)
    with pytest.raises(xprnn.InputError, match=rf"^Cell mine: build must return the functions \(.*\), found {found}$"):
        layer(made(layer), np.zeros((5, 2, 3)))


def test_a_cell_of_ones_own_that_keeps_its_word(xp, rng):
    layer = xprnn.Recurrent(3, 4, cell=cell_of(step, back))
    params, x = made(layer), rng.standard_normal((5, 2, 3))
    params["rate_l0"] = rng.standard_normal(4)
    assert max(xprnn.check_layer(layer, params, x).values()) < 1e-6
    c, h, rows = np.zeros((2, 4)), np.zeros((2, 4)), []
    w, u, both = params["weight_ih_l0"], params["weight_hh_l0"], params["bias_ih_l0"] + params["bias_hh_l0"]
    for x_t in x:
        c = c + x_t @ w.T + h @ u.T + both
        h = params["rate_l0"] * c
        rows.append(h)
    y, _ = layer(xp.asarray(params), xp.asarray(x))
    xp.assert_close(y, xp.asarray(np.stack(rows)))
