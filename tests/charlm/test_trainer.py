"""Training loop against an explicit loop, its learning rate, divergence, resuming, and text generation."""

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


def batched_text(batch: int = 4, window: int = 9) -> BatchedText:
    return BatchedText(*batchify(IDS, batch, window), window)


def small_model(cell: str = "elman", num_layers: int = 1):
    model = build_model(cell, len(VOCABULARY), 12, num_layers)
    return model, init_train_state(model, np.random.default_rng(3), LIKE)


def assert_identical(one: TrainState, two: TrainState) -> None:
    assert one.step == two.step
    assert one.params.keys() == two.params.keys()
    for name in one.params:
        np.testing.assert_array_equal(one.params[name], two.params[name])
    np.testing.assert_array_equal(one.loss, two.loss)
    np.testing.assert_array_equal(np.asarray(one.recurrent_state), np.asarray(two.recurrent_state))


def last(states):
    return deque(states, maxlen=1).pop()


def test_initial_recurrent_weights_are_orthogonal():
    _, state = small_model(num_layers=2)
    for name in ("rnn.weight_hh_l0", "rnn.weight_hh_l1"):
        np.testing.assert_allclose(state.params[name] @ state.params[name].T, np.eye(12), atol=1e-12)


def test_training_equals_explicit_truncated_backpropagation():
    model, start = small_model()
    data, config = batched_text(), TrainConfig(steps=40)
    assert data.windows_per_epoch < 40 - 2
    states = list(train(model, start, data, config))
    params, moments, state = start.params, start.optimizer_state, None
    for step in range(40):
        x, targets = data.batch(step)
        logits, state, tape = model.forward(params, x, None if step % data.windows_per_epoch == 0 else state)
        _, dlogits = xprnn.cross_entropy(logits, targets)
        gradients = model.backward(tape, dlogits)[2]
        gradients, _ = xprnn.clip_by_global_norm(gradients, 1.0)
        rate = 4e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / 40))
        params, moments = xprnn.adam(rate).update(params, gradients, moments)
        assert states[step].step == step + 1
        for name in params:
            np.testing.assert_allclose(states[step].params[name], params[name], rtol=1e-12, atol=1e-14)
    assert len(states) == 40


def test_long_run_memorises_a_repeated_sentence():
    model, start = small_model()
    state = last(train(model, start, batched_text(), TrainConfig(steps=800, learning_rate=0.01)))
    inputs, targets = batchify(IDS, 1, 1)
    # The sentence of 48 characters repeats: only its branches, such as "cat|dog" and "mat|log", are unpredictable.
    assert bits_per_character(model, state.params, inputs, targets) < 0.25
    assert "sat on the " in generate_text(model, state.params, VOCABULARY, "the ", 60, temperature=0)


@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
@pytest.mark.parametrize("stop", [1, 7, 17])
def test_resumed_training_equals_uninterrupted_training(tmp_path, cell, stop):
    model, start = small_model(cell, num_layers=2)
    config = TrainConfig(steps=30)
    expected = last(train(model, start, batched_text(), config))
    stopped = last(islice(train(model, start, batched_text(), config), stop))
    save_checkpoint(tmp_path / "run.safetensors", model, stopped, {})
    loaded_model, loaded = load_checkpoint(tmp_path / "run.safetensors", like=LIKE)
    assert loaded_model == model
    assert_identical(loaded, stopped)
    assert_identical(last(train(loaded_model, loaded, batched_text(), config)), expected)


def test_checkpoint_before_the_first_step_can_be_resumed(tmp_path):
    model, start = small_model()
    save_checkpoint(tmp_path / "run.safetensors", model, start, {})
    _, loaded = load_checkpoint(tmp_path / "run.safetensors", like=LIKE)
    config = TrainConfig(steps=3)
    assert_identical(
        last(train(model, loaded, batched_text(), config)), last(train(model, start, batched_text(), config))
    )


def test_load_checkpoint_of_a_model_file_raises(tmp_path):
    model, start = small_model()
    xprnn.save(tmp_path / "model.safetensors", model, start.params)
    with pytest.raises(InputError, match="expected a training checkpoint"):
        load_checkpoint(tmp_path / "model.safetensors", like=LIKE)


def test_learning_rate_warms_up_and_falls_to_zero():
    config = TrainConfig(steps=1000, learning_rate=1.0)
    rates = [config.learning_rate_at(TrainState(step, {}, None)) for step in (0, 24, 50, 500, 999)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[1] == pytest.approx(0.5, rel=0.01)
    assert rates[2] == pytest.approx(1.0, rel=0.01)
    assert rates[3] == pytest.approx(0.5)
    assert 0 < rates[4] < 1e-5


def test_minutes_limit_the_training_time():
    model, start = small_model()
    state = last(train(model, start, batched_text(), TrainConfig(minutes=0.005)))
    assert 0.3 <= state.seconds < 3


def test_nan_loss_raises_with_its_step():
    model, start = small_model()
    nan_params = {**start.params, "head.bias": np.full(len(VOCABULARY), np.nan)}
    with pytest.raises(InputError, match=r"the loss became nan at step 1; lower --learning-rate \(it is 0\.5\)"):
        last(train(model, start._replace(params=nan_params), batched_text(), TrainConfig(steps=25, learning_rate=0.5)))


def test_bits_per_character_carries_the_state_across_chunks():
    model, start = small_model()
    ids = np.tile(IDS, 2)
    inputs, targets = batchify(ids, 1, 1)
    assert len(inputs) > 3 * 256
    logits, _ = model(start.params, inputs)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    expected = -np.take_along_axis(log_p, targets[..., None], -1).mean() / math.log(2)
    assert bits_per_character(model, start.params, inputs, targets) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
def test_greedy_generation_equals_the_explicit_loop(cell):
    model, start = small_model(cell, num_layers=2)
    text = "the d"
    for _ in range(40):
        logits, _, _ = model.forward(start.params, VOCABULARY.encode(text)[:, None])
        text += VOCABULARY.characters[int(np.argmax(logits[-1, 0]))]
    for _ in range(2):
        assert "the d" + generate_text(model, start.params, VOCABULARY, "the d", 40, temperature=0) == text


def test_sample_frequencies_follow_temperature_and_top_k():
    logits, rng = np.log([0.1, 0.6, 0.3]), np.random.default_rng(0)

    def frequencies(temperature, top_k):
        samples = [sample_token(logits, temperature, top_k, rng) for _ in range(4000)]
        return np.bincount(samples, minlength=3) / 4000

    np.testing.assert_allclose(frequencies(1.0, None), [0.1, 0.6, 0.3], atol=0.03)
    np.testing.assert_allclose(frequencies(0.5, None), np.array([1, 36, 9]) / 46, atol=0.03)
    np.testing.assert_allclose(frequencies(1.0, 2), [0, 2 / 3, 1 / 3], atol=0.03)
    np.testing.assert_array_equal(frequencies(1e-300, None), [0, 1, 0])
    np.testing.assert_array_equal(frequencies(0, None), [0, 1, 0])
    np.testing.assert_allclose(frequencies(1.0, 99), [0.1, 0.6, 0.3], atol=0.03)


def test_seed_gives_equal_text_on_every_array_library(xp):
    model, start = small_model()
    params = {name: xp.asarray(array, "float32") for name, array in start.params.items()}
    host = {name: array.astype(np.float32) for name, array in start.params.items()}
    with xp.allow_host_conversion():
        text = generate_text(model, params, VOCABULARY, "the", 50, rng=np.random.default_rng(5))
    assert text == generate_text(model, host, VOCABULARY, "the", 50, rng=np.random.default_rng(5))
    assert text != generate_text(model, host, VOCABULARY, "the", 50, rng=np.random.default_rng(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature of 0 or more, found -1"),
        ({"temperature": math.nan}, "temperature of 0 or more, found nan"),
        ({"top_k": 0}, "top_k of at least 1, found 0"),
        ({"prompt": "thé"}, "character 'é' at position 2"),
    ],
)
def test_invalid_generate_options_raise_before_the_first_character(options, message):
    model, start = small_model()
    with pytest.raises(InputError, match=message):
        generate(model, start.params, VOCABULARY, **options)


def test_unknown_cell_raises():
    with pytest.raises(InputError, match="expected a cell of elman, lstm, gru, found 'rwkv'"):
        build_model("rwkv", 5, 4)
