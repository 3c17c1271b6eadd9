"""`from_keras`: conversion of .keras and .weights.h5 files (without Keras) and of live Keras models.

Sources: the documentation of keras.layers and keras.saving.
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
    """Convert a trained Keras 3 network to an xprnn model and its parameters.

    The model accepts the same input as the Keras model, (N, T, D) or integers (N, T), and returns the outputs that the
    Keras model computes at inference.

    Supported layers: SimpleRNN, LSTM, GRU (reset_after=True and False), RNN of their cells and of StackedRNNCells,
    Bidirectional (both directions with the same options; every merge_mode, None only in the last layer), Masking,
    Embedding (also with mask_zero), Dense, TimeDistributed of a Dense, Activation, ReLU, LeakyReLU, ELU, Softmax.
    Dropout and noise layers are dropped. The layers may be in a Sequential, in nested Sequentials, or in a functional
    model that is a single chain. Supported activations: all elementwise activations of Keras that take no arguments (in
    a recurrent layer only those whose derivative follows from their output), and softmax and log_softmax of a Dense.

    Masks are created by Masking and Embedding(mask_zero=True) and act as in Keras. The output of a masked step is the
    output of the previous valid step (0 if there is none), or 0 with zero_output_for_mask. After go_backwards the mask
    is not reversed.

    A call of the model returns the states as its second result, with and without return_state. For a layer with
    stateful=True, pass the returned state to the next call. All computations use the dtype of the weights, also
    if the Keras model computes in float16 under a mixed-precision policy.

    Args:
        source: the path of a .keras file or of a .weights.h5 file, or a live Keras model.
        like: an array that selects array library, dtype and device of the parameters. None: NumPy arrays in the
            source's dtype.
        config: required for a .weights.h5 file, which does not contain the architecture. Either `model.to_json()`, as
            text or dict, or the path of a .json or .keras file of the same architecture.

    Returns:
        model, params. A single recurrent layer with return_sequences=True is returned as that layer. Otherwise the
        model is a Sequential under Keras's layer names. A Keras layer that needs several xprnn layers gets suffixes:
        after "lstm" follow "lstm_last", "lstm_hold", "lstm_order" or "lstm_merge", after "dense" "dense_activation".
        If Keras has one bias for both products, it becomes bias_ih, and bias_hh is zero.

    Raises:
        InputError: layers without an equivalent in xprnn (all are listed); a damaged or malicious file; h5py is not
            installed.

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
            raise InputError(f"{where}: the architecture is read from the live model: leave config out")
        return _from_live_model(where, source, like)
    path = as_path(where, source)
    parsed_config = None if config is None else read_config(where, config)
    return _from_file(f"{where} {path}", path, parsed_config, like)


def _from_live_model(where: str, source: Any, like: Array | None) -> tuple[Any, Params]:
    """Save the model's weights to a temporary file and convert that, so that files and models take the same path."""
    if not getattr(source, "built", False):
        raise InputError(f"{where}: the model has no weights yet: call it on an input first, or add an Input layer")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.weights.h5"
        try:
            config = source.to_json()
            source.save_weights(path)
        except (TypeError, ValueError, NotImplementedError) as error:
            message = " ".join(str(error).split())[:200]
            raise InputError(f"{where}: Keras cannot serialize this model ({message})") from None
        return _from_file(where, path, read_config(where, config), like)


def _from_file(where: str, path: Path, config: dict[str, Any] | None, like: Array | None) -> tuple[Any, Params]:
    with open_model_file(where, path, config) as (model_config, arrays):
        if model_config is None:
            layer_names = ", ".join(arrays.layer_names()) or "no layers"
            raise InputError(
                f"{where}: contains the weights of {layer_names}, but not the architecture: pass "
                "config=model.to_json(), or save the model as .keras"
            )
        problems: list[str] = []
        with wrap_read_errors(where):
            layers = _convert_layers(linear_topology(model_config, problems), arrays, problems)
        raise_all(where, problems)
        if not layers:
            raise InputError(f"{where}: the model has no layer that computes anything")
        if len(layers) == 1 and isinstance(layers[0][1], Recurrent):
            layers = [(layers[0][0]._replace(name=""), layers[0][1])]
        return assemble(where, layers, like)


def _convert_layers(
    specs: list[KerasLayerSpec], arrays: WeightsFile, problems: list[str]
) -> list[tuple[NamedLayer, Any]]:
    """Convert all layers; append a message to `problems` for each that has no equivalent in xprnn."""
    converted: list[tuple[NamedLayer, Any]] = []
    has_mask, used_names = False, set[str]()
    for k, spec in enumerate(specs):
        if not spec.class_name:
            continue
        try:
            layers, has_mask = convert_layer(spec, arrays, ChainPosition(has_mask, k == len(specs) - 1))
        except InputError as error:
            problems.append(f"{spec.name} ({spec.class_name}): {error}")
            continue
        for named, layer in layers:
            # Parameters are named "layer.parameter": a layer's name must be unique and contain no dot.
            name = base_name = named.name.replace(".", "_")
            number = 1
            while name in used_names:
                number += 1
                name = f"{base_name}_{number}"
            used_names.add(name)
            converted.append((named._replace(name=name), layer))
    return converted
