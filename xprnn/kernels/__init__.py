"""Scans of one layer in one direction over a whole sequence: the reference and faster kernels with the same results."""
