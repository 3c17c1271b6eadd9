"""What a compiled pass hands to its kernel: a table of numbers and addresses, and the arrays behind them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xprnn.affine import columns, few
from xprnn.arrays import Array, Params
from xprnn.kernels import library
from xprnn.kernels.ragged import Rows
from xprnn.kernels.source import Sources
from xprnn.kernels.threads import Part
from xprnn.kernels.walk import contiguous
from xprnn.tape import State, Tape

__all__ = [
    "ALIGNED",
    "Kept",
    "Table",
    "address",
    "aligned",
    "back_room",
    "call",
    "forward_room",
    "inputs",
    "inputs_back",
    "padded",
    "projection",
    "room_for",
]

ALIGNED = 64  # bytes: a vector that lies across two lines of the cache is read twice
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


def address(a: Array) -> int:
    """Where its first element lies."""
    return int(a.__array_interface__["data"][0])


def aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """Fresh memory that begins on a line of the cache."""
    size, line = math.prod(shape), ALIGNED // np.dtype(dtype).itemsize
    whole = np.empty(size + line, dtype)
    skip = -address(whole) % ALIGNED // whole.itemsize
    return whole[skip : skip + size].reshape(shape)


def room_for(dtype: Any, sizes: Mapping[str, int]) -> tuple[dict[str, Array], dict[str, int]]:
    """Flat arrays of these sizes in one piece of memory, and their addresses: asking for one takes a microsecond."""
    item = np.dtype(dtype).itemsize
    line = ALIGNED // item
    whole = np.empty(sum(sizes.values()) + (len(sizes) + 1) * line, dtype)
    arrays, table, at = {}, {}, address(whole)
    start = -at % ALIGNED // item
    for name, size in sizes.items():
        arrays[name], table[name] = whole[start : start + size], at + start * item
        start += -(-size // line) * line
    return arrays, table


def padded(columns: int, item: int) -> int:
    """The width of a matrix with so many columns in panels."""
    lanes = library.lanes(item)
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
    edge, own = library.tile_size(item), padded(hidden, item)
    sizes = {"B": n * wide, "O": edge + max(d, own, edge), "Q": width * inputs, "U": width * wide}
    sizes |= {"LA": (width + 2 * library.tile_rows()) * rows, "LB": rows * max(inputs, own)}
    apart = width + ALIGNED // item * (d > 0 and width * item % _CLASH == 0)
    sizes |= dict.fromkeys(("X", "Y")[: (2 - sources.same) * (d > 0)], rows * apart)
    numbers = {"J": block, "Hz": wide, "Xw": apart, "room": rows, "zeros": edge}
    if sources.halves.early:
        cut, sizes = sources.halves.first * hidden, sizes | {"DQ": n * wide}
        numbers |= {"cut": cut, "half": -(-cut // library.tile_rows()) * library.tile_rows()}
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
    library.compiled(source)(np.array([table.get(name, 0) for name in names], np.int64))
