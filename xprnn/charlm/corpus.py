"""Text: reading it, numbering its characters, cutting it into windows, and what counting alone predicts.

A text of characters becomes integers through a `Vocabulary`. For truncated back-propagation through time it is cut into
N parallel streams, each read window by window of T characters, so that the state after one window is the right state
before the next. `ngram_bits_per_character` is the honest opponent of every model here: what a table of counts reaches on the same
held-out text.
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
    """Return the English every Python carries: the manual's topics, in the order of their names.

    >>> len(default_text()) > 100_000
    True
    """
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics))


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file.

    Args:
        path: the file; a byte-order mark is dropped and every line end becomes a newline.

    Returns:
        Its characters, at least two different ones.

    Raises:
        InputError: the file cannot be read, is not UTF-8 text, or holds nothing that could be learnt.
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
    """The characters a model knows; a character's number is its place.

    Args:
        characters: the different characters, in the order of their numbers.

    >>> vocabulary = Vocabulary.of("hello")
    >>> vocabulary.characters, vocabulary.encode("hole").tolist()
    ('ehlo', [1, 3, 2, 0])
    >>> vocabulary.decode([1, 0, 2, 2, 3])
    'hello'
    """

    characters: str

    @classmethod
    def from_text(cls, text: str) -> Vocabulary:
        """Return the vocabulary of all characters of `text`, sorted."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    @cached_property
    def _codepoints(self) -> tuple[TokenIds, TokenIds]:
        points = np.array([ord(c) for c in self.characters], dtype=np.int64)
        order = np.argsort(points)
        return points[order], order.astype(np.int64)

    def encode(self, text: str) -> TokenIds:
        """Return the numbers (len(text),) of the characters of `text`.

        Raises:
            InputError: a character is not in the vocabulary; the message names it.
        """
        points, order = self._codepoints
        wanted = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
        found = np.minimum(np.searchsorted(points, wanted), max(len(points) - 1, 0))
        unknown = points[found] != wanted if len(points) else np.ones(len(wanted), bool)
        if unknown.any():
            place = int(np.argmax(unknown))
            raise InputError(
                f"Vocabulary.encode: character {text[place]!r} at position {place} is not among the"
                f" {len(self)} characters the model knows"
            )
        return order[found]

    def decode(self, ids: Any) -> str:
        """Return the text of the numbers `ids`, any iterable of integers in [0, len(self))."""
        return "".join(self.characters[int(i)] for i in ids)


def split_held_out(ids: TokenIds, held_out_fraction: float = 0.1) -> tuple[TokenIds, TokenIds]:
    """Return the training part and the held-out part: the last `share` of `ids`."""
    cut = len(ids) - int(len(ids) * held_out_fraction)
    return ids[:cut], ids[cut:]


class Corpus(NamedTuple):
    """A text to learn from.

    Args:
        name: what to call it.
        mark: tells one text from another when a run is resumed.
        vocabulary: its characters.
        train: the part to learn from.
        held_out: the part never learnt from.
    """

    name: str
    fingerprint: str
    vocabulary: Vocabulary
    train: TokenIds
    held_out: TokenIds

    @classmethod
    def read(cls, file: str | None) -> Corpus:
        """Read `file`; None: the text every Python carries.

        Raises:
            InputError: as `read_text`, or a text too short to hold anything out.
        """
        name = "the Python manual's topics" if file is None else file
        text = default_text() if file is None else read_text(file)
        vocabulary = Vocabulary.from_text(text)
        train, held_out = split_held_out(vocabulary.encode(text))
        if len(held_out) < 2:
            raise InputError(
                f"text {name}: too short: it has {len(text)} characters, and a tenth of them, at least 2, is held out;"
                " take a longer one"
            )
        mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return cls(name, mark, vocabulary, train, held_out)

    def check_length(self, batch: int, window: int) -> None:
        """Raise InputError if the part to learn from is too short for `batch` streams of one window each."""
        length, needed = len(self.train), batch * window + 1
        if length < needed:
            raise InputError(
                f"text {self.name}: too short: it has {length + len(self.held_out):,} characters; a tenth is held out,"
                f" which leaves {length:,} to learn from, but {batch} streams of one window of {window} need"
                f" {needed:,}; take a longer text, or a smaller --batch or --window"
            )


@dataclass(frozen=True)
class BatchedText:
    """N parallel streams of a text, read in windows of T.

    Args:
        inputs: (S, N) integers, column n being the n-th stretch of the text.
        targets: (S, N), the character after each input.
        window: T, the steps of one window.

    `inputs` and `targets` may live on any device: a window is a view, nothing is copied while training.
    """

    inputs: Array
    targets: Array
    window: int

    @property
    def windows_per_epoch(self) -> int:
        """Full windows in one epoch."""
        return int(self.inputs.shape[0]) // self.window

    def batch(self, step: int) -> tuple[Array, Array]:
        """Return inputs and targets (T, N) of training step `step`; epochs follow one another."""
        start = (step % self.windows_per_epoch) * self.window
        stop = start + self.window
        return self.inputs[start:stop, ...], self.targets[start:stop, ...]


def batchify(ids: TokenIds, batch: int, window: int) -> tuple[TokenIds, TokenIds]:
    """Cut a text into `batch` streams of equal length.

    Args:
        ids: (length,) integers.
        batch: N, at least 1.
        window: T, at least 1; every stream must fill one.

    Returns:
        inputs and targets (S, N), C-ordered; fewer than N characters at the end stay unused.

    Raises:
        InputError: the text is too short for N streams of T.

    >>> inputs, targets = batchify(np.arange(7), batch=2, window=3)
    >>> inputs.T.tolist(), targets.T.tolist()
    ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """
    if batch < 1 or window < 1:
        raise InputError(f"streams: expected batch and window of at least 1, found {batch} and {window}")
    length = (len(ids) - 1) // batch
    if length < window:
        raise InputError(
            f"streams: the text is too short: {len(ids):,} characters, but {batch} streams of one window of"
            f" {window} need {batch * window + 1:,}; take a longer text, or a smaller --batch or --window"
        )
    inputs = ids[: length * batch].reshape(batch, length).T
    targets = ids[1 : length * batch + 1].reshape(batch, length).T
    return np.ascontiguousarray(inputs), np.ascontiguousarray(targets)
