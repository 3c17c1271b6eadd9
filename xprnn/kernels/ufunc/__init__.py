"""CPU kernels of NumPy calls that write into preallocated memory."""
