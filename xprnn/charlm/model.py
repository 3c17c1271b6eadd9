"""The character language model: recurrent stack and linear head."""

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
    """Return an array of `backend` (numpy, cupy, or auto: CuPy where it finds a GPU), to make others like it.

    Raises:
        InputError: CuPy was asked for and cannot work here.
    """
    if backend != "numpy":
        try:
            from cupy import cuda  # a mere folder called cupy can be imported, but has no cuda

            if cuda.is_available():
                from cupy import zeros

                return zeros(1, dtype=np.float32)
            problem = "no CUDA GPU found"
        except ImportError:
            problem = 'CuPy is not installed: pip install "xprnn[cuda12]" or "xprnn[cuda13]"'
        if backend == "cupy":
            raise InputError(f"backend cupy: {problem}; or take --backend numpy")
    return np.zeros(1, dtype=np.float32)


def build_model(
    cell: str, vocabulary_size: int, hidden_size: int, num_layers: int = 1, bidirectional: bool = False
) -> Any:
    """Return a character model: one-hot input, a recurrent stack, a linear head.

    Args:
        cell: "elman", "lstm" or "gru".
        characters: V, the size of the vocabulary.
        hidden: H, of each direction.
        num_layers: L; 1 where bidirectional.
        bidirectional: logits at t say which character stands at t, between those before and those after it;
            without it they say which one comes next.

    Raises:
        InputError: an unknown cell, or a stack of bidirectional layers.

    >>> list(build_model("gru", 40, 16, bidirectional=True).layers)
    ['rnn', 'around', 'head']
    """
    if cell not in LAYER_CLASSES:
        raise InputError(f"build: expected a cell of {', '.join(LAYER_CLASSES)}, found {cell!r}")
    if bidirectional and num_layers > 1:
        raise InputError(
            f"build: a bidirectional model has 1 layer, found {num_layers}: the second layer's forward direction would"
            " see the character it is to predict, through the first one's reverse direction; leave out one of"
            " --bidirectional and --layers"
        )
    rnn = getattr(rnn_lstm_gru, LAYER_CLASSES[cell])(
        vocabulary_size, hidden_size, num_layers=num_layers, bidirectional=bidirectional
    )
    if bidirectional:
        return Sequential(rnn=rnn, around=ContextShift(hidden_size), head=Linear(2 * hidden_size, vocabulary_size))
    return Sequential(rnn=rnn, head=Linear(hidden_size, vocabulary_size))
