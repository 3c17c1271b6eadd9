"""ScanKernel: the compiled functions of a cell for one dtype, and the argument templates of its calls.

The drivers and the matrix products are compiled once for each dtype. A cell adds its pointwise functions. The entry
points (bind.py) are compiled for each dtype and number of states and vectors. All machine code is cached on disk.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from xprnn.cells.cell import Cell
from xprnn.kernels.jit import compile_cache
from xprnn.kernels.jit.pointwise import PointwiseSources, pointwise_sources
from xprnn.kernels.memory import ALIGNMENT
from xprnn.kernels.tracing.graph import UntraceableError

__all__ = ["NAME", "ScanKernel", "scan_kernel", "unsupported_reason"]

NAME = "compiled by numba"
_BITS = {np.dtype(np.float32): 32, np.dtype(np.float64): 64}

_DRIVER_SOURCE = '''"""The {name} driver, printed by xprnn (a cache entry, safe to delete)"""
import numpy as np
from xprnn.kernels.jit.{name} import {name}

ZERO = np.float{bits}(0)


def kernel(address):
    {name}(address, ZERO)
    return 0
'''
_ENTRY_SOURCE = '''"""The entry point {name} for {what}, printed by xprnn (a cache entry, safe to delete)"""
from xprnn.kernels.jit.{module} import {name}


def kernel({arguments}):
    return {name}({arguments})
'''


@lru_cache(maxsize=512)
def scan_kernel(cell: Cell, dtype: Any, projected: bool) -> "ScanKernel | str":
    """Return the kernel of a cell for arrays of this dtype, or the reason why there is none.

    Args:
        cell: the cell.
        dtype: of the arrays.
        projected: h is projected by weight_hr.
    """
    if dtype not in _BITS:
        return f"{dtype} is neither float32 nor float64"
    if not compile_cache.numba_available():
        return 'numba is not installed: pip install ".[fast]" in the clone of xprnn'
    try:
        sources = pointwise_sources(cell, _BITS[dtype], projected)
    except UntraceableError as error:
        return f"its cell can't be traced: {error}"
    kernel = ScanKernel(cell, dtype, sources, projected)
    return kernel if kernel.compiles else "numba can't compile its cell"


def unsupported_reason(cell: Cell, dtype: Any, projected: bool) -> str:
    """Return why there is no kernel, or ""."""
    kernel = scan_kernel(cell, dtype, projected)
    return kernel if isinstance(kernel, str) else ""


def entry_counts(num_states: int, num_vectors: int) -> tuple[int, int]:
    """Return the lengths of the tuples of states and vectors in the signatures of entry points.

    Few lengths, because an entry point is compiled for each, which takes seconds.
    """
    return max(2, num_states), max(3, num_vectors) if num_vectors else 0


class ScanKernel:
    """Compiled functions of a cell for one dtype."""

    def __init__(self, cell: Cell, dtype: Any, sources: PointwiseSources, projected: bool) -> None:
        self.cell, self.dtype, self.sources, self.projected = cell, dtype, sources, projected
        self.bits = _BITS[dtype]
        self.num_states, self.num_vectors = len(cell.states), len(cell.vectors)
        self._templates: dict[tuple[bool, bool, str], Any] = {}
        self._entries: dict[tuple[str, bool], Any] = {}
        # Arrays of size 0, for arguments of the entry points that are absent.
        self.no_vector, self.no_matrix, self.no_sequence = (np.empty((0,) * rank, dtype) for rank in (1, 2, 3))
        self.no_mask = np.empty((0, 0), np.uint8)
        self._zeros: dict[int, Any] = {}
        self.padded_states, self.padded_vectors = entry_counts(self.num_states, self.num_vectors)

    def zeros(self, size: int) -> Any:
        """Return a read-only array of zeros, in place of a missing bias."""
        if size not in self._zeros:
            self._zeros[size] = np.zeros(size, self.dtype)
            self._zeros[size].flags.writeable = False
        return self._zeros[size]

    def tape_size(self, sizes: tuple[int, int, int, int], has_reset: bool) -> int:
        """Return the number of elements of a tape without its first state; `sizes` are (T, N, H, P).

        bind.tape_layout places these arrays, each on a cache line.
        """
        T, N, H, P = sizes
        lengths = [(T + 1) * N * H] * (self.num_states - 1) + [T * N * H] * self.sources.num_extra
        lengths += [T * N * self.cell.gates * H] * self.sources.saves_gates
        lengths += [T * N * H] * (self.cell.pregates > 0 or self.projected)
        lengths += [T * N * P, *[T * N * H] * (self.num_states - 1)] * has_reset
        line = ALIGNMENT // (self.bits // 8)
        return sum(-(-length // line) * line for length in lengths) + line

    def states_tuple(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """Return a tuple as long as the entry points expect: they are compiled for at least two states."""
        return (*arrays, *(self.no_sequence,) * (self.padded_states - len(arrays)))

    def vectors_tuple(self, arrays: Iterable[Any]) -> tuple[Any, ...]:
        """Return a tuple of the cell's vectors as long as the entry points expect."""
        vectors = tuple(arrays)
        return (*vectors, *(self.no_vector,) * (self.padded_vectors - len(vectors)))

    @cached_property
    def compiles(self) -> bool:
        """True if numba compiles all functions of the cell."""
        texts = [self.sources.forward_rows, self.sources.backward_rows]
        texts += [t for t in (self.sources.pregate_rows, self.sources.pregate_backward_rows) if t]
        return all(compile_cache.can_compile_cfunc(text, 4) for text in texts) and compile_cache.can_compile_gemm(
            self.bits // 8
        )

    def template(self, reverse: bool, record_tape: bool, driver: str = "forward") -> Any:
        """Return the argument record of a call as an array of int64, without sizes and addresses.

        Args:
            reverse: the scan runs from the last step to the first.
            record_tape: there is a tape.
            driver: "forward" or "backward". Only this driver is compiled, because that takes seconds.
        """
        key = reverse, record_tape, driver
        if key not in self._templates:
            self._templates[key] = self._make_template(reverse, record_tape, driver)
        return self._templates[key]

    def _make_template(self, reverse: bool, record_tape: bool, driver: str) -> Any:
        from xprnn.kernels.jit.record import SCAN_RECORD

        sources, cell = self.sources, self.cell
        fields = {
            "item": self.bits // 8,
            "shift": 2 if self.bits == 32 else 3,
            "lanes": compile_cache.vector_lanes(self.bits // 8),
            "gates_count": cell.gates,
            "first_gates": sources.first_gates,
            "num_states": self.num_states,
            "num_vectors": self.num_vectors,
            "num_extra": sources.num_extra,
            "separate_first": sources.separate[0],
            "separate_second": sources.separate[1],
            "has_pregates": cell.pregates > 0,
            "has_projection": self.projected,
            "has_direct_path": sources.has_direct_path,
            "dx_is_dh": sources.dx_is_dh,
            "saves_gates": sources.saves_gates,
            "fused": not cell.pregates and not self.projected,
            "reverse": reverse,
            "record_tape": record_tape,
            "gemm": compile_cache.gemm_kernel(self.bits // 8).address,
        }
        text = _DRIVER_SOURCE.format(name=driver, bits=self.bits)
        fields[f"{driver}_driver"] = compile_cache.compile_cfunc(text, 1).address
        for name in ("forward_rows", "backward_rows", "pregate_rows", "pregate_backward_rows"):
            if text := getattr(sources, name):
                fields[name] = compile_cache.compile_cfunc(text, 4).address
        template = np.zeros(1, SCAN_RECORD)
        for name, value in fields.items():
            template[name] = value
        return template.view(np.int64)

    def entry(self, name: str, integer: bool) -> Any:
        """Return an entry point of bind.py.

        Args:
            name: its name.
            integer: x holds class numbers.
        """
        key = name, integer
        if key not in self._entries:
            self._entries[key] = self._compile_entry(name, integer)
        return self._entries[key]

    def _compile_entry(self, name: str, integer: bool) -> Any:
        from xprnn.kernels.jit import entry_types

        counts = self.padded_states, self.padded_vectors
        arguments, signature = entry_types.entry_signature(name, self.bits, *counts, integer)
        what = f"float{self.bits}, {self.padded_states} states, {self.padded_vectors} vectors"
        module = "bind_backward" if name == "backward" else "bind"
        text = _ENTRY_SOURCE.format(name=name, module=module, what=what, arguments=", ".join(arguments))
        return compile_cache.compile_kernel(text, signature)
