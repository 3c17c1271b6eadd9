"""Layers and models: RNN, LSTM, GRU, Linear, Embedding, Sequential, masking, initialisers, model files.

A layer is an immutable configuration. Its parameters (a dict of arrays) and its state are passed to each call and
returned from it, so that one layer can be used with several sets of parameters and by several threads. `base.Layer`
lists the methods of a layer.
"""
