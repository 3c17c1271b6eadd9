"""Quick walks: a sequence without a tape, compiled, is the scan's, and what does not fit goes the scan's way."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from engine.test_call_cache_step import XP, each_layer
from support.layer_cases import CASES, MAIN_CASES, random_inputs

import xprnn
from xprnn.engine import stack
from xprnn.kernels import step_plan
from xprnn.kernels.config import allow_jit, reference_only

pytestmark = pytest.mark.needs("numba")


def scanned(layer, params, x, state):
    """What the checked way says, by the generic scan."""
    with reference_only():
        return stack.forward(layer, params, x, state, record_tape=False)[:2]


def agree(layer, params, x, state):
    before = copy.deepcopy((params, x, state))
    found = layer._fast_sequence(params, x, state)
    assert found is not None
    XP.assert_close(found, scanned(layer, params, x, state), condition=64)
    np.testing.assert_equal((params, x, state), before)
    fresh = [found[0], *(found[1] if isinstance(found[1], tuple) else (found[1],))]
    for k, a in enumerate(fresh):
        assert a.flags.writeable
        assert a.flags.c_contiguous
        assert not any(np.shares_memory(a, b) for b in (x, *params.values(), *fresh[:k]))
    return found


def as_dtype(p, dtype):
    state = tuple(s.astype(dtype) for s in p.state) if isinstance(p.state, tuple) else p.state.astype(dtype)
    return {k: v.astype(dtype) for k, v in p.params.items()}, p.x.astype(dtype), state


@pytest.mark.parametrize("name", CASES)
def test_every_cell_is_the_scan(rng, name):
    for layers, steps, n in ((1, 7, 1), (2, 40, 2), (1, 1, 1), (3, 17, 1), (1, 0, 1)):
        layer = CASES[name].make(3, 5, layers)
        p = random_inputs(rng, layer, steps, N=n)
        agree(layer, p.params, p.x, p.state)


@pytest.mark.parametrize("name", MAIN_CASES)
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"batch_first": True}], ids=["plain", "no bias", "batch first"]
)
def test_every_option_is_the_scan(rng, name, options):
    layer = CASES[name].make(3, 19, 2, **options)
    p = random_inputs(rng, layer, 6, N=2)
    x = p.x.swapaxes(0, 1) if options.get("batch_first") else p.x
    ids = rng.integers(0, 3, x.shape[:2])
    agree(layer, p.params, np.ascontiguousarray(x), p.state)
    agree(layer, p.params, x, p.state)
    agree(layer, p.params, x[::-1], p.state)
    agree(layer, p.params, ids, p.state)
    agree(layer, p.params, ids.astype(np.uint8)[::-1], None)
    agree(layer, {k: np.asfortranarray(v) for k, v in p.params.items()}, x, p.state)


@each_layer
@pytest.mark.parametrize("sizes", [(1, 1), (1, 16), (3, 15), (27, 17), (33, 8), (2, 33)])
def test_every_size_is_the_scan(rng, make, sizes, dtype):
    layer = make(*sizes)
    agree(
        layer, *as_dtype(random_inputs(rng, layer, 35, N=1, scale=0.15), dtype)
    )  # larger weights make chaos of 33 units


@each_layer
def test_chunks_of_any_length_are_the_whole_bit_for_bit(rng, make):
    layer = make(3, 8)
    p = random_inputs(rng, layer, 70, N=1)
    y, final = layer(p.params, p.x, p.state)
    for cut in (1, 15, 16, 17, 33, 69):
        first, carried = layer(p.params, p.x[:cut], p.state)
        rest, carried = layer(p.params, p.x[cut:], carried)
        np.testing.assert_array_equal(np.concatenate((first, rest)), y)
        np.testing.assert_equal(carried, final)


def test_a_learned_state_is_the_scans(rng):
    layer = xprnn.LSTM(3, 5, learned_state=True)
    p = random_inputs(rng, layer, 4, N=2)
    agree(layer, p.params, p.x, p.state)
    assert layer._fast_sequence(p.params, p.x, None) is None
    XP.assert_close(layer(p.params, p.x), scanned(layer, p.params, p.x, None), condition=64)
    with pytest.raises(xprnn.InputError, match="initial_h"):
        layer(p.params | {"initial_h": np.ones((1, 4))}, p.x, p.state)


@each_layer
def test_who_does_not_walk(rng, make):
    """Flags, many rows, large weights, other ways chosen."""
    layer, large = make(3, 8), make(3, 200)
    p, many, big = (random_inputs(rng, owner, 4, N=n) for owner, n in ((layer, 2), (layer, 1000), (large, 1)))
    assert layer._fast_sequence(p.params, p.x, p.state) is not None
    assert layer._fast_sequence(many.params, many.x, many.state) is None
    assert large._fast_sequence(big.params, big.x, big.state) is None
    assert make(3, 8, bidirectional=True)._fast_sequence(p.params, p.x, p.state) is None
    for context in (allow_jit(False), reference_only()):
        with context:
            assert layer._fast_sequence(p.params, p.x, p.state) is None
    short, _ = layer(p.params, p.x, p.state, lengths=[1, 2])
    assert not short[2:].any()
    assert step_plan.MAX_SEQUENCE_KERNEL_WORK > 2 * 4 * 8 * (3 + 8)


@each_layer
def test_what_does_not_fit_gets_the_checks_own_words(rng, make):
    layer = make(3, 8)
    p = random_inputs(rng, layer, 4, N=2)
    pair = isinstance(p.state, tuple)

    def each(f):
        return tuple(f(s) for s in p.state) if pair else f(p.state)

    wrong = {
        "a name less": ({k: v for k, v in p.params.items() if k != "bias_hh_l0"}, p.x, p.state),
        "a smaller weight": (p.params | {"weight_hh_l0": p.params["weight_hh_l0"][:, :-1]}, p.x, p.state),
        "a longer bias": (p.params | {"bias_ih_l0": np.ones(99)}, p.x, p.state),
        "another dtype": (p.params | {"bias_ih_l0": p.params["bias_ih_l0"].astype("float32")}, p.x, p.state),
        "features": (p.params, p.x[:, :, :2], p.state),
        "x of two axes": (p.params, p.x[0], p.state),
        "x of four axes": (p.params, p.x[None], p.state),
        "a class too many": (p.params, np.full((4, 2), 3), p.state),
        "a negative class": (p.params, np.full((4, 2), -1), p.state),
        "a state of one row": (p.params, p.x, each(lambda s: s[:, :1])),
        "a state of two layers": (p.params, p.x, each(lambda s: np.repeat(s, 2, axis=0))),
        "a smaller state": (p.params, p.x, each(lambda s: s[:, :, :-1])),
    }
    for name, arguments in wrong.items():
        with pytest.raises(xprnn.InputError) as checked:
            stack.forward(layer, *arguments, record_tape=False)
        with pytest.raises(xprnn.InputError) as found:
            layer(*arguments)
        assert str(found.value) == str(checked.value), name
