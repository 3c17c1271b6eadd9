"""What a finished run shows: its figure beside what counting reaches, what it can write or restore, and a picture."""

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
    model: Any, train_state: TrainState, corpus: Corpus, bits: float, characters_per_second: float, seed: int
) -> dict[str, float]:
    """Print the figures and what the network can do, and return the bits of its opponents under their names.

    Args:
        model: from `build`.
        now: the run at its end.
        text: what it learnt from, and what was held out.
        bits: held-out bits per character.
        rate: characters learnt from in a second.
        seed: of the sample.
    """
    both = is_noncausal(model)
    kind = ", each restored from both sides" if both else ""
    print(f"\nheld-out bits per character{kind} ({len(corpus.held_out):,} characters the run has never learnt from)")
    print(
        f"  this network          {bits:.3f}   after {train_state.seconds:.0f} s, {characters_per_second:,.0f} characters a second"
    )
    levels = {}
    for name, order, means in _baselines(both):
        levels[name] = ngram_bits_per_character(corpus.train, corpus.held_out, len(corpus.vocabulary), order, both)
        print(f"  {name:21} {levels[name]:.3f}   {means}")
    if both:
        print("  (an easier task than the next character: not to be compared with runs without --bidirectional)")
        _print_infilled(model, train_state, corpus)
    else:
        prompt = "The " if set("The ") <= set(corpus.vocabulary.characters) else ""
        how = {"temperature": 0.6, "rng": np.random.default_rng(seed)}
        print(f"\n{prompt}{generate_text(model, train_state.params, corpus.vocabulary, prompt, 400, **how)}\n")
    return levels


def _baselines(both: bool) -> list[tuple[str, int, str]]:
    frequency = ("counting, order 0", 0, "each character by its frequency alone")
    if both:
        means = "each character from the three before it and the three after it (Witten-Bell)"
        return [("counting, both sides", 3, means), frequency]
    return [("counting, order 3", 3, "each character from the three before it (Witten-Bell)"), frequency]


def _print_infilled(model: Any, now: TrainState, text: Corpus) -> None:
    ids = _most_text_window(text.held_out, text.vocabulary, _PASSAGE_LENGTH)
    blank = np.arange(len(ids)) % _BLANK_INTERVAL == _BLANK_INTERVAL - 1
    restored = infill(model, now.params, ids, blank)
    right = int((restored == ids)[blank].sum())
    counts = f"{right} [right], {int(blank.sum()) - right} {{wrong}}"
    print(
        f"\nthe held-out passage with most letters, every {_BLANK_INTERVAL}th character hidden and restored: {counts}\n"
    )
    print(mark_restored(text.vocabulary, ids, restored, blank) + "\n")


def _most_text_window(ids: TokenIds, vocabulary: Vocabulary, length: int) -> TokenIds:
    """The stretch with the most letters: to read, and harder than a table or its spaces."""
    letters = np.array([c.isalpha() for c in vocabulary.characters])[ids]
    before = np.concatenate([[0], np.cumsum(letters)])
    start = int(np.argmax(before[length:] - before[:-length])) if len(ids) > length else 0
    return ids[start : start + length]


def mark_restored(vocabulary: Vocabulary, ids: TokenIds, restored: TokenIds, blank: Any) -> str:
    r"""Return the text of `restored`, what was blank in brackets: [right] or {wrong}.

    >>> ids, restored = np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])
    >>> mark_restored(Vocabulary("abc"), ids, restored, np.array([False, True, True, False]))
    'a[b]{b}c'
    """
    shown = []
    for right, found, hidden in zip(vocabulary.decode(ids), vocabulary.decode(restored), blank, strict=True):
        visible = "\\n" if found == "\n" else found
        shown.append(found if not hidden else f"[{visible}]" if found == right else f"{{{visible}}}")
    return "".join(shown)


def save_curve(directory: Path, curve: Sequence[Sequence[float]], baselines: Mapping[str, float]) -> None:
    """Draw `curve`, rows of (step, seconds, training bits, held-out bits), to curve.png, where matplotlib is."""
    if not can_plot():  # a run says so before it begins
        return
    steps, _, learnt, held_out = (list(column) for column in zip(*curve, strict=True))
    try:
        plot_curve(directory / "curve.png", steps, {"training": learnt, "held out": held_out}, baselines)
    except InputError as error:
        print(f"no curve.png: {error}")
