"""The fused CUDA kernels equal the reference scan, and their time loops contain only launches.

pytest --backend cupy tests/kernels/cuda/test_fused.py              on a GPU
pytest --backend cupy:fake tests/kernels/cuda/test_fused.py      on a CPU: a fake CuPy, and g++ instead of NVRTC
"""

from __future__ import annotations

import numpy as np
import pytest
from support.cuda.layer_runs import forward_backward, only_cupy, only_fake_cupy, output_cotangents
from support.kernel_cases import PATTERNS, every_other
from support.layer_cases import CASES, MAIN_CASES, inputs_on, random_cotangents, random_inputs

import xprnn
from xprnn.kernels.config import reference_only

pytestmark = [pytest.mark.needs("cupy"), only_cupy, pytest.mark.usefixtures("fused_kernels")]
# A projected h, and gates before the recurrent product, have no generated kernel.
FUSED = [name for name in CASES if name != "lstm-proj" and not name.startswith("gru-before")]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", FUSED)
def test_fused_steps_equal_generic_scan(xp, rng, dtype, name, pattern):
    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=4)._replace(flags={k: np.asarray(v) for k, v in PATTERNS[pattern].items()})
    dy, dfinal = output_cotangents(rng, layer, p)
    fast, tape = forward_backward(xp, layer, p, dtype, dy, dfinal)
    with reference_only():
        slow, generic = forward_backward(xp, layer, p, dtype, dy, dfinal)
    assert tape.explain().count("CUDA fused steps") == 2 * layer.num_layers
    assert generic.explain().count("reference scan") == 2 * layer.num_layers
    xp.assert_close(fast, slow, condition=200)
    xp.assert_like(fast, xp.asarray(np.zeros(1), dtype))
    params, x, state, flags = inputs_on(xp, p, dtype)
    without_tape = layer(params, x, state, **flags)
    xp.assert_close(without_tape, fast[:2], condition=0)


@pytest.mark.parametrize("name", MAIN_CASES)
def test_class_number_input_and_state_cotangents_equal_generic_scan(xp, rng, dtype, name):
    layer = CASES[name].make(5, 4, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=4, flags="lr")
    params, _, state, flags = inputs_on(xp, p, dtype)
    x = xp.asarray(rng.integers(0, 5, size=(6, 4)))

    def run():
        y, _, tape = layer.forward(params, x, state, **flags)
        state_cotangents = [tuple(xp.asarray(d, dtype) for d in s) for s in injected] if injected else None
        return y, tape, layer.backward(tape, None, dstates=state_cotangents)

    injected = None
    injected = [random_cotangents(rng, s) for s in run()[1].states()]
    y, _, got = run()
    with reference_only():
        want_y, _, want = run()
    assert got.dx is None
    xp.assert_close((y, got.dstate, got.dparams), (want_y, want.dstate, want.dparams), condition=200)


@pytest.mark.parametrize("persistent", [False, True])
def test_article_rnn_with_one_bias_equals_generic_scan(xp, rng, dtype, persistent):
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
def test_checkpointed_segments_with_resets_equal_generic_scan(xp, rng, name):
    """With checkpoints, the reset state differs from the first state of a segment, and so do their cotangents."""
    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=4, flags="r")
    p.flags["reset"][::2] |= np.asarray([True, False, True, False])
    params, x, state, flags = inputs_on(xp, p, "float64")

    def run():
        y, final, tape = layer.forward(params, x, state, **flags, checkpoint=2)
        return y, final, *layer.backward(tape, dy)

    dy = xp.asarray(output_cotangents(rng, layer, p)[0])
    fast = run()
    with reference_only():
        xp.assert_close(fast, run(), condition=200)


@pytest.mark.parametrize(("m", "k", "v"), [(1, 1, 1), (7, 3, 5), (300, 5, 2), (40, 2, 90)])
def test_segment_sum_equals_numpy_add_at(xp, rng, dtype, m, k, v):
    from xprnn.kernels.cuda.segment_sum import segment_sum

    ids, rows = rng.integers(0, v, size=m).astype(np.uint8), rng.normal(size=(m, k)).astype(dtype)
    want = np.zeros((k, v))
    np.add.at(want.T, ids, rows.astype("float64"))
    xp.assert_close(segment_sum(xp.xp, xp.asarray(ids), xp.asarray(rows), v), want.astype(dtype), condition=2)


@pytest.mark.parametrize("record_tape", [True, False])
@pytest.mark.parametrize("name", ["rnn", "lstm", "gru", "leaky"])
def test_results_do_not_depend_on_block_sizes(xp, rng, monkeypatch, name, record_tape):
    from xprnn.kernels.cuda import device, fused

    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=4, flags="lmr")
    dy, dfinal = output_cotangents(rng, layer, p)
    params, x, state, flags = inputs_on(xp, p, "float64")

    def run():
        if record_tape:
            return forward_backward(xp, layer, p, "float64", dy, dfinal)[0]
        return layer(params, x, state, **flags), layer(params, x, state)

    want = run()
    monkeypatch.setattr(fused, "_BLOCK_BYTES", 4 * 16 * 8 * 2)
    monkeypatch.setattr(device, "_MAX_GEMM_ROWS", 5)
    xp.assert_close(run(), want, condition=64)


@pytest.mark.parametrize("name", FUSED)
def test_fortran_and_strided_inputs_give_equal_results(xp, rng, name):
    """The inputs themselves stay unchanged."""
    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=5, N=4, flags="lr")
    dy, dfinal = output_cotangents(rng, layer, p)
    want = forward_backward(xp, layer, p, "float64", dy, dfinal)[0]

    def fortran_order(tree):
        if isinstance(tree, dict):
            return {k: fortran_order(v) for k, v in tree.items()}
        if isinstance(tree, tuple):
            return tuple(map(fortran_order, tree))
        axes = tuple(reversed(range(tree.ndim)))
        return xp.xp.permute_dims(xp.asarray(np.ascontiguousarray(np.transpose(tree, axes))), axes)

    def strided(tree):
        if isinstance(tree, dict):
            return {k: strided(v) for k, v in tree.items()}
        if isinstance(tree, tuple):
            return tuple(map(strided, tree))
        return xp.asarray(np.ascontiguousarray(every_other(tree).base))[..., ::2]

    flags = {k: xp.asarray(v) for k, v in p.flags.items()}
    for layout in (fortran_order, strided):
        params, x, state = layout(p.params), layout(p.x), layout(p.state)
        y, final, tape = layer.forward(params, x, state, **flags)
        got = layer.backward(tape, layout(dy), layout(dfinal))
        xp.assert_close((y, final, tape.states(), *got), want, condition=64)
        xp.assert_close((params, x, state), (p.params, p.x, p.state), condition=0)


@pytest.mark.parametrize("name", MAIN_CASES)
def test_overwriting_results_does_not_change_the_tape(xp, rng, name):
    layer = CASES[name].make(3, 4)
    p = random_inputs(rng, layer)
    params, x, state, _ = inputs_on(xp, p, "float64")
    y, final, tape = layer.forward(params, x, state)
    dy = xp.asarray(rng.normal(size=tuple(y.shape)))
    want = layer.backward(tape, dy)
    dparams = xp.to_numpy(want.dparams)
    arrays = [y, *tape.states()[0], want.dx, *want.dparams.values()]
    for array in [*arrays, *(final if isinstance(final, tuple) else [final])]:
        array[...] = 7.0
    xp.assert_close(layer.backward(tape, dy).dparams, dparams, condition=0)


@only_fake_cupy
@pytest.mark.parametrize("flags", ["", "l", "lmr"])
@pytest.mark.parametrize("name", FUSED)
def test_time_loops_have_two_launches_per_step_and_nothing_else(xp, rng, event_log, name, flags):
    layer = CASES[name].make(3, 4)
    p = random_inputs(rng, layer, T=9, N=4, flags=flags)
    params, x, state, options = inputs_on(xp, p, "float32")
    event_log.clear()
    y, _, tape = layer.forward(params, x, state, **options)
    check_loop(event_log, "forward_step", ["gemm", "launch"])
    layer(params, x, state, **options)
    assert not [event for event in event_log if event[0] == "sync"]
    event_log.clear()
    layer.backward(tape, y)
    check_loop(event_log, "backward_step", ["launch", "gemm"])
    assert not [event for event in event_log if event[0] == "sync"]


def check_loop(event_log, name, step):
    """Assert that the log has nine consecutive steps, each with the two events `step`."""
    at = [i for i, event in enumerate(event_log) if event == ("launch", name)]
    start = at[0] - step.index("launch")
    assert len(at) == 9
    assert [kind for kind, _ in event_log[start : at[-1] + 1 + (step[0] == "launch")]] == 9 * step


@only_fake_cupy
@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
def test_memory_per_step_is_that_of_the_saved_arrays(xp, rng, event_log, name):
    layer = CASES[name].make(2, 16)
    params = {k: xp.asarray(0.1 * rng.normal(size=s), "float64") for k, s in layer.shapes().items()}
    sizes = []
    for T in (20, 40):
        x = xp.asarray(rng.normal(size=(T, 8, 2)))
        event_log.clear()
        layer(params, x)
        inference = sum(size for kind, size in event_log if kind == "alloc")
        event_log.clear()
        layer.forward(params, x)
        sizes.append((inference, sum(size for kind, size in event_log if kind == "alloc")))
    step = 20 * 8 * 16 * 8
    # An Elman layer overwrites its projection with its states.
    gates = layer.resolved_cell.gates if name != "rnn" else 0
    assert sizes[1][0] - sizes[0][0] == step * (1 + gates)
    # Saved beside the gates: tanh(c') of the LSTM, the recurrent term of the candidate of the GRU.
    extra = {"rnn": 0, "lstm": 1, "gru": 1}[name]
    assert sizes[1][1] - sizes[0][1] == step * (2 + gates + extra + (name == "lstm"))


@only_fake_cupy
@pytest.mark.parametrize("kernel", ["forward_step", "backward_step"])
@pytest.mark.parametrize("name", MAIN_CASES)
def test_element_offsets_beyond_32_bits(rng, name, kernel):
    """Run a late step of a sequence too long to allocate: only the memory of this step exists, at shifted addresses."""
    from support.cuda import fake_cupy_cuda

    from xprnn.kernels.cuda.pointwise import pointwise_kernels

    cell, n, hidden = CASES[name].make(3, 4).resolved_cell, 3, 5
    kernels, width, late_step = pointwise_kernels(cell, 32), cell.gates * hidden, (1 << 31) // (n * hidden) + 7
    names = kernels.forward_fields if kernel == "forward_step" else kernels.backward_fields
    start = {field: rng.normal(size=(n, width)).astype(np.float32) for field in names}
    step_strides = {field: n * hidden for field in names if field[0] in "YOISMV"}
    step_strides |= {
        field: n * width for field in names if field in ("X", "G") or (field == "Y" and kernel != "forward_step")
    }
    sizes = {
        "T": late_step + 1,
        "N": n,
        "H": hidden,
        "W": width,
        "reverse": 0,
        "save": 1,
        "first": 0,
        "active": 0,
        "reset": 0,
    }
    sizes |= {f"{c}{k}": n * hidden for c in "sm" for k in range(len(cell.states))}

    def memory_after_step(t):
        memory = {field: a.copy() for field, a in start.items()}
        values = sizes | {"t": t}
        numbers = [values.get(f, memory[f].ctypes.data - 4 * t * step_strides.get(f, 0)) for f in names]
        getattr(fake_cupy_cuda.compile_for_host(kernels.source), f"run_{kernel}")(
            np.asarray(numbers, np.int64).tobytes(), 1, 128, 0
        )
        return memory

    first, last = memory_after_step(0), memory_after_step(late_step)
    assert any(not np.array_equal(first[field], start[field]) for field in names)
    assert all(np.array_equal(first[field], last[field]) for field in names)
