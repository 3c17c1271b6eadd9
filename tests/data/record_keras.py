"""Writes the files in keras_files: `python tests/data/record_keras.py [NAME...]` (needs keras, jax, h5py).

For each model of tests/support/keras_models.py, or only those named, a .keras file and an .npz with inputs, outputs and
gradients are written, computed in float64 by Keras on JAX. Without names, lstm_stack is also recorded in float32. The
weights of lstm_stack are also written as .weights.h5, with the architecture in .json.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).parents[1]
FILES = TESTS / "data" / "keras_files"


def record(keras: Any, keras_models: Any, name: str, dtype: str) -> None:
    """Write the files of one model."""
    keras_models.set_dtype(keras, dtype)
    rng = np.random.default_rng(len(name))
    model = keras_models.build_model(keras, name)
    keras_models.randomize_weights(rng, model)
    results = keras_models.keras_results(keras, model, keras_models.random_inputs(rng, name, dtype), rng)
    stem = name if dtype == "float64" else f"{name}_{dtype}"
    model.save(FILES / f"{stem}.keras")
    np.savez(FILES / f"{stem}.npz", **results)
    if name == "lstm_stack" and dtype == "float64":
        model.save_weights(FILES / f"{stem}.weights.h5")
        (FILES / f"{stem}.json").write_text(model.to_json(), encoding="utf-8")


def main() -> None:
    """Record the models named on the command line, or all."""
    sys.path.insert(0, str(TESTS))  # for the package `support`
    from support import keras_models

    keras = keras_models.keras_on_jax()
    for name in sys.argv[1:] or keras_models.MODEL_NAMES:
        record(keras, keras_models, name, "float64")
    if not sys.argv[1:]:
        record(keras, keras_models, "lstm_stack", "float32")


if __name__ == "__main__":
    main()
