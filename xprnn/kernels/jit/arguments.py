"""What a compiled pass hands to its kernel: a table of numbers and addresses, and the arrays behind them."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays.linear import gather_columns, gather_is_cheaper
from xprnn.arrays.namespace import Array, Params
from xprnn.kernels.jit import compile_cache
from xprnn.kernels.jit.forward_driver import KernelSources
from xprnn.kernels.jit.threads import RowRange
from xprnn.kernels.memory import ALIGNMENT, address, aligned_empty, contiguous
from xprnn.kernels.row_order import RowOrder
from xprnn.kernels.tape import State, Tape

__all__ = [
    "Arena",
    "KernelArguments",
    "PointerBinder",
    "SavedForBackward",
    "backward_workspace",
    "bind_backward_inputs",
    "bind_inputs",
    "forward_workspace",
    "launch",
    "make_binder",
    "panel_width",
    "projection_size",
]


_BLOCK_BYTES = 1 << 20  # of a block's projection, which should stay in the second-level cache
_CACHE_ALIAS_STRIDE = 1 << 11  # rows so many bytes apart fall into the same few places of the first-level cache
_BLOCK_ROWS = 256  # of a block whose weights' gradients are added up at once


class SavedForBackward(NamedTuple):
    """What backward needs; arrays (T, N, .), rows in walking order."""

    sources: KernelSources
    row_order: RowOrder
    x: Array
    gates: Array | None  # the first saved values
    extra_values: dict[str, Array]  # the other saved values
    states_before: State
    states_after: State
    result: Any = None  # plain.py's record, where that wrote the tape


def panel_width(columns: int, itemsize: int) -> int:
    """The width of a matrix with so many columns in panels."""
    lanes = compile_cache.vector_lanes(itemsize)
    return -(-columns // lanes) * lanes


def projection_size(params: Params) -> int:
    """P where h is projected, else 0."""
    return int(params["weight_hr"].shape[0]) if "weight_hr" in params else 0


WorkspaceSizes = tuple[dict[str, int], dict[str, int]]


def forward_workspace(
    sources: KernelSources, shape: Sequence[int], itemsize: int, proj_size: int = 0
) -> WorkspaceSizes:
    """What a forward kernel needs for rows of `shape` = (T, R, D, H, W): numbers, and sizes of memory by name.

    `projected` is P, where h is.
    """
    count, rows, d, hidden, width = shape
    cut, apart = sources.gate_groups.first_gates * hidden, sources.gate_groups.separate_recurrent
    y = panel_width(cut, itemsize)
    z = y + panel_width(width - cut, itemsize)
    late = y * apart[0] + (z - y) * apart[1]
    block = max(1, min(count, _BLOCK_BYTES // max(1, rows * z * itemsize)))
    sizes = {"Q": d * z, "U": (proj_size or hidden) * z, "P": block * rows * z, "B": rows * late, "K": z, "L": late}
    numbers, wide = {"cut": cut, "Y": y, "Z": z, "J": block}, panel_width(proj_size, itemsize)
    if proj_size:
        numbers |= {"HP": proj_size, "Hw": wide}
        sizes |= {"UR": hidden * wide, "HN": rows * wide}
    return numbers, sizes | {"O": wide}


def backward_workspace(
    sources: KernelSources, shape: Sequence[int], itemsize: int, proj_size: int = 0
) -> WorkspaceSizes:
    """The same for a backward kernel; B and O must be 0 before."""
    count, n, d, hidden, width = shape
    block = max(1, min(count, -(-_BLOCK_ROWS // max(1, n))))
    rows, wide, inputs = block * n, panel_width(proj_size or hidden, itemsize), panel_width(d, itemsize)
    edge, own = compile_cache.tile_size(itemsize), panel_width(hidden, itemsize)
    sizes = {"B": n * wide, "O": edge + max(d, own, edge), "Q": width * inputs, "U": width * wide}
    sizes |= {"LA": (width + 2 * compile_cache.tile_rows()) * rows, "LB": rows * max(inputs, own)}
    apart = width + ALIGNMENT // itemsize * (d > 0 and width * itemsize % _CACHE_ALIAS_STRIDE == 0)
    sizes |= dict.fromkeys(("X", "Y")[: (2 - sources.dx_is_dh) * (d > 0)], rows * apart)
    numbers = {"J": block, "Hz": wide, "Xw": apart, "room": rows, "zeros": edge}
    if sources.gate_groups.has_pregates:
        cut, sizes = sources.gate_groups.first_gates * hidden, sizes | {"DQ": n * wide}
        numbers |= {"cut": cut, "half": -(-cut // compile_cache.tile_rows()) * compile_cache.tile_rows()}
    if proj_size:
        sizes |= {"UR": proj_size * own, "DH": rows * proj_size, "DR": n * own, "SR": proj_size}
        numbers |= {"HP": proj_size, "Hw": own}
    return numbers, sizes


class KernelArguments:
    """The numbers and addresses that a kernel is called with, for all rows or for a part of them."""

    def __init__(self, entries: dict[str, int]) -> None:
        self.entries = entries
        self._row_strides: dict[str, int] = {}
        self._active_counts: Array | None = None
        self._references: list[Array] = []  # while a kernel may read them

    def set_pointer(self, name: str, address: int, stride: int = 0) -> None:
        """Memory at this address; `stride` bytes from one row of the batch to the next."""
        self.entries[name] = address
        if stride:
            self._row_strides[name] = stride

    def set_input(self, name: str, a: Array, stride: int = 0, dtype: Any = None) -> None:
        """An array to be read, in C order."""
        a = contiguous(a) if dtype is None else np.ascontiguousarray(a, dtype)
        self.keep_alive(a)
        self.set_pointer(name, address(a), stride)

    def set_cotangent(self, k: int, d: Array, dtype: Any) -> None:
        """What the caller sends into state k (T, N, H), where it is if the kernel can read its rows, or else a copy."""
        item = dtype.itemsize
        whole = d.dtype == dtype and d.strides[-1] == item and not (d.strides[0] % item or d.strides[1] % item)
        d = d if whole else np.ascontiguousarray(d, dtype)
        self.keep_alive(d)
        self.set_pointer(f"I{k}", address(d), d.strides[1])
        self.entries |= {f"a{k}": d.strides[0] // item, f"b{k}": d.strides[1] // item}

    def keep_alive(self, a: Array) -> None:
        """Hold on to an array of which the kernel knows only the address."""
        self._references.append(a)

    def set_sizes(self, row_order: RowOrder, shape: tuple[int, ...]) -> None:
        """What every pass is told: the sizes (T, N, H, W), and which rows take part in which step."""
        count = shape[0]
        self.entries |= dict(zip("TNHW", shape, strict=True))
        if row_order.active is not None:
            self._active_counts = np.zeros(count, np.int64)
            for t0, t1, k in row_order.step_runs:
                self._active_counts[t0:t1] = k
            self.entries["some"] = 1
            self.set_input("active", row_order.active, 1)
        if row_order.reset is not None:
            self.entries["resets"] = 1
            self.set_input("reset", row_order.reset, 1)

    def for_rows(self, row_range: RowRange) -> dict[str, int]:
        """The entries for these rows."""
        at = {
            name: self.entries[name] + row_range.start * step
            for name, step in self._row_strides.items()
            if row_range.start
        }
        if self._active_counts is not None:
            counts = np.clip(self._active_counts - row_range.start, 0, row_range.size)
            self.keep_alive(counts)
            at["counts"] = address(counts)
        return {**self.entries, **at, "R": row_range.size}


def bind_inputs(arguments: KernelArguments, params: Params, x: Array) -> Array:
    """Into the table, x (T, N, D) and its weight; or, for integers, ids and the rows of W' they choose. Returns x."""
    w = params["weight_ih"]
    arguments.entries["D"] = 0 if x.dtype.kind in "iu" else x.shape[2]
    if arguments.entries["D"]:
        x = contiguous(x)
        arguments.set_input("A", x, x.shape[2] * x.itemsize)
        arguments.set_input("WI", w)
    elif gather_is_cheaper(w, x):
        arguments.set_input("ids", np.arange(x.size), 8, np.int64)
        arguments.set_input("WI", gather_columns(np, w, x.reshape(x.size)))
    else:
        arguments.set_input("ids", x, 8, np.int64)
        arguments.set_input("WI", w.T)
    return x


def bind_backward_inputs(arguments: KernelArguments, tape: Tape) -> tuple[Array | None, Array | None]:
    """Into the table, x, the weights and where dx goes; for integers, where the gates' adjoints go instead."""
    kept, params = tape.saved, tape.params
    x, u = kept.x, params["weight_hh"]
    arguments.set_input("WH", u)
    if "weight_hr" in params:
        arguments.set_input("WR", params["weight_hr"])
    if x.dtype.kind not in "iu":
        bind_inputs(arguments, params, x)
        dx = aligned_empty(x.shape, u.dtype)
        arguments.set_pointer("DX", address(dx), x.shape[2] * u.itemsize)
        return dx, None
    arguments.entries["D"] = 0
    dgates = [aligned_empty((*x.shape, u.shape[0]), u.dtype) for _ in range(2 - kept.sources.dx_is_dh)]
    for name, a in zip("XY", dgates, strict=False):
        arguments.keep_alive(a)
        arguments.set_pointer(name, address(a), u.shape[0] * u.itemsize)
    return None, dgates[0]


def launch(source: str, argument_names: Sequence[str], arguments: Mapping[str, int]) -> None:
    """Run a kernel on the entries of its table; those that are missing are 0."""
    compile_cache.compile_kernel(source)(np.array([arguments.get(name, 0) for name in argument_names], np.int64))


class Arena:
    """Places in one piece of memory, each on a line of the cache; `clear`: the entries before this place start as 0."""

    def __init__(self, itemsize: int, sizes: Mapping[str, int], zeroed_before: str = "") -> None:
        self.offsets, self.byte_offsets, line, size = dict[str, int](), dict[str, int](), ALIGNMENT // itemsize, 0
        for name, entries in sizes.items():
            self.offsets[name], self.byte_offsets[name] = size, size * itemsize
            size += -(-entries // line) * line
        self.size = size + line  # to begin on a line, wherever it lies
        self.zeroed_size = self.offsets[zeroed_before] if zeroed_before else 0

    def view(self, memory: Array, base: int, name: str, shape: tuple[int, ...]) -> Array:
        """The array in a place."""
        start, size = base + self.offsets[name], 1
        for n in shape:
            size *= n
        return memory[start : start + size].reshape(shape)


class PointerBinder(NamedTuple):
    """How a pass's table comes from its pieces.

    fill(places, sizes, table, *fresh, *old, *pairs, *given): fresh pieces; pieces of an earlier pass; for each state
    where its running value goes, and what it starts from, (1, N, H) both; arrays. Returns how many entries each fresh
    piece skips, a byte for each, or -1 where a shape is another; raises TypeError for other dtypes or orders.
    """

    bind: Callable[..., int]
    pointer_sources: Array
    expected_sizes: Array
    num_arguments: int


def make_binder(
    argument_names: Sequence[str],
    scalars: Mapping[str, int],
    new_arenas: Sequence[tuple[Arena, Mapping[str, int]]],
    array_offsets: Sequence[Mapping[str, int]],
    num_saved_arenas: int,
    initial_state_offsets: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    bits: int,
    state_shape: tuple[int, int] = (0, 0),
) -> PointerBinder:
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
    where = np.zeros((2, len(argument_names)), np.int64)
    where[1] = [scalars.get(name, 0) for name in argument_names]
    for i, piece in enumerate((*(places for _, places in new_arenas), *array_offsets), 1):
        for name, start in piece.items():
            if name in argument_names:
                j = argument_names.index(name)
                assert not where[0, j]
                where[:, j] = i, start
    sizes = [
        *(piece.zeroed_size for piece, _ in new_arenas),
        *initial_state_offsets,
        *state_shape,
        *(n for shape in shapes for n in shape),
    ]
    source, signature = _binder_source(
        len(new_arenas), num_saved_arenas, len(initial_state_offsets), tuple(map(len, shapes)), bits
    )
    return PointerBinder(
        compile_cache.compile_kernel(source, signature), where, np.array(sizes, np.int64), len(argument_names)
    )


@lru_cache(maxsize=256)
def _binder_source(fresh: int, old: int, states: int, ranks: tuple[int, ...], bits: int) -> tuple[str, str]:
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
        lines += [f"at = {name}.ctypes.data", f"skip = -at % {ALIGNMENT}", f"starts[{i + 1}] = at + skip"]
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
    return f"{_BINDER_HEADER}{text}\n", f"int64({', '.join(kinds)})"


_BINDER_HEADER = '''"""Written by xprnn: the table of a pass; it may be deleted at any time."""
import numpy as np


'''
