"""The compiled kernel for short sequences without a tape: the results of the reference scan, and its limits."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from support.fast_paths import XP, each_layer
from support.layer_cases import CASES, MAIN_CASES, random_inputs

import xprnn
from xprnn.engine import stack
from xprnn.kernels import step_plan
from xprnn.kernels.config import allow_jit, reference_only

pytestmark = pytest.mark.needs("numba")


def reference_results(layer, params, x, state):
    """y and the final state by the validated path and the reference scan."""
    with reference_only():
        return stack.forward(layer, params, x, state, record_tape=False)[:2]


def check_fast_sequence(layer, params, x, state):
    """Assert that the kernel applies, equals the reference scan and leaves its arguments alone; return its result."""
    before = copy.deepcopy((params, x, state))
    result = layer._fast_sequence(params, x, state)
    assert result is not None
    XP.assert_close(result, reference_results(layer, params, x, state), condition=64)
    np.testing.assert_equal((params, x, state), before)
    outputs = [result[0], *(result[1] if isinstance(result[1], tuple) else (result[1],))]
    for k, a in enumerate(outputs):
        assert a.flags.writeable
        assert a.flags.c_contiguous
        assert not any(np.shares_memory(a, b) for b in (x, *params.values(), *outputs[:k]))
    return result


def as_dtype(p, dtype):
    state = tuple(s.astype(dtype) for s in p.state) if isinstance(p.state, tuple) else p.state.astype(dtype)
    return {k: v.astype(dtype) for k, v in p.params.items()}, p.x.astype(dtype), state


@pytest.mark.parametrize("name", CASES)
def test_fast_sequence_equals_reference_scan_for_every_cell(rng, name):
    for layers, steps, n in ((1, 7, 1), (2, 40, 2), (1, 1, 1), (3, 17, 1), (1, 0, 1)):
        layer = CASES[name].make(3, 5, layers)
        p = random_inputs(rng, layer, steps, N=n)
        check_fast_sequence(layer, p.params, p.x, p.state)


@pytest.mark.parametrize("name", MAIN_CASES)
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"batch_first": True}], ids=["plain", "no bias", "batch first"]
)
def test_fast_sequence_equals_reference_scan_for_every_option(rng, name, options):
    layer = CASES[name].make(3, 19, 2, **options)
    p = random_inputs(rng, layer, 6, N=2)
    x = p.x.swapaxes(0, 1) if options.get("batch_first") else p.x
    ids = rng.integers(0, 3, x.shape[:2])
    check_fast_sequence(layer, p.params, np.ascontiguousarray(x), p.state)
    check_fast_sequence(layer, p.params, x, p.state)
    check_fast_sequence(layer, p.params, x[::-1], p.state)
    check_fast_sequence(layer, p.params, ids, p.state)
    check_fast_sequence(layer, p.params, ids.astype(np.uint8)[::-1], None)
    check_fast_sequence(layer, {k: np.asfortranarray(v) for k, v in p.params.items()}, x, p.state)


@each_layer
@pytest.mark.parametrize("sizes", [(1, 1), (1, 16), (3, 15), (27, 17), (33, 8), (2, 33)])
def test_fast_sequence_equals_reference_scan_for_every_size(rng, make, sizes, dtype):
    layer = make(*sizes)
    p = random_inputs(rng, layer, 35, N=1, scale=0.15)  # with larger weights, 33 units are chaotic
    check_fast_sequence(layer, *as_dtype(p, dtype))


@each_layer
def test_chunks_give_the_bits_of_the_whole_sequence(rng, make):
    layer = make(3, 8)
    p = random_inputs(rng, layer, 70, N=1)
    y, final = layer(p.params, p.x, p.state)
    for cut in (1, 15, 16, 17, 33, 69):
        first, carried = layer(p.params, p.x[:cut], p.state)
        rest, carried = layer(p.params, p.x[cut:], carried)
        np.testing.assert_array_equal(np.concatenate((first, rest)), y)
        np.testing.assert_equal(carried, final)


def test_fast_sequence_does_not_apply_to_a_default_learned_state(rng):
    layer = xprnn.LSTM(3, 5, learned_state=True)
    p = random_inputs(rng, layer, 4, N=2)
    check_fast_sequence(layer, p.params, p.x, p.state)
    assert layer._fast_sequence(p.params, p.x, None) is None
    XP.assert_close(layer(p.params, p.x), reference_results(layer, p.params, p.x, None), condition=64)
    with pytest.raises(xprnn.InputError, match="initial_h"):
        layer(p.params | {"initial_h": np.ones((1, 4))}, p.x, p.state)


@each_layer
def test_fast_sequence_does_not_apply_to_flags_many_rows_and_large_weights(rng, make):
    layer, large = make(3, 8), make(3, 200)
    p, many, big = (random_inputs(rng, one, 4, N=n) for one, n in ((layer, 2), (layer, 1000), (large, 1)))
    assert layer._fast_sequence(p.params, p.x, p.state) is not None
    assert layer._fast_sequence(many.params, many.x, many.state) is None
    assert large._fast_sequence(big.params, big.x, big.state) is None
    assert make(3, 8, bidirectional=True)._fast_sequence(p.params, p.x, p.state) is None
    for context in (allow_jit(False), reference_only()):
        with context:
            assert layer._fast_sequence(p.params, p.x, p.state) is None
    padded, _ = layer(p.params, p.x, p.state, lengths=[1, 2])
    assert not padded[2:].any()
    assert step_plan.MAX_SEQUENCE_KERNEL_WORK > 2 * 4 * 8 * (3 + 8)


@each_layer
def test_wrong_arguments_raise_the_error_of_the_validated_path(rng, make):
    layer = make(3, 8)
    p = random_inputs(rng, layer, 4, N=2)
    is_tuple = isinstance(p.state, tuple)

    def map_state(f):
        return tuple(f(s) for s in p.state) if is_tuple else f(p.state)

    wrong = {
        "missing parameter": ({k: v for k, v in p.params.items() if k != "bias_hh_l0"}, p.x, p.state),
        "weight too small": (p.params | {"weight_hh_l0": p.params["weight_hh_l0"][:, :-1]}, p.x, p.state),
        "bias too long": (p.params | {"bias_ih_l0": np.ones(99)}, p.x, p.state),
        "bias of another dtype": (p.params | {"bias_ih_l0": p.params["bias_ih_l0"].astype("float32")}, p.x, p.state),
        "too few features": (p.params, p.x[:, :, :2], p.state),
        "x with two axes": (p.params, p.x[0], p.state),
        "x with four axes": (p.params, p.x[None], p.state),
        "class number too large": (p.params, np.full((4, 2), 3), p.state),
        "negative class number": (p.params, np.full((4, 2), -1), p.state),
        "state of one row": (p.params, p.x, map_state(lambda s: s[:, :1])),
        "state of two layers": (p.params, p.x, map_state(lambda s: np.repeat(s, 2, axis=0))),
        "state too small": (p.params, p.x, map_state(lambda s: s[:, :, :-1])),
    }
    for name, arguments in wrong.items():
        with pytest.raises(xprnn.InputError) as validated:
            stack.forward(layer, *arguments, record_tape=False)
        with pytest.raises(xprnn.InputError) as raised:
            layer(*arguments)
        assert str(raised.value) == str(validated.value), name
