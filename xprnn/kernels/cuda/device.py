"""What a CUDA pass asks of CuPy: memory, matrix products without temporaries, launches of printed kernels.

Products go to cuBLAS by address. `cupy.cublas.gemm` does the same, but makes four arrays on the host for each call and
wants views for its arguments, which costs more than the launch itself where a step is small.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays.namespace import Array
from xprnn.kernels.config import tf32_enabled

__all__ = [
    "CublasGemm",
    "address",
    "contiguous",
    "copy",
    "cublas_gemm",
    "empty",
    "make_launcher",
    "raw_kernel",
    "take_rows",
    "zeros",
]

_HOST_POINTERS, _DEFAULT_MATH, _TF32_MATH = 0, 0, 3  # of cublas_api.h; CuPy does not name the last
_THREADS_PER_BLOCK = 128
_MAX_GEMM_ROWS = 1 << 30  # of one product: cuBLAS counts them in 32 bits


def empty(shape: Sequence[int], dtype: Any) -> Array:
    """Memory on the current device."""
    import cupy

    return cupy.empty(tuple(shape), dtype)


def zeros(shape: Sequence[int], dtype: Any) -> Array:
    """Zeros on the current device."""
    import cupy

    return cupy.zeros(tuple(shape), dtype)


def contiguous(a: Array) -> Array:
    """`a` in C order: itself, or a copy."""
    import cupy

    return cupy.ascontiguousarray(a)


def copy(a: Array) -> Array:
    """A copy in C order."""
    import cupy

    return cupy.array(a, order="C")


def take_rows(out: Array, table: Array, ids: Array) -> None:
    """out (M, K) = the rows of table that ids (M,) name."""
    import cupy

    cupy.take(table, ids, axis=0, out=out)


def address(a: Array | None) -> int:
    """Where its first element lies; 0 for None."""
    return 0 if a is None else int(a.data.ptr)


class CublasGemm(NamedTuple):
    """cuBLAS, set up for the products of one pass."""

    handle: int
    gemm: Callable[..., None]
    one: Any  # 1 and 0 in host memory, in the arrays' dtype
    zero: Any

    def make_gemm(
        self, sizes: tuple[int, int, int], transposed: tuple[bool, bool], accumulate: bool
    ) -> Callable[[int, int, int], None]:
        """out (M, N) = a (M, K) b (K, N), or += with `add`, as a function of the three addresses; C order, no gaps.

        Args:
            sizes: M, N, K.
            turned: whether a is given as (K, M), and b as (N, K).
            add: whether to add to what out holds.
        """
        m, n, k = sizes
        lda, ldb = m if transposed[0] else k, k if transposed[1] else n
        # cuBLAS counts along columns: it sees each matrix turned, so it is asked for out' = b' a'.
        ta, tb, handle, gemm = int(transposed[0]), int(transposed[1]), self.handle, self.gemm
        alpha = int(self.one.ctypes.data)
        beta = alpha if accumulate else int(self.zero.ctypes.data)
        return lambda out, a, b: gemm(handle, tb, ta, n, m, k, alpha, b, ldb, a, lda, beta, out, n)

    def matmul(self, out: Array, a: Array, b: Array, *, rhs_transposed: bool = False) -> None:
        """out (M, N) = a (M, K) b (K, N), b given as (N, K) if `turned`; any number of rows."""
        (m, k), n, item = a.shape, out.shape[1], a.dtype.itemsize
        for start in range(0, m, _MAX_GEMM_ROWS):
            some = min(_MAX_GEMM_ROWS, m - start)
            to, of = address(out) + start * n * item, address(a) + start * k * item
            self.make_gemm((some, n, k), (False, rhs_transposed), False)(to, of, address(b))

    def matmul_lhs_transposed(self, out: Array, a: Array, b: Array) -> None:
        """out (K, N) = a' b for a (M, K) and b (M, N); any number of rows."""
        (m, k), n, item = a.shape, b.shape[1], a.dtype.itemsize
        for start in range(0, m, _MAX_GEMM_ROWS):
            of, by = address(a) + start * k * item, address(b) + start * n * item
            some = min(_MAX_GEMM_ROWS, m - start)
            self.make_gemm((k, n, some), (True, False), start > 0)(address(out), of, by)


@contextmanager
def cublas_gemm(dtype: Any) -> Iterator[CublasGemm]:
    """cuBLAS on the current device and stream, in the arithmetic that `precision` asks for; put back at the end."""
    from cupy.cuda import cublas, get_cublas_handle

    single = np.dtype(dtype) == np.float32
    handle = get_cublas_handle()
    math, pointers = cublas.getMathMode(handle), cublas.getPointerMode(handle)
    try:
        cublas.setMathMode(handle, _TF32_MATH if single and tf32_enabled() else _DEFAULT_MATH)
        cublas.setPointerMode(handle, _HOST_POINTERS)
        yield CublasGemm(handle, cublas.sgemm if single else cublas.dgemm, np.ones(1, dtype), np.zeros(1, dtype))
    finally:
        cublas.setMathMode(handle, math)
        cublas.setPointerMode(handle, pointers)


@lru_cache(maxsize=1024)
def raw_kernel(source: str, name: str) -> Any:
    """A function of a printed source; CuPy compiles it at its first launch on a device, and keeps it on disk."""
    import cupy

    # Without it CuPy 13 asks for C++11, CuPy 14 for C++17.
    return cupy.RawModule(code=source, options=("--std=c++17",)).get_function(name)


def make_launcher(
    kernel: Any, fields: Sequence[str], values: Mapping[str, Any], min_threads: int
) -> Callable[[int], None]:
    """step -> launch the kernel `run` for it. Its one argument, 8 bytes a field, is passed by value.

    The launch copies the argument, so the next step's number may be written while a kernel still waits for its turn.

    Args:
        run: from `kernel`.
        fields: the names of the argument's fields; the first is the step.
        values: numbers, or arrays for their addresses; what is missing is 0. The caller keeps the arrays alive.
        threads: how many are needed at least.
    """
    given = (values.get(name, 0) for name in fields)
    numbers = np.asarray([v if isinstance(v, int) else address(v) for v in given], np.int64)
    whole = (numbers.view(f"V{numbers.nbytes}"),)  # CuPy passes a NumPy array of one element by value
    grid, block = (-(-min_threads // _THREADS_PER_BLOCK),), (_THREADS_PER_BLOCK,)

    def launch(t: int) -> None:
        numbers[0] = t
        kernel(grid, block, whole)

    return launch
