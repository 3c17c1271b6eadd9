"""Arguments of the compiled kernels: an int64 array of numbers and addresses, and the memory behind the addresses."""

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


_BLOCK_BYTES = 1 << 20  # size limit of a forward block's projection, so that it stays in the L2 cache
_CACHE_ALIAS_STRIDE = 1 << 11  # bytes: rows this far apart compete for the same few sets of the L1 cache
_BLOCK_ROWS = 256  # rows of a backward block, whose contributions to the weight gradients are added at once


class SavedForBackward(NamedTuple):
    """Arrays that a forward pass saves for backward, (T, N, .) each, with rows in the order of `row_order`."""

    sources: KernelSources
    row_order: RowOrder
    x: Array
    gates: Array | None  # G: the first saved values of the cell
    extra_values: dict[str, Array]  # Vj: the other saved values
    states_before: State
    states_after: State
    result: Any = None  # scan_plan.ForwardResult, if a plan ran the pass


def panel_width(columns: int, itemsize: int) -> int:
    """Return the number of columns rounded up to whole vectors: the width of a matrix packed into panels."""
    lanes = compile_cache.vector_lanes(itemsize)
    return -(-columns // lanes) * lanes


def projection_size(params: Params) -> int:
    """Return the width P of a projected h, or 0."""
    return int(params["weight_hr"].shape[0]) if "weight_hr" in params else 0


WorkspaceSizes = tuple[dict[str, int], dict[str, int]]


def forward_workspace(
    sources: KernelSources, shape: Sequence[int], itemsize: int, proj_size: int = 0
) -> WorkspaceSizes:
    """Compute the sizes that a forward kernel needs. forward_driver.py documents the names.

    Args:
        sources: the cell's kernels.
        shape: (T, R, D, H, W), R the number of rows that the kernel processes.
        itemsize: of the arrays, in bytes.
        proj_size: width of the projected h, or 0.

    Returns:
        Scalar arguments by name, and the number of elements of each workspace array by name.
    """
    T, R, D, H, W = shape
    first_width, separate = sources.gate_groups.first_gates * H, sources.gate_groups.separate_recurrent
    first_padded = panel_width(first_width, itemsize)
    padded = first_padded + panel_width(W - first_width, itemsize)
    recurrent_width = first_padded * separate[0] + (padded - first_padded) * separate[1]
    block_steps = max(1, min(T, _BLOCK_BYTES // max(1, R * padded * itemsize)))
    sizes = {"Q": D * padded, "U": (proj_size or H) * padded, "P": block_steps * R * padded}
    sizes |= {"B": R * recurrent_width, "K": padded, "L": recurrent_width}
    scalars = {"W0": first_width, "Wp0": first_padded, "Wp": padded, "block_steps": block_steps}
    projection_stride = panel_width(proj_size, itemsize)
    if proj_size:
        scalars |= {"HP": proj_size, "projection_stride": projection_stride}
        sizes |= {"UR": H * projection_stride, "HN": R * projection_stride}
    return scalars, sizes | {"O": projection_stride}


def backward_workspace(
    sources: KernelSources, shape: Sequence[int], itemsize: int, proj_size: int = 0
) -> WorkspaceSizes:
    """Compute the sizes that a backward kernel needs, as `forward_workspace`. B and O must be zeroed by the caller."""
    T, R, D, H, W = shape
    block_steps = max(1, min(T, -(-_BLOCK_ROWS // max(1, R))))
    capacity, h_padded, d_padded = block_steps * R, panel_width(proj_size or H, itemsize), panel_width(D, itemsize)
    tile_size, tile_rows = compile_cache.tile_size(itemsize), compile_cache.tile_rows()
    hidden_padded = panel_width(H, itemsize)
    sizes = {"B": R * h_padded, "O": tile_size + max(D, hidden_padded, tile_size)}
    sizes |= {"Q": W * d_padded, "U": W * h_padded}
    sizes |= {"LA": (W + 2 * tile_rows) * capacity, "LB": capacity * max(d_padded, hidden_padded)}
    x_stride = W + ALIGNMENT // itemsize * (D > 0 and W * itemsize % _CACHE_ALIAS_STRIDE == 0)
    sizes |= dict.fromkeys(("X", "Y")[: (2 - sources.dx_is_dh) * (D > 0)], capacity * x_stride)
    scalars = {"block_steps": block_steps, "Hp": h_padded, "X_stride": x_stride}
    scalars |= {"capacity": capacity, "zeros": tile_size}
    if sources.gate_groups.has_pregates:
        first_width, sizes = sources.gate_groups.first_gates * H, sizes | {"DQ": R * h_padded}
        scalars |= {"W0": first_width, "W0_packed": -(-first_width // tile_rows) * tile_rows}
    if proj_size:
        sizes |= {"UR": proj_size * hidden_padded, "DH": capacity * proj_size, "DR": R * hidden_padded}
        sizes |= {"SR": proj_size}
        scalars |= {"HP": proj_size, "projection_stride": hidden_padded}
    return scalars, sizes


class KernelArguments:
    """Arguments of a kernel by name, for the whole batch or for a range of its rows."""

    def __init__(self, entries: dict[str, int]) -> None:
        self.entries = entries
        self._row_strides: dict[str, int] = {}
        self._active_counts: Array | None = None
        self._references: list[Array] = []  # arrays that must outlive the addresses in `entries`

    def set_pointer(self, name: str, address: int, stride: int = 0) -> None:
        """Set an address. `stride` is the number of bytes between two rows of the batch, 0 if there are none."""
        self.entries[name] = address
        if stride:
            self._row_strides[name] = stride

    def set_input(self, name: str, a: Array, stride: int = 0, dtype: Any = None) -> None:
        """Set the address of an input array, copied if it is not C-contiguous."""
        a = contiguous(a) if dtype is None else np.ascontiguousarray(a, dtype)
        self.keep_alive(a)
        self.set_pointer(name, address(a), stride)

    def set_cotangent(self, k: int, d: Array, dtype: Any) -> None:
        """Set the caller's cotangent of state k (T, N, H), copied only if its rows are not contiguous."""
        item = dtype.itemsize
        is_readable = d.dtype == dtype and d.strides[-1] == item and not (d.strides[0] % item or d.strides[1] % item)
        d = d if is_readable else np.ascontiguousarray(d, dtype)
        self.keep_alive(d)
        self.set_pointer(f"I{k}", address(d), d.strides[1])
        self.entries |= {f"I{k}_step_stride": d.strides[0] // item, f"I{k}_row_stride": d.strides[1] // item}

    def keep_alive(self, a: Array) -> None:
        """Hold a reference to an array of which the kernel knows only the address."""
        self._references.append(a)

    def set_sizes(self, row_order: RowOrder, shape: tuple[int, ...]) -> None:
        """Set the sizes (T, N, H, W), the mask and the resets."""
        self.entries |= dict(zip("TNHW", shape, strict=True))
        if row_order.active is not None:
            self._active_counts = np.zeros(shape[0], np.int64)
            for t0, t1, k in row_order.step_runs:
                self._active_counts[t0:t1] = k
            self.entries["has_mask"] = 1
            self.set_input("active", row_order.active, 1)
        if row_order.reset is not None:
            self.entries["has_reset"] = 1
            self.set_input("reset", row_order.reset, 1)

    def for_rows(self, row_range: RowRange) -> dict[str, int]:
        """Return the arguments for a range of rows."""
        moved = {
            name: self.entries[name] + row_range.start * stride
            for name, stride in self._row_strides.items()
            if row_range.start
        }
        if self._active_counts is not None:
            counts = np.clip(self._active_counts - row_range.start, 0, row_range.size)
            self.keep_alive(counts)
            moved["active_counts"] = address(counts)
        return {**self.entries, **moved, "R": row_range.size}


def bind_inputs(arguments: KernelArguments, params: Params, x: Array) -> Array:
    """Set x (T, N, D) and its weight; for integer x (T, N), ids and rows of W'. Return x in C order."""
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
    """Set x and the weights, and allocate dx.

    Returns:
        (dx, None), or for integer x (None, cotangents of the gates (T, N, W)).
    """
    saved, params = tape.saved, tape.params
    x, u = saved.x, params["weight_hh"]
    arguments.set_input("WH", u)
    if "weight_hr" in params:
        arguments.set_input("WR", params["weight_hr"])
    if x.dtype.kind not in "iu":
        bind_inputs(arguments, params, x)
        dx = aligned_empty(x.shape, u.dtype)
        arguments.set_pointer("DX", address(dx), x.shape[2] * u.itemsize)
        return dx, None
    arguments.entries["D"] = 0
    dgates = [aligned_empty((*x.shape, u.shape[0]), u.dtype) for _ in range(2 - saved.sources.dx_is_dh)]
    for name, a in zip("XY", dgates, strict=False):
        arguments.keep_alive(a)
        arguments.set_pointer(name, address(a), u.shape[0] * u.itemsize)
    return None, dgates[0]


def launch(source: str, argument_names: Sequence[str], arguments: Mapping[str, int]) -> None:
    """Run a kernel. Arguments that are not set are 0."""
    compile_cache.compile_kernel(source)(np.array([arguments.get(name, 0) for name in argument_names], np.int64))


class Arena:
    """Layout of several arrays in one allocation, each aligned to a cache line.

    Args:
        itemsize: of an element, in bytes.
        sizes: number of elements of each array.
        zeroed_before: the arrays before this one are zeroed in every new allocation.
    """

    def __init__(self, itemsize: int, sizes: Mapping[str, int], zeroed_before: str = "") -> None:
        self.offsets, self.byte_offsets = dict[str, int](), dict[str, int]()
        line, size = ALIGNMENT // itemsize, 0
        for name, length in sizes.items():
            self.offsets[name], self.byte_offsets[name] = size, size * itemsize
            size += -(-length // line) * line
        self.size = size + line  # one more line, so that the first array can start at a cache line
        self.zeroed_size = self.offsets[zeroed_before] if zeroed_before else 0

    def view(self, memory: Array, base: int, name: str, shape: tuple[int, ...]) -> Array:
        """Return an array of the arena as a view; `base` elements of `memory` are skipped for alignment."""
        start, size = base + self.offsets[name], 1
        for n in shape:
            size *= n
        return memory[start : start + size].reshape(shape)


class PointerBinder(NamedTuple):
    """Compiled function that checks a call's arrays and fills the kernel's arguments with their addresses.

    bind(pointer_sources, expected_sizes, arguments, *new arenas, *saved arenas, *state pairs, *arrays), where a state
    pair is the array of the running state, and of its initial value, (1, N, H) both. It zeroes the first elements of
    the new arenas and copies the initial states. It returns -1 if a shape is not the expected one. Otherwise byte i of
    the result is the number of elements that new arena i skips for alignment. It raises TypeError for another dtype or
    memory order.
    """

    bind: Callable[..., int]
    pointer_sources: Array  # (2, arguments): which array an argument points into (0: none), and the offset or scalar
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
    """Make the binder of a kernel.

    Args:
        argument_names: names of the kernel's arguments. Those that nothing below sets are 0.
        scalars: arguments that are numbers.
        new_arenas: arenas that are allocated for every call, each with the byte offsets of its arguments.
        array_offsets: byte offsets of arguments in the saved arenas, then in each running state, then in each array.
        num_saved_arenas: number of arenas of an earlier pass, the first ones of `array_offsets`.
        initial_state_offsets: where the initial value of each state is copied to: an element of the first new arena
            for state 0, of the second for the others.
        shapes: expected shapes of the arrays.
        bits: 32 or 64, of a float.
        state_shape: (N, H) of a state.
    """
    pointer_sources = np.zeros((2, len(argument_names)), np.int64)
    pointer_sources[1] = [scalars.get(name, 0) for name in argument_names]
    for i, offsets in enumerate((*(offsets for _, offsets in new_arenas), *array_offsets), 1):
        for name, start in offsets.items():
            if name in argument_names:
                j = argument_names.index(name)
                assert not pointer_sources[0, j]
                pointer_sources[:, j] = i, start
    sizes = [
        *(arena.zeroed_size for arena, _ in new_arenas),
        *initial_state_offsets,
        *state_shape,
        *(n for shape in shapes for n in shape),
    ]
    source, signature = _binder_source(
        len(new_arenas), num_saved_arenas, len(initial_state_offsets), tuple(map(len, shapes)), bits
    )
    binder = compile_cache.compile_kernel(source, signature)
    return PointerBinder(binder, pointer_sources, np.array(sizes, np.int64), len(argument_names))


@lru_cache(maxsize=256)
def _binder_source(num_new: int, num_saved: int, num_states: int, ranks: tuple[int, ...], bits: int) -> tuple[str, str]:
    """Print a binder's source and its numba signature."""
    new, saved = [f"new{i}" for i in range(num_new)], [f"saved{i}" for i in range(num_saved)]
    pairs = [f"{kind}{k}" for k in range(num_states) for kind in ("final", "initial")]
    arrays = [f"array{i}" for i in range(len(ranks))]
    names = ["pointer_sources", "sizes", "arguments", *new, *saved, *pairs, *arrays]
    at = num_new + num_states + 2
    checks = [f"{name}.shape == (1, sizes[{at - 2}], sizes[{at - 1}])" for name in pairs]
    for name, rank in zip(arrays, ranks, strict=True):
        checks += [f"{name}.shape[{i}] == sizes[{at + i}]" for i in range(rank)]
        at += rank
    lines = [f"if not ({' and '.join(checks)}):", "    return -1", f"starts = np.empty({len(names) - 2}, np.int64)"]
    lines += ["starts[0] = skips = 0"]
    for i, name in enumerate((*new, *saved)):
        lines += [f"at = {name}.ctypes.data", f"skip = -at % {ALIGNMENT}", f"starts[{i + 1}] = at + skip"]
        if i < num_new:
            lines += [f"skip //= {name}.itemsize", f"{name}[skip : skip + sizes[{i}]] = 0", f"skips += skip << {8 * i}"]
    for i, name in enumerate((*pairs[::2], *arrays), num_new + num_saved + 1):
        lines += [f"starts[{i}] = {name}.ctypes.data"]
    lines += ["for j in range(arguments.size):"]
    lines += ["    arguments[j] = pointer_sources[1, j] + starts[pointer_sources[0, j]]"]
    for k in range(num_states):
        start = f"(skips >> {8 * (k > 0)}) % 256 + sizes[{num_new + k}]"
        lines += [
            f"initial, at = initial{k}[0], {start}",
            "for r in range(len(initial)):",
            "    for j in range(initial.shape[1]):",
        ]
        lines += [f"        new{int(k > 0)}[at] = final{k}[0, r, j] = initial[r, j]", "        at += 1"]
    text = "\n    ".join((f"def kernel({', '.join(names)}):", *lines, "return skips"))
    real = f"float{bits}"
    kinds = ["int64[:, ::1]", "int64[::1]", "int64[::1]", *[f"{real}[::1]"] * num_new]
    kinds += [f"Array({real}, 1, 'C', True)"] * num_saved
    kinds += [f"{real}[:, :, ::1]", f"Array({real}, 3, 'C', True)"] * num_states
    kinds += [f"Array({real}, {n}, 'C', True)" for n in ranks]
    return f"{_BINDER_HEADER}{text}\n", f"int64({', '.join(kinds)})"


_BINDER_HEADER = '''"""Kernel arguments, printed by xprnn (a cache entry, safe to delete)"""
import numpy as np


'''
