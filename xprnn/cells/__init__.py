"""Recurrent cells: the elementwise part of a time step and its adjoint, with activations and their JSON configuration.

`Cell` describes a cell and documents how to write one. `elman`, `lstm`, `gru` and `gru_reset_before` return the cells
of the library.
"""

from xprnn.cells.cell import Cell, Pointwise
from xprnn.cells.standard import elman, gru, gru_reset_before, lstm

__all__ = ["Cell", "Pointwise", "elman", "gru", "gru_reset_before", "lstm"]
