"""CPU kernels, printed as Python source for each cell and compiled by numba.

`scan`, `scan_plan` and `arguments` run a scan over a sequence. `forward_driver` and `backward_driver` print
its kernels, with `kernel_writer`, `gate_groups`, `pregates` and `hidden_projection`. `step` and `short_sequence` print
kernels that take plain arrays. `simd`, `gemm`, `gemm_tile`, `matvec` and `segment_sum` are the functions that printed
kernels call. `compile_cache` compiles them; `threads` splits a batch.
"""
