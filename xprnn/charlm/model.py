"""Character language model: a recurrent stack on one-hot input, and a linear head."""

from __future__ import annotations

from typing import Any

import numpy as np

from xprnn.arrays.namespace import Array, InputError
from xprnn.layers import rnn_lstm_gru
from xprnn.layers.context_shift import ContextShift
from xprnn.layers.linear import Linear
from xprnn.layers.sequential import Sequential

LAYER_CLASSES = {"elman": "RNN", "lstm": "LSTM", "gru": "GRU"}


def backend_array(backend: str) -> Array:
    """Return a float32 array of a backend; it gives other arrays their namespace, dtype and device.

    Args:
        backend: "numpy", "cupy", or "auto" for CuPy if it is installed and finds a GPU, else NumPy.

    Raises:
        InputError: backend is "cupy", but CuPy is not installed or finds no GPU.
    """
    if backend != "numpy":
        try:
            from cupy import cuda  # an unrelated folder named cupy can be imported, but has no cuda

            if cuda.is_available():
                from cupy import zeros

                return zeros(1, dtype=np.float32)
            problem = "no CUDA GPU found"
        except ImportError:
            problem = 'CuPy is not installed: pip install ".[cuda12]" or ".[cuda13]" in the clone of xprnn'
        if backend == "cupy":
            raise InputError(f"backend cupy: {problem}; or use --backend numpy")
    return np.zeros(1, dtype=np.float32)


def build_model(
    cell: str, vocabulary_size: int, hidden_size: int, num_layers: int = 1, bidirectional: bool = False
) -> Any:
    """Return a character model: one-hot input, a recurrent stack and a linear head.

    A causal model's logits at step t predict the character at t + 1. A bidirectional model's logits at step t predict
    the character at t, from the forward state before t and the reverse state after t.

    Args:
        cell: "elman", "lstm" or "gru".
        vocabulary_size: V.
        hidden_size: H of each direction.
        num_layers: L; must be 1 if bidirectional.
        bidirectional: True builds a model that predicts from both sides.

    Returns:
        A Sequential that maps integers (T, N) to logits (T, N, V).

    Raises:
        InputError: the cell is unknown, or the model is bidirectional with more than one layer.

    >>> list(build_model("gru", 40, 16, bidirectional=True).layers)
    ['rnn', 'around', 'head']
    """
    if cell not in LAYER_CLASSES:
        raise InputError(f"expected a cell of {', '.join(LAYER_CLASSES)}, found {cell!r}")
    if bidirectional and num_layers > 1:
        raise InputError(
            f"a bidirectional model has 1 layer, found {num_layers}: the second layer's forward direction"
            " would see the character that it must predict, through the first layer's reverse direction; leave out"
            " --bidirectional or --layers"
        )
    rnn = getattr(rnn_lstm_gru, LAYER_CLASSES[cell])(
        vocabulary_size, hidden_size, num_layers=num_layers, bidirectional=bidirectional
    )
    if bidirectional:
        return Sequential(rnn=rnn, around=ContextShift(hidden_size), head=Linear(2 * hidden_size, vocabulary_size))
    return Sequential(rnn=rnn, head=Linear(hidden_size, vocabulary_size))
