"""CPU kernels compiled by numba from printed source."""
