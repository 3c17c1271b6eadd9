"""Baseline of the character model: n-gram counts with Witten-Bell smoothing."""

from __future__ import annotations

import numpy as np

from xprnn.arrays.namespace import InputError
from xprnn.charlm.corpus import TokenIds


def ngram_bits_per_character(
    train: TokenIds, held_out: TokenIds, vocabulary_size: int, order: int, bidirectional: bool = False
) -> float:
    r"""Return the bits per character that a table of counts needs for the held-out text.

    Witten-Bell interpolation: with n(c, x) the count of x after context c in training, n(c) its sum and u(c) the
    number of different x seen there, p_k(x) = (n(c, x) + u(c) p_{k-1}(x)) / (n(c) + u(c)), down to p_{-1} = 1/V.

    Args:
        train: (length,) integers that are counted.
        held_out: the integers that follow `train` and are predicted, each from the `order` before it.
        characters: V, the size of the vocabulary.
        order: 0 (how frequent is a character) or more (after the `order` characters before it).
        bidirectional: the context is the `order` characters before and as many after, taken in nearest first.

    Returns:
        The mean of -log2 p over the held-out characters.

    >>> round(ngram_bits_per_character(np.array([0, 1, 0, 1, 0]), np.array([1, 0]), 2, 0), 3)
    1.015
    """
    if len(held_out) == 0:
        raise InputError("ngram_bits_per_character: expected a held-out text, found no characters")
    text = np.concatenate([train, held_out])
    seen = len(train)
    counted = max(0, seen - order) if bidirectional else seen  # the last ones see held-out characters after them
    context = np.zeros(len(text), dtype=np.int64)
    p = np.full(len(held_out), 1.0 / vocabulary_size)
    distances = [d for k in range(1, order + 1) for d in ((k, -k) if bidirectional else (k,))]
    for distance in (0, *distances):
        if distance:
            # Renumbered every time, so that no code can overflow however large V is.
            context = np.unique(
                context * (vocabulary_size + 1) + _shift(text, distance, vocabulary_size), return_inverse=True
            )[1]
        pairs, pair = np.unique(context * vocabulary_size + text, return_inverse=True)
        pair_counts = np.bincount(pair[:counted], minlength=len(pairs))
        counts = np.bincount(context[:counted], minlength=int(context.max()) + 1)
        kinds = np.bincount((pairs // vocabulary_size)[pair_counts > 0], minlength=len(counts))
        here = context[seen:]
        n, u = counts[here], kinds[here]
        p = np.where(n > 0, (pair_counts[pair[seen:]] + u * p) / np.maximum(n + u, 1), p)
    return float(-np.mean(np.log2(p)))


def _shift(ids: TokenIds, by: int, outside: int) -> TokenIds:
    """What stands `by` places before each place (after it, if negative); `outside` beyond the ends."""
    beyond = np.full(min(abs(by), len(ids)), outside)
    return np.concatenate([beyond, ids[:-by]] if by > 0 else [ids[-by:], beyond])[: len(ids)]
