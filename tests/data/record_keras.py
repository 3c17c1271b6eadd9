"""Write the files in keras_files: python tests/data/record_keras.py [NAME...] (needs keras, jax, h5py).

For each model of tests/support/keras_models.py a .keras file and an .npz of inputs, outputs and gradients, computed by Keras on
JAX; float64, and one in float32. One more model as .weights.h5 with its architecture in .json.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
HERE = Path(__file__).parent
FILES = HERE / "keras_files"
sys.path.insert(0, str(HERE.parent))

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)
import keras  # noqa: E402
import numpy as np  # noqa: E402
from support import keras_models


def record(name: str, dtype: str) -> None:
    keras_models.set_dtype(keras, dtype)
    rng = np.random.default_rng(len(name))
    model = keras_models.build_model(keras, name)
    keras_models.randomize_weights(rng, model)
    found = keras_models.keras_results(keras, model, keras_models.random_inputs(rng, name, dtype), rng)
    stem = name if dtype == "float64" else f"{name}_{dtype}"
    model.save(FILES / f"{stem}.keras")
    np.savez(FILES / f"{stem}.npz", **found)
    if name == "lstm_stack" and dtype == "float64":
        model.save_weights(FILES / f"{stem}.weights.h5")
        (FILES / f"{stem}.json").write_text(model.to_json(), encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or keras_models.MODEL_NAMES:
        record(name, "float64")
    if not sys.argv[1:]:
        record("lstm_stack", "float32")
