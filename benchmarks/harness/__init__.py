"""Code that the benchmark scripts share.

problem           arrays of one row of the grid; what an implementation is
peers             libraries that xprnn is compared with; builds their implementations
onnx_peers        runtimes of ONNX models: ONNX Runtime, OpenVINO, tract
xprnn_contenders  implementations by xprnn
article_baseline  the article's code
numba_loop        a time loop written by hand for numba
worker, worker_pool  worker processes that take turns, and single fresh processes
agreement         comparison of results before timing
machine, timing   description of the machine; interleaved timing
options, report   command-line options; tables, goals and JSON
"""
