"""Writing text with a trained model, one character at a time, each drawn from what the model expects next; and
restoring characters of a text with a model that reads both sides of them.
"""

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
    """Yield the characters that follow `prompt`, without end.

    The draw is made on the host in float64, so the same generator writes the same text on every array library.

    Args:
        model: maps integers (T, N) to logits (T, N, V), with `step` for one time step.
        params: its parameters, on any device.
        vocabulary: the V characters.
        prompt: text read first; empty: as after a line end.
        temperature: 0 takes the likeliest character; 1 draws as often as the model says; above, more freely.
        top_k: draw among the k likeliest only; None: among all.
        rng: where the draws come from; None: a generator with seed 0.

    Raises:
        InputError: a temperature below 0, a top_k below 1, a prompt with unknown characters, or a bidirectional model.
    """
    if is_noncausal(model):
        raise InputError(
            "generate: a bidirectional model restores characters between known ones; to write, it would have to read"
            " what it has not written yet: train one without --bidirectional"
        )
    if not 0 <= temperature < float("inf"):
        raise InputError(f"generate: expected a temperature of 0 or more, found {temperature}")
    if top_k is not None and top_k < 1:
        raise InputError(f"generate: expected a top_k of at least 1, found {top_k}")
    rng = rng or np.random.default_rng(0)
    like = next(iter(params.values()))
    start = "\n" if "\n" in vocabulary.characters else vocabulary.characters[0]
    ids = vocabulary.encode(prompt or start)
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
        raise InputError(f"generate: the model has {logits.shape[-1]} outputs for {len(vocabulary)} characters")
    while True:
        chosen = sample_token(to_numpy(logits)[0], temperature, top_k, rng)
        yield vocabulary.characters[chosen]
        logits, state = model.step(params, from_numpy(np.array([chosen]), like=like), state)


def sample_token(logits: Any, temperature: float, top_k: int | None, rng: np.random.Generator) -> int:
    """Return one index drawn from softmax(logits / temperature), logits (V,), among the `top_k` largest.

    >>> sample_token(np.array([0.0, 3.0, 1.0]), 0.0, None, np.random.default_rng(0))
    1
    """
    logits = np.asarray(logits, dtype=np.float64)
    if not np.isfinite(logits).all():
        raise InputError("generate: the model's logits are not finite; its parameters are damaged or diverged")
    if temperature == 0 or top_k == 1:
        return int(np.argmax(logits))
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is the right exponent
        weights = np.exp((logits - logits.max()) / temperature)
    if top_k is not None and top_k < len(weights):
        weights[np.argsort(-logits, kind="stable")[top_k:]] = 0
    cumulated = np.cumsum(weights)
    return int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right"))


def generate_text(
    model: Any, params: Params, vocabulary: Vocabulary, prompt: str = "", length: int = 300, **options: Any
) -> str:
    """Return `length` characters that follow `prompt`; other arguments as in `generate`."""
    return "".join(islice(generate(model, params, vocabulary, prompt, **options), length))


def infill(model: Any, params: Params, ids: TokenIds, blank: Any, iterations: int = 5) -> TokenIds:
    """Return `ids` (T,) with the likeliest characters where `blank`; what stood there is never read.

    At first both directions skip the blanks. Then each blank is restored once more with the others as restored so far,
    until nothing changes.

    Args:
        model: from `build(..., bidirectional=True)`.
        params: its parameters, on any device.
        ids: (T,) integers.
        blank: (T,) boolean.
        rounds: how often at most.
    """
    like = next(iter(params.values()))
    restored = np.where(blank, 0, ids)
    for round_ in range(iterations):
        skip = {} if round_ else {"mask": from_numpy(~np.asarray(blank)[:, None], like=like)}
        logits, _ = model(params, from_numpy(restored[:, None], like=like), **skip)
        likeliest = np.where(blank, np.argmax(to_numpy(logits)[:, 0, :], axis=-1), ids)
        if round_ and np.array_equal(likeliest, restored):
            break
        restored = likeliest
    return restored
