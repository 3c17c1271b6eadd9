"""Kernels against the reference scan, for every cell, dtype, mask, reset and direction."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from support.backends import Backend
from support.kernel_cases import PATTERNS, branching_cell, every_other, untraceable_cell
from support.layer_cases import CASES, MAIN_CASES, RARE_CASES, inputs_on, random_cotangents, random_inputs

import xprnn
from xprnn.gradcheck import check_layer
from xprnn.kernels.config import allow_jit, reference_only

XP = Backend.NUMPY
NAMES = {"in place": "NumPy in place", "compiled": "compiled by numba"}


@pytest.fixture(params=["in place", pytest.param("compiled", marks=pytest.mark.needs("numba"))], autouse=True)
def kernel(request):
    """Run every test with each kernel, and return the kernel's name in `tape.explain()`."""
    with allow_jit(request.param == "compiled"):
        yield NAMES[request.param]


def run(layer, p, dtype, dy=None, dfinal=None):
    """Return (y, final, states) and, given dy, (dx, dstate, dparams) of a pass; and its tape."""
    params, x, state, flags = inputs_on(XP, p, dtype)
    y, final, tape = layer.forward(params, x, state, **flags)
    if dy is None:
        return (y, final, tape.states()), tape
    dx, dstate, dparams = layer.backward(tape, XP.asarray(dy, dtype), cast(dfinal, dtype))
    return (y, final, tape.states(), dx, dstate, dparams), tape


def cast(tree, dtype):
    return tuple(cast(a, dtype) for a in tree) if isinstance(tree, tuple) else XP.asarray(tree, dtype)


def run_both(layer, p, dtype, rng):
    (y, final, _), tape = run(layer, p, dtype)
    dy, dfinal = random_cotangents(rng, y), random_cotangents(rng, final)
    fast, tape = run(layer, p, dtype, dy, dfinal)
    with reference_only():
        slow, generic = run(layer, p, dtype, dy, dfinal)
    assert "reference" in generic.explain()
    return fast, slow, tape


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference_scan(rng, dtype, kernel, name, pattern):
    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=4)._replace(flags=PATTERNS[pattern])
    p = p._replace(flags={k: np.asarray(v) for k, v in p.flags.items()})
    fast, slow, tape = run_both(layer, p, dtype, rng)
    in_place = kernel == NAMES["in place"]
    expected = "reference scan" if in_place and layer.resolved_cell.pregates else kernel  # only jit supports pregates
    assert tape.explain().count(expected) == 2 * layer.num_layers
    XP.assert_close(fast, slow, condition=200)
    XP.assert_like(fast, XP.asarray(np.zeros(1), dtype))
    params, x, state, flags = inputs_on(XP, p, dtype)
    XP.assert_close(layer(params, x, state, **flags), fast[:2], condition=0)  # without a tape: bit for bit


@pytest.mark.parametrize("name", RARE_CASES)
def test_rare_cells_equal_reference_scan(rng, kernel, name):
    """User-defined cells with pregates, separate or summed, and peepholes with a projected h: scan, sequence, step."""
    layer = RARE_CASES[name](3, 5, 2)
    p = random_inputs(rng, layer, T=6, N=4, flags="lmr", scale=0.3)
    fast, slow, tape = run_both(layer, p, "float64", rng)
    compiled = kernel == NAMES["compiled"]
    assert ("reference scan" if layer.resolved_cell.pregates and not compiled else kernel) in tape.explain()
    XP.assert_close(fast, slow, condition=200)
    check_layer(layer, p.params, p.x, p.state, **p.flags)
    ids = rng.integers(0, 3, (4, 2))
    state = tuple(s[:, :2] for s in p.state)
    for x in (p.x[:, :2], ids):
        sequence, running = layer(p.params, x, state), state
        assert (layer._calls.forward(p.params, x, state, record_tape=False) is not None) == compiled
        for x_t in x:
            y, running = layer.step(p.params, x_t, running)
        XP.assert_close(layer.forward(p.params, x, state)[:2], sequence, condition=64)
        XP.assert_close((y, running), (sequence[0][-1], sequence[1]), condition=64)


@pytest.mark.parametrize("name", MAIN_CASES)
def test_repeated_runs_and_replays_are_bitwise_equal(rng, name):
    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=4, flags="lmr")
    (y, final, _), tape = run(layer, p, "float64")
    dy, dfinal = random_cotangents(rng, y), random_cotangents(rng, final)
    one, tape = run(layer, p, "float64", dy, dfinal)
    two, _ = run(layer, p, "float64", dy, dfinal)
    XP.assert_close(two, one, condition=0)
    layer.backward(tape, -dy, None)  # a replay with other cotangents changes nothing
    XP.assert_close(tuple(layer.backward(tape, dy, dfinal)), one[3:], condition=0)


@pytest.mark.parametrize("name", CASES)
def test_memory_layout_of_arguments_does_not_matter(rng, name):
    """Arguments may be Fortran-ordered, strided, reversed and read-only; none is written to."""
    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=5, N=4, flags="lr")
    (y, final, _), _ = run(layer, p, "float64")
    dy, dfinal = random_cotangents(rng, y), random_cotangents(rng, final)
    want, _ = run(layer, p, "float64", dy, dfinal)
    for layout in (np.asfortranarray, every_other, reversed_rows):
        params, x, state = with_layout(layout, (p.params, p.x, p.state))
        y, final, tape = layer.forward(params, x, state, **p.flags)
        got = layer.backward(tape, with_layout(layout, dy), with_layout(layout, dfinal))
        XP.assert_close((y, final, tape.states(), *got), want, condition=64)


def reversed_rows(a):
    return np.ascontiguousarray(a[::-1])[::-1]


def with_layout(layout, tree):
    if isinstance(tree, dict):
        return {k: with_layout(layout, v) for k, v in tree.items()}
    if isinstance(tree, tuple):
        return tuple(with_layout(layout, v) for v in tree)
    a = layout(tree)
    a.flags.writeable = False
    return a


def test_editing_results_in_place_does_not_change_gradients(rng):
    """Results are read-only or copies, so that in-place edits by the caller cannot change the gradients."""
    layer = xprnn.LSTM(3, 4)
    p = random_inputs(rng, layer)
    (y, final, _), _ = run(layer, p, "float64")
    dy, dfinal = random_cotangents(rng, y), random_cotangents(rng, final)
    want, _ = run(layer, p, "float64", dy, dfinal)
    y, final, tape = layer.forward(p.params, p.x, p.state)
    got = layer.backward(tape, dy, dfinal)
    for array in (y, *final, got.dx, *got.dstate, *got.dparams.values()):
        if array.flags.writeable:
            array[...] = 7.0
    XP.assert_close(tuple(layer.backward(tape, dy, dfinal)), want[3:], condition=0)


def peak_memory(call):
    tracemalloc.start()
    try:
        result = call()  # noqa: F841 - alive while it is measured
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru", "leaky"])
def test_no_allocation_inside_the_time_loop(rng, name):
    """Peak memory grows with T only by the saved arrays. N*H is large, so one more array per step would show."""
    layer, N, H = CASES[name].make(2, 64), 64, 64
    params = {k: rng.normal(size=s) * 0.1 for k, s in layer.shapes().items()}
    step = N * H * 8
    peaks = []
    for T in (40, 80):
        x = rng.normal(size=(T, N, 2))
        layer(params, x)  # the first call compiles
        peaks.append(peak_memory(lambda x=x: layer(params, x)))
    cell = layer.resolved_cell
    saved = len(cell.states) + cell.gates
    assert peaks[1] - peaks[0] <= (saved + 0.5) * 40 * step
    y, _, tape = layer.forward(params, x)
    dy = np.ones_like(y)
    layer.backward(tape, dy)
    short = layer.forward(params, x[:40])[2]
    growth = peak_memory(lambda: layer.backward(tape, dy)) - peak_memory(lambda: layer.backward(short, dy[:40]))
    gate_cotangents = cell.gates * (1 if cell.name != "gru" else 2) + len(cell.vectors)
    assert growth <= (gate_cotangents + 0.5) * 40 * step


@pytest.mark.parametrize("make", [untraceable_cell, branching_cell])
def test_untraceable_cells_use_the_generic_scan(rng, make):
    layer = xprnn.Recurrent(2, 3, cell=make(), bidirectional=True)
    p = random_inputs(rng, layer, T=4, flags="lmr", scale=0.3)
    assert run(layer, p, "float64")[1].explain().count("reference") == 2
    check_layer(layer, p.params, p.x, p.state, **p.flags)


@pytest.mark.parametrize(("kind", "bidirectional"), [(xprnn.RNN, True), (xprnn.LSTM, False), (xprnn.GRU, False)])
def test_sequence_of_70000_steps(rng, kind, bidirectional):
    """70,000 steps, more than the 65,535 of torch's cuDNN path. The last steps equal those of a short run."""
    T = 70_000
    layer = kind(1, 1, bidirectional=bidirectional)
    p = random_inputs(rng, layer, T=1, N=1, scale=0.3)
    x = rng.normal(size=(T, 1, 1))
    y, final, tape = layer.forward(p.params, x, p.state)
    assert np.isfinite(y).all()
    dy = np.zeros_like(y)
    dy[-200:, :, :1] = rng.normal(size=(200, 1, 1))  # only the forward direction
    got = layer.backward(tape, dy)
    short_y, _, short = layer.forward(p.params, x[-2000:], p.state)
    want = layer.backward(short, dy[-2000:])
    np.testing.assert_allclose(y[-1000:, :, 0], short_y[-1000:, :, 0], rtol=0, atol=1e-14)
    np.testing.assert_allclose(got.dx[-1000:], want.dx[-1000:], rtol=1e-9, atol=1e-15)
    for name in got.dparams:
        np.testing.assert_allclose(got.dparams[name], want.dparams[name], rtol=1e-9, atol=1e-12)
    with reference_only():
        generic = layer(p.params, x[:500], p.state)[0]
    np.testing.assert_allclose(generic[:400, :, 0], y[:400, :, 0], rtol=0, atol=1e-14)
    check_chunked_run(layer, p, x, y, final)


def check_chunked_run(layer, p, x, y, final):
    """Check that running the sequence in chunks, which do not align with the kernel's blocks, changes nothing."""
    if layer.bidirectional:
        return
    last, state = None, p.state
    for start in range(0, 70_000, 10_007):
        last, state = layer(p.params, x[start : start + 10_007], state)
    np.testing.assert_allclose(last[-1], y[-1], rtol=0, atol=1e-14)
    XP.assert_close(state, final, condition=64)
