"""Dispatch to CUDA kernels, its explanations, precision and devices."""

from __future__ import annotations

import numpy as np
import pytest
from support.cuda.layer_runs import forward_backward, only_cupy, only_fake_cupy, output_cotangents
from support.kernel_cases import branching_cell, untraceable_cell
from support.layer_cases import CASES, inputs_on, random_inputs

import xprnn
from xprnn.kernels.config import allow_jit, reference_only

pytestmark = [pytest.mark.needs("cupy"), only_cupy, pytest.mark.usefixtures("fused_kernels")]


def test_tf32_applies_inside_its_context_only(xp, rng, dtype):
    layer = xprnn.LSTM(24, 16)
    p = random_inputs(rng, layer, T=8, N=4, scale=0.4)
    dy, dfinal = output_cotangents(rng, layer, p)
    plain = forward_backward(xp, layer, p, dtype, dy, dfinal)[0]
    with xprnn.precision("tf32"):
        rounded = forward_backward(xp, layer, p, dtype, dy, dfinal)[0]
    again = forward_backward(xp, layer, p, dtype, dy, dfinal)[0]
    xp.assert_close(again, plain, condition=0)
    if dtype == "float64":
        xp.assert_close(rounded, plain, condition=0)
        return
    a, b = xp.to_numpy(plain[0]), xp.to_numpy(rounded[0])
    assert 1e-6 < np.abs(a - b).max() < 1e-2
    for name, want in xp.to_numpy(plain[-1]).items():
        assert np.abs(xp.to_numpy(rounded[-1][name]) - want).max() < 2e-2 * max(1.0, np.abs(want).max())


@only_fake_cupy
def test_error_in_time_loop_restores_cublas_modes(xp, rng, monkeypatch):
    from support.cuda import fake_cupy_cuda

    layer = xprnn.RNN(3, 4)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer), "float32")
    monkeypatch.setitem(fake_cupy_cuda.CUBLAS_STATE, "math", 1)
    monkeypatch.setattr(fake_cupy_cuda.RawKernel, "__call__", lambda *_: 1 / 0)
    with xprnn.precision("tf32"), pytest.raises(ZeroDivisionError):
        layer(params, x, state)
    assert fake_cupy_cuda.CUBLAS_STATE == {"math": 1, "pointers": 0}


def test_precision_rejects_unknown_names():
    with pytest.raises(xprnn.InputError, match=r'"float32" or "tf32", found \'half\''), xprnn.precision("half"):
        pass


@only_fake_cupy
def test_layer_runs_on_the_device_of_its_arrays(xp, rng):
    import cupy

    layer = CASES["gru"].make(3, 4, bidirectional=True)
    p = random_inputs(rng, layer, flags="l")
    dy, _ = output_cotangents(rng, layer, p)
    want = forward_backward(xp, layer, p, "float64", dy, p.state)[0]
    with cupy.cuda.Device(1):
        params, x, state, flags = (
            {k: cupy.asarray(v) for k, v in p.params.items()},
            cupy.asarray(p.x),
            cupy.asarray(p.state),
            p.flags,
        )
        dy_device1 = cupy.asarray(dy)
        assert "capability" not in layer.explain(params, x)
    device = cupy.cuda.Device(1)
    with device:
        y, _, tape = layer.forward(params, x, state, **flags)
        got = layer.backward(tape, dy_device1, cupy.asarray(p.state))
        assert all(a.device == device for a in (y, got.dx, got.dstate, *got.dparams.values()))
        np.testing.assert_allclose(got.dx.get(), xp.to_numpy(want[3]), rtol=1e-12, atol=1e-14)


EXPLAINED = {
    "rnn": "CUDA fused steps (not persistent: ",
    "lstm-proj": "reference scan (not fused: h is projected by weight_hr; not persistent: ",
    "gru-before": "reference scan (not fused: gates act before their product; not persistent: ",
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_layer_explain_equals_tape_explain(xp, rng, name):
    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer), "float32")
    lines = layer.explain(params, x).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        f"layer {k}, {w}" for k in (0, 1) for w in ("forward", "reverse")
    ]
    assert all(line.partition(": ")[2].startswith(EXPLAINED[name]) for line in lines)
    tape = layer.forward(params, x, state)[2]
    assert tape.explain().count(EXPLAINED[name].partition(" (")[0]) == 4


def test_model_explain_lists_layers_and_training_equals_generic_scan(xp, rng):
    """Three steps of Adam end at the same parameters with the fused kernels and with the reference scan."""
    model = xprnn.Sequential(
        read=xprnn.Embedding(7, 5),
        low=xprnn.GRU(5, 4, bidirectional=True),
        high=xprnn.RNN(8, 6),
        head=xprnn.Linear(6, 7),
    )
    start = model.init(np.random.default_rng(0), like=np.zeros(1, np.float32))
    ids, targets = (xp.asarray(rng.integers(0, 7, size=(5, 4))) for _ in range(2))

    def train():
        params = {k: xp.asarray(v) for k, v in start.items()}
        optimizer = xprnn.adam(0.01)
        moments = optimizer.init(params)
        for _ in range(3):
            y, _, tape = model.forward(params, ids, lengths=[5, 3, 0, 1])
            grads = model.backward(tape, xprnn.cross_entropy(y, targets)[1]).dparams
            params, moments = optimizer.update(params, grads, moments)
        return params

    text = model.explain({k: xp.asarray(v) for k, v in start.items()}, ids, lengths=[5, 3, 0, 1])
    assert [line.partition(": ")[0] for line in text.splitlines()] == [
        "low, layer 0, forward",
        "low, layer 0, reverse",
        "high, layer 0, forward",
    ]
    assert text.count("CUDA fused steps (not persistent: ruled out by no_persistent)") == 3
    fused = train()
    with reference_only():
        xp.assert_close(fused, train(), condition=2000)  # Adam divides by small numbers


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
def test_unsupported_layers_run_the_generic_scan(xp, rng, change, why):
    layer = xprnn.Recurrent(3, 4, cell=change.get("cell", xprnn.cells.elman()))
    p = random_inputs(rng, layer, T=change.get("T", 5), N=change.get("N", 3))
    params, x, state, _ = inputs_on(xp, p, change.get("dtype", "float64"))
    with allow_jit(change.get("compiling", True)):
        assert why in layer.explain(params, x)
        if "dtype" not in change and "N" not in change and change.get("cell") is None:
            assert "reference scan" in layer.forward(params, x, state)[2].explain()
