"""Threads that share a step compute what one thread computes."""

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
    "gru, both ways": build_model("gru", V, 8, bidirectional=True),
    "two recurrent parts": xprnn.Sequential(a=xprnn.GRU(V, 8), b=xprnn.LSTM(8, 4), head=xprnn.Linear(4, V)),
}


def window(like, seed=1):
    rng = np.random.default_rng(seed)
    return [from_numpy(rng.integers(0, V, (T, N)), like) for _ in range(2)]


def leaves(tree):
    if isinstance(tree, dict):
        return [a for k in tree for a in leaves(tree[k])]
    return [a for t in tree for a in leaves(t)] if isinstance(tree, tuple) else [to_numpy(tree)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("threads", [2, 3, 9])
def test_shares_add_up_to_the_whole(xp, name, threads):
    model, like = MODELS[name], xp.asarray(np.zeros(1))
    params = model.init(np.random.default_rng(0), like)
    x, targets = window(like)
    with DataParallel(1) as one, DataParallel(threads) as many:
        first = one.gradients(model, params, x, targets, None)
        for state in (None, first[2]):
            wanted, found = (leaves(crew.gradients(model, params, x, targets, state)) for crew in (one, many))
            for a, b in zip(found, wanted, strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_the_same_number_of_threads_gives_the_same_bits():
    model = MODELS["lstm, 2 layers"]
    params = model.init(np.random.default_rng(0), np.zeros(1, np.float32))
    with DataParallel(3) as crew:
        first, *others = (leaves(crew.gradients(model, params, *window(np.zeros(1)), None)) for _ in range(4))
    assert all(a.tobytes() == b.tobytes() for other in others for a, b in zip(first, other, strict=True))


def test_what_a_thread_raises_is_raised():
    model = MODELS["elman"]
    params = model.init(np.random.default_rng(0), np.zeros(1))
    x, targets = window(np.zeros(1))
    targets[0, -1] = V  # in the last share
    with DataParallel(2) as crew, pytest.raises(InputError, match="targets"):
        crew.gradients(model, params, x, targets, None)


def test_training_with_threads_learns_the_same():
    ids = np.random.default_rng(2).integers(0, V, (40, N))
    start = init_train_state(MODELS["elman"], np.random.default_rng(0), np.zeros(1))
    one, two = (
        list(train(MODELS["elman"], start, BatchedText(ids[:-1], ids[1:], T), TrainConfig(steps=12), threads))[-1]
        for threads in (1, 2)
    )
    for a, b in zip(
        leaves((one.params, one.recurrent_state, one.loss)),
        leaves((two.params, two.recurrent_state, two.loss)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_loss_that_overflows_in_a_thread_is_named_with_its_step():
    ids = np.zeros((20, N), np.int64)
    start = init_train_state(MODELS["elman"], np.random.default_rng(0), np.zeros(1, np.float32))
    broken = {k: a * np.float32(3e38) for k, a in start.params.items()}
    with pytest.raises(InputError, match="the loss became"):
        list(
            train(
                MODELS["elman"],
                start._replace(params=broken),
                BatchedText(ids[:-1], ids[1:], T),
                TrainConfig(steps=2),
                2,
            )
        )


def test_keep_memory_says_whether_it_could(monkeypatch):
    assert keep_freed_memory() in (True, False)
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert keep_freed_memory() is False
