"""Layers and models: RNN, LSTM, GRU, Linear, Embedding, Sequential, masking, initialisers, model files."""
