"""Layers on the persistent kernels equal the reference scan; unsupported layers name the reason."""

from __future__ import annotations

import numpy as np
import pytest
from support.backends import Backend
from support.cuda.layer_runs import forward_backward, only_cupy, output_cotangents
from support.kernel_cases import PATTERNS
from support.layer_cases import CASES, inputs_on, random_inputs

import xprnn
from xprnn.kernels.config import reference_only
from xprnn.kernels.cuda import cluster_config, no_persistent, persistent

pytestmark = [pytest.mark.needs("cupy"), only_cupy]
PERSISTENT_CASES = ["rnn", "rnn-relu", "lstm", "gru"]
PERSISTENT_PATTERNS = [k for k, flags in PATTERNS.items() if "reset" not in flags]


@pytest.fixture(autouse=True)
def hopper_device(xp):
    """Skip if the current device has no thread block clusters."""
    import cupy

    capability = cupy.cuda.Device().compute_capability
    if not any(map(str.isdigit, capability)) or capability < "90":
        pytest.skip("needs compute capability 9.0")


@pytest.mark.parametrize("pattern", PERSISTENT_PATTERNS)
@pytest.mark.parametrize("name", PERSISTENT_CASES)
def test_persistent_kernels_equal_generic_scan(xp, rng, name, pattern):
    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=4)._replace(flags={k: np.asarray(v) for k, v in PATTERNS[pattern].items()})
    dy, dfinal = output_cotangents(rng, layer, p)
    fast, tape = forward_backward(xp, layer, p, "float32", dy, dfinal)
    with reference_only():
        slow, _ = forward_backward(xp, layer, p, "float32", dy, dfinal)
    assert tape.explain().count(persistent.NAME) == 4
    xp.assert_close(fast, slow, condition=200)
    xp.assert_like(fast, xp.asarray(np.zeros(1), "float32"))
    params, x, state, flags = inputs_on(xp, p, "float32")
    without_tape = layer(params, x, state, **flags)
    xp.assert_close(without_tape, fast[:2], condition=0)


@pytest.mark.parametrize("name", PERSISTENT_CASES)
def test_class_number_input_equals_generic_scan(xp, rng, name):
    layer = CASES[name].make(5, 4, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=3)
    p = p._replace(x=rng.integers(0, 5, size=(6, 3)))
    dy, dfinal = output_cotangents(rng, layer, p)
    fast, tape = forward_backward(xp, layer, p, "float32", dy, dfinal)
    with reference_only():
        slow, _ = forward_backward(xp, layer, p, "float32", dy, dfinal)
    assert persistent.NAME in tape.explain()
    assert fast[3] is None
    xp.assert_close(*(tuple(a for a in got if a is not None) for got in (fast, slow)), condition=200)


@pytest.mark.parametrize("name", PERSISTENT_CASES)
def test_overwriting_results_does_not_change_the_tape(xp, rng, name):
    layer = CASES[name].make(3, 4, bidirectional=True)
    p = random_inputs(rng, layer, T=5, N=3)
    params, x, state, _ = inputs_on(xp, p, "float32")
    y, final, tape = layer.forward(params, x, state)
    dy = xp.asarray(output_cotangents(rng, layer, p)[0], "float32")
    first = layer.backward(tape, dy)
    for a in (y, *(final if isinstance(final, tuple) else (final,)), first.dx, *first.dparams.values()):
        values = xp.asarray(xp.to_numpy(a))
        a[...] = np.nan
        again = layer.backward(tape, dy)
        a[...] = values
        xp.assert_close((again.dx, again.dstate, again.dparams), (first.dx, first.dstate, first.dparams), condition=0)


def round_to_tf32(a):
    """Round to ten mantissa bits, as a TF32 product rounds its factors."""
    return ((a.view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.mark.parametrize("name", PERSISTENT_CASES)
def test_tf32_applies_to_gemms_but_not_to_the_recurrence(xp, rng, name):
    """The input projection and the weight gradients use TF32; the recurrence stays in full float32."""
    layer = CASES[name].make(24, 16)
    p = random_inputs(rng, layer, T=6, N=4)
    dy, dfinal = output_cotangents(rng, layer, p)
    plain, tape = forward_backward(xp, layer, p, "float32", dy, dfinal)
    with xprnn.precision("tf32"):
        got, rounded = forward_backward(xp, layer, p, "float32", dy, dfinal)
    assert persistent.NAME in rounded.explain()
    assert persistent.NAME in tape.explain()
    xp.assert_close(forward_backward(xp, layer, p, "float32", dy, dfinal)[0], plain, condition=0)  # float32 again
    factors = {"weight_ih_l0": round_to_tf32(p.params["weight_ih_l0"].astype("float32"))}
    rounded_inputs = p._replace(x=round_to_tf32(p.x.astype("float32")), params=p.params | factors)
    want, _ = forward_backward(xp, layer, rounded_inputs, "float32", dy, dfinal)
    # A GPU may truncate the factors; the fake CuPy rounds them.
    xp.assert_close(got[:3], want[:3], condition=4 if xp is Backend.CUPY_FAKE else 1e4)
    assert float(np.abs(xp.to_numpy(got[0]) - xp.to_numpy(plain[0])).max()) > 1e-6
    for key, g in xp.to_numpy(got[-1]).items():
        error = np.abs(g - xp.to_numpy(plain[-1])[key]).max() / np.abs(xp.to_numpy(plain[-1])[key]).max()
        assert error < 1e-2, key
        assert error > 1e-6 or "weight" not in key, key  # gradients of relu's biases need no rounding


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("rnn", {"dtype": "float64"}, "only for float32, the parameters are float64"),
        ("rnn", {"flags": "r"}, "not with reset"),
        ("rnn", {"hidden": 1025}, "1025 units of tanh are more than fit on the chip, at most 1024"),
        ("lstm", {"hidden": 513}, "513 units of lstm are more than fit on the chip, at most 512"),
        ("lstm-proj", {}, "not for projected states"),
        ("leaky", {}, "only for the standard Elman, GRU and LSTM cells, this is leaky"),
        ("lstm-clip", {}, "only for the standard Elman, GRU and LSTM cells, this is lstm"),
        ("gru-before", {}, "only for the standard Elman, GRU and LSTM cells, this is gru_reset_before"),
    ],
)
def test_unsupported_layers_run_another_kernel_and_name_the_reason(xp, rng, name, change, why):
    layer = CASES[name].make(3, change.get("hidden", 4))
    p = random_inputs(rng, layer, T=3, N=2, flags=change.get("flags", ""))
    params, x, state, flags = inputs_on(xp, p, change.get("dtype", "float32"))
    y, _, tape = layer.forward(params, x, state, **flags)
    assert persistent.NAME not in tape.explain()
    assert f"not persistent: {why}" in layer.explain(params, x, **flags)
    with reference_only():
        xp.assert_close(y, layer(params, x, state, **flags)[0], condition=500)


def test_older_device_is_refused_with_reason(rng):
    layer = xprnn.RNN(3, 4)
    params = {k.removesuffix("_l0"): np.zeros(s, np.float32) for k, s in layer.shapes().items()}
    reason = persistent.find_config(layer.resolved_cell, params, (3, 2), None, (8, 6))
    assert reason == "needs compute capability 9.0, the device has 8.6"


def test_failed_launch_is_cached_and_the_fused_kernels_run(xp, rng, monkeypatch):
    import cupy

    launches = []

    def refuse(config, *_):
        launches.append(config)
        raise cupy.cuda.driver.CUDADriverError("CUDA_ERROR_INVALID_CLUSTER_SIZE")

    monkeypatch.setattr(persistent, "launch", refuse)
    persistent.launch_error.cache_clear()
    layer = xprnn.LSTM(3, 4)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer), "float32")
    for _ in range(2):
        text = layer.forward(params, x, state)[2].explain()
        assert "CUDA fused steps (not persistent: the device refuses clusters of 1 blocks: CUDA_ERROR_INVALID" in text
    assert len(launches) == 1
    persistent.launch_error.cache_clear()


@pytest.mark.usefixtures("xp")
@pytest.mark.parametrize("units", [("tanh", 1024), ("gru", 512), ("lstm", 256)])
def test_empty_launch_reads_no_array(units):
    """`launch_error` launches with null pointers and sizes of 0."""
    config = cluster_config.choose_config(*units, 1, (9, 0))
    assert persistent.launch_error.__wrapped__(config, 0) == ""


def test_choose_config_minimizes_padding_and_waves():
    """One row gets a cluster of one row; many rows get clusters of four, so that one wave suffices."""
    assert cluster_config.choose_config("tanh", 256, 1, (9, 0)).rows_per_cluster == 1
    assert cluster_config.choose_config("tanh", 256, 128, (9, 0)).rows_per_cluster == 4
    assert cluster_config.choose_config("tanh", 200, 128, (9, 0)).padded_hidden_size == 256
    assert "more shared memory" in cluster_config.choose_config("lstm", 512, 8, (12, 0))
    assert cluster_config.choose_config("tanh", 512, 8, (12, 0)).padded_hidden_size == 512


def test_no_persistent_disables_the_persistent_kernels(xp, rng):
    layer = xprnn.GRU(3, 4)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer), "float32")
    with no_persistent():
        assert persistent.NAME not in layer.forward(params, x, state)[2].explain()
    assert layer.explain(params, x).endswith(persistent.NAME)
    assert persistent.NAME in layer.forward(params, x, state)[2].explain()
