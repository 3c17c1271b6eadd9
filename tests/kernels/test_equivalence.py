"""A kernel means what the generic scan means: every cell, dtype, ragged pattern and direction."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from support.backends import Backend
from support.layer_cases import CASES, MAIN_CASES, RARE_CASES, inputs_on, random_cotangents, random_inputs

import xprnn
from xprnn.gradcheck import check_layer
from xprnn.kernels.config import allow_jit, reference_only
from xprnn.kernels.jit import compile_cache

PATTERNS = {
    "full": {},
    "sorted": {"lengths": [6, 4, 1, 0]},
    "any-order": {"lengths": [1, 6, 0, 3]},
    "nearly-full": {"lengths": [5, 6, 6, 6]},
    "equal": {"lengths": [3, 3, 3, 3]},
    "none": {"lengths": [0, 0, 0, 0]},
    "holes": {
        "mask": np.array([[1, 0, 1, 1], [0, 0, 1, 1], [1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]], bool)
    },
    "resets": {
        "reset": np.array([[1, 0, 0, 1], [0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1]], bool)
    },
}
PATTERNS["all"] = {"lengths": [4, 6, 2, 5], **PATTERNS["holes"], **PATTERNS["resets"]}
XP = Backend.NUMPY
NAMES = {"in place": "NumPy in place", "compiled": "compiled by numba"}


@pytest.fixture(params=NAMES, autouse=True)
def kernel(request):
    """Every test runs with each kernel; its name in a tape's words."""
    if request.param == "compiled" and not compile_cache.numba_available():
        pytest.skip("numba is not installed")
    with allow_jit(request.param == "compiled"):
        yield NAMES[request.param]


def run(layer, p, dtype, dy=None, dfinal=None):
    """Everything a pass gives: (y, final, states, dx, dstate, dparams) and how it was computed."""
    params, x, state, flags = inputs_on(XP, p, dtype)
    y, final, tape = layer.forward(params, x, state, **flags)
    if dy is None:
        return (y, final, tape.states()), tape
    dx, dstate, dparams = layer.backward(tape, XP.asarray(dy, dtype), cast(dfinal, dtype))
    return (y, final, tape.states(), dx, dstate, dparams), tape


def cast(tree, dtype):
    return tuple(cast(a, dtype) for a in tree) if isinstance(tree, tuple) else XP.asarray(tree, dtype)


def both(layer, p, dtype, rng):
    (y, final, _), tape = run(layer, p, dtype)
    dy, dfinal = random_cotangents(rng, y), random_cotangents(rng, final)
    fast, tape = run(layer, p, dtype, dy, dfinal)
    with reference_only():
        slow, generic = run(layer, p, dtype, dy, dfinal)
    assert "generic" in generic.explain()
    return fast, slow, tape


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_equals_generic(rng, dtype, kernel, name, pattern):
    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=4)._replace(flags=PATTERNS[pattern])
    p = p._replace(flags={k: np.asarray(v) for k, v in p.flags.items()})
    fast, slow, tape = both(layer, p, dtype, rng)
    in_place = kernel == NAMES["in place"]
    expected = "generic scan" if in_place and layer.resolved_cell.early else kernel  # early gates are compiled only
    assert tape.explain().count(expected) == 2 * layer.num_layers
    XP.assert_close(fast, slow, condition=200)
    XP.assert_like(fast, XP.asarray(np.zeros(1), dtype))
    params, x, state, flags = inputs_on(XP, p, dtype)
    XP.assert_close(layer(params, x, state, **flags), fast[:2], condition=0)  # no tape, the same bits


@pytest.mark.parametrize("name", RARE_CASES)
def test_a_rarer_cell_equals_generic(rng, kernel, name):
    """Early gates of a cell of one's own, whichever only look at x + h; peepholes with a projected h: all that runs."""
    layer = RARE_CASES[name](3, 5, 2)
    p = random_inputs(rng, layer, T=6, N=4, flags="lmr", scale=0.3)
    fast, slow, tape = both(layer, p, "float64", rng)
    compiled = kernel == NAMES["compiled"]
    assert ("generic scan" if layer.resolved_cell.pregates and not compiled else kernel) in tape.explain()
    XP.assert_close(fast, slow, condition=200)
    check_layer(layer, p.params, p.x, p.state, **p.flags)
    ids = rng.integers(0, 3, (4, 2))
    state = tuple(s[:, :2] for s in p.state)
    for x in (p.x[:, :2], ids):
        assert (layer._fast_sequence(p.params, x, state) is not None) == compiled
        walked, steps = layer(p.params, x, state), state
        for x_t in x:
            y, steps = layer.step(p.params, x_t, steps)
        XP.assert_close(layer.forward(p.params, x, state)[:2], walked, condition=64)
        XP.assert_close((y, steps), (walked[0][-1], walked[1]), condition=64)


@pytest.mark.parametrize("name", MAIN_CASES)
def test_the_same_bits_from_run_to_run_and_from_replay(rng, name):
    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=4, flags="lmr")
    (y, final, _), tape = run(layer, p, "float64")
    dy, dfinal = random_cotangents(rng, y), random_cotangents(rng, final)
    one, tape = run(layer, p, "float64", dy, dfinal)
    two, _ = run(layer, p, "float64", dy, dfinal)
    XP.assert_close(two, one, condition=0)
    layer.backward(tape, -dy, None)  # a replay with other cotangents leaves no trace
    XP.assert_close(tuple(layer.backward(tape, dy, dfinal)), one[3:], condition=0)


@pytest.mark.parametrize("name", CASES)
def test_any_memory_layout(rng, name):
    """Fortran-ordered, strided and read-only arguments: the same numbers, and not one of them is written to."""
    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=5, N=4, flags="lr")
    (y, final, _), _ = run(layer, p, "float64")
    dy, dfinal = random_cotangents(rng, y), random_cotangents(rng, final)
    want, _ = run(layer, p, "float64", dy, dfinal)
    for twist in (np.asfortranarray, every_other, backwards):
        params, x, state = twisted(twist, (p.params, p.x, p.state))
        y, final, tape = layer.forward(params, x, state, **p.flags)
        got = layer.backward(tape, twisted(twist, dy), twisted(twist, dfinal))
        XP.assert_close((y, final, tape.states(), *got), want, condition=64)


def every_other(a):
    return np.repeat(a, 2, axis=-1)[..., ::2]


def backwards(a):
    return np.ascontiguousarray(a[::-1])[::-1]


def twisted(twist, tree):
    if isinstance(tree, dict):
        return {k: twisted(twist, v) for k, v in tree.items()}
    if isinstance(tree, tuple):
        return tuple(twisted(twist, v) for v in tree)
    a = twist(tree)
    a.flags.writeable = False
    return a


def test_what_comes_out_is_not_what_the_tape_holds(rng):
    """A caller who works in place on results must not bend the gradients: such memory is read-only or a copy."""
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


def peak(call):
    tracemalloc.start()
    try:
        kept = call()  # noqa: F841 - alive while it is measured
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru", "leaky"])
def test_no_allocation_inside_the_time_loop(rng, name):
    """Beyond what is kept, the peak does not grow with T: N*H is large here, so one array per step would show."""
    layer, N, H = CASES[name].make(2, 64), 64, 64
    params = {k: rng.normal(size=s) * 0.1 for k, s in layer.shapes().items()}
    step = N * H * 8
    peaks = []
    for T in (40, 80):
        x = rng.normal(size=(T, N, 2))
        layer(params, x)  # the first call compiles
        peaks.append(peak(lambda x=x: layer(params, x)))
    kept = (
        len(layer.resolved_cell.states) + layer.resolved_cell.gates
    )  # states and projection; the Elman cell's are one
    assert peaks[1] - peaks[0] <= (kept + 0.5) * 40 * step
    y, _, tape = layer.forward(params, x)
    dy = np.ones_like(y)
    layer.backward(tape, dy)
    short = layer.forward(params, x[:40])[2]
    growth = peak(lambda: layer.backward(tape, dy)) - peak(lambda: layer.backward(short, dy[:40]))
    sums = layer.resolved_cell.gates * (1 if layer.resolved_cell.name != "gru" else 2) + len(
        layer.resolved_cell.vectors
    )
    assert growth <= (sums + 0.5) * 40 * step  # the gates' adjoints, which one product reads at the end


def untraceable_cell():
    """xp.atan is in the standard but not among what is traced."""

    def build(xp):
        def step(x, h, state, p):
            a = x[0] + h[0]
            return (xp.atan(a),), (a,)

        def back(dstate, saved, state, p):
            da = dstate[0] / (1.0 + saved[0] * saved[0])
            return (da,), (da,), (None,), ()

        return step, back

    return xprnn.Cell("atan", 1, build)


def branching_cell():
    """A branch on a value cannot be traced either: here it is an error of the cell only where it has no one answer."""

    def build(xp):
        def step(x, h, state, p):
            a = x[0] + h[0]
            y = a if not bool(xp.any(xp.abs(a) > 1e9)) else xp.zeros_like(a)
            return (y,), ()

        def back(dstate, saved, state, p):
            return (dstate[0],), (dstate[0],), (None,), ()

        return step, back

    return xprnn.Cell("branch", 1, build)


@pytest.mark.parametrize("make", [untraceable_cell, branching_cell])
def test_a_cell_that_cannot_be_traced_takes_the_generic_scan(rng, make):
    layer = xprnn.Recurrent(2, 3, cell=make(), bidirectional=True)
    p = random_inputs(rng, layer, T=4, flags="lmr", scale=0.3)
    assert run(layer, p, "float64")[1].explain().count("generic") == 2
    check_layer(layer, p.params, p.x, p.state, **p.flags)


@pytest.mark.parametrize(("kind", "bidirectional"), [(xprnn.RNN, True), (xprnn.LSTM, False), (xprnn.GRU, False)])
def test_a_very_long_sequence(rng, kind, bidirectional):
    """torch's cuDNN path ends at 65,535 steps. Here only the last steps matter, and they are the short run's."""
    T = 70_000
    layer = kind(1, 1, bidirectional=bidirectional)
    p = random_inputs(rng, layer, T=1, N=1, scale=0.3)
    x = rng.normal(size=(T, 1, 1))
    y, final, tape = layer.forward(p.params, x, p.state)
    assert np.isfinite(y).all()
    dy = np.zeros_like(y)
    dy[-200:, :, :1] = rng.normal(size=(200, 1, 1))  # the forward direction's end
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
    check_parts_of_a_long_walk(layer, p, x, y, final)


def check_parts_of_a_long_walk(layer, p, x, y, final):
    """Across the seams of whatever blocks the kernel walks in, step after step is one plain recurrence."""
    if layer.bidirectional:
        return
    last, state = None, p.state
    for start in range(0, 70_000, 10_007):
        last, state = layer(p.params, x[start : start + 10_007], state)
    np.testing.assert_allclose(last[-1], y[-1], rtol=0, atol=1e-14)
    XP.assert_close(state, final, condition=64)
