"""Text generation with a causal model, and infilling of hidden characters with a bidirectional model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Array, InputError, Params, from_numpy, to_numpy
from xprnn.charlm.corpus import TokenIds, Vocabulary
from xprnn.layers.context_shift import is_noncausal


def generate(
    model: Any,
    params: Params,
    vocabulary: Vocabulary,
    prompt: str = "",
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    rng: np.random.Generator | None = None,
) -> Iterator[str]:
    """Yield the characters that follow `prompt`, one after another, without end.

    Sampling runs on the host in float64, so a seed gives the same text on every array library.

    Args:
        model: maps integers (T, N) to logits (T, N, V), with a method `step` for one time step.
        params: parameters of the model, on any device.
        vocabulary: the V characters.
        prompt: text to continue; an empty prompt stands for a newline.
        temperature: >= 0; logits are divided by it. 0 takes the most likely character, 1 samples from the model's
            distribution.
        top_k: sample among the k most likely characters only; None for all.
        rng: generator of the samples; None for a generator with seed 0.

    Raises:
        InputError: temperature or top_k is out of range, the prompt has unknown characters, or the model is
            bidirectional.
    """
    if is_noncausal(model):
        raise InputError(
            "the model is bidirectional: it predicts a character from the text on both sides, but generation"
            " has only the text before it; train a model without --bidirectional"
        )
    if not 0 <= temperature < float("inf"):
        raise InputError(f"expected a temperature of 0 or more, found {temperature}")
    if top_k is not None and top_k < 1:
        raise InputError(f"expected a top_k of at least 1, found {top_k}")
    rng = rng or np.random.default_rng(0)
    like = next(iter(params.values()))
    default_prompt = "\n" if "\n" in vocabulary.characters else vocabulary.characters[0]
    ids = vocabulary.encode(prompt or default_prompt)
    return _generate_characters(model, params, vocabulary, from_numpy(ids[:, None], like=like), temperature, top_k, rng)


def _generate_characters(
    model: Any,
    params: Params,
    vocabulary: Vocabulary,
    prompt: Array,
    temperature: float,
    top_k: int | None,
    rng: np.random.Generator,
) -> Iterator[str]:
    like = next(iter(params.values()))
    logits, state = model(params, prompt)
    logits = logits[-1, ...]
    if logits.shape[-1] != len(vocabulary):
        raise InputError(f"the model has {logits.shape[-1]} outputs for {len(vocabulary)} characters")
    while True:
        token = sample_token(to_numpy(logits)[0], temperature, top_k, rng)
        yield vocabulary.characters[token]
        logits, state = model.step(params, from_numpy(np.array([token]), like=like), state)


def sample_token(logits: Any, temperature: float, top_k: int | None, rng: np.random.Generator) -> int:
    """Return one index sampled from softmax(logits / temperature).

    Args:
        logits: (V,) scores.
        temperature: >= 0; 0 returns the index of the largest logit.
        top_k: sample among the k largest logits only; None for all.
        rng: generator of the sample.

    Raises:
        InputError: a logit is not finite.

    >>> sample_token(np.array([0.0, 3.0, 1.0]), 0.0, None, np.random.default_rng(0))
    1
    """
    logits = np.asarray(logits, dtype=np.float64)
    if not np.isfinite(logits).all():
        raise InputError("the model's logits are not finite; its parameters are damaged or diverged")
    if temperature == 0 or top_k == 1:
        return int(np.argmax(logits))
    with np.errstate(over="ignore"):  # a tiny temperature overflows to -inf, whose exponential 0 is right
        weights = np.exp((logits - logits.max()) / temperature)
    if top_k is not None and top_k < len(weights):
        weights[np.argsort(-logits, kind="stable")[top_k:]] = 0
    cumulative = np.cumsum(weights)
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def generate_text(
    model: Any, params: Params, vocabulary: Vocabulary, prompt: str = "", length: int = 300, **options: Any
) -> str:
    """Return `length` generated characters that follow `prompt`; `options` are keyword arguments of `generate`."""
    return "".join(islice(generate(model, params, vocabulary, prompt, **options), length))


def infill(model: Any, params: Params, ids: TokenIds, blank: Any, iterations: int = 5) -> TokenIds:
    """Return `ids` with the most likely characters at the blank positions; the integers there are not read.

    The first pass masks the blank positions. Each further pass predicts every blank position again, with the
    characters of the last pass at the other blank positions, until no character changes.

    Args:
        model: from `build_model(..., bidirectional=True)`.
        params: parameters of the model, on any device.
        ids: (T,) integers.
        blank: (T,) boolean, True at the positions to fill in.
        iterations: maximum number of passes.

    Returns:
        (T,) integers.
    """
    like = next(iter(params.values()))
    filled = np.where(blank, 0, ids)
    for iteration in range(iterations):
        mask = {} if iteration else {"mask": from_numpy(~np.asarray(blank)[:, None], like=like)}
        logits, _ = model(params, from_numpy(filled[:, None], like=like), **mask)
        most_likely = np.where(blank, np.argmax(to_numpy(logits)[:, 0, :], axis=-1), ids)
        if iteration and np.array_equal(most_likely, filled):
            break
        filled = most_likely
    return filled
