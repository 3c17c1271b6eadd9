"""Traces of a cell's elementwise functions, from which every kernel is printed."""
