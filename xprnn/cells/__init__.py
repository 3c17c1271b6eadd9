"""Elementwise steps of recurrent cells and their adjoints, activations, and the configuration form of both."""

from xprnn.cells.cell import Cell, Pointwise
from xprnn.cells.standard import elman, gru, gru_reset_before, lstm

__all__ = ["Cell", "Pointwise", "elman", "gru", "gru_reset_before", "lstm"]
