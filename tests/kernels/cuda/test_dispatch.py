"""Which CUDA kernel runs: dispatch, precision, devices, and what is said about it. Run as test_cuda.py is."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.cuda.test_fused import drawn, log, on_cupy, results  # noqa: F401 - fixtures
from kernels.test_equivalence import branching_cell, untraceable_cell
from support.layer_cases import CASES, inputs_on, random_inputs

import xprnn
from xprnn.kernels.config import allow_jit, reference_only

pytestmark = pytest.mark.needs("cupy")


def test_tf32_is_asked_for_and_put_back(xp, rng, dtype):
    layer = xprnn.LSTM(24, 16)
    p = random_inputs(rng, layer, T=8, N=4, scale=0.4)
    dy, dfinal = drawn(rng, layer, p)
    plain = results(xp, layer, p, dtype, dy, dfinal)[0]
    with xprnn.precision("tf32"):
        rounded = results(xp, layer, p, dtype, dy, dfinal)[0]
    again = results(xp, layer, p, dtype, dy, dfinal)[0]
    xp.assert_close(again, plain, condition=0)
    if dtype == "float64":
        xp.assert_close(rounded, plain, condition=0)
        return
    a, b = xp.to_numpy(plain[0]), xp.to_numpy(rounded[0])
    assert 1e-6 < np.abs(a - b).max() < 1e-2
    for name, want in xp.to_numpy(plain[-1]).items():
        assert np.abs(xp.to_numpy(rounded[-1][name]) - want).max() < 2e-2 * max(1.0, np.abs(want).max())


@pytest.mark.usefixtures("log")
def test_an_error_in_the_loop_puts_the_handle_back(xp, rng, monkeypatch):
    from support.cuda import fake_cupy_cuda as standin_cuda

    layer = xprnn.RNN(3, 4)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer), "float32")
    monkeypatch.setitem(standin_cuda.CUBLAS_STATE, "math", 1)
    monkeypatch.setattr(standin_cuda.RawKernel, "__call__", lambda *_: 1 / 0)
    with xprnn.precision("tf32"), pytest.raises(ZeroDivisionError):
        layer(params, x, state)
    assert standin_cuda.CUBLAS_STATE == {"math": 1, "pointers": 0}


def test_precision_wants_a_known_name():
    with pytest.raises(xprnn.InputError, match=r'"float32" or "tf32", found \'half\''), xprnn.precision("half"):
        pass


@pytest.mark.usefixtures("log")
def test_arrays_of_another_device_than_the_current_one(xp, rng):
    import cupy

    layer = CASES["gru"].make(3, 4, bidirectional=True)
    p = random_inputs(rng, layer, flags="l")
    dy, _ = drawn(rng, layer, p)
    want = results(xp, layer, p, "float64", dy, p.state)[0]
    with cupy.cuda.Device(1):
        params, x, state, flags = (
            {k: cupy.asarray(v) for k, v in p.params.items()},
            cupy.asarray(p.x),
            cupy.asarray(p.state),
            p.flags,
        )
        there = cupy.asarray(dy)
        assert "capability" not in layer.explain(params, x)
    device = cupy.cuda.Device(1)
    with device:
        y, _, tape = layer.forward(params, x, state, **flags)
        got = layer.backward(tape, there, cupy.asarray(p.state))
        assert all(a.device == device for a in (y, got.dx, got.dstate, *got.dparams.values()))
        np.testing.assert_allclose(got.dx.get(), xp.to_numpy(want[3]), rtol=1e-12, atol=1e-14)


EXPLAINED = {
    "rnn": "CUDA fused steps (not persistent: ",
    "lstm-proj": "reference scan (not fused: h is projected by weight_hr; not persistent: ",
    "gru-before": "reference scan (not fused: gates act before their product; not persistent: ",
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_explain_says_what_the_tape_will_say(xp, rng, name):
    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer), "float32")
    lines = layer.explain(params, x).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        f"layer {k}, {w}" for k in (0, 1) for w in ("forward", "reverse")
    ]
    assert all(line.partition(": ")[2].startswith(EXPLAINED[name]) for line in lines)
    tape = layer.forward(params, x, state)[2]
    assert tape.explain().count(EXPLAINED[name].partition(" (")[0]) == 4


def test_a_model_says_where_its_parts_run_and_trains_there(xp, rng):
    """Three steps of Adam on three tiers end at the same parameters."""
    model = xprnn.Sequential(
        read=xprnn.Embedding(7, 5),
        low=xprnn.GRU(5, 4, bidirectional=True),
        high=xprnn.RNN(8, 6),
        head=xprnn.Linear(6, 7),
    )
    start = model.init(np.random.default_rng(0), like=np.zeros(1, np.float32))
    ids, targets = (xp.asarray(rng.integers(0, 7, size=(5, 4))) for _ in range(2))

    def trained():
        params = {k: xp.asarray(v) for k, v in start.items()}
        optimizer = xprnn.adam(0.01)
        moments = optimizer.init(params)
        for _ in range(3):
            y, _, tape = model.forward(params, ids, lengths=[5, 3, 0, 1])
            grads = model.backward(tape, xprnn.cross_entropy(y, targets)[1]).dparams
            params, moments = optimizer.update(params, grads, moments)
        return params

    said = model.explain({k: xp.asarray(v) for k, v in start.items()}, ids, lengths=[5, 3, 0, 1])
    assert [line.partition(": ")[0] for line in said.splitlines()] == [
        "low, layer 0, forward",
        "low, layer 0, reverse",
        "high, layer 0, forward",
    ]
    assert said.count("CUDA fused steps (not persistent: ruled out by no_persistent)") == 3
    fused = trained()
    with reference_only():
        xp.assert_close(fused, trained(), condition=2000)  # Adam divides by small numbers


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"T": 0}, "no step or no row"),
        ({"N": 0}, "no step or no row"),
        ({"dtype": "float16"}, "float16 is neither float32 nor float64"),
        ({"cell": untraceable_cell()}, "its cell can't be printed as CUDA code"),
        ({"cell": branching_cell()}, "its cell can't be printed as CUDA code"),
        ({"compiling": False}, "kernels are switched off"),
    ],
)
def test_what_no_kernel_knows_takes_the_generic_scan(xp, rng, change, why):
    layer = xprnn.Recurrent(3, 4, cell=change.get("cell", xprnn.cells.elman()))
    p = random_inputs(rng, layer, T=change.get("T", 5), N=change.get("N", 3))
    params, x, state, _ = inputs_on(xp, p, change.get("dtype", "float64"))
    with allow_jit(change.get("compiling", True)):
        assert why in layer.explain(params, x)
        if "dtype" not in change and "N" not in change and change.get("cell") is None:
            assert "reference scan" in layer.forward(params, x, state)[2].explain()
