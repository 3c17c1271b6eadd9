"""Models and states in files: parameters under their names, and all else as JSON in the header.

A model's file holds its configuration and the caller's metadata (a vocabulary, figures) beside the parameters. How a
file is written and read, and what is found when it is damaged, is the matter of `archive`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Array, InputError, Params, resolve_namespace, to_numpy
from xprnn.io.archive import as_path, check_layer_count, open_archive, read_arrays, read_header, to_like, write_arrays
from xprnn.layers.sequential import from_config

MODEL_FILENAME = "model.safetensors"  # its name in the DIR of a run


def save(path: str | Path, model: Any, params: Params, metadata: Mapping[str, Any] | None = None) -> None:
    """Save a model and its parameters.

    Args:
        path: ends in `.safetensors` or `.npz`, which says what is written; replaced in one step if it exists. What
            has another format has another function: to_onnx writes `.onnx`, torch.save takes what to_torch returns.
        model: a layer or Sequential.
        params: its parameters, name -> array of any library, float16 to float64, each in a dtype and of a library of
            its own if need be: `load` gives back the same bits, as NumPy arrays or all of one kind (`like`).
        metadata: whatever JSON can hold, read back by `load_metadata`.

    Raises:
        InputError: parameters that are not the model's, a dtype or metadata that a file cannot hold, another file
            ending, or a place that cannot be written.
    """
    path = as_path("save", path)
    where = f"save {path}"
    if isinstance(model, type) or not hasattr(model, "shapes"):
        raise InputError(f"{where}: model must be a layer or Sequential, found {type(model).__name__}")
    for name, given in (("params", params), ("metadata", {} if metadata is None else metadata)):
        if not isinstance(given, Mapping):
            raise InputError(f"{where}: {name} must be a dict, found {type(given).__name__}")
    arrays = {name: _to_host(where, str(name), array) for name, array in params.items()}
    _check_shapes(where, {name: a.shape for name, a in arrays.items()}, model.shapes())
    write_arrays(path, arrays, {"model": model.config(), "metadata": dict(metadata or {})})


def load(path: str | Path, like: Array | None = None) -> tuple[Any, Params]:
    """Load what `save` wrote.

    Args:
        path: a `.safetensors` or `.npz` file.
        like: the parameters become arrays of its library, dtype and device; None: NumPy, in the file's dtype.

    Returns:
        model, params.

    Raises:
        InputError: not a model file, a damaged one, or one whose parameters are missing, too many or of wrong shape.
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
    """Save the state of a stream: an array, or arrays in tuples and dicts, as a layer or model returns it.

    Args:
        path: ends in `.safetensors` or `.npz`.
        state: what `step` or `forward` returned, of any array library.

    Raises:
        InputError: something else than arrays in tuples and dicts, or a place that cannot be written.
    """
    arrays: Params = {}
    where = f"save_state {as_path('save_state', path)}"

    def written(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [written(v) for v in value]
        if isinstance(value, Mapping):
            if not all(isinstance(k, str) for k in value):
                raise InputError(f"{where}: expected dicts with strings as keys, found {list(value)}")
            return {k: written(v) for k, v in value.items()}
        if value is None:
            return None
        if not hasattr(value, "shape"):
            raise InputError(f"{where}: expected arrays, tuples and dicts, found {type(value).__name__}")
        # A number names an array: the keys on the way to it, joined, could name another one as well.
        name = f"state.{len(arrays)}"
        arrays[name] = _to_host(where, name, value)
        return name

    write_arrays(path, arrays, {"state": written(state)})


def load_state(path: str | Path, like: Array | None = None) -> Any:
    """Load what `save_state` wrote, in the same structure.

    Args:
        path: a `.safetensors` or `.npz` file.
        like: the arrays take its library, dtype and device; None: NumPy, in the file's dtype.

    Raises:
        InputError: not a file of `save_state`, or a damaged one.
    """
    _check_like("load_state", like)
    arrays, header = read_arrays(path)

    def read(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(read(v) for v in value)
        if isinstance(value, dict):
            return {k: read(v) for k, v in value.items()}
        if value is None:
            return None
        array = arrays[value]
        return array if like is None else to_like(str(path), array, like)

    try:
        return read(header["state"])
    except (KeyError, TypeError):
        raise InputError(f"{path}: holds no state: it was not written by save_state") from None


def load_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata given to `save`; parameters are not read.

    Raises:
        InputError: not a model file, or a damaged one.
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
    for what, names in (("missing", expected.keys() - found.keys()), ("extra", found.keys() - expected.keys())):
        if names:
            some = ", ".join(sorted(map(str, names))[:5])
            raise InputError(f"{where}: {what} parameters {some} for this model")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise InputError(f"{where}: {name} has shape {tuple(found[name])}, the model expects {tuple(shape)}")
