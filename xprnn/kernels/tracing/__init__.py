"""Traces of a cell's elementwise functions, from which every kernel is printed.

graph.py          records calls of elementwise functions as a graph
cell_trace.py     the graphs of a cell's forward and adjoint functions
scalar_code.py    prints a graph as scalar statements
"""
