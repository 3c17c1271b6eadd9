"""Baseline of the character model: an n-gram model with Witten-Bell smoothing."""

from __future__ import annotations

import numpy as np

from xprnn.arrays.namespace import InputError
from xprnn.charlm.corpus import TokenIds


def ngram_bits_per_character(
    train: TokenIds, held_out: TokenIds, vocabulary_size: int, order: int, bidirectional: bool = False
) -> float:
    r"""Return the held-out bits per character of an n-gram model with Witten-Bell smoothing.

    Let n(c, x) be the count of character x after context c in the training text, n(c) the sum of n(c, x) over x, and
    u(c) the number of different x after c. Then p_k(x) = (n(c, x) + u(c) p_{k-1}(x)) / (n(c) + u(c)) for the context
    of k characters, and p_{-1} = 1/V. Source: Witten and Bell 1991.

    Args:
        train: (length,) integers, the text to count.
        held_out: the integers that follow `train` in the text, to predict.
        vocabulary_size: V.
        order: number of context characters before the predicted one; 0 uses the frequency of the character alone.
        bidirectional: True uses `order` characters before the predicted one and as many after it, the nearest first.

    Returns:
        The mean of -log2 p over the held-out characters.

    Raises:
        InputError: held_out is empty.

    >>> round(ngram_bits_per_character(np.array([0, 1, 0, 1, 0]), np.array([1, 0]), 2, 0), 3)
    1.015
    """
    if len(held_out) == 0:
        raise InputError("expected a held-out text, found no characters")
    text = np.concatenate([train, held_out])
    train_length = len(train)
    # The right context of the last training characters is held out, so these are not counted.
    counted = max(0, train_length - order) if bidirectional else train_length
    context = np.zeros(len(text), dtype=np.int64)
    p = np.full(len(held_out), 1.0 / vocabulary_size)
    distances = [d for k in range(1, order + 1) for d in ((k, -k) if bidirectional else (k,))]
    for distance in (0, *distances):
        if distance:
            # Contexts are renumbered after every extension, so that the codes cannot overflow for any V.
            context = np.unique(
                context * (vocabulary_size + 1) + _shift(text, distance, vocabulary_size), return_inverse=True
            )[1]
        pairs, pair = np.unique(context * vocabulary_size + text, return_inverse=True)
        pair_counts = np.bincount(pair[:counted], minlength=len(pairs))
        context_counts = np.bincount(context[:counted], minlength=int(context.max()) + 1)
        distinct = np.bincount((pairs // vocabulary_size)[pair_counts > 0], minlength=len(context_counts))
        held_out_context = context[train_length:]
        n, u = context_counts[held_out_context], distinct[held_out_context]
        p = np.where(n > 0, (pair_counts[pair[train_length:]] + u * p) / np.maximum(n + u, 1), p)
    return float(-np.mean(np.log2(p)))


def _shift(ids: TokenIds, distance: int, fill: int) -> TokenIds:
    """Return the character `distance` positions before each position (after it if negative), `fill` beyond the ends."""
    padding = np.full(min(abs(distance), len(ids)), fill)
    return np.concatenate([padding, ids[:-distance]] if distance > 0 else [ids[-distance:], padding])[: len(ids)]
