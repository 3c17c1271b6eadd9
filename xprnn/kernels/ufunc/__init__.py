"""NumPy kernels: printed programs of ufunc calls that write into preallocated arrays.

plan.py         the forward and backward programs of a cell
program.py      prints and compiles a program
workspace.py    the arrays of one pass, and the input projection
scan.py         the scan over a whole sequence, forward and backward
step.py         one step of a stream
"""
