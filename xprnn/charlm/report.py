"""Report of a finished training run: held-out bits per character beside n-gram baselines, a text sample, the curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xprnn.arrays.namespace import InputError
from xprnn.charlm.corpus import Corpus, TokenIds, Vocabulary
from xprnn.charlm.generate import generate_text, infill
from xprnn.charlm.ngram_baseline import ngram_bits_per_character
from xprnn.charlm.plot import can_plot, plot_curve
from xprnn.charlm.trainer import TrainState
from xprnn.layers.context_shift import is_noncausal

_PASSAGE_LENGTH, _BLANK_INTERVAL = 360, 6


def print_report(
    model: Any, train_state: TrainState, corpus: Corpus, bits: float, characters_per_second: float | None, seed: int
) -> dict[str, float]:
    """Print the held-out result, the n-gram baselines, and a generated text or an infilled passage.

    Args:
        model: from `build_model`.
        train_state: final state of the run.
        corpus: training and held-out text.
        bits: held-out bits per character of the model.
        characters_per_second: training speed; None if no step was trained.
        seed: seed of the generated text.

    Returns:
        Name of each baseline -> held-out bits per character.
    """
    bidirectional = is_noncausal(model)
    task = ", each predicted from both sides" if bidirectional else ""
    print(f"\nheld-out bits per character{task} ({len(corpus.held_out):,} characters not used for training)")
    speed = "" if characters_per_second is None else f", {characters_per_second:,.0f} characters/s"
    print(f"  this network          {bits:.3f}   after {train_state.seconds:.0f} s{speed}")
    baselines = {}
    for name, order, description in _baselines(bidirectional):
        baselines[name] = ngram_bits_per_character(
            corpus.train, corpus.held_out, len(corpus.vocabulary), order, bidirectional
        )
        print(f"  {name:21} {baselines[name]:.3f}   {description}")
    if bidirectional:
        print("  (easier than predicting the next character: do not compare with runs without --bidirectional)")
        _print_infilled(model, train_state, corpus)
    else:
        prompt = "The " if set("The ") <= set(corpus.vocabulary.characters) else ""
        options = {"temperature": 0.6, "rng": np.random.default_rng(seed)}
        print(f"\n{prompt}{generate_text(model, train_state.params, corpus.vocabulary, prompt, 400, **options)}\n")
    return baselines


def _baselines(bidirectional: bool) -> list[tuple[str, int, str]]:
    """(name, order, description) of the n-gram baselines."""
    unigram = ("n-gram, order 0", 0, "each character from its frequency alone")
    if bidirectional:
        description = "each character from the three before and the three after it (Witten-Bell smoothing)"
        return [("n-gram, both sides", 3, description), unigram]
    return [("n-gram, order 3", 3, "each character from the three before it (Witten-Bell smoothing)"), unigram]


def _print_infilled(model: Any, train_state: TrainState, corpus: Corpus) -> None:
    """Hide every 6th character of a held-out passage, fill it in, and print the passage with the result marked."""
    ids = _most_text_window(corpus.held_out, corpus.vocabulary, _PASSAGE_LENGTH)
    blank = np.arange(len(ids)) % _BLANK_INTERVAL == _BLANK_INTERVAL - 1
    filled = infill(model, train_state.params, ids, blank)
    right = int((filled == ids)[blank].sum())
    counts = f"{right} [right], {int(blank.sum()) - right} {{wrong}}"
    hidden = f"every {_BLANK_INTERVAL}th character hidden and filled in"
    print(f"\nthe held-out passage with the most letters, {hidden}: {counts}\n")
    print(mark_restored(corpus.vocabulary, ids, filled, blank) + "\n")


def _most_text_window(ids: TokenIds, vocabulary: Vocabulary, length: int) -> TokenIds:
    """Return the window of `length` characters with the most letters: prose rather than a table or blank space."""
    is_letter = np.array([c.isalpha() for c in vocabulary.characters])[ids]
    cumulative = np.concatenate([[0], np.cumsum(is_letter)])
    start = int(np.argmax(cumulative[length:] - cumulative[:-length])) if len(ids) > length else 0
    return ids[start : start + length]


def mark_restored(vocabulary: Vocabulary, ids: TokenIds, restored: TokenIds, blank: Any) -> str:
    r"""Return the text of `restored` with the blank positions in brackets: [right] or {wrong}.

    Args:
        vocabulary: the V characters.
        ids: (T,) integers of the true text.
        restored: (T,) integers, from `infill`.
        blank: (T,) boolean, True at the positions that were filled in.

    >>> ids, restored = np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])
    >>> mark_restored(Vocabulary("abc"), ids, restored, np.array([False, True, True, False]))
    'a[b]{b}c'
    """
    marked = []
    for expected, found, hidden in zip(vocabulary.decode(ids), vocabulary.decode(restored), blank, strict=True):
        visible = "\\n" if found == "\n" else found
        marked.append(found if not hidden else f"[{visible}]" if found == expected else f"{{{visible}}}")
    return "".join(marked)


def save_curve(directory: Path, curve: Sequence[Sequence[float]], baselines: Mapping[str, float]) -> None:
    """Plot `curve`, rows of (step, seconds, training bits, held-out bits), to curve.png if matplotlib is installed."""
    if not can_plot():  # the `train` command prints a message at its start
        return
    steps, _, training, held_out = (list(column) for column in zip(*curve, strict=True))
    try:
        plot_curve(directory / "curve.png", steps, {"training": training, "held out": held_out}, baselines)
    except InputError as error:
        print(f"curve.png was not written: {error}")
