"""Which layers the persistent kernels run, that they mean the generic scan there, and what is said where they don't."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.cuda.test_fused import drawn, results
from support.backends import Backend
from support.kernel_cases import PATTERNS
from support.layer_cases import CASES, inputs_on, random_inputs

import xprnn
from xprnn.kernels.config import reference_only
from xprnn.kernels.cuda import cluster_config, no_persistent, persistent

pytestmark = pytest.mark.needs("cupy")
TAKEN = ["rnn", "rnn-relu", "lstm", "gru"]
TAKEN_PATTERNS = [k for k, flags in PATTERNS.items() if "reset" not in flags]


@pytest.fixture(autouse=True)
def on_cupy(xp):
    if xp.library != "cupy":
        pytest.skip("about CuPy's kernels")
    import cupy

    if not any(map(str.isdigit, cupy.cuda.Device().compute_capability)) or cupy.cuda.Device().compute_capability < "90":
        pytest.skip("needs compute capability 9.0")


@pytest.mark.parametrize("pattern", TAKEN_PATTERNS)
@pytest.mark.parametrize("name", TAKEN)
def test_persistent_equals_generic(xp, rng, name, pattern):
    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=4)._replace(flags={k: np.asarray(v) for k, v in PATTERNS[pattern].items()})
    dy, dfinal = drawn(rng, layer, p)
    fast, tape = results(xp, layer, p, "float32", dy, dfinal)
    with reference_only():
        slow, _ = results(xp, layer, p, "float32", dy, dfinal)
    assert tape.explain().count(persistent.NAME) == 4
    xp.assert_close(fast, slow, condition=200)
    xp.assert_like(fast, xp.asarray(np.zeros(1), "float32"))
    params, x, state, flags = inputs_on(xp, p, "float32")
    xp.assert_close(layer(params, x, state, **flags), fast[:2], condition=0)  # no tape, the same bits


@pytest.mark.parametrize("name", TAKEN)
def test_class_numbers(xp, rng, name):
    layer = CASES[name].make(5, 4, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=3)
    p = p._replace(x=rng.integers(0, 5, size=(6, 3)))
    dy, dfinal = drawn(rng, layer, p)
    fast, tape = results(xp, layer, p, "float32", dy, dfinal)
    with reference_only():
        slow, _ = results(xp, layer, p, "float32", dy, dfinal)
    assert persistent.NAME in tape.explain()
    assert fast[3] is None
    xp.assert_close(*(tuple(a for a in got if a is not None) for got in (fast, slow)), condition=200)


@pytest.mark.parametrize("name", TAKEN)
def test_a_tape_replays_whatever_becomes_of_what_came_out(xp, rng, name):
    layer = CASES[name].make(3, 4, bidirectional=True)
    p = random_inputs(rng, layer, T=5, N=3)
    params, x, state, _ = inputs_on(xp, p, "float32")
    y, final, tape = layer.forward(params, x, state)
    dy = xp.asarray(drawn(rng, layer, p)[0], "float32")
    first = layer.backward(tape, dy)
    for a in (y, *(final if isinstance(final, tuple) else (final,)), first.dx, *first.dparams.values()):
        kept = xp.asarray(xp.to_numpy(a))
        a[...] = np.nan
        again = layer.backward(tape, dy)
        a[...] = kept
        xp.assert_close((again.dx, again.dstate, again.dparams), (first.dx, first.dstate, first.dparams), condition=0)


def tf32(a):
    """Rounded to ten bits after the point, as a TF32 product takes its factors."""
    return ((a.view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.mark.parametrize("name", TAKEN)
def test_tf32_is_for_the_products_around_the_kernel(xp, rng, name):
    """The projection and the weights' gradients; the recurrence itself stays in full float32."""
    layer = CASES[name].make(24, 16)
    p = random_inputs(rng, layer, T=6, N=4)
    dy, dfinal = drawn(rng, layer, p)
    plain, tape = results(xp, layer, p, "float32", dy, dfinal)
    with xprnn.precision("tf32"):
        got, rounded = results(xp, layer, p, "float32", dy, dfinal)
    assert persistent.NAME in rounded.explain()
    assert persistent.NAME in tape.explain()
    xp.assert_close(results(xp, layer, p, "float32", dy, dfinal)[0], plain, condition=0)  # put back
    factors = {"weight_ih_l0": tf32(p.params["weight_ih_l0"].astype("float32"))}
    by_hand = p._replace(x=tf32(p.x.astype("float32")), params=p.params | factors)
    want, _ = results(xp, layer, by_hand, "float32", dy, dfinal)
    # A GPU may cut its factors where the stand-in rounds them.
    xp.assert_close(got[:3], want[:3], condition=4 if xp is Backend.CUPY_FAKE else 1e4)
    assert float(np.abs(xp.to_numpy(got[0]) - xp.to_numpy(plain[0])).max()) > 1e-6
    for key, g in xp.to_numpy(got[-1]).items():
        far = np.abs(g - xp.to_numpy(plain[-1])[key]).max() / np.abs(xp.to_numpy(plain[-1])[key]).max()
        assert far < 1e-2, key
        assert far > 1e-6 or "weight" not in key, key  # a product of its own; relu's biases see no rounding


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
def test_what_does_not_fit_goes_elsewhere_and_says_why(xp, rng, name, change, why):
    layer = CASES[name].make(3, change.get("hidden", 4))
    p = random_inputs(rng, layer, T=3, N=2, flags=change.get("flags", ""))
    params, x, state, flags = inputs_on(xp, p, change.get("dtype", "float32"))
    y, _, tape = layer.forward(params, x, state, **flags)
    assert persistent.NAME not in tape.explain()
    assert f"not persistent: {why}" in layer.explain(params, x, **flags)
    with reference_only():
        xp.assert_close(y, layer(params, x, state, **flags)[0], condition=500)


def test_an_older_device(rng):
    layer = xprnn.RNN(3, 4)
    params = {k.removesuffix("_l0"): np.zeros(s, np.float32) for k, s in layer.shapes().items()}
    found = persistent.find_config(layer.resolved_cell, params, (3, 2), None, (8, 6))
    assert found == "needs compute capability 9.0, the device has 8.6"


def test_a_device_that_refuses_is_asked_once_and_the_next_kernel_runs(xp, rng, monkeypatch):
    import cupy

    asked = []

    def refuse(config, *_):
        asked.append(config)
        raise cupy.cuda.driver.CUDADriverError("CUDA_ERROR_INVALID_CLUSTER_SIZE")

    monkeypatch.setattr(persistent, "launch", refuse)
    persistent.launch_error.cache_clear()
    layer = xprnn.LSTM(3, 4)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer), "float32")
    for _ in range(2):
        said = layer.forward(params, x, state)[2].explain()
        assert "CUDA fused steps (not persistent: the device refuses clusters of 1 blocks: CUDA_ERROR_INVALID" in said
    assert len(asked) == 1
    persistent.launch_error.cache_clear()


@pytest.mark.usefixtures("xp")
@pytest.mark.parametrize("units", [("tanh", 1024), ("gru", 512), ("lstm", 256)])
def test_a_launch_with_nothing_to_do(units):
    """What `refused` asks of a device: no array is looked at."""
    config = cluster_config.choose_config(*units, 1, (9, 0))
    assert persistent.launch_error.__wrapped__(config, 0) == ""


def test_rows_of_a_cluster():
    """One row is not given a cluster for four; four waves of clusters are not run where one will do."""
    assert cluster_config.choose_config("tanh", 256, 1, (9, 0)).rows_per_cluster == 1
    assert cluster_config.choose_config("tanh", 256, 128, (9, 0)).rows_per_cluster == 4
    assert cluster_config.choose_config("tanh", 200, 128, (9, 0)).padded_hidden_size == 256
    assert "more shared memory" in cluster_config.choose_config("lstm", 512, 8, (12, 0))
    assert cluster_config.choose_config("tanh", 512, 8, (12, 0)).padded_hidden_size == 512


def test_fused_only_rules_it_out(xp, rng):
    layer = xprnn.GRU(3, 4)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer), "float32")
    with no_persistent():
        assert persistent.NAME not in layer.forward(params, x, state)[2].explain()
    assert layer.explain(params, x).endswith(persistent.NAME)
    assert persistent.NAME in layer.forward(params, x, state)[2].explain()
