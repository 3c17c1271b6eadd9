"""What a finished run shows: its figure beside what counting reaches, what it can write or restore, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xprnn.arrays.namespace import InputError
from xprnn.charlm.corpus import Corpus, Ids, Vocabulary
from xprnn.charlm.generate import fill_in, write
from xprnn.charlm.ngram_baseline import counting_bits
from xprnn.charlm.plot import can_plot, plot_curve
from xprnn.charlm.trainer import Snapshot
from xprnn.layers.context_shift import reads_ahead

_PASSAGE, _EVERY = 360, 6


def report(model: Any, now: Snapshot, text: Corpus, bits: float, rate: float, seed: int) -> dict[str, float]:
    """Print the figures and what the network can do, and return the bits of its opponents under their names.

    Args:
        model: from `build`.
        now: the run at its end.
        text: what it learnt from, and what was held out.
        bits: held-out bits per character.
        rate: characters learnt from in a second.
        seed: of the sample.
    """
    both = reads_ahead(model)
    kind = ", each restored from both sides" if both else ""
    print(f"\nheld-out bits per character{kind} ({len(text.held_out):,} characters the run has never learnt from)")
    print(f"  this network          {bits:.3f}   after {now.seconds:.0f} s, {rate:,.0f} characters a second")
    levels = {}
    for name, order, means in _opponents(both):
        levels[name] = counting_bits(text.train, text.held_out, len(text.vocabulary), order, both)
        print(f"  {name:21} {levels[name]:.3f}   {means}")
    if both:
        print("  (an easier task than the next character: not to be compared with runs without --bidirectional)")
        _show_restored(model, now, text)
    else:
        prompt = "The " if set("The ") <= set(text.vocabulary.characters) else ""
        how = {"temperature": 0.6, "rng": np.random.default_rng(seed)}
        print(f"\n{prompt}{write(model, now.params, text.vocabulary, prompt, 400, **how)}\n")
    return levels


def _opponents(both: bool) -> list[tuple[str, int, str]]:
    frequency = ("counting, order 0", 0, "each character by its frequency alone")
    if both:
        means = "each character from the three before it and the three after it (Witten-Bell)"
        return [("counting, both sides", 3, means), frequency]
    return [("counting, order 3", 3, "each character from the three before it (Witten-Bell)"), frequency]


def _show_restored(model: Any, now: Snapshot, text: Corpus) -> None:
    ids = _wordiest(text.held_out, text.vocabulary, _PASSAGE)
    blank = np.arange(len(ids)) % _EVERY == _EVERY - 1
    restored = fill_in(model, now.params, ids, blank)
    right = int((restored == ids)[blank].sum())
    counts = f"{right} [right], {int(blank.sum()) - right} {{wrong}}"
    print(f"\nthe held-out passage with most letters, every {_EVERY}th character hidden and restored: {counts}\n")
    print(marked(text.vocabulary, ids, restored, blank) + "\n")


def _wordiest(ids: Ids, vocabulary: Vocabulary, length: int) -> Ids:
    """The stretch with the most letters: to read, and harder than a table or its spaces."""
    letters = np.array([c.isalpha() for c in vocabulary.characters])[ids]
    before = np.concatenate([[0], np.cumsum(letters)])
    start = int(np.argmax(before[length:] - before[:-length])) if len(ids) > length else 0
    return ids[start : start + length]


def marked(vocabulary: Vocabulary, ids: Ids, restored: Ids, blank: Any) -> str:
    r"""Return the text of `restored`, what was blank in brackets: [right] or {wrong}.

    >>> ids, restored = np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])
    >>> marked(Vocabulary("abc"), ids, restored, np.array([False, True, True, False]))
    'a[b]{b}c'
    """
    shown = []
    for right, found, hidden in zip(vocabulary.decode(ids), vocabulary.decode(restored), blank, strict=True):
        visible = "\\n" if found == "\n" else found
        shown.append(found if not hidden else f"[{visible}]" if found == right else f"{{{visible}}}")
    return "".join(shown)


def picture(out: Path, curve: Sequence[Sequence[float]], levels: Mapping[str, float]) -> None:
    """Draw `curve`, rows of (step, seconds, training bits, held-out bits), to curve.png, where matplotlib is."""
    if not can_plot():  # a run says so before it begins
        return
    steps, _, learnt, held_out = (list(column) for column in zip(*curve, strict=True))
    try:
        plot_curve(out / "curve.png", steps, {"training": learnt, "held out": held_out}, levels)
    except InputError as error:
        print(f"no curve.png: {error}")
