"""Scans of one layer in one direction over a whole sequence: the reference and faster kernels with the same results.

reference.py    the specification: a loop over time in array operations that every array library has
dispatch.py     choice of the kernel for a call
config.py       context managers and environment variables that restrict the choice
tape.py         tapes: the arrays that a forward pass saves for backward
row_order.py    rows of a ragged batch, sorted by length (NumPy)
memory.py       contiguous and aligned NumPy arrays
step_plan.py    signature of a layer for single steps
tracing/        traces of a cell's elementwise functions, from which the kernels are printed
ufunc/          NumPy kernels: ufunc calls that write into preallocated arrays
jit/            NumPy kernels compiled by numba: time loops for all cells, printed functions of each cell
cuda/           CuPy kernels
"""
