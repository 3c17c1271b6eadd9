"""Files: a model and its parameters in one file, read back without trusting it.

`.safetensors` is the home format: parameters under their names, and in the header, as JSON, the model's configuration
and the caller's metadata (a vocabulary, figures). `.npz` is the same for machines with NumPy alone. Neither can run
code on loading. Every file is written beside its place and then renamed, so a reader sees the old file or the new one.
"""

from __future__ import annotations

import io
import json
import math
import os
import secrets
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from .arrays import Array, InputError, Params, from_numpy, to_numpy
from .model import from_config

FORMAT = "xprnn"
MODEL_FILE = "model.safetensors"  # its name in the DIR of a run
_NPZ_HEADER = "__xprnn__"
_Shapes = dict[str, tuple[int, ...]]
_Read = Callable[[str], Any]
_Opened = tuple[str | None, _Shapes, _Read]


class _Contents(NamedTuple):
    """An open file: header and shapes first, an array only when it is asked for."""

    header: dict[str, Any]
    shapes: _Shapes
    read: _Read


def write_atomically(path: str | Path, content: bytes) -> None:
    """Put `content` at `path` in one step: whatever happens, no half-written file stays behind.

    Raises:
        InputError: the place cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            beside.unlink()


def save(path: str | Path, model: Any, params: Params, metadata: Mapping[str, Any] | None = None) -> None:
    """Save a model and its parameters.

    Args:
        path: ends in `.safetensors` or `.npz`; replaced in one step if it exists.
        model: a layer or Sequential.
        params: its parameters, name -> array of any library.
        metadata: whatever JSON can hold, read back by `load_metadata`.

    Raises:
        InputError: parameters that are not the model's, another file ending, or a place that cannot be written.
    """
    path = Path(path)
    arrays = {name: np.asarray(to_numpy(array), order="C") for name, array in params.items()}
    _compare(f"save {path}", {name: a.shape for name, a in arrays.items()}, model.shapes())
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
    with _opened(path) as file:
        try:
            model = from_config(file.header["model"])
            shapes = model.shapes()
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise InputError(f"{path}: holds no model this xprnn knows ({error})") from None
        _compare(str(path), file.shapes, shapes)
        arrays = {name: file.read(name) for name in shapes}
    if like is None:
        return model, arrays
    return model, {name: from_numpy(array, like=like) for name, array in arrays.items()}


def save_state(path: str | Path, state: Any) -> None:
    """Save the state of a stream: an array, or arrays in tuples and dicts, as a layer or model returns it.

    Args:
        path: ends in `.safetensors` or `.npz`.
        state: what `step` or `forward` returned, of any array library.

    Raises:
        InputError: something else than arrays in tuples and dicts, or a place that cannot be written.
    """
    arrays: Params = {}

    def written(value: Any, name: str) -> Any:
        if isinstance(value, (tuple, list)):
            return [written(v, f"{name}.{k}") for k, v in enumerate(value)]
        if isinstance(value, Mapping):
            return {str(k): written(v, f"{name}.{k}") for k, v in value.items()}
        if value is None:
            return None
        if not hasattr(value, "shape"):
            raise InputError(f"save_state {path}: expected arrays, tuples and dicts, found {type(value).__name__}")
        arrays[name] = np.asarray(to_numpy(value), order="C")
        return name

    header = {"state": written(state, "state")}
    write_arrays(path, arrays, header)


def load_state(path: str | Path, like: Array | None = None) -> Any:
    """Load what `save_state` wrote, in the same structure.

    Args:
        path: a `.safetensors` or `.npz` file.
        like: the arrays take its library, dtype and device; None: NumPy, in the file's dtype.

    Raises:
        InputError: not a file of `save_state`, or a damaged one.
    """
    arrays, header = read_arrays(path)

    def read(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(read(v) for v in value)
        if isinstance(value, dict):
            return {k: read(v) for k, v in value.items()}
        if value is None:
            return None
        array = arrays[value]
        return array if like is None else from_numpy(array, like=like)

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


def read_header(path: str | Path) -> dict[str, Any]:
    """Return the JSON header of a file of ours: "model" and "metadata" for what `save` wrote."""
    with _opened(path) as file:
        return file.header


def read_arrays(path: str | Path) -> tuple[Params, dict[str, Any]]:
    """Return all arrays of a file written by `write_arrays`, and its header."""
    with _opened(path) as file:
        return {name: file.read(name) for name in file.shapes}, file.header


def write_arrays(path: str | Path, arrays: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    """Write NumPy arrays and a JSON header to a `.safetensors` or `.npz` file, in one step."""
    path, text = Path(path), json.dumps(header)
    if path.suffix == ".safetensors":
        content = safetensors.numpy.save(dict(arrays), {FORMAT: text})
    elif path.suffix == ".npz":
        content = _npz({**arrays, _NPZ_HEADER: np.frombuffer(text.encode(), np.uint8)})
    else:
        raise InputError(f"{path}: expected a name ending in .safetensors or .npz, found {path.suffix or 'no ending'}")
    write_atomically(path, content)


def _npz(arrays: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
    return buffer.getvalue()


def _compare(where: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    for what, names in (("missing", expected.keys() - found.keys()), ("extra", found.keys() - expected.keys())):
        if names:
            raise InputError(f"{where}: {what} parameters {', '.join(sorted(names)[:5])} for this model")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise InputError(f"{where}: {name} has shape {tuple(found[name])}, the model expects {tuple(shape)}")


@contextmanager
def _opened(path: str | Path) -> Iterator[_Contents]:
    path = Path(path)
    if path.suffix not in _OPENERS:
        raise InputError(f"{path}: expected a .safetensors or .npz file")
    try:
        with path.open("rb"), _OPENERS[path.suffix](path) as (text, shapes, read):
            if text is None:
                raise InputError(f"{path}: not written by xprnn (its header has no {FORMAT!r} entry)")
            header = json.loads(text)
            if not isinstance(header, dict):
                raise ValueError("its header is not a JSON object")
            yield _Contents(header, shapes, read)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (safetensors.SafetensorError, zipfile.BadZipFile, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: damaged, or not a {path.suffix} file ({reason})") from None


@contextmanager
def _open_safetensors(path: Path) -> Iterator[_Opened]:
    # The library has compared every tensor's extent with the file's length before it hands out a name.
    with safetensors.safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        for name, part in slices.items():
            _check_kind(name, part.get_dtype(), ("F16", "F32", "F64", "I32", "I64"))
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        yield (file.metadata() or {}).get(FORMAT), shapes, file.get_tensor


@contextmanager
def _open_npz(path: Path) -> Iterator[_Opened]:
    with zipfile.ZipFile(path) as archive:
        shapes = {}
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > path.stat().st_size:
                raise InputError(f"{path}: not written by xprnn ({member.filename} is compressed)")
            with archive.open(member) as stream:
                shapes[member.filename.removesuffix(".npy")] = _npy_shape(stream, member)

        def read(name: str) -> Any:
            with archive.open(f"{name}.npy") as stream:
                return np.lib.format.read_array(stream, allow_pickle=False)

        has_header = shapes.pop(_NPZ_HEADER, None) is not None
        yield read(_NPZ_HEADER).tobytes().decode() if has_header else None, shapes, read


def _npy_shape(stream: Any, member: zipfile.ZipInfo) -> tuple[int, ...]:
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"{member.filename} has npy version {version}")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    _check_kind(member.filename, dtype.str[1:], ("f2", "f4", "f8", "i4", "i8", "u1"))
    if math.prod(shape) * dtype.itemsize != member.file_size - stream.tell():
        raise ValueError(f"{member.filename} has another length than its shape {shape} needs")
    return shape


def _check_kind(name: str, found: str, known: tuple[str, ...]) -> None:
    if found not in known:
        raise ValueError(f"{name} has dtype {found}, expected one of {', '.join(known)}")


_OPENERS = {".safetensors": _open_safetensors, ".npz": _open_npz}
