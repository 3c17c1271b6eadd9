"""The training loop: its arithmetic, its schedule, its end by NaN, and resuming to the last bit; sampling from it."""

from __future__ import annotations

import math
from collections import deque
from itertools import islice

import numpy as np
import pytest

import xprnn
from xprnn.arrays.namespace import InputError
from xprnn.charlm.checkpoint import load_checkpoint, save_checkpoint
from xprnn.charlm.corpus import BatchedText, Vocabulary, batchify
from xprnn.charlm.generate import generate, generate_text, sample_token
from xprnn.charlm.model import build_model
from xprnn.charlm.trainer import TrainConfig, TrainState, bits_per_character, init_train_state, train

TEXT = "the cat sat on the mat; the dog sat on the log. " * 12
VOCABULARY = Vocabulary.from_text(TEXT)
IDS = VOCABULARY.encode(TEXT)
LIKE = np.zeros(1)


def cut(batch: int = 4, window: int = 9) -> BatchedText:
    return BatchedText(*batchify(IDS, batch, window), window)


def small(cell: str = "elman", num_layers: int = 1):
    model = build_model(cell, len(VOCABULARY), 12, num_layers)
    return model, init_train_state(model, np.random.default_rng(3), LIKE)


def same(one: TrainState, two: TrainState) -> None:
    assert one.step == two.step
    assert one.params.keys() == two.params.keys()
    for name in one.params:
        np.testing.assert_array_equal(one.params[name], two.params[name])
    np.testing.assert_array_equal(one.loss, two.loss)
    np.testing.assert_array_equal(np.asarray(one.recurrent_state), np.asarray(two.recurrent_state))


def last(snapshots):
    return deque(snapshots, maxlen=1).pop()


def test_recurrent_weights_begin_orthogonal():
    _, now = small(num_layers=2)
    for name in ("rnn.weight_hh_l0", "rnn.weight_hh_l1"):
        np.testing.assert_allclose(now.params[name] @ now.params[name].T, np.eye(12), atol=1e-12)


def test_steps_are_truncated_backpropagation_with_the_state_carried_and_fresh_each_epoch():
    model, start = small()
    s, schedule = cut(), TrainConfig(steps=40)
    assert s.windows_per_epoch < 40 - 2
    got = list(train(model, start, s, schedule))
    params, moments, state = start.params, start.optimizer_state, None
    for step in range(40):
        x, targets = s.batch(step)
        logits, state, tape = model.forward(params, x, None if step % s.windows_per_epoch == 0 else state)
        _, dlogits = xprnn.cross_entropy(logits, targets)
        gradients = model.backward(tape, dlogits)[2]
        gradients, _ = xprnn.clip_by_global_norm(gradients, 1.0)
        rate = 4e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / 40))
        params, moments = xprnn.adam(rate).update(params, gradients, moments)
        assert got[step].step == step + 1
        for name in params:
            np.testing.assert_allclose(got[step].params[name], params[name], rtol=1e-12, atol=1e-14)
    assert len(got) == 40


def test_a_long_enough_run_knows_the_text_by_heart():
    model, start = small()
    now = last(train(model, start, cut(), TrainConfig(steps=800, learning_rate=0.01)))
    inputs, targets = batchify(IDS, 1, 1)
    # The sentence of 48 characters repeats: only the branches "cat|dog", "mat|log" and the like cost anything.
    assert bits_per_character(model, now.params, inputs, targets) < 0.25
    assert "sat on the " in generate_text(model, now.params, VOCABULARY, "the ", 60, temperature=0)


@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
@pytest.mark.parametrize("stop", [1, 7, 17])
def test_resuming_is_the_same_as_never_having_stopped(tmp_path, cell, stop):
    model, start = small(cell, num_layers=2)
    schedule = TrainConfig(steps=30)
    whole = last(train(model, start, cut(), schedule))
    half = last(islice(train(model, start, cut(), schedule), stop))
    save_checkpoint(tmp_path / "run.safetensors", model, half, {})
    again, restored = load_checkpoint(tmp_path / "run.safetensors", like=LIKE)
    assert again == model
    same(restored, half)
    same(last(train(again, restored, cut(), schedule)), whole)


def test_a_run_kept_before_its_first_step_restores(tmp_path):
    model, start = small()
    save_checkpoint(tmp_path / "run.safetensors", model, start, {})
    _, restored = load_checkpoint(tmp_path / "run.safetensors", like=LIKE)
    schedule = TrainConfig(steps=3)
    same(last(train(model, restored, cut(), schedule)), last(train(model, start, cut(), schedule)))


def test_a_model_file_is_not_a_run(tmp_path):
    model, start = small()
    xprnn.save(tmp_path / "model.safetensors", model, start.params)
    with pytest.raises(InputError, match="expected a run to resume"):
        load_checkpoint(tmp_path / "model.safetensors", like=LIKE)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    schedule = TrainConfig(steps=1000, learning_rate=1.0)
    rates = [schedule.learning_rate_at(TrainState(step, {}, None)) for step in (0, 24, 50, 500, 999)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[1] == pytest.approx(0.5, rel=0.01)
    assert rates[2] == pytest.approx(1.0, rel=0.01)
    assert rates[3] == pytest.approx(0.5)
    assert 0 < rates[4] < 1e-5


def test_minutes_end_a_run_by_the_clock():
    model, start = small()
    now = last(train(model, start, cut(), TrainConfig(minutes=0.005)))
    assert 0.3 <= now.seconds < 3


def test_a_loss_that_is_no_number_names_its_step():
    model, start = small()
    broken = {**start.params, "head.bias": np.full(len(VOCABULARY), np.nan)}
    with pytest.raises(InputError, match=r"the loss became nan at step 1; lower --learning-rate \(it is 0\.5\)"):
        last(train(model, start._replace(params=broken), cut(), TrainConfig(steps=25, learning_rate=0.5)))


def test_held_out_bits_are_exact_across_chunks_and_carry_the_state():
    model, start = small()
    ids = np.tile(IDS, 2)
    inputs, targets = batchify(ids, 1, 1)
    assert len(inputs) > 3 * 256
    logits, _ = model(start.params, inputs)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    want = -np.take_along_axis(log_p, targets[..., None], -1).mean() / math.log(2)
    assert bits_per_character(model, start.params, inputs, targets) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
def test_greedy_sampling_is_the_explicit_loop(cell):
    model, start = small(cell, num_layers=2)
    text = "the d"
    for _ in range(40):
        logits, _, _ = model.forward(start.params, VOCABULARY.encode(text)[:, None])
        text += VOCABULARY.characters[int(np.argmax(logits[-1, 0]))]
    for _ in range(2):
        assert "the d" + generate_text(model, start.params, VOCABULARY, "the d", 40, temperature=0) == text


def test_draws_follow_temperature_and_top_k():
    logits, rng = np.log([0.1, 0.6, 0.3]), np.random.default_rng(0)

    def shares(temperature, top_k):
        drawn = [sample_token(logits, temperature, top_k, rng) for _ in range(4000)]
        return np.bincount(drawn, minlength=3) / 4000

    np.testing.assert_allclose(shares(1.0, None), [0.1, 0.6, 0.3], atol=0.03)
    np.testing.assert_allclose(shares(0.5, None), np.array([1, 36, 9]) / 46, atol=0.03)
    np.testing.assert_allclose(shares(1.0, 2), [0, 2 / 3, 1 / 3], atol=0.03)
    np.testing.assert_array_equal(shares(1e-300, None), [0, 1, 0])
    np.testing.assert_array_equal(shares(0, None), [0, 1, 0])
    np.testing.assert_allclose(shares(1.0, 99), [0.1, 0.6, 0.3], atol=0.03)


def test_the_same_seed_writes_the_same_text_on_every_array_library(xp):
    model, start = small()
    params = {name: xp.asarray(array, "float32") for name, array in start.params.items()}
    host = {name: array.astype(np.float32) for name, array in start.params.items()}
    with xp.allow_host_conversion():
        text = generate_text(model, params, VOCABULARY, "the", 50, rng=np.random.default_rng(5))
    assert text == generate_text(model, host, VOCABULARY, "the", 50, rng=np.random.default_rng(5))
    assert text != generate_text(model, host, VOCABULARY, "the", 50, rng=np.random.default_rng(6))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -1.0}, "temperature of 0 or more, found -1"),
        ({"temperature": math.nan}, "temperature of 0 or more, found nan"),
        ({"top_k": 0}, "top_k of at least 1, found 0"),
        ({"prompt": "thé"}, "character 'é' at position 2"),
    ],
)
def test_bad_sampling_is_refused_before_the_first_character(how, message):
    model, start = small()
    with pytest.raises(InputError, match=message):
        generate(model, start.params, VOCABULARY, **how)


def test_an_unknown_cell_is_refused():
    with pytest.raises(InputError, match="expected a cell of elman, lstm, gru, found 'rwkv'"):
        build_model("rwkv", 5, 4)
