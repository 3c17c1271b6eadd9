"""The CUDA kernels behind CuPy arrays mean what the generic scan means, and their time loops hold nothing but launches.

pytest --backend cupy tests/kernels/cuda/test_fused.py              on a GPU
pytest --backend cupy:standin tests/kernels/cuda/test_fused.py      anywhere: standin.py takes CuPy's place, g++ that of NVRTC
"""

from __future__ import annotations

import numpy as np
import pytest
from support.backends import Backend
from support.kernel_cases import PATTERNS, every_other
from support.layer_cases import CASES, MAIN_CASES, inputs_on, random_cotangents, random_inputs

import xprnn
from xprnn.kernels.config import reference_only

pytestmark = pytest.mark.needs("cupy")
# A projected h and early gates have no printed kernel.
FUSED = [name for name in CASES if name != "lstm-proj" and not name.startswith("gru-before")]


@pytest.fixture(autouse=True)
def on_cupy(xp):
    if xp.library != "cupy":
        pytest.skip("about CuPy's kernels")
    from xprnn.kernels.cuda import no_persistent

    with no_persistent():
        yield
    if xp is Backend.CUPY_FAKE:
        from support.cuda import fake_cupy as standin

        standin.DEVICE_MEMORY.check_guards()


@pytest.fixture
def log(xp):
    """What the stand-in has seen since."""
    if xp is not Backend.CUPY_FAKE:
        pytest.skip("only the stand-in counts")
    from support.cuda import fake_cupy as standin

    standin.EVENT_LOG.clear()
    return standin.EVENT_LOG


def results(xp, layer, p, dtype, dy, dfinal):
    """Everything a pass gives, and its tape."""
    params, x, state, flags = inputs_on(xp, p, dtype)
    y, final, tape = layer.forward(params, x, state, **flags)
    put = lambda tree: tuple(map(put, tree)) if isinstance(tree, tuple) else xp.asarray(tree, dtype)  # noqa: E731
    return (y, final, tape.states(), *layer.backward(tape, put(dy), put(dfinal))), tape


def drawn(rng, layer, p):
    """Cotangents of y and of the final state."""
    shape = (*p.x.shape[:2], layer.output_size)
    return rng.normal(size=shape), random_cotangents(rng, p.state)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", FUSED)
def test_fused_steps_equal_generic(xp, rng, dtype, name, pattern):
    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=4)._replace(flags={k: np.asarray(v) for k, v in PATTERNS[pattern].items()})
    dy, dfinal = drawn(rng, layer, p)
    fast, tape = results(xp, layer, p, dtype, dy, dfinal)
    with reference_only():
        slow, generic = results(xp, layer, p, dtype, dy, dfinal)
    assert tape.explain().count("CUDA fused steps") == 2 * layer.num_layers
    assert generic.explain().count("reference scan") == 2 * layer.num_layers
    xp.assert_close(fast, slow, condition=200)
    xp.assert_like(fast, xp.asarray(np.zeros(1), dtype))
    params, x, state, flags = inputs_on(xp, p, dtype)
    xp.assert_close(layer(params, x, state, **flags), fast[:2], condition=0)  # no tape, the same bits


@pytest.mark.parametrize("name", MAIN_CASES)
def test_class_numbers_and_inner_cotangents(xp, rng, dtype, name):
    layer = CASES[name].make(5, 4, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=4, flags="lr")
    params, _, state, flags = inputs_on(xp, p, dtype)
    x = xp.asarray(rng.integers(0, 5, size=(6, 4)))

    def run():
        y, _, tape = layer.forward(params, x, state, **flags)
        inner = [tuple(xp.asarray(d, dtype) for d in s) for s in injected] if injected else None
        return y, tape, layer.backward(tape, None, dstates=inner)

    injected = None
    injected = [random_cotangents(rng, s) for s in run()[1].states()]
    y, _, got = run()
    with reference_only():
        want_y, _, want = run()
    assert got.dx is None
    xp.assert_close((y, got.dstate, got.dparams), (want_y, want.dstate, want.dparams), condition=200)


@pytest.mark.parametrize("persistent", [False, True])
def test_one_bias_as_the_article_has_it(xp, rng, dtype, persistent):
    from xprnn.kernels import cuda

    cuda._no_persistent.set(not persistent)
    x, a0 = xp.asarray(rng.normal(size=(3, 4, 5)), dtype), xp.asarray(rng.normal(size=(6, 4)), dtype)
    shapes = {"Wax": (6, 3), "Waa": (6, 6), "Wya": (2, 6), "ba": (6, 1), "by": (2, 1)}
    parameters = {k: xp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}
    da = xp.asarray(rng.normal(size=(6, 4, 5)), dtype)

    def run():
        a, y, caches = xprnn.rnn_forward(x, a0, parameters)
        return a, y, xprnn.rnn_backward(da, caches)

    fast = run()
    with reference_only():
        xp.assert_close(fast, run(), condition=200)


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
def test_segments_with_a_home_of_their_own(xp, rng, name):
    """With checkpoints a reset leads to another state than the segment's first: the two adjoints part."""
    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=4, flags="r")
    p.flags["reset"][::2] |= np.asarray([True, False, True, False])
    params, x, state, flags = inputs_on(xp, p, "float64")

    def run():
        y, final, tape = layer.forward(params, x, state, **flags, checkpoint=2)
        return y, final, *layer.backward(tape, dy)

    dy = xp.asarray(drawn(rng, layer, p)[0])
    fast = run()
    with reference_only():
        xp.assert_close(fast, run(), condition=200)


@pytest.mark.parametrize(("m", "k", "v"), [(1, 1, 1), (7, 3, 5), (300, 5, 2), (40, 2, 90)])
def test_rows_summed_by_class(xp, rng, dtype, m, k, v):
    from xprnn.kernels.cuda.segment_sum import segment_sum

    ids, rows = rng.integers(0, v, size=m).astype(np.uint8), rng.normal(size=(m, k)).astype(dtype)
    want = np.zeros((k, v))
    np.add.at(want.T, ids, rows.astype("float64"))
    xp.assert_close(segment_sum(xp.xp, xp.asarray(ids), xp.asarray(rows), v), want.astype(dtype), condition=2)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", ["rnn", "lstm", "gru", "leaky"])
def test_blocks_of_steps_and_of_rows_are_the_whole(xp, rng, monkeypatch, name, keep):
    from xprnn.kernels.cuda import device, fused

    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=4, flags="lmr")
    dy, dfinal = drawn(rng, layer, p)
    params, x, state, flags = inputs_on(xp, p, "float64")

    def run():
        if keep:
            return results(xp, layer, p, "float64", dy, dfinal)[0]
        return layer(params, x, state, **flags), layer(params, x, state)

    want = run()
    monkeypatch.setattr(fused, "_BLOCK_BYTES", 4 * 16 * 8 * 2)
    monkeypatch.setattr(device, "_MAX_GEMM_ROWS", 5)
    xp.assert_close(run(), want, condition=64)


@pytest.mark.parametrize("name", FUSED)
def test_any_memory_layout(xp, rng, name):
    """Fortran-ordered and strided arguments: the same numbers, and none of them is written to."""
    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=5, N=4, flags="lr")
    dy, dfinal = drawn(rng, layer, p)
    want = results(xp, layer, p, "float64", dy, dfinal)[0]

    def turned(tree):
        if isinstance(tree, dict):
            return {k: turned(v) for k, v in tree.items()}
        if isinstance(tree, tuple):
            return tuple(map(turned, tree))
        axes = tuple(reversed(range(tree.ndim)))
        return xp.xp.permute_dims(xp.asarray(np.ascontiguousarray(np.transpose(tree, axes))), axes)

    def strided(tree):
        if isinstance(tree, dict):
            return {k: strided(v) for k, v in tree.items()}
        if isinstance(tree, tuple):
            return tuple(map(strided, tree))
        return xp.asarray(np.ascontiguousarray(every_other(tree).base))[..., ::2]

    flags = {k: xp.asarray(v) for k, v in p.flags.items()}
    for twist in (turned, strided):
        params, x, state = twist(p.params), twist(p.x), twist(p.state)
        y, final, tape = layer.forward(params, x, state, **flags)
        got = layer.backward(tape, twist(dy), twist(dfinal))
        xp.assert_close((y, final, tape.states(), *got), want, condition=64)
        xp.assert_close((params, x, state), (p.params, p.x, p.state), condition=0)


@pytest.mark.parametrize("name", MAIN_CASES)
def test_what_comes_out_is_not_what_the_tape_holds(xp, rng, name):
    layer = CASES[name].make(3, 4)
    p = random_inputs(rng, layer)
    params, x, state, _ = inputs_on(xp, p, "float64")
    y, final, tape = layer.forward(params, x, state)
    dy = xp.asarray(rng.normal(size=tuple(y.shape)))
    want = layer.backward(tape, dy)
    kept = xp.to_numpy(want.dparams)
    arrays = [y, *tape.states()[0], want.dx, *want.dparams.values()]
    for array in [*arrays, *(final if isinstance(final, tuple) else [final])]:
        array[...] = 7.0
    xp.assert_close(layer.backward(tape, dy).dparams, kept, condition=0)


@pytest.mark.parametrize("flags", ["", "l", "lmr"])
@pytest.mark.parametrize("name", FUSED)
def test_the_time_loops_hold_two_launches_a_step_and_nothing_else(xp, rng, log, name, flags):
    layer = CASES[name].make(3, 4)
    p = random_inputs(rng, layer, T=9, N=4, flags=flags)
    params, x, state, given_flags = inputs_on(xp, p, "float32")
    log.clear()
    y, _, tape = layer.forward(params, x, state, **given_flags)
    check_loop(log, "forward_step", ["gemm", "launch"])
    layer(params, x, state, **given_flags)
    assert not [event for event in log if event[0] == "sync"]
    log.clear()
    layer.backward(tape, y)
    check_loop(log, "backward_step", ["launch", "gemm"])
    assert not [event for event in log if event[0] == "sync"]


def check_loop(log, name, step):
    """Nine steps, each these two events."""
    at = [i for i, event in enumerate(log) if event == ("launch", name)]
    start = at[0] - step.index("launch")
    assert len(at) == 9
    assert [kind for kind, _ in log[start : at[-1] + 1 + (step[0] == "launch")]] == 9 * step


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
def test_memory_does_not_grow_beyond_what_is_kept(xp, rng, log, name):
    layer = CASES[name].make(2, 16)
    params = {k: xp.asarray(0.1 * rng.normal(size=s), "float64") for k, s in layer.shapes().items()}
    sizes = []
    for T in (20, 40):
        x = xp.asarray(rng.normal(size=(T, 8, 2)))
        log.clear()
        layer(params, x)
        inference = sum(size for kind, size in log if kind == "alloc")
        log.clear()
        layer.forward(params, x)
        sizes.append((inference, sum(size for kind, size in log if kind == "alloc")))
    step = 20 * 8 * 16 * 8
    gates = (
        layer.resolved_cell.gates if name != "rnn" else 0
    )  # an Elman layer's projection lies where its states will be
    assert sizes[1][0] - sizes[0][0] == step * (1 + gates)
    extra = {"rnn": 0, "lstm": 1, "gru": 1}[name]  # tanh(c') and c, with g in place of a gate; h_n of the GRU
    assert sizes[1][1] - sizes[0][1] == step * (2 + gates + extra + (name == "lstm"))


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize("kernel", ["forward_step", "backward_step"])
@pytest.mark.parametrize("name", MAIN_CASES)
def test_a_step_beyond_two_billion_numbers(rng, name, kernel):
    """Late in a sequence too long to be kept here: addresses of its step alone, which no 32-bit index would find."""
    from support.cuda import fake_cupy_cuda as standin_cuda

    from xprnn.kernels.cuda.pointwise import pointwise_kernels

    cell, n, hidden = CASES[name].make(3, 4).resolved_cell, 3, 5
    made, width, late = pointwise_kernels(cell, 32), cell.gates * hidden, (1 << 31) // (n * hidden) + 7
    names = made.forward_fields if kernel == "forward_step" else made.backward_fields
    start = {field: rng.normal(size=(n, width)).astype(np.float32) for field in names}
    stepped = {field: n * hidden for field in names if field[0] in "YOISMV"}
    stepped |= {
        field: n * width for field in names if field in ("X", "G") or (field == "Y" and kernel != "forward_step")
    }
    sizes = {"T": late + 1, "N": n, "H": hidden, "W": width, "reverse": 0, "save": 1, "first": 0, "active": 0, "reset": 0}
    sizes |= {f"{c}{k}": n * hidden for c in "sm" for k in range(len(cell.states))}

    def after(t):
        memory = {field: a.copy() for field, a in start.items()}
        values = sizes | {"t": t}
        numbers = [values.get(f, memory[f].ctypes.data - 4 * t * stepped.get(f, 0)) for f in names]
        getattr(standin_cuda.compile_for_host(made.source), f"run_{kernel}")(
            np.asarray(numbers, np.int64).tobytes(), 1, 128, 0
        )
        return memory

    first, last = after(0), after(late)
    assert any(not np.array_equal(first[field], start[field]) for field in names)
    assert all(np.array_equal(first[field], last[field]) for field in names)
