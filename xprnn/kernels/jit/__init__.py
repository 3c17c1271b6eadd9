"""CPU kernels compiled by numba: hand-written time loops, and functions printed for each cell.

scan.py             runs a scan: allocates the arrays of a pass, calls an entry point, keeps the tape
kernel.py           compiled functions of a cell for one dtype
bind.py             entry points of the forward pass and of a step: read the caller's arrays, fill the argument record
bind_backward.py    entry point of the backward pass
entry_types.py      numba signatures of the entry points
record.py           the argument record, with the documentation of every buffer
forward.py          time loop of the forward pass, the same for every cell
backward.py         time loop of the backward pass, the same for every cell
pointwise.py        prints the elementwise functions of a cell
products.py         products with a weight that is packed once in a call, or read in place
gemm.py             matrix products of packed panels
gemm_tile.py        micro-kernel of the matrix products
matvec.py           matrix-vector products
simd.py             pointers, alias scopes, calls by address, tanh and exp that vectorise
segment_sum.py      adjoint of a row lookup
training.py         cross-entropy and the updates of the optimisers
applies.py          condition for compiled functions other than scans
threads.py          splits a batch into one row range for each thread
compile_cache.py    compiles functions and caches the machine code on disk
"""
