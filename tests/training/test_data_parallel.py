"""Gradients, states and training with several threads equal those with one thread."""

from __future__ import annotations

import numpy as np
import pytest

import xprnn
from xprnn.arrays.namespace import InputError, from_numpy, to_numpy
from xprnn.charlm.corpus import BatchedText
from xprnn.charlm.model import build_model
from xprnn.charlm.trainer import TrainConfig, init_train_state, train
from xprnn.training.data_parallel import DataParallel, keep_freed_memory

T, N, V = 7, 5, 6
MODELS = {
    "elman": build_model("elman", V, 8),
    "lstm, 2 layers": build_model("lstm", V, 8, num_layers=2),
    "bidirectional gru": build_model("gru", V, 8, bidirectional=True),
    "two recurrent layers": xprnn.Sequential(a=xprnn.GRU(V, 8), b=xprnn.LSTM(8, 4), head=xprnn.Linear(4, V)),
}


def random_window(like, seed=1):
    rng = np.random.default_rng(seed)
    return [from_numpy(rng.integers(0, V, (T, N)), like) for _ in range(2)]


def leaves(tree):
    if isinstance(tree, dict):
        return [a for k in tree for a in leaves(tree[k])]
    return [a for t in tree for a in leaves(t)] if isinstance(tree, tuple) else [to_numpy(tree)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("threads", [2, 3, 9])
def test_gradients_of_shards_sum_to_those_of_the_batch(xp, name, threads):
    model, like = MODELS[name], xp.asarray(np.zeros(1))
    params = model.init(np.random.default_rng(0), like)
    x, targets = random_window(like)
    with DataParallel(1) as serial, DataParallel(threads) as parallel:
        first = serial.gradients(model, params, x, targets, None)
        for state in (None, first[2]):
            expected, found = (leaves(d.gradients(model, params, x, targets, state)) for d in (serial, parallel))
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_equal_thread_counts_give_equal_bits():
    model = MODELS["lstm, 2 layers"]
    params = model.init(np.random.default_rng(0), np.zeros(1, np.float32))
    with DataParallel(3) as data_parallel:
        first, *others = (
            leaves(data_parallel.gradients(model, params, *random_window(np.zeros(1)), None)) for _ in range(4)
        )
    assert all(a.tobytes() == b.tobytes() for other in others for a, b in zip(first, other, strict=True))


def test_error_in_a_thread_is_raised():
    model = MODELS["elman"]
    params = model.init(np.random.default_rng(0), np.zeros(1))
    x, targets = random_window(np.zeros(1))
    targets[0, -1] = V  # a row of the last shard
    with DataParallel(2) as data_parallel, pytest.raises(InputError, match="targets"):
        data_parallel.gradients(model, params, x, targets, None)


def test_training_with_two_threads_equals_training_with_one():
    ids = np.random.default_rng(2).integers(0, V, (40, N))
    start = init_train_state(MODELS["elman"], np.random.default_rng(0), np.zeros(1))
    serial, parallel = (
        list(train(MODELS["elman"], start, BatchedText(ids[:-1], ids[1:], T), TrainConfig(steps=12), threads))[-1]
        for threads in (1, 2)
    )
    for a, b in zip(
        leaves((serial.params, serial.recurrent_state, serial.loss)),
        leaves((parallel.params, parallel.recurrent_state, parallel.loss)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_overflowing_loss_in_a_thread_is_reported_with_its_step():
    ids = np.zeros((20, N), np.int64)
    start = init_train_state(MODELS["elman"], np.random.default_rng(0), np.zeros(1, np.float32))
    huge = {k: a * np.float32(3e38) for k, a in start.params.items()}
    with pytest.raises(InputError, match="the loss became"):
        list(
            train(
                MODELS["elman"],
                start._replace(params=huge),
                BatchedText(ids[:-1], ids[1:], T),
                TrainConfig(steps=2),
                2,
            )
        )


def test_keep_freed_memory_returns_false_without_mallopt(monkeypatch):
    assert keep_freed_memory() in (True, False)
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert keep_freed_memory() is False
