"""What a compiled pass hands to its kernel: a table of numbers and addresses, and the arrays behind them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays import Array
from xprnn.kernels import library
from xprnn.kernels.ragged import Rows
from xprnn.kernels.source import Sources
from xprnn.tape import State

__all__ = ["Kept", "address", "call", "common_entries", "packed_panels", "room_for"]


class Kept(NamedTuple):
    """What backward needs; arrays (T, N, .), rows in walking order."""

    sources: Sources
    rows: Rows
    x: Array
    gates: Array  # the projection, overwritten by the first saved values
    spare: dict[str, Array]  # the other saved values
    before: State
    after: State


def address(a: Array) -> int:
    """Where its first element lies."""
    return int(a.__array_interface__["data"][0])


def room_for(dtype: Any, sizes: Mapping[str, int]) -> tuple[dict[str, Array], dict[str, int]]:
    """Flat arrays of these sizes in one piece of memory, and their addresses: asking for one takes a microsecond."""
    whole, item, start = np.empty(sum(sizes.values()), dtype), np.dtype(dtype).itemsize, 0
    arrays, table, at = {}, {}, address(whole)
    for name, size in sizes.items():
        arrays[name], table[name] = whole[start : start + size], at + start * item
        start += size
    return arrays, table


def packed_panels(u: Array) -> tuple[Array, int]:
    """u (K, J) in panels of as many columns as the kernel takes at once, filled up with zeros: (P, K, .), its width."""
    wide, (inner, columns) = library.panel_width(u.itemsize), u.shape
    whole, rest = divmod(columns, wide)
    out = np.empty((whole + (rest > 0), inner, wide), u.dtype)
    out[:whole] = u[:, : whole * wide].reshape(inner, whole, wide).transpose(1, 0, 2)
    if rest:
        out[whole, :, :rest] = u[:, whole * wide :]
        out[whole, :, rest:] = 0
    return out, out.shape[0] * wide


def common_entries(rows: Rows, shape: tuple[int, ...]) -> tuple[dict[str, int], list[Array]]:
    """The table's first entries, and arrays that must live until the kernel is done."""
    count, n, hidden, width = shape
    table = {"T": count, "N": n, "H": hidden, "W": width}
    alive: list[Array] = []
    if rows.active is not None:
        counts = np.zeros(count, np.int64)
        for t0, t1, k in rows.runs:
            counts[t0:t1] = k
        alive += [counts, np.ascontiguousarray(rows.active)]
        table |= {"some": 1, "counts": address(alive[0]), "active": address(alive[1])}
    if rows.reset is not None:
        alive.append(np.ascontiguousarray(rows.reset))
        table |= {"resets": 1, "reset": address(alive[-1])}
    return table, alive


def call(source: str, names: Sequence[str], table: Mapping[str, int]) -> None:
    """Run a kernel on the entries of its table; those that are missing are 0."""
    library.compiled(source)(np.array([table.get(name, 0) for name in names], np.int64))
