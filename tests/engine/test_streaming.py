"""Streaming: step by step, in chunks of any size, and as a whole, a sequence gives the same results."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
from support.layer_cases import CASES, MAIN_CASES, inputs_on, random_cotangents, random_inputs, to_backend

import xprnn
from xprnn.kernels.config import reference_only

every_case = pytest.mark.parametrize("name", CASES)
main_cases = pytest.mark.parametrize("name", MAIN_CASES)
T = 5


def tree_to_numpy(xp, tree):
    return tuple(tree_to_numpy(xp, a) for a in tree) if isinstance(tree, tuple) else xp.to_numpy(tree)


@every_case
def test_steps_equal_the_whole_sequence(xp, dtype, rng, name):
    layer = CASES[name].make(2, 3, 2)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T), dtype)
    y, final = layer(params, x, state)
    for t in range(T):
        y_t, state = layer.step(params, x[t, ...], state)
        xp.assert_close(y_t, xp.to_numpy(y[t, ...]), condition=8)
        xp.assert_like(y_t, x)
    xp.assert_close(state, tree_to_numpy(xp, final), condition=16)


@main_cases
def test_step_and_sequence_have_the_same_default_state(xp, rng, name):
    """state=None stands for zero, or for the learned state."""
    for learned in (False, True):
        layer = CASES[name].make(2, 3, 2, learned_state=learned)
        params, x, _, _ = inputs_on(xp, random_inputs(rng, layer, 1))
        y, final = layer(params, x)
        y_t, state = layer.step(params, x[0, ...])
        xp.assert_close((y_t, state), (xp.to_numpy(y[0, ...]), tree_to_numpy(xp, final)), condition=8)


@main_cases
def test_chunks_equal_the_whole_sequence(xp, rng, name):
    """All 16 partitions of 5 steps, with the mask cut at the same steps."""
    layer = CASES[name].make(2, 3, 2)
    p = random_inputs(rng, layer, T, N=3, flags="m")
    params, x, state, flags = inputs_on(xp, p)
    y, final, _ = layer.forward(params, x, state, **flags)
    for cuts in itertools.product([False, True], repeat=T - 1):
        edges = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), T]
        carried, chunks = state, []
        for a, b in itertools.pairwise(edges):
            chunk, carried, _ = layer.forward(params, x[a:b, ...], carried, mask=flags["mask"][a:b, ...])
            chunks.append(xp.to_numpy(chunk))
        xp.assert_close(y, np.concatenate(chunks), condition=8)
        xp.assert_close(final, tree_to_numpy(xp, carried), condition=8)


def test_chunks_of_ragged_rows_equal_the_whole_sequence(xp, rng):
    layer = xprnn.LSTM(2, 3, 2)
    p = random_inputs(rng, layer, T, N=4)
    lengths = np.array([0, 2, 5, 3])
    params, x, state, _ = inputs_on(xp, p)
    y, final = layer(params, x, state, lengths=lengths)
    first, carried = layer(params, x[:2, ...], state, lengths=np.clip(lengths, 0, 2))
    rest, carried = layer(params, x[2:, ...], carried, lengths=np.clip(lengths - 2, 0, 3))
    xp.assert_close(y, np.concatenate((xp.to_numpy(first), xp.to_numpy(rest))), condition=8)
    xp.assert_close(final, tree_to_numpy(xp, carried), condition=8)


@main_cases
def test_gradients_of_chunks_sum_to_those_of_the_whole_sequence(xp, rng, name):
    """dstate of the second chunk is the cotangent of the final state of the first."""
    layer = CASES[name].make(2, 3, 2)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T))
    y, final, tape = layer.forward(params, x, state)
    dy, dfinal = to_backend(xp, random_cotangents(rng, y)), to_backend(xp, random_cotangents(rng, final))
    whole = layer.backward(tape, dy, dfinal)
    _, carried, first_tape = layer.forward(params, x[:2, ...], state)
    _, _, second_tape = layer.forward(params, x[2:, ...], carried)
    second = layer.backward(second_tape, dy[2:, ...], dfinal)
    first = layer.backward(first_tape, dy[:2, ...], second.dstate)
    dx = np.concatenate((xp.to_numpy(first.dx), xp.to_numpy(second.dx)))
    xp.assert_close((whole.dx, whole.dstate), (dx, tree_to_numpy(xp, first.dstate)), condition=64)
    total = {k: xp.to_numpy(first.dparams[k] + second.dparams[k]) for k in params}
    xp.assert_close(whole.dparams, total, condition=64)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("context", [nullcontext, reference_only], ids=["in place", "reference"])
def test_chunks_of_one_hot_input_give_the_same_bits(rng, name, context):
    """One-hot input needs no matrix product over all steps, whose rounding may depend on its shape."""
    layer = CASES[name].make(5, 8)
    p = random_inputs(rng, layer, 7, N=3)
    ids = rng.integers(0, 5, size=(7, 3))
    with context():
        y, final = layer(p.params, ids, p.state)
        for cut in range(8):
            first, carried = layer(p.params, ids[:cut], p.state)
            rest, carried = layer(p.params, ids[cut:], carried)
            np.testing.assert_array_equal(np.concatenate((first, rest)), y)
            for actual, expected in zip(state_arrays(carried), state_arrays(final), strict=True):
                np.testing.assert_array_equal(actual, expected)


def state_arrays(state):
    return state if isinstance(state, tuple) else (state,)


def test_step_accepts_class_numbers(xp, rng):
    layer = xprnn.GRU(5, 3, 2)
    p = random_inputs(rng, layer, 1)
    params, _, state, _ = inputs_on(xp, p)
    ids = np.array([4, 0, 2])
    actual, expected = layer.step(params, xp.asarray(ids), state), layer.step(params, xp.asarray(np.eye(5)[ids]), state)
    xp.assert_close(actual, tree_to_numpy(xp, expected), condition=8)


def test_steps_of_layers_of_different_sizes_equal_the_sequence(xp, rng):
    layer = xprnn.LSTM(2, (4, 3), 2)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T))
    y, final = layer(params, x, state)
    for t in range(T):
        last, state = layer.step(params, x[t, ...], state)
    xp.assert_close((last, state), (xp.to_numpy(y[-1, ...]), tree_to_numpy(xp, final)), condition=16)


def test_step_of_a_batch_first_layer(xp, rng):
    """One step has no time axis: x is (N, D) with and without batch_first."""
    layer = xprnn.GRU(2, 3, batch_first=True)
    p = random_inputs(rng, layer, T, N=T)
    params, x, state, _ = inputs_on(xp, p)  # T = N, so the inputs fit both layouts
    y, _ = layer(params, x, state)
    y_0, _ = layer.step(params, x[:, 0, :], state)
    xp.assert_close(y_0, xp.to_numpy(y[:, 0, :]), condition=8)


def test_step_and_call_do_not_change_their_arguments(rng):
    layer = xprnn.LSTM(2, 3)
    p = random_inputs(rng, layer, 1)
    before = [a.copy() for a in p.state]
    layer.step(p.params, p.x[0], p.state)
    layer(p.params, p.x, p.state)
    np.testing.assert_array_equal(p.state, before)


@pytest.mark.parametrize("rows", [1, 2, 4])
@main_cases
def test_state_of_another_batch_size_raises(xp, rng, name, rows):
    """A state of one row must not be broadcast over the batch; torch raises too."""
    layer = CASES[name].make(2, 3, 2)
    params, x, _, _ = inputs_on(xp, random_inputs(rng, layer, T, N=3))
    _, _, state, _ = inputs_on(xp, random_inputs(rng, layer, T, N=rows))
    for call in (layer, layer.forward):
        with pytest.raises(xprnn.InputError, match=rf"state h .* must have shape \(2, 3, .\), found \(2, {rows}, .\)"):
            call(params, x, state)
    with pytest.raises(xprnn.InputError, match=r"state h .* must have shape"):
        layer.step(params, x[0, ...], state)


def test_step_of_a_bidirectional_layer_raises(xp, rng):
    layer = xprnn.GRU(2, 3, bidirectional=True)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, 1))
    with pytest.raises(xprnn.InputError, match=r"GRU\.step: a bidirectional layer needs the whole sequence"):
        layer.step(params, x[0, ...], state)
