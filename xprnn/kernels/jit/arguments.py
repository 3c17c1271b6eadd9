"""What a compiled pass hands to its kernel: a table of numbers and addresses, and the arrays behind them."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays.linear import columns, few
from xprnn.arrays.namespace import Array, Params
from xprnn.kernels.jit import compile_cache
from xprnn.kernels.jit.forward_driver import Sources
from xprnn.kernels.jit.threads import Part
from xprnn.kernels.memory import ALIGNED, address, aligned, contiguous
from xprnn.kernels.row_order import Rows
from xprnn.kernels.tape import State, Tape

__all__ = [
    "Kept",
    "Piece",
    "Places",
    "Table",
    "back_room",
    "call",
    "forward_room",
    "inputs",
    "inputs_back",
    "padded",
    "places_of",
    "projection",
]


_BLOCK_BYTES = 1 << 20  # of a block's projection, which should stay in the second-level cache
_CLASH = 1 << 11  # rows so many bytes apart fall into the same few places of the first-level cache
_BLOCK_ROWS = 256  # of a block whose weights' gradients are added up at once


class Kept(NamedTuple):
    """What backward needs; arrays (T, N, .), rows in walking order."""

    sources: Sources
    rows: Rows
    x: Array
    gates: Array | None  # the first saved values
    spare: dict[str, Array]  # the other saved values
    before: State
    after: State
    done: Any = None  # plain.py's record, where that wrote the tape


def padded(columns: int, item: int) -> int:
    """The width of a matrix with so many columns in panels."""
    lanes = compile_cache.lanes(item)
    return -(-columns // lanes) * lanes


def projection(params: Params) -> int:
    """P where h is projected, else 0."""
    return int(params["weight_hr"].shape[0]) if "weight_hr" in params else 0


Sizes = tuple[dict[str, int], dict[str, int]]


def forward_room(sources: Sources, shape: Sequence[int], item: int, projected: int = 0) -> Sizes:
    """What a forward kernel needs for rows of `shape` = (T, R, D, H, W): numbers, and sizes of memory by name.

    `projected` is P, where h is.
    """
    count, rows, d, hidden, width = shape
    cut, apart = sources.halves.first * hidden, sources.halves.apart
    y = padded(cut, item)
    z = y + padded(width - cut, item)
    late = y * apart[0] + (z - y) * apart[1]
    block = max(1, min(count, _BLOCK_BYTES // max(1, rows * z * item)))
    sizes = {"Q": d * z, "U": (projected or hidden) * z, "P": block * rows * z, "B": rows * late, "K": z, "L": late}
    numbers, wide = {"cut": cut, "Y": y, "Z": z, "J": block}, padded(projected, item)
    if projected:
        numbers |= {"HP": projected, "Hw": wide}
        sizes |= {"UR": hidden * wide, "HN": rows * wide}
    return numbers, sizes | {"O": wide}


def back_room(sources: Sources, shape: Sequence[int], item: int, projected: int = 0) -> Sizes:
    """The same for a backward kernel; B and O must be 0 before."""
    count, n, d, hidden, width = shape
    block = max(1, min(count, -(-_BLOCK_ROWS // max(1, n))))
    rows, wide, inputs = block * n, padded(projected or hidden, item), padded(d, item)
    edge, own = compile_cache.tile_size(item), padded(hidden, item)
    sizes = {"B": n * wide, "O": edge + max(d, own, edge), "Q": width * inputs, "U": width * wide}
    sizes |= {"LA": (width + 2 * compile_cache.tile_rows()) * rows, "LB": rows * max(inputs, own)}
    apart = width + ALIGNED // item * (d > 0 and width * item % _CLASH == 0)
    sizes |= dict.fromkeys(("X", "Y")[: (2 - sources.same) * (d > 0)], rows * apart)
    numbers = {"J": block, "Hz": wide, "Xw": apart, "room": rows, "zeros": edge}
    if sources.halves.early:
        cut, sizes = sources.halves.first * hidden, sizes | {"DQ": n * wide}
        numbers |= {"cut": cut, "half": -(-cut // compile_cache.tile_rows()) * compile_cache.tile_rows()}
    if projected:
        sizes |= {"UR": projected * own, "DH": rows * projected, "DR": n * own, "SR": projected}
        numbers |= {"HP": projected, "Hw": own}
    return numbers, sizes


class Table:
    """The numbers and addresses that a kernel is called with, for all rows or for a part of them."""

    def __init__(self, entries: dict[str, int]) -> None:
        self.entries = entries
        self._strides: dict[str, int] = {}
        self._counts: Array | None = None
        self._alive: list[Array] = []  # while a kernel may read them

    def point(self, name: str, at: int, stride: int = 0) -> None:
        """Memory at this address; `stride` bytes from one row of the batch to the next."""
        self.entries[name] = at
        if stride:
            self._strides[name] = stride

    def read(self, name: str, a: Array, stride: int = 0, dtype: Any = None) -> None:
        """An array to be read, in C order."""
        a = contiguous(a) if dtype is None else np.ascontiguousarray(a, dtype)
        self.keep(a)
        self.point(name, address(a), stride)

    def sent(self, k: int, d: Array, dtype: Any) -> None:
        """What the caller sends into state k (T, N, H), where it is if the kernel can read its rows, or else a copy."""
        item = dtype.itemsize
        whole = d.dtype == dtype and d.strides[-1] == item and not (d.strides[0] % item or d.strides[1] % item)
        d = d if whole else np.ascontiguousarray(d, dtype)
        self.keep(d)
        self.point(f"I{k}", address(d), d.strides[1])
        self.entries |= {f"a{k}": d.strides[0] // item, f"b{k}": d.strides[1] // item}

    def keep(self, a: Array) -> None:
        """Hold on to an array of which the kernel knows only the address."""
        self._alive.append(a)

    def given(self, rows: Rows, shape: tuple[int, ...]) -> None:
        """What every pass is told: the sizes (T, N, H, W), and which rows take part in which step."""
        count = shape[0]
        self.entries |= dict(zip("TNHW", shape, strict=True))
        if rows.active is not None:
            self._counts = np.zeros(count, np.int64)
            for t0, t1, k in rows.runs:
                self._counts[t0:t1] = k
            self.entries["some"] = 1
            self.read("active", rows.active, 1)
        if rows.reset is not None:
            self.entries["resets"] = 1
            self.read("reset", rows.reset, 1)

    def of(self, part: Part) -> dict[str, int]:
        """The entries for these rows."""
        at = {name: self.entries[name] + part.first * step for name, step in self._strides.items() if part.first}
        if self._counts is not None:
            counts = np.clip(self._counts - part.first, 0, part.rows)
            self.keep(counts)
            at["counts"] = address(counts)
        return {**self.entries, **at, "R": part.rows}


def inputs(table: Table, params: Params, x: Array) -> Array:
    """Into the table, x (T, N, D) and its weight; or, for integers, ids and the rows of W' they choose. Returns x."""
    w = params["weight_ih"]
    table.entries["D"] = 0 if x.dtype.kind in "iu" else x.shape[2]
    if table.entries["D"]:
        x = contiguous(x)
        table.read("A", x, x.shape[2] * x.itemsize)
        table.read("WI", w)
    elif few(w, x):
        table.read("ids", np.arange(x.size), 8, np.int64)
        table.read("WI", columns(np, w, x.reshape(x.size)))
    else:
        table.read("ids", x, 8, np.int64)
        table.read("WI", w.T)
    return x


def inputs_back(table: Table, tape: Tape) -> tuple[Array | None, Array | None]:
    """Into the table, x, the weights and where dx goes; for integers, where the gates' adjoints go instead."""
    kept, params = tape.saved, tape.params
    x, u = kept.x, params["weight_hh"]
    table.read("WH", u)
    if "weight_hr" in params:
        table.read("WR", params["weight_hr"])
    if x.dtype.kind not in "iu":
        inputs(table, params, x)
        dx = aligned(x.shape, u.dtype)
        table.point("DX", address(dx), x.shape[2] * u.itemsize)
        return dx, None
    table.entries["D"] = 0
    dgates = [aligned((*x.shape, u.shape[0]), u.dtype) for _ in range(2 - kept.sources.same)]
    for name, a in zip("XY", dgates, strict=False):
        table.keep(a)
        table.point(name, address(a), u.shape[0] * u.itemsize)
    return None, dgates[0]


def call(source: str, names: Sequence[str], table: Mapping[str, int]) -> None:
    """Run a kernel on the entries of its table; those that are missing are 0."""
    compile_cache.compiled(source)(np.array([table.get(name, 0) for name in names], np.int64))


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
    return Places(compile_cache.compiled(source, signature), where, np.array(sizes, np.int64), len(names))


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
