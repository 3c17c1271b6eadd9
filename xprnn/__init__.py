"""xprnn: recurrent neural networks on plain arrays, forward and backward, on every library of the Array API standard.

Contents:

    layers      RNN, LSTM, GRU, Recurrent with any cell, Linear, Embedding, Sequential, masking and more
    article     rnn_forward, rnn_backward and the cell functions of the article that xprnn grew out of
    training    losses, optimisers, clipping of gradients, truncated back-propagation through time
    checks      check_gradients and check_layer compare a backward pass with central differences
    files       save, load, save_state, load_state; from_torch, from_keras, from_onnx, to_torch, to_onnx

README.md shows how they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from xprnn import cells
from xprnn.arrays.namespace import InputError
from xprnn.arrays.sparse_gradient import SparseGradient
from xprnn.article import rnn_backward, rnn_cell_backward, rnn_cell_forward, rnn_forward
from xprnn.cells import activations
from xprnn.cells.activations import Activation, activation
from xprnn.cells.cell import Cell
from xprnn.gradcheck import GradientError, NotDifferentiableError, check_gradients, check_layer
from xprnn.kernels.config import precision
from xprnn.kernels.tape import Gradients
from xprnn.layers.base import StatelessLayer
from xprnn.layers.context_shift import ContextShift
from xprnn.layers.elementwise import ActivationLayer, Softmax
from xprnn.layers.embedding import Embedding
from xprnn.layers.linear import Linear
from xprnn.layers.masking import HoldLastOutput, LastStep, Masking
from xprnn.layers.model_file import load, load_state, save, save_state
from xprnn.layers.recurrent import Recurrent
from xprnn.layers.rnn_lstm_gru import GRU, LSTM, RNN
from xprnn.layers.sequence_ops import MergeDirections, ReverseTime
from xprnn.layers.sequential import Sequential
from xprnn.training import truncated_bptt
from xprnn.training.losses import cross_entropy, mse, softmax
from xprnn.training.optimizers import adagrad, adam, adamw, clip_by_global_norm, clip_by_value, rmsprop, sgd

if TYPE_CHECKING:
    from xprnn.interop import from_keras, from_onnx, from_torch, to_onnx, to_torch

__version__ = "0.2.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Activation",
    "ActivationLayer",
    "Cell",
    "ContextShift",
    "Embedding",
    "GradientError",
    "Gradients",
    "HoldLastOutput",
    "InputError",
    "LastStep",
    "Linear",
    "Masking",
    "MergeDirections",
    "NotDifferentiableError",
    "Recurrent",
    "ReverseTime",
    "Sequential",
    "Softmax",
    "SparseGradient",
    "StatelessLayer",
    "activation",
    "activations",
    "adagrad",
    "adam",
    "adamw",
    "cells",
    "check_gradients",
    "check_layer",
    "clip_by_global_norm",
    "clip_by_value",
    "cross_entropy",
    "from_keras",
    "from_onnx",
    "from_torch",
    "load",
    "load_state",
    "mse",
    "precision",
    "rmsprop",
    "rnn_backward",
    "rnn_cell_backward",
    "rnn_cell_forward",
    "rnn_forward",
    "save",
    "save_state",
    "sgd",
    "softmax",
    "to_onnx",
    "to_torch",
    "truncated_bptt",
]

_LAZY_NAMES = frozenset({"from_keras", "from_onnx", "from_torch", "to_onnx", "to_torch"})


def __getattr__(name: str) -> Any:
    # xprnn.interop takes a third of the import time, and most processes do not use it.
    if name not in _LAZY_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module("xprnn.interop"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
