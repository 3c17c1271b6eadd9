"""Reading, encoding and batching text; n-gram baselines against a brute-force count."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from xprnn.arrays.namespace import InputError
from xprnn.charlm.corpus import BatchedText, Vocabulary, batchify, default_text, read_text, split_held_out
from xprnn.charlm.ngram_baseline import ngram_bits_per_character


def test_default_text_is_long_english_and_reproducible():
    text = default_text()
    assert len(text) > 300_000
    assert text.count(" the ") > 3000
    assert text == default_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"a", "at least two different characters, found 1 times 'a'"),
        (b"aaaa", "at least two different characters, found 4 times 'a'"),
        (b"caf\xe9 au lait", "expected UTF-8 text, found byte 0xe9 at position 3"),
        (b"\x7fELF\0\0\0", "binary file"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_invalid_text_file_raises_with_its_path(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_text(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_directory_instead_of_text_raises(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path)


def test_read_text_normalises_byte_order_mark_and_line_ends(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\n")
    assert read_text(path) == "a\nb\n"


def test_encode_and_decode_characters_of_every_unicode_plane():
    text = "zebra «ä» 🙂 a"
    vocabulary = Vocabulary.from_text(text)
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int64
    assert ids.tolist() == [sorted(set(text)).index(c) for c in text]
    assert vocabulary.decode(ids) == text
    assert Vocabulary("zab").encode("baz").tolist() == [2, 1, 0]  # the order of `characters`, which is not sorted here
    assert vocabulary.encode("").tolist() == []


def test_encode_names_the_unknown_character():
    with pytest.raises(InputError, match=r"character 'é' at position 3 is not among the 3 characters"):
        Vocabulary("abc").encode("abcé")


def test_last_tenth_is_held_out():
    train, held_out = split_held_out(np.arange(105))
    assert train.tolist() == list(range(95))
    assert held_out.tolist() == list(range(95, 105))


def test_windows_are_consecutive_and_wrap_around():
    text = np.arange(100, 131)
    data = BatchedText(*batchify(text, batch=3, window=4), window=4)
    assert data.windows_per_epoch == 2
    first, second, wrapped = data.batch(0), data.batch(1), data.batch(2)
    assert first[0].T.tolist() == [[100, 101, 102, 103], [110, 111, 112, 113], [120, 121, 122, 123]]
    assert second[0][0].tolist() == [104, 114, 124]
    np.testing.assert_array_equal(wrapped[0], first[0])
    for x, targets in (first, second):
        np.testing.assert_array_equal(targets, x + 1)
    assert first[0].flags.c_contiguous


def test_batchify_needs_one_window_per_stream():
    inputs, _ = batchify(np.arange(13), batch=3, window=4)
    assert inputs.shape == (4, 3)
    with pytest.raises(InputError, match=r"12 characters, but 3 streams of one window of 4 need 13"):
        batchify(np.arange(12), batch=3, window=4)


def brute_force_bits(train: list[int], held_out: list[int], vocabulary_size: int, order: int) -> float:
    text, bits = train + held_out, 0.0
    for i in range(len(train), len(text)):
        p = 1 / vocabulary_size
        for k in range(order + 1):
            if i < k:
                break
            context = text[i - k : i]
            counts = Counter(text[j] for j in range(k, len(train)) if text[j - k : j] == context)
            if counts:
                p = (counts[text[i]] + len(counts) * p) / (counts.total() + len(counts))
        bits -= math.log2(p)
    return bits / len(held_out)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_ngram_bits_equal_brute_force(rng, order):
    text = rng.choice(6, size=400, p=[0.4, 0.3, 0.1, 0.1, 0.09, 0.01])
    text[350] = 5
    train, held_out = text[:300], text[300:]
    expected = brute_force_bits(train.tolist(), held_out.tolist(), 7, order)
    assert ngram_bits_per_character(train, held_out, 7, order) == pytest.approx(expected, rel=1e-12)


def bidirectional_brute_force_bits(train: list[int], held_out: list[int], vocabulary_size: int, order: int) -> float:
    text, bits = [-1] * order + train + held_out + [-1] * order, 0.0
    last = order + len(train) - order  # the right context of later characters is held out
    offsets = [d for k in range(1, order + 1) for d in (-k, k)]
    for i in range(order + len(train), len(text) - order):
        p = 1 / vocabulary_size
        for k in range(len(offsets) + 1):
            context = [text[i + d] for d in offsets[:k]]
            counts = Counter(text[j] for j in range(order, last) if [text[j + d] for d in offsets[:k]] == context)
            if counts:
                p = (counts[text[i]] + len(counts) * p) / (counts.total() + len(counts))
        bits -= math.log2(p)
    return bits / len(held_out)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_bidirectional_ngram_bits_equal_brute_force(rng, order):
    text = rng.choice(4, size=200, p=[0.4, 0.3, 0.2, 0.1])
    text[1:] = np.where(rng.random(199) < 0.6, (text[:-1] + 1) % 4, text[1:])
    train, held_out = text[:150], text[150:]
    expected = bidirectional_brute_force_bits(train.tolist(), held_out.tolist(), 5, order)
    assert ngram_bits_per_character(train, held_out, 5, order, bidirectional=True) == pytest.approx(expected, rel=1e-12)


def test_context_codes_do_not_overflow_for_huge_vocabularies():
    text = np.array([2**40, 1, 2, 3] * 50)
    assert ngram_bits_per_character(text[:150], text[150:], 2**41, 3) < 0.5
