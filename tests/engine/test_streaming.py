"""Streams: a sequence step by step, in chunks of any size, and whole, is the same sequence."""

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


def host(xp, tree):
    return tuple(host(xp, a) for a in tree) if isinstance(tree, tuple) else xp.to_numpy(tree)


@every_case
def test_step_by_step_is_the_whole_sequence(xp, dtype, rng, name):
    layer = CASES[name].make(2, 3, 2)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T), dtype)
    y, final = layer(params, x, state)
    for t in range(T):
        y_t, state = layer.step(params, x[t, ...], state)
        xp.assert_close(y_t, xp.to_numpy(y[t, ...]), condition=8)
        xp.assert_like(y_t, x)
    xp.assert_close(state, host(xp, final), condition=16)


@main_cases
def test_a_stream_starts_where_a_sequence_starts(xp, rng, name):
    """state=None is zero, or the learned state, for both."""
    for learned in (False, True):
        layer = CASES[name].make(2, 3, 2, learned_state=learned)
        params, x, _, _ = inputs_on(xp, random_inputs(rng, layer, 1))
        y, final = layer(params, x)
        y_t, state = layer.step(params, x[0, ...])
        xp.assert_close((y_t, state), (xp.to_numpy(y[0, ...]), host(xp, final)), condition=8)


@main_cases
def test_any_split_into_chunks_is_the_whole(xp, rng, name):
    """All 16 ways to cut 5 steps; flags are cut along, and lengths become what is left of each row."""
    layer = CASES[name].make(2, 3, 2)
    p = random_inputs(rng, layer, T, N=3, flags="m")
    params, x, state, flags = inputs_on(xp, p)
    y, final, _ = layer.forward(params, x, state, **flags)
    for cuts in itertools.product([False, True], repeat=T - 1):
        edges = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), T]
        carried, parts = state, []
        for a, b in itertools.pairwise(edges):
            part, carried, _ = layer.forward(params, x[a:b, ...], carried, mask=flags["mask"][a:b, ...])
            parts.append(xp.to_numpy(part))
        xp.assert_close(y, np.concatenate(parts), condition=8)
        xp.assert_close(final, host(xp, carried), condition=8)


def test_ragged_rows_in_chunks(xp, rng):
    layer = xprnn.LSTM(2, 3, 2)
    p = random_inputs(rng, layer, T, N=4)
    lengths = np.array([0, 2, 5, 3])
    params, x, state, _ = inputs_on(xp, p)
    y, final = layer(params, x, state, lengths=lengths)
    first, carried = layer(params, x[:2, ...], state, lengths=np.clip(lengths, 0, 2))
    rest, carried = layer(params, x[2:, ...], carried, lengths=np.clip(lengths - 2, 0, 3))
    xp.assert_close(y, np.concatenate((xp.to_numpy(first), xp.to_numpy(rest))), condition=8)
    xp.assert_close(final, host(xp, carried), condition=8)


@main_cases
def test_gradients_of_chunks_join_through_the_state(xp, rng, name):
    """Backward through the second chunk, its dstate into the first: the gradients of the whole sequence."""
    layer = CASES[name].make(2, 3, 2)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T))
    y, final, tape = layer.forward(params, x, state)
    dy, dfinal = to_backend(xp, random_cotangents(rng, y)), to_backend(xp, random_cotangents(rng, final))
    whole = layer.backward(tape, dy, dfinal)
    _, carried, one = layer.forward(params, x[:2, ...], state)
    _, _, two = layer.forward(params, x[2:, ...], carried)
    late = layer.backward(two, dy[2:, ...], dfinal)
    early = layer.backward(one, dy[:2, ...], late.dstate)
    dx = np.concatenate((xp.to_numpy(early.dx), xp.to_numpy(late.dx)))
    xp.assert_close((whole.dx, whole.dstate), (dx, host(xp, early.dstate)), condition=64)
    total = {k: xp.to_numpy(early.dparams[k] + late.dparams[k]) for k in params}
    xp.assert_close(whole.dparams, total, condition=64)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("context", [nullcontext, reference_only], ids=["in place", "generic"])
def test_the_recurrence_itself_is_the_same_to_the_last_bit(rng, name, context):
    """One-hot input is a look-up: without the hoisted product, whose shape may move a bit, chunks are exactly equal."""
    layer = CASES[name].make(5, 8)
    p = random_inputs(rng, layer, 7, N=3)
    ids = rng.integers(0, 5, size=(7, 3))
    with context():
        y, final = layer(p.params, ids, p.state)
        for cut in range(8):
            first, carried = layer(p.params, ids[:cut], p.state)
            rest, carried = layer(p.params, ids[cut:], carried)
            np.testing.assert_array_equal(np.concatenate((first, rest)), y)
            for have, want in zip(parts(carried), parts(final), strict=True):
                np.testing.assert_array_equal(have, want)


def parts(state):
    return state if isinstance(state, tuple) else (state,)


def test_one_hot_numbers_stream_too(xp, rng):
    layer = xprnn.GRU(5, 3, 2)
    p = random_inputs(rng, layer, 1)
    params, _, state, _ = inputs_on(xp, p)
    ids = np.array([4, 0, 2])
    one, want = layer.step(params, xp.asarray(ids), state), layer.step(params, xp.asarray(np.eye(5)[ids]), state)
    xp.assert_close(one, host(xp, want), condition=8)


def test_layers_of_different_sizes_stream(xp, rng):
    layer = xprnn.LSTM(2, (4, 3), 2)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, T))
    y, final = layer(params, x, state)
    for t in range(T):
        last, state = layer.step(params, x[t, ...], state)
    xp.assert_close((last, state), (xp.to_numpy(y[-1, ...]), host(xp, final)), condition=16)


def test_a_stream_of_a_batch_first_layer(xp, rng):
    """One step has no time axis: x is (N, D) whichever way sequences are laid out."""
    layer = xprnn.GRU(2, 3, batch_first=True)
    p = random_inputs(rng, layer, T, N=T)
    params, x, state, _ = inputs_on(xp, p)  # as many rows as steps: either way round
    y, _ = layer(params, x, state)
    y_0, _ = layer.step(params, x[:, 0, :], state)
    xp.assert_close(y_0, xp.to_numpy(y[:, 0, :]), condition=8)


def test_steps_leave_their_arguments_alone(rng):
    layer = xprnn.LSTM(2, 3)
    p = random_inputs(rng, layer, 1)
    before = [a.copy() for a in p.state]
    layer.step(p.params, p.x[0], p.state)
    layer(p.params, p.x, p.state)
    np.testing.assert_array_equal(p.state, before)


@pytest.mark.parametrize("rows", [1, 2, 4])
@main_cases
def test_a_state_of_another_batch_size_is_an_error(xp, rng, name, rows):
    """A state of one row would broadcast over the batch in silence (torch refuses it too)."""
    layer = CASES[name].make(2, 3, 2)
    params, x, _, _ = inputs_on(xp, random_inputs(rng, layer, T, N=3))
    _, _, state, _ = inputs_on(xp, random_inputs(rng, layer, T, N=rows))
    for call in (layer, layer.forward):
        with pytest.raises(xprnn.InputError, match=rf"state h .* must have shape \(2, 3, .\), found \(2, {rows}, .\)"):
            call(params, x, state)
    with pytest.raises(xprnn.InputError, match=r"state h .* must have shape"):
        layer.step(params, x[0, ...], state)


def test_a_bidirectional_stream_is_an_error(xp, rng):
    layer = xprnn.GRU(2, 3, bidirectional=True)
    params, x, state, _ = inputs_on(xp, random_inputs(rng, layer, 1))
    with pytest.raises(xprnn.InputError, match=r"GRU\.step: a bidirectional layer needs the whole sequence"):
        layer.step(params, x[0, ...], state)
