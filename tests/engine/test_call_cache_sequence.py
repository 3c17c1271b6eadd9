"""Planned inference: the results of the reference scan; other arguments take the checked path."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
from support.fast_paths import XP, as_dtype, check_planned_call, each_layer, planned_call, projected_lstm
from support.layer_cases import CASES, MAIN_CASES, RARE_CASES, random_inputs

import xprnn
from xprnn.engine import call_cache, stack
from xprnn.kernels.config import allow_jit, reference_only

pytestmark = pytest.mark.needs("numba")
MAKERS = {name: case.make for name, case in CASES.items()} | RARE_CASES


@pytest.mark.parametrize("name", MAKERS)
def test_planned_call_equals_reference_scan_for_every_cell(rng, name):
    longest = 7 if name in RARE_CASES else 40  # the states of rare cells grow
    for layers, steps, n in ((1, 7, 1), (2, longest, 2), (1, 1, 1), (3, 7, 1), (1, 0, 1), (1, 3, 0), (1, 5, 21)):
        layer = MAKERS[name](3, 5, layers)
        p = random_inputs(rng, layer, steps, N=n, scale=0.3)
        check_planned_call(layer, p.params, p.x, p.state)
        check_planned_call(layer, p.params, p.x, None)


OPTIONS = [{}, {"bias": False}, {"batch_first": True}, {"reverse": True}, {"bidirectional": True}]
OPTIONS += [{"learned_state": True}, {"bidirectional": True, "batch_first": True, "learned_state": True, "bias": False}]


@pytest.mark.parametrize("name", MAIN_CASES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_planned_call_equals_reference_scan_for_every_option(rng, name, options):
    layer = CASES[name].make(3, 19, 2, **options)
    p = random_inputs(rng, layer, 6, N=3, scale=0.3)
    x = p.x.swapaxes(0, 1) if layer.batch_first else p.x
    ids, lengths = rng.integers(0, 3, x.shape[:2]), np.array([5, 0, 6])
    for state in (p.state, None):
        check_planned_call(layer, p.params, np.ascontiguousarray(x), state)
        check_planned_call(layer, p.params, x, state, lengths)
        check_planned_call(layer, p.params, ids, state)
        check_planned_call(layer, p.params, ids.astype(np.uint8), state, lengths.tolist())


def expanded(a):
    """Return an array of the shape of `a` whose first axis has stride 0."""
    return np.broadcast_to(a[:1], a.shape)


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


LAYOUTS = {
    "fortran": np.asfortranarray,
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "reversed": lambda a: np.flip(np.flip(a).copy()),
    "expanded": expanded,
    "read-only": read_only,
}


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@each_layer
def test_planned_call_accepts_every_memory_layout(rng, make, layout, options):
    layer, change = make(3, 9, 2, **options), LAYOUTS[layout]
    p = random_inputs(rng, layer, 6, N=2, scale=0.3)
    x = np.ascontiguousarray(p.x.swapaxes(0, 1)) if layer.batch_first else p.x
    params = {name: change(a) for name, a in p.params.items()}
    state = tuple(change(s) for s in p.state) if isinstance(p.state, tuple) else change(p.state)
    check_planned_call(layer, params, x, p.state)
    check_planned_call(layer, p.params, change(x), state)
    check_planned_call(layer, params, change(rng.integers(0, 3, x.shape[:2])), state)


@each_layer
@pytest.mark.parametrize("sizes", [(1, 1), (1, 16), (3, 15), (27, 17), (33, 8), (2, 33)])
def test_planned_call_equals_reference_scan_for_every_size(rng, make, sizes, dtype):
    layer = make(*sizes)
    for n in (1, 25):
        p = random_inputs(rng, layer, 35, N=n, scale=0.15)  # with larger weights, 33 units are chaotic
        check_planned_call(layer, *as_dtype((p.params, p.x, p.state), dtype))


@each_layer
@pytest.mark.parametrize("n", [1, 21])
@pytest.mark.parametrize("features", [3, 37])
def test_chunks_give_the_bits_of_the_whole_sequence(rng, make, features, n, dtype):
    # A projected layer multiplies by panels, whose sums depend on the number of rows from 4 features on.
    layer = make(3 if make is projected_lstm else features, 8)
    p = random_inputs(rng, layer, 70, N=n, scale=0.2)
    params, x, state = as_dtype((p.params, p.x, p.state), dtype)
    for run in (layer, lambda *args: layer.forward(*args)[:2]):
        y, final = run(params, x, state)
        np.testing.assert_equal(run(params, x, state), (y, final))
        for cut in (1, 15, 16, 17, 33, 69):
            first, carried = run(params, x[:cut], state)
            rest, carried = run(params, x[cut:], carried)
            np.testing.assert_array_equal(np.concatenate((first, rest)), y)
            np.testing.assert_equal(carried, final)


@each_layer
def test_no_plan_for_other_layers_and_without_compiled_kernels(rng, make):
    layer = make(3, 8)
    p = random_inputs(rng, layer, 4, N=2)
    planned_call(layer, p.params, p.x, p.state, record_tape=False)
    for context in (allow_jit(False), reference_only()):
        with context:
            assert layer._calls.forward(p.params, p.x, p.state, record_tape=False) is None
            layer(p.params, p.x, p.state)
            assert layer._calls.forward(p.params, p.x, p.state, record_tape=False) is None
    assert len(layer._calls.plans) == 1
    sizes = xprnn.GRU(3, (5, 6), 2)
    q = random_inputs(rng, sizes, 4, N=2)
    sizes(q.params, q.x)
    assert not sizes._calls.plans
    half = as_dtype((p.params, p.x, p.state), "float16")
    other = make(3, 8)
    assert other(*half)[0].dtype == np.float16
    assert not other._calls.plans


def test_masks_resets_dropout_and_checkpoints_use_no_plan(rng):
    layer = xprnn.GRU(3, 5, 2, dropout=0.5)
    p = random_inputs(rng, layer, 6, N=2)
    mask = rng.random((6, 2)) < 0.5
    generator = np.random.default_rng
    for options in ({"mask": mask}, {"reset": mask}, {"rng": generator(0)}, {"checkpoint": 2}):
        layer.forward(p.params, p.x, p.state, **options)
        assert not layer._calls.plans
    layer.forward(p.params, p.x, p.state)
    assert len(layer._calls.plans) == 1
    for options in ({"mask": mask}, {"reset": mask}, {"checkpoint": 2}):
        y, final, tape = layer.forward(p.params, p.x, p.state, **options)
        with reference_only():
            expected = layer.forward(p.params, p.x, p.state, **options)
            XP.assert_close((y, final), expected[:2], condition=64)
        XP.assert_close(layer.backward(tape, y), layer.backward(expected[2], expected[0]), condition=256)
    one, two = (layer.forward(p.params, p.x, p.state, rng=generator(k))[0] for k in (1, 2))
    assert np.abs(one - two).max() > 1e-3


def test_cache_of_plans_is_bounded(rng, monkeypatch):
    monkeypatch.setattr(call_cache, "_MAX_PLANS", 3)
    layer = xprnn.RNN(3, 5)
    p = random_inputs(rng, layer, 9, N=1)
    for steps in (1, 2, 3, 4, 5, 1):
        check_planned_call(layer, p.params, p.x[:steps], p.state)
        assert len(layer._calls.plans) <= 3


def wrong_arguments(p):
    """Return, by name, wrong arguments of a layer with input size 3 and hidden size 8, for x (4, 2, 3)."""

    def map_state(f):
        return tuple(f(s) for s in p.state) if isinstance(p.state, tuple) else f(p.state)

    u, ids = p.params["weight_hh_l0"], np.zeros((4, 2), int)
    return {
        "missing parameter": ({k: v for k, v in p.params.items() if k != "bias_hh_l0"}, p.x, p.state),
        "extra parameter": (p.params | {"bias": u}, p.x, p.state),
        "another parameter": ({k: v for k, v in p.params.items() if k != "bias_hh_l0"} | {"b": u}, p.x, p.state),
        "weight too small": (p.params | {"weight_hh_l0": u[:, :-1]}, p.x, p.state),
        "weight with too few rows": (p.params | {"weight_hh_l0": u[:-1]}, p.x, p.state),
        "weight is None": (p.params | {"weight_hh_l0": None}, p.x, p.state),
        "weight is a list": (p.params | {"weight_hh_l0": u.tolist()}, p.x, p.state),
        "bias too long": (p.params | {"bias_ih_l0": np.ones(99)}, p.x, p.state),
        "bias with two axes": (p.params | {"bias_hh_l0": p.params["bias_hh_l0"][None]}, p.x, p.state),
        "bias of another dtype": (p.params | {"bias_ih_l0": p.params["bias_ih_l0"].astype("float32")}, p.x, p.state),
        "too few features": (p.params, p.x[:, :, :2], p.state),
        "no features": (p.params, p.x[:, :, :0], p.state),
        "x of another dtype": (p.params, p.x.astype("float32"), p.state),
        "x with two axes": (p.params, p.x[0], p.state),
        "x with four axes": (p.params, p.x[None], p.state),
        "masked x": (p.params, np.ma.masked_array(p.x), p.state),
        "class number too large": (p.params, ids + 3, p.state),
        "negative class number": (p.params, ids - 1, p.state),
        "class number beyond int64": (p.params, ids.astype(np.uint64) + np.uint64(2**64 - 1), p.state),
        "weights for more classes": (p.params | {"weight_ih_l0": np.ones((len(u), 4))}, ids, p.state),
        "state of one row": (p.params, p.x, map_state(lambda s: s[:, :1])),
        "state of two layers": (p.params, p.x, map_state(lambda s: np.repeat(s, 2, axis=0))),
        "state too small": (p.params, p.x, map_state(lambda s: s[:, :, :-1])),
        "state of another dtype": (p.params, p.x, map_state(lambda s: s.astype("float32"))),
        "one state too many": (p.params, p.x, (*(p.state if isinstance(p.state, tuple) else (p.state,)), u)),
        "negative length": (p.params, p.x, p.state, [-1, 2]),
        "length too large": (p.params, p.x, p.state, [5, 2]),
        "too few lengths": (p.params, p.x, p.state, [2]),
        "lengths that are no integers": (p.params, p.x, p.state, [1.0, 2.0]),
    }


@each_layer
def test_wrong_arguments_raise_the_error_of_the_checked_path(rng, make):
    layer = make(3, 8)
    p = random_inputs(rng, layer, 4, N=2)
    for x in (p.x, np.zeros((4, 2), int), np.zeros((4, 2), np.uint64)):  # plans with the keys of the wrong arguments
        for lengths in (None, [1, 2]):
            planned_call(layer, p.params, x, p.state, lengths, record_tape=False)
    for name, (params, x, state, *lengths) in wrong_arguments(p).items():
        with pytest.raises(xprnn.InputError) as checked:
            stack.forward(layer, params, x, state, lengths=(lengths or [None])[0], record_tape=False)
        with pytest.raises(xprnn.InputError) as raised:
            layer(params, x, state, *lengths)
        assert str(raised.value) == str(checked.value), name
        with pytest.raises(xprnn.InputError):
            layer.forward(params, x, state, *lengths)


def test_planned_call_checks_the_learned_state_even_where_the_caller_passes_another(rng):
    layer = xprnn.LSTM(3, 5, learned_state=True)
    p = random_inputs(rng, layer, 4, N=2)
    start = p.params["initial_h"]
    for state in (p.state, None):
        check_planned_call(layer, p.params, p.x, state)
        for other in (np.ones((1, 4)), np.ones((2, 5)), start[0], start.astype("float32"), start.tolist(), None):
            with pytest.raises(xprnn.InputError, match="initial_h"):
                layer(p.params | {"initial_h": other}, p.x, state)


def test_subclass_of_ndarray_takes_the_checked_path(rng):
    layer = xprnn.GRU(3, 5)
    p = random_inputs(rng, layer, 4, N=2)
    expected = check_planned_call(layer, p.params, p.x, p.state)
    for params, x, state in (
        (p.params, p.x.view(np.memmap), p.state),
        (p.params | {"weight_hh_l0": p.params["weight_hh_l0"].view(np.memmap)}, p.x, p.state),
        (p.params, p.x, p.state.view(np.memmap)),
    ):
        assert layer._calls.forward(params, x, state, record_tape=False) is None
        XP.assert_close(layer(params, x, state), expected, condition=64)


@each_layer
def test_planned_call_uses_changed_parameters(rng, make):
    """Parameters that were replaced, written to, or converted to another dtype after an earlier call."""
    layer = make(3, 8)
    p = random_inputs(rng, layer, 5, N=2)
    params = dict(p.params)
    first = check_planned_call(layer, params, p.x, p.state)
    params["weight_hh_l0"] *= 0.5
    second = check_planned_call(layer, params, p.x, p.state)
    params["weight_ih_l0"] = rng.normal(size=params["weight_ih_l0"].shape)
    third = check_planned_call(layer, params, p.x, p.state)
    for a, b in ((first, second), (second, third)):
        assert np.max(np.abs(a[0] - b[0])) > 1e-3
    check_planned_call(layer, *as_dtype((params, p.x, p.state), "float32"))
    check_planned_call(layer, params, p.x, p.state)
    ids = rng.integers(0, 3, (5, 2))
    for dtype in ("float64", "float32", "float64"):
        assert layer(as_dtype(params, dtype), ids)[0].dtype == dtype


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "learned_state": True}], ids=str)
def test_layer_keeps_no_array_alive(rng, options):
    layer = xprnn.LSTM(3, 8, 2, **options)
    p = random_inputs(rng, layer, 5, N=2)
    arrays = [p.x, *p.params.values(), *p.state]
    for state in (p.state, None):
        for lengths in (None, np.array([5, 2])):
            planned_call(layer, p.params, p.x, state, lengths, record_tape=False)
            y, final, tape = planned_call(layer, p.params, p.x, state, lengths, record_tape=True)
            arrays += [y, *final, *layer.backward(tape, y).dparams.values()]
    references = [weakref.ref(a) for a in arrays]
    del p, arrays, state, lengths, y, final, tape
    gc.collect()
    assert not any(ref() is not None for ref in references)


def test_copies_and_pickles_of_a_layer_have_no_plans(rng):
    layer = xprnn.LSTM(3, 4)
    p = random_inputs(rng, layer, 5, N=2)
    expected = check_planned_call(layer, p.params, p.x, p.state)
    for other in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other == layer
        assert hash(other) == hash(layer)
        assert not {"_calls", "_fast_step"} & set(vars(other))
        np.testing.assert_equal(other(p.params, p.x, p.state), expected)


def test_threads_may_share_a_layer(rng):
    """Each thread calls the layer with other parameters, another state and another number of steps."""
    layer = xprnn.GRU(3, 16, bidirectional=True)
    tasks = [random_inputs(rng, layer, steps, N=2) for steps in (3, 3, 4, 5)]

    def run(p):
        for _ in range(50):
            y, _, tape = layer.forward(p.params, p.x, p.state)
            grads = layer.backward(tape, y)
        return y, layer(p.params, p.x, p.state)[0], grads

    expected, results = [run(p) for p in tasks], [None] * 4

    def work(k):
        results[k] = run(tasks[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_equal(results, expected)


def test_planned_call_equals_reference_scan_for_several_blocks_of_steps(rng):
    """More steps than a block of the forward kernel, whose gate sums are limited to 1 MiB."""
    layer = xprnn.GRU(2, 40)
    p = random_inputs(rng, layer, 600, N=3, scale=0.1)
    check_planned_call(layer, p.params, p.x, p.state)
