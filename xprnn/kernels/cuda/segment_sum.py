"""The gradient of a look-up on CUDA: rows summed by the class they belong to, in one launch.

The generic way (scatter.segment_sum) takes some hundred launches. Here each class's rows are added up by one thread
for each column, in the order in which they came and in double precision: the same bits from run to run, where adding
atomically would give others each time.
"""

from xprnn.arrays.namespace import Array, Namespace, as_index
from xprnn.kernels.cuda.device import empty, make_launcher, raw_kernel

__all__ = ["kernel_source", "segment_sum"]

_FIELDS = ("t", "M", "K", "V", "rows", "out", "order", "starts")
_SOURCE = """// By xprnn: out (K,V) = the sums of rows (M,K) by class; order (M,) sorts, starts (V+1,) cuts them.
typedef {real} real;
typedef long long size;

struct sum_rows_arguments {{
  size t, M, K, V;
  real *rows, *out;
  const size *order, *starts;
}};

extern "C" __global__ void segment_sum_into(const sum_rows_arguments a) {{
  const size i = (size)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= a.K * a.V) return;
  const size v = i / a.K, k = i - v * a.K;
  double sum = 0;
  for (size m = a.starts[v]; m < a.starts[v + 1]; ++m) sum += a.rows[a.order[m] * a.K + k];
  a.out[k * a.V + v] = (real)sum;
}}
"""


def kernel_source(bits: int) -> str:
    """The kernel for float32 or float64."""
    return _SOURCE.format(real="float" if bits == 32 else "double")


def segment_sum(xp: Namespace, ids: Array, rows: Array, count: int) -> Array:
    """out[:, v] = the sum of rows[m] over the m with ids[m] = v.

    Args:
        xp: CuPy's namespace.
        ids: (M,) integers in 0..V-1.
        rows: (M, K), in C order.
        count: V.

    Returns:
        (K, V).
    """
    ids = as_index(xp, ids)
    order = xp.argsort(ids, stable=True)
    starts = xp.searchsorted(xp.take(ids, order), xp.arange(count + 1, dtype=ids.dtype))
    order, starts = xp.astype(order, xp.int64, copy=False), xp.astype(starts, xp.int64, copy=False)
    out = empty((rows.shape[1], count), rows.dtype)
    values = {"M": rows.shape[0], "K": rows.shape[1], "V": count, "rows": rows, "out": out}
    values |= {"order": order, "starts": starts}
    run = raw_kernel(kernel_source(8 * rows.dtype.itemsize), "segment_sum_into")
    make_launcher(run, _FIELDS, values, rows.shape[1] * count)(0)
    return out
