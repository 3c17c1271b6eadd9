"""Save and load models and states as `.safetensors` or `.npz` files.

A file holds arrays by name and a JSON header. The header of a model file holds the configuration of the model and the
caller's metadata (a vocabulary, for example). `xprnn.io.archive` reads and writes the file format and detects damage.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Array, InputError, Params, resolve_namespace, to_numpy
from xprnn.io.archive import as_path, check_layer_count, open_archive, read_arrays, read_header, to_like, write_arrays
from xprnn.layers.base import Layer
from xprnn.layers.sequential import from_config

MODEL_FILENAME = "model.safetensors"  # name of the model file in the directory of a training run


def save(path: str | Path, model: Layer, params: Params, metadata: Mapping[str, Any] | None = None) -> None:
    """Save a model and its parameters.

    An existing file is replaced atomically. For other formats, to_onnx writes `.onnx`, and torch.save writes the result
    of to_torch.

    Args:
        path: ends in `.safetensors` or `.npz`; the suffix selects the format.
        model: a layer or Sequential.
        params: name -> array, float16 to float64. The arrays may be of different libraries and dtypes. `load` returns
            the same bits.
        metadata: a dict that JSON can hold; `load_metadata` returns it.

    Raises:
        InputError: parameters that do not fit the model, a dtype or metadata that a file cannot hold, another file
            suffix, or a path that cannot be written.

    >>> import tempfile, xprnn
    >>> model = xprnn.Linear(3, 2)
    >>> params = model.init(np.random.default_rng(0), like=np.zeros(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/model.npz", model, params, {"vocabulary": "abc"})
    ...     load(f"{folder}/model.npz")[0], load_metadata(f"{folder}/model.npz")
    (Linear(in_features=3, out_features=2, bias=True), {'vocabulary': 'abc'})
    """
    path = as_path("save", path)
    where = f"save {path}"
    if isinstance(model, type) or not hasattr(model, "shapes"):
        raise InputError(f"{where}: model must be a layer or Sequential, found {type(model).__name__}")
    for name, value in (("params", params), ("metadata", {} if metadata is None else metadata)):
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: {name} must be a dict, found {type(value).__name__}")
    arrays = {name: _to_host(where, str(name), array) for name, array in params.items()}
    _check_shapes(where, {name: a.shape for name, a in arrays.items()}, model.shapes())
    write_arrays(path, arrays, {"model": model.config(), "metadata": dict(metadata or {})})


def load(path: str | Path, like: Array | None = None) -> tuple[Any, Params]:
    """Load a model file that `save` wrote.

    Args:
        path: a `.safetensors` or `.npz` file.
        like: an array whose library, dtype and device the parameters take; None: NumPy arrays in the dtype of the file.

    Returns:
        model, params.

    Raises:
        InputError: the file is not a model file or is damaged, or its parameters do not fit the model.
    """
    _check_like("load", like)
    with open_archive(path) as file:
        try:
            check_layer_count(file.header["model"], len(file.shapes))
            model = from_config(file.header["model"])
            shapes = model.shapes()
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise InputError(f"{path}: holds no model this xprnn knows ({str(error)[:300]})") from None
        _check_shapes(str(path), file.shapes, shapes)
        arrays = {name: file.read(name) for name in shapes}
    if like is None:
        return model, arrays
    return model, {name: to_like(str(path), array, like) for name, array in arrays.items()}


def save_state(path: str | Path, state: Any) -> None:
    """Save the state of a layer or model: an array, or arrays in nested tuples and dicts.

    Args:
        path: ends in `.safetensors` or `.npz`; the suffix selects the format.
        state: a state that `step` or `forward` returned, of any array library.

    Raises:
        InputError: something other than arrays, tuples and dicts, or a path that cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state(f"{folder}/state.npz", {"rnn": (np.ones(1), np.zeros(1))})
    ...     load_state(f"{folder}/state.npz")
    {'rnn': (array([1.]), array([0.]))}
    """
    arrays: Params = {}
    where = f"save_state {as_path('save_state', path)}"

    def to_json(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [to_json(v) for v in value]
        if isinstance(value, Mapping):
            if not all(isinstance(k, str) for k in value):
                raise InputError(f"{where}: expected dicts with strings as keys, found {list(value)}")
            return {k: to_json(v) for k, v in value.items()}
        if value is None:
            return None
        if not hasattr(value, "shape"):
            raise InputError(f"{where}: expected arrays, tuples and dicts, found {type(value).__name__}")
        # Numbered, not named after the joined keys: {"a": {"b": x}, "a.b": y} would have one name for two arrays.
        name = f"state.{len(arrays)}"
        arrays[name] = _to_host(where, name, value)
        return name

    write_arrays(path, arrays, {"state": to_json(state)})


def load_state(path: str | Path, like: Array | None = None) -> Any:
    """Load a state that `save_state` wrote, in the same structure of tuples and dicts.

    Args:
        path: a `.safetensors` or `.npz` file.
        like: an array whose library, dtype and device the state takes; None: NumPy arrays in the dtype of the file.

    Returns:
        The state, as `step` and `forward` accept it.

    Raises:
        InputError: the file was not written by `save_state`, or it is damaged.
    """
    _check_like("load_state", like)
    arrays, header = read_arrays(path)

    def from_json(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(from_json(v) for v in value)
        if isinstance(value, dict):
            return {k: from_json(v) for k, v in value.items()}
        if value is None:
            return None
        array = arrays[value]
        return array if like is None else to_like(str(path), array, like)

    try:
        return from_json(header["state"])
    except (KeyError, TypeError):
        raise InputError(f"{path}: holds no state: it was not written by save_state") from None


def load_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata that was passed to `save`, without reading the parameters.

    Raises:
        InputError: the file is not a model file, or it is damaged.
    """
    metadata = read_header(path).get("metadata")
    if not isinstance(metadata, dict):
        raise InputError(f"{path}: expected metadata in the header, found {type(metadata).__name__}")
    return metadata


def _to_host(where: str, name: str, array: Any) -> Any:
    if array is None:
        raise InputError(f"{where}: {name} must be an array, found None")
    resolve_namespace(where, {}, {name: array})
    try:
        return np.asarray(to_numpy(array), order="C")
    except (TypeError, ValueError, RuntimeError):  # torch's bfloat16 has no NumPy dtype
        raise InputError(f"{where}: {name} is {array.dtype}, which NumPy cannot hold: convert it first") from None


def _check_like(where: str, like: Any) -> None:
    if like is not None:
        resolve_namespace(where, {}, {"like": like})


def _check_shapes(where: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    for problem, names in (("missing", expected.keys() - found.keys()), ("extra", found.keys() - expected.keys())):
        if names:
            first_names = ", ".join(sorted(map(str, names))[:5])
            raise InputError(f"{where}: {problem} parameters {first_names} for this model")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise InputError(f"{where}: {name} has shape {tuple(found[name])}, the model expects {tuple(shape)}")
