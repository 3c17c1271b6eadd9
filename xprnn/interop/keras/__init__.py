"""Models from Keras 3: .keras and .weights.h5 files, live models."""
