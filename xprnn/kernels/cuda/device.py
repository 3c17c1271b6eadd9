"""CuPy helpers of the CUDA kernels: allocation, matrix products without temporaries, launches of generated kernels.

Matrix products call cuBLAS with raw addresses. `cupy.cublas.gemm` computes the same product, but each call creates four
host arrays and needs array views as arguments. For a small step that overhead exceeds the cost of the launch.
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

_HOST_POINTERS, _DEFAULT_MATH, _TF32_MATH = 0, 0, 3  # constants of cublas_api.h; CuPy does not name the last
_THREADS_PER_BLOCK = 128
_MAX_GEMM_ROWS = 1 << 30  # per gemm call: cuBLAS takes the row count as a 32-bit int


def empty(shape: Sequence[int], dtype: Any) -> Array:
    """Allocate an uninitialized array on the current device."""
    import cupy

    return cupy.empty(tuple(shape), dtype)


def zeros(shape: Sequence[int], dtype: Any) -> Array:
    """Allocate an array of zeros on the current device."""
    import cupy

    return cupy.zeros(tuple(shape), dtype)


def contiguous(a: Array) -> Array:
    """Return `a` if it is C-contiguous, else a C-contiguous copy."""
    import cupy

    return cupy.ascontiguousarray(a)


def copy(a: Array) -> Array:
    """Return a C-contiguous copy."""
    import cupy

    return cupy.array(a, order="C")


def take_rows(out: Array, table: Array, ids: Array) -> None:
    """Gather rows: out (M, K) = table[ids], with ids (M,)."""
    import cupy

    cupy.take(table, ids, axis=0, out=out)


def address(a: Array | None) -> int:
    """Return the device address of the first element, or 0 for None."""
    return 0 if a is None else int(a.data.ptr)


class CublasGemm(NamedTuple):
    """Matrix products by cuBLAS for one forward or backward pass."""

    handle: int
    gemm: Callable[..., None]
    one: Any  # 1 and 0 in host memory, in the dtype of the arrays
    zero: Any

    def make_gemm(
        self, sizes: tuple[int, int, int], transposed: tuple[bool, bool], accumulate: bool
    ) -> Callable[[int, int, int], None]:
        """Return a function f(out, a, b) of three addresses that computes out (M, N) = a (M, K) b (K, N).

        All matrices are C-contiguous.

        Args:
            sizes: M, N, K.
            transposed: a is stored as (K, M); b is stored as (N, K).
            accumulate: add to out instead of overwriting it.
        """
        m, n, k = sizes
        lda, ldb = m if transposed[0] else k, k if transposed[1] else n
        # cuBLAS is column-major: it reads each matrix as its transpose, so the call computes out.T = b.T a.T.
        ta, tb, handle, gemm = int(transposed[0]), int(transposed[1]), self.handle, self.gemm
        alpha = int(self.one.ctypes.data)
        beta = alpha if accumulate else int(self.zero.ctypes.data)
        return lambda out, a, b: gemm(handle, tb, ta, n, m, k, alpha, b, ldb, a, lda, beta, out, n)

    def matmul(self, out: Array, a: Array, b: Array, *, rhs_transposed: bool = False) -> None:
        """Compute out (M, N) = a (M, K) b (K, N), where b is stored as (N, K) if `rhs_transposed`; M is unlimited."""
        (m, k), n, item = a.shape, out.shape[1], a.dtype.itemsize
        for start in range(0, m, _MAX_GEMM_ROWS):
            rows = min(_MAX_GEMM_ROWS, m - start)
            out_address, a_address = address(out) + start * n * item, address(a) + start * k * item
            self.make_gemm((rows, n, k), (False, rhs_transposed), False)(out_address, a_address, address(b))

    def matmul_lhs_transposed(self, out: Array, a: Array, b: Array) -> None:
        """Compute out (K, N) = a.T b for a (M, K) and b (M, N); M is unlimited."""
        (m, k), n, item = a.shape, b.shape[1], a.dtype.itemsize
        for start in range(0, m, _MAX_GEMM_ROWS):
            a_address, b_address = address(a) + start * k * item, address(b) + start * n * item
            rows = min(_MAX_GEMM_ROWS, m - start)
            self.make_gemm((k, n, rows), (True, False), start > 0)(address(out), a_address, b_address)


@contextmanager
def cublas_gemm(dtype: Any) -> Iterator[CublasGemm]:
    """Set up cuBLAS on the current device and stream; restore its modes on exit.

    float32 products use TF32 where xprnn.precision("tf32") is active.
    """
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
    """Return a kernel of a generated source. CuPy compiles it at the first launch on a device and caches it on disk."""
    import cupy

    # The default is C++11 in CuPy 13 and C++17 in CuPy 14.
    return cupy.RawModule(code=source, options=("--std=c++17",)).get_function(name)


def make_launcher(
    kernel: Any, fields: Sequence[str], values: Mapping[str, Any], min_threads: int
) -> Callable[[int], None]:
    """Return a function launch(t) that launches `kernel` for step t.

    The kernel has one argument, a struct of 8-byte fields, which is passed by value. Each launch copies the struct, so
    the next step's number may be written while an earlier launch is still queued.

    Args:
        kernel: a kernel from `raw_kernel`.
        fields: the names of the struct's fields; the first is the step.
        values: the value of each field: an integer, or an array for its address. Missing fields are 0. The caller must
            keep the arrays alive.
        min_threads: the least number of threads to launch.
    """
    field_values = (values.get(name, 0) for name in fields)
    packed = np.asarray([v if isinstance(v, int) else address(v) for v in field_values], np.int64)
    args = (packed.view(f"V{packed.nbytes}"),)  # CuPy passes a NumPy array of one element by value
    grid, block = (-(-min_threads // _THREADS_PER_BLOCK),), (_THREADS_PER_BLOCK,)

    def launch(t: int) -> None:
        packed[0] = t
        kernel(grid, block, args)

    return launch
