"""Conversion of Keras 3 models to xprnn: .keras files, .weights.h5 files and live models."""
