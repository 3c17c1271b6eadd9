"""Memory of a pass in a few pieces, and its kernel's table, written by compiled code from where the pieces lie.

To ask NumPy for an array takes a tenth of a microsecond, for its address a whole one: what a tiny network's kernel
takes for three steps. Here a pass asks for its pieces only; where in them everything lies was worked out once, and one
call of a compiled function checks the shapes and dtypes of what was given, aligns the pieces and fills the table:

    table[j] = offset[j] + start of piece[j],     places = (piece, offset), and piece 0 starts at 0: a plain number
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from xprnn.arrays import Array
from xprnn.kernels import library
from xprnn.kernels.table import ALIGNED

__all__ = ["Piece", "Places", "places_of"]


class Piece:
    """Places in one piece of memory, each on a line of the cache; `clear`: the entries before this place start as 0."""

    def __init__(self, item: int, sizes: Mapping[str, int], clear: str = "") -> None:
        self.starts, self.bytes, line, size = dict[str, int](), dict[str, int](), ALIGNED // item, 0
        for name, entries in sizes.items():
            self.starts[name], self.bytes[name] = size, size * item
            size += -(-entries // line) * line
        self.room = size + line  # to begin on a line, wherever it lies
        self.clear = self.starts[clear] if clear else 0

    def view(self, memory: Array, skip: int, name: str, shape: tuple[int, ...]) -> Array:
        """The array in a place."""
        start, size = skip + self.starts[name], 1
        for n in shape:
            size *= n
        return memory[start : start + size].reshape(shape)


class Places(NamedTuple):
    """How a pass's table comes from its pieces.

    fill(places, sizes, table, *fresh, *old, *pairs, *given): fresh pieces; pieces of an earlier pass; for each state
    where its running value goes, and what it starts from, (1, N, H) both; arrays. Returns how many entries each fresh
    piece skips, a byte for each, or -1 where a shape is another; raises TypeError for other dtypes or orders.
    """

    fill: Callable[..., int]
    places: Array
    sizes: Array
    entries: int


def places_of(
    names: Sequence[str],
    numbers: Mapping[str, int],
    fresh: Sequence[tuple[Piece, Mapping[str, int]]],
    rest: Sequence[Mapping[str, int]],
    old: int,
    begins: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    bits: int,
    state: tuple[int, int] = (0, 0),
) -> Places:
    """The table with these entries.

    Args:
        names: its entries; those that nothing below names are 0.
        numbers: entries that are numbers.
        fresh: pieces to be made, and what lies so many bytes behind the start of each.
        rest: the same for pieces of an earlier pass, `old` of them; for each state's running value; for arrays.
        begins: for each state where its first value goes, in entries of the first piece, and of the second for others.
        shapes: of the arrays.
        bits: of a number.
        state: (N, H) of a state.
    """
    where = np.zeros((2, len(names)), np.int64)
    where[1] = [numbers.get(name, 0) for name in names]
    for i, piece in enumerate((*(places for _, places in fresh), *rest), 1):
        for name, start in piece.items():
            if name in names:
                j = names.index(name)
                assert not where[0, j]
                where[:, j] = i, start
    sizes = [*(piece.clear for piece, _ in fresh), *begins, *state, *(n for shape in shapes for n in shape)]
    source, signature = _text(len(fresh), old, len(begins), tuple(map(len, shapes)), bits)
    return Places(library.compiled(source, signature), where, np.array(sizes, np.int64), len(names))


@lru_cache(maxsize=256)
def _text(fresh: int, old: int, states: int, ranks: tuple[int, ...], bits: int) -> tuple[str, str]:
    """The function's source, and its signature."""
    pieces, before = [f"m{i}" for i in range(fresh)], [f"o{i}" for i in range(old)]
    pairs, given = [f"{c}{k}" for k in range(states) for c in "fs"], [f"a{i}" for i in range(len(ranks))]
    names = ["places", "sizes", "table", *pieces, *before, *pairs, *given]
    at = fresh + states + 2
    fits = [f"{name}.shape == (1, sizes[{at - 2}], sizes[{at - 1}])" for name in pairs]
    for name, rank in zip(given, ranks, strict=True):
        fits += [f"{name}.shape[{i}] == sizes[{at + i}]" for i in range(rank)]
        at += rank
    lines = [f"if not ({' and '.join(fits)}):", "    return -1", f"starts = np.empty({len(names) - 2}, np.int64)"]
    lines += ["starts[0] = skips = 0"]
    for i, name in enumerate((*pieces, *before)):
        lines += [f"at = {name}.ctypes.data", f"skip = -at % {ALIGNED}", f"starts[{i + 1}] = at + skip"]
        if i < fresh:
            lines += [f"skip //= {name}.itemsize", f"{name}[skip : skip + sizes[{i}]] = 0", f"skips += skip << {8 * i}"]
    for i, name in enumerate((*pairs[::2], *given), fresh + old + 1):
        lines += [f"starts[{i}] = {name}.ctypes.data"]
    lines += ["for j in range(table.size):", "    table[j] = places[1, j] + starts[places[0, j]]"]
    for k in range(states):
        start = f"(skips >> {8 * (k > 0)}) % 256 + sizes[{fresh + k}]"
        lines += [
            f"first, at = s{k}[0], {start}",
            "for r in range(len(first)):",
            "    for j in range(first.shape[1]):",
        ]
        lines += [f"        m{int(k > 0)}[at] = f{k}[0, r, j] = first[r, j]", "        at += 1"]
    text = "\n    ".join((f"def kernel({', '.join(names)}):", *lines, "return skips"))
    real = f"float{bits}"
    kinds = ["int64[:, ::1]", "int64[::1]", "int64[::1]", *[f"{real}[::1]"] * fresh]
    kinds += [f"Array({real}, 1, 'C', True)"] * old + [f"{real}[:, :, ::1]", f"Array({real}, 3, 'C', True)"] * states
    kinds += [f"Array({real}, {n}, 'C', True)" for n in ranks]
    return f"{_HEAD}{text}\n", f"int64({', '.join(kinds)})"


_HEAD = '''"""Written by xprnn: the table of a pass; it may be deleted at any time."""
import numpy as np


'''
