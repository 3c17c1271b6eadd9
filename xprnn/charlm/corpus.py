"""Text data: reading text, encoding characters as integers, splitting, and batching for truncated back-propagation.

A `Vocabulary` encodes a text as integers. `batchify` cuts it into N parallel streams of equal length, and `BatchedText`
reads them in windows of T steps. Consecutive windows of a stream are adjacent in the text, so the final state of a
window is the initial state of the next one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xprnn.arrays.namespace import Array, InputError
from xprnn.io.archive import check_file

TokenIds = NDArray[np.int64]


def default_text() -> str:
    """Return the help topics of the Python manual in the standard library (`pydoc_data`), sorted by name.

    >>> len(default_text()) > 100_000
    True
    """
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics))


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file; drop a byte-order mark and turn every line end into a newline.

    Args:
        path: the file.

    Returns:
        The text, with at least two different characters.

    Raises:
        InputError: the file cannot be read, is not UTF-8 text, or has fewer than two different characters.
    """
    check_file(f"text {path}", Path(path))
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"text {path}: expected UTF-8 text, found byte 0x{error.object[error.start]:02x} at position"
            f" {error.start}; convert it to UTF-8 first"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero character
        raise InputError(f"text {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if "\0" in text:
        raise InputError(f"text {path}: expected text, found a binary file (it has zero bytes)")
    if not text:
        raise InputError(f"text {path}: expected text, found an empty file")
    if len(set(text)) < 2:
        raise InputError(
            f"text {path}: expected at least two different characters,"
            f" found {len(text):,} times {text[0]!r}; there is nothing to learn"
        )
    return text


@dataclass(frozen=True)
class Vocabulary:
    """Bijection between characters and the integers 0..V-1.

    Args:
        characters: the V different characters; the index of a character is its integer.

    >>> vocabulary = Vocabulary.from_text("hello")
    >>> vocabulary.characters, vocabulary.encode("hole").tolist()
    ('ehlo', [1, 3, 2, 0])
    >>> vocabulary.decode([1, 0, 2, 2, 3])
    'hello'
    """

    characters: str

    @classmethod
    def from_text(cls, text: str) -> Vocabulary:
        """Return the vocabulary of all characters of `text`, sorted by code point."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    @cached_property
    def _codepoints(self) -> tuple[TokenIds, TokenIds]:
        """The sorted code points (V,) of the characters, and the integer of each."""
        codepoints = np.array([ord(c) for c in self.characters], dtype=np.int64)
        order = np.argsort(codepoints)
        return codepoints[order], order.astype(np.int64)

    def encode(self, text: str) -> TokenIds:
        """Return the integers (len(text),) of the characters of `text`.

        Raises:
            InputError: a character is not in the vocabulary; the message names it and its position.
        """
        codepoints, ids = self._codepoints
        text_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
        index = np.minimum(np.searchsorted(codepoints, text_points), max(len(codepoints) - 1, 0))
        unknown = codepoints[index] != text_points if len(codepoints) else np.ones(len(text_points), bool)
        if unknown.any():
            position = int(np.argmax(unknown))
            raise InputError(
                f"character {text[position]!r} at position {position} is not among the"
                f" {len(self)} characters of the vocabulary"
            )
        return ids[index]

    def decode(self, ids: Any) -> str:
        """Return the text of `ids`, an iterable of integers in 0..V-1."""
        return "".join(self.characters[int(i)] for i in ids)


def split_held_out(ids: TokenIds, held_out_fraction: float = 0.1) -> tuple[TokenIds, TokenIds]:
    """Split `ids` into a training part and a held-out part, the last `held_out_fraction` of them."""
    split = len(ids) - int(len(ids) * held_out_fraction)
    return ids[:split], ids[split:]


class Corpus(NamedTuple):
    """A text, encoded and split into a training part and a held-out part.

    Args:
        name: name of the text in messages.
        fingerprint: SHA-256 of the text; a resumed run checks that it reads the same text.
        vocabulary: the characters of the text.
        train: integers of the training part.
        held_out: integers of the held-out part, which is only used for evaluation.
    """

    name: str
    fingerprint: str
    vocabulary: Vocabulary
    train: TokenIds
    held_out: TokenIds

    @classmethod
    def read(cls, file: str | None) -> Corpus:
        """Read the text file `file`, or `default_text()` if it is None.

        Raises:
            InputError: as `read_text`, or if the text is too short for a held-out part of 2 characters.
        """
        name = "the Python manual's topics" if file is None else file
        text = default_text() if file is None else read_text(file)
        vocabulary = Vocabulary.from_text(text)
        train, held_out = split_held_out(vocabulary.encode(text))
        if len(held_out) < 2:
            raise InputError(
                f"text {name}: too short: it has {len(text)} characters, but the held-out tenth must have at least 2;"
                " use a longer text"
            )
        fingerprint = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return cls(name, fingerprint, vocabulary, train, held_out)

    def check_length(self, batch: int, window: int) -> None:
        """Raise InputError if the training part is too short for `batch` streams of one window each."""
        length, needed = len(self.train), batch * window + 1
        if length < needed:
            raise InputError(
                f"text {self.name}: too short: it has {length + len(self.held_out):,} characters; a tenth is held out,"
                f" which leaves {length:,} for training, but {batch} streams of one window of {window} need"
                f" {needed:,}; use a longer text, or a smaller --batch or --window"
            )


@dataclass(frozen=True)
class BatchedText:
    """N parallel streams of a text, read in windows of T steps.

    A window is a view of the streams, which may be arrays on any device: training copies no text.

    Args:
        inputs: (S, N) integers; column n is the n-th section of the text.
        targets: (S, N) integers; the target of each input, for example the next character.
        window: T, steps of a window.
    """

    inputs: Array
    targets: Array
    window: int

    @property
    def windows_per_epoch(self) -> int:
        """Number of windows in one pass over the text; a shorter rest at the end is not used."""
        return int(self.inputs.shape[0]) // self.window

    def batch(self, step: int) -> tuple[Array, Array]:
        """Return inputs and targets (T, N) of training step `step`; after the last window the first one follows."""
        start = (step % self.windows_per_epoch) * self.window
        stop = start + self.window
        return self.inputs[start:stop, ...], self.targets[start:stop, ...]


def batchify(ids: TokenIds, batch: int, window: int) -> tuple[TokenIds, TokenIds]:
    """Cut a text into `batch` parallel streams of equal length, with the next characters as targets.

    Args:
        ids: (length,) integers.
        batch: N, >= 1.
        window: T, >= 1; the least length of a stream.

    Returns:
        Inputs and targets (S, N) in C order, with S = (length - 1) // N; the rest of the text is not used.

    Raises:
        InputError: batch or window is below 1, or the text is too short for N streams of T steps.

    >>> inputs, targets = batchify(np.arange(7), batch=2, window=3)
    >>> inputs.T.tolist(), targets.T.tolist()
    ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """
    if batch < 1 or window < 1:
        raise InputError(f"expected batch and window of at least 1, found {batch} and {window}")
    length = (len(ids) - 1) // batch
    if length < window:
        raise InputError(
            f"the text is too short: {len(ids):,} characters, but {batch} streams of one window of"
            f" {window} need {batch * window + 1:,}; use a longer text, or a smaller --batch or --window"
        )
    inputs = ids[: length * batch].reshape(batch, length).T
    targets = ids[1 : length * batch + 1].reshape(batch, length).T
    return np.ascontiguousarray(inputs), np.ascontiguousarray(targets)
