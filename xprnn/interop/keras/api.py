"""Keras's trained networks: .keras and .weights.h5 files without Keras, and live models.

Sources: keras.layers, keras.saving.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from xprnn.arrays.namespace import Array, InputError, Params, resolve_namespace
from xprnn.interop.assemble import NamedLayer, assemble, raise_all
from xprnn.interop.keras.files import WeightsFile, open_model_file, read_config, wrap_read_errors
from xprnn.interop.keras.layers import ChainPosition, convert_layer
from xprnn.interop.keras.topology import KerasLayerSpec, linear_topology
from xprnn.io.archive import as_path
from xprnn.layers.recurrent import Recurrent

__all__ = ["from_keras"]


def from_keras(source: Any, like: Array | None = None, *, config: Any = None) -> tuple[Any, Params]:
    """A network that Keras 3 has trained, as a model of xprnn and its parameters.

    The model takes what the Keras model takes, (N, T, D) or integers (N, T), and gives what it gives at inference.
    Read are SimpleRNN, LSTM, GRU (reset_after both ways), RNN of their cells and of StackedRNNCells, Bidirectional
    (both directions alike; every merge_mode, None as the last layer), Masking, Embedding (mask_zero too), Dense,
    TimeDistributed of a Dense, Activation, ReLU, LeakyReLU, ELU, Softmax; Dropout and noise are left out. They stand
    in a Sequential, in nested ones, or in a functional model that is one chain. Activations: linear, tanh, sigmoid,
    relu, softsign, softplus, hard_sigmoid, elu, celu, leaky_relu; softmax and log_softmax behind a Dense.

    Masks come from Masking and Embedding(mask_zero=True) and act as in Keras: masked steps hold the output before them
    (0 before the first), unless zero_output_for_mask; after go_backwards the mask stays unturned. States are xprnn's,
    second in what a call returns: that covers return_state, and stateful, where the caller hands them back in. Numbers
    are of the weights' dtype, also where mixed precision made Keras compute in half of it.

    Args:
        source: the path of a .keras file, or of a .weights.h5 file, which needs `config`; or a live Keras model.
        like: array library, dtype and device of the parameters; None: NumPy, in the source's dtype.
        config: for .weights.h5, which does not say how its layers are built: `model.to_json()` as text or dict, or a
            .json or .keras file of the same architecture.

    Returns:
        model, params. One recurrent layer alone, which returns sequences, is that layer; else a Sequential under
        Keras's names, where "lstm_last", "lstm_hold", "lstm_order", "lstm_merge" and "dense_activation" stand behind
        "lstm" and "dense". A summed bias of Keras is bias_ih, beside a bias_hh of zeros.

    Raises:
        InputError: layers without a counterpart, all of them; a damaged or hostile file; h5py missing.

    >>> import numpy as np
    >>> from_keras("nowhere.keras")
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: from_keras nowhere.keras: cannot be read (No such file or directory)
    """
    where = "from_keras"
    if like is not None:
        resolve_namespace(where, {}, {"like": like})
    if hasattr(source, "to_json") and hasattr(source, "save_weights"):
        if config is not None:
            raise InputError(f"{where}: a model has an architecture of its own: leave config out")
        return _from_live_model(where, source, like)
    path = as_path(where, source)
    given = None if config is None else read_config(where, config)
    return _from_file(f"{where} {path}", path, given, like)


def _from_live_model(where: str, source: Any, like: Array | None) -> tuple[Any, Params]:
    """Through the model's own writing of its architecture and weights: one way for files and for models."""
    if not getattr(source, "built", False):
        raise InputError(f"{where}: the model has no weights yet: call it on an input first, or give it an Input")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.weights.h5"
        try:
            config = source.to_json()
            source.save_weights(path)
        except (TypeError, ValueError, NotImplementedError) as error:
            said = " ".join(str(error).split())[:200]
            raise InputError(f"{where}: Keras cannot say how this model is built ({said})") from None
        return _from_file(where, path, read_config(where, config), like)


def _from_file(where: str, path: Path, config: dict[str, Any] | None, like: Array | None) -> tuple[Any, Params]:
    with open_model_file(where, path, config) as (found, arrays):
        if found is None:
            held = ", ".join(arrays.layer_names()) or "no layers"
            raise InputError(
                f"{where}: holds the weights of {held} and not how they are built: give config=model.to_json(), "
                "or save the model as .keras"
            )
        problems: list[str] = []
        with wrap_read_errors(where):
            parts = _convert_layers(linear_topology(found, problems), arrays, problems)
        raise_all(where, problems)
        if not parts:
            raise InputError(f"{where}: nothing in it computes anything")
        if len(parts) == 1 and isinstance(parts[0][1], Recurrent):
            parts = [(parts[0][0]._replace(name=""), parts[0][1])]
        return assemble(where, parts, like)


def _convert_layers(
    specs: list[KerasLayerSpec], arrays: WeightsFile, problems: list[str]
) -> list[tuple[NamedLayer, Any]]:
    """The parts of all layers; what cannot be said here is added to `problems`."""
    made: list[tuple[NamedLayer, Any]] = []
    masked, used = False, set[str]()
    for k, spec in enumerate(specs):
        if not spec.class_name:
            continue
        try:
            own, masked = convert_layer(spec, arrays, ChainPosition(masked, k == len(specs) - 1))
        except InputError as error:
            problems.append(f"{spec.name} ({spec.class_name}): {error}")
            continue
        for part, layer in own:
            # Parameters are "part.parameter": a name must neither hold a dot nor be there twice.
            name = base = part.name.replace(".", "_")
            number = 1
            while name in used:
                number += 1
                name = f"{base}_{number}"
            used.add(name)
            made.append((part._replace(name=name), layer))
    return made
