"""Readers of Keras's files: the .keras archive, its JSON configuration, and the arrays of a .weights.h5 file.

Files are not trusted, and code in a file is never run. Each member of the archive is read completely and compared with
its checksum, so that accidental damage does not reach the HDF5 library. An array is read only if it is contiguous or
compact, has a floating-point dtype, occupies as many bytes in the file as its shape requires, and has the shape that
the architecture requires.

Sources: keras.saving (saving_lib: the archive, the paths of layers and variables), the HDF5 file format.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from xprnn.arrays.namespace import InputError
from xprnn.interop.assemble import LazyArray
from xprnn.interop.optional_import import require_package
from xprnn.io.archive import check_file

__all__ = ["WeightsFile", "open_model_file", "read_config", "wrap_read_errors"]

CONFIG_MEMBER, WEIGHTS_MEMBER = "config.json", "model.weights.h5"
MAX_JSON_BYTES = 1 << 24
MAX_COMPRESSION_RATIO = {CONFIG_MEMBER: 100, WEIGHTS_MEMBER: 20}  # uncompressed size / compressed size
_CORRUPTION_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    NotImplementedError,
    MemoryError,
    OverflowError,
    zlib.error,
    zipfile.BadZipFile,
)


@contextmanager
def wrap_read_errors(where: str) -> Iterator[None]:
    """Turn any error that h5py, zipfile or json raises on a damaged file into one InputError."""
    try:
        yield
    except InputError:
        raise
    except _CORRUPTION_ERRORS as error:
        message = " ".join(str(error).split())[:120]
        raise InputError(f"{where}: damaged, or not a file of Keras 3 ({message or type(error).__name__})") from None


def _read_member(where: str, archive: zipfile.ZipFile, name: str) -> bytes:
    """Read one member of the archive, after a check of its size and compression."""
    matches = [info for info in archive.infolist() if info.filename == name]
    if len(matches) != 1:
        raise InputError(f"{where}: expected one {name} in the archive, found {len(matches)}")
    info = matches[0]
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{where}: {name} has compression method {info.compress_type}, which Keras does not use")
    if info.file_size > MAX_COMPRESSION_RATIO[name] * max(info.compress_size, 1000):
        raise InputError(
            f"{where}: {name} claims {info.file_size} bytes, compressed to {info.compress_size}: the maximum ratio is "
            f"{MAX_COMPRESSION_RATIO[name]}"
        )
    if name == CONFIG_MEMBER and info.file_size > MAX_JSON_BYTES:
        raise InputError(f"{where}: {name} claims {info.file_size} bytes, the maximum is {MAX_JSON_BYTES}")
    with archive.open(info) as member:
        data = member.read(info.file_size + 1)
    if len(data) != info.file_size:
        raise InputError(f"{where}: {name} has {len(data)} bytes, the archive says {info.file_size}")
    return data


def _parse_config(where: str, text: str | bytes) -> dict[str, Any]:
    """Parse the JSON of a model's architecture: a dict with class_name and config."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected an architecture as JSON ({' '.join(str(error).split())[:80]})") from None
    return _check_config(where, config)


def _check_config(where: str, config: Any) -> dict[str, Any]:
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict) or "class_name" not in config:
        raise InputError(f"{where}: expected the architecture of a model (class_name, config), as from model.to_json()")
    return config


def read_config(where: str, config: Any) -> dict[str, Any]:
    """Read the `config` argument of `from_keras`: the dict or text of `model.to_json()`, or a .json or .keras file."""
    if isinstance(config, dict):
        return _check_config(f"{where}: config", config)
    if isinstance(config, str) and config.lstrip().startswith("{"):
        return _parse_config(f"{where}: config", config)
    try:
        path = Path(config)
        if path.exists():
            check_file(f"{where}: config {path}", path)
        data = path.read_bytes()
    except InputError:
        raise
    except (TypeError, ValueError, OSError) as error:
        raise InputError(
            f"{where}: config must be the result of model.to_json(), or a .json or .keras file ({error})"
        ) from None
    where = f"{where}: config {path}"
    if data[:2] != b"PK":
        return _parse_config(where, data)
    with wrap_read_errors(where), zipfile.ZipFile(io.BytesIO(data)) as archive:
        return _parse_config(where, _read_member(where, archive, CONFIG_MEMBER))


class WeightsFile:
    """The arrays of an open .weights.h5 file, by their path in the file; `LazyArray.read` reads the data."""

    def __init__(self, where: str, h5py: Any, file: Any, size: int) -> None:
        self.where, self.h5py, self.file, self.bytes_left = where, h5py, file, size

    def layer_names(self) -> list[str]:
        """Return the names of at most 20 layers in the file, for error messages."""
        with wrap_read_errors(self.where):
            layers = self.file.get("layers", default={})
            return sorted(str(name) for name in list(layers)[:20])

    def variables(self, path: str, *shapes: tuple[int | None, ...]) -> list[LazyArray]:
        """Return the variables of the layer at `path`, in Keras's order.

        Args:
            path: for example "layers/lstm/cell".
            shapes: the expected shape of each variable; an entry None accepts any length of that axis.

        Raises:
            InputError: the number of variables, a shape or a dtype is not as expected, or a variable is not stored as
                a contiguous array in this file.
        """
        with wrap_read_errors(f"{self.where}: {path}"):
            group = self._group(f"{path}/vars")
            if len(group) != len(shapes):
                raise InputError(f"{path}: expected {len(shapes)} arrays, found {len(group)}")
            return [self._lazy_array(group, f"{path}/vars", str(k), shape) for k, shape in enumerate(shapes)]

    def _group(self, path: str) -> Any:
        group = self.file
        for name in path.split("/"):
            group = self._child(group, path, name, self.h5py.Group)
        return group

    def _child(self, group: Any, path: str, name: str, expected_type: type) -> Any:
        link = group.get(name, getlink=True)
        if link is None:
            raise InputError(f"{path}: not in the file")
        if not isinstance(link, self.h5py.HardLink):
            raise InputError(f"{path}: is a {type(link).__name__}: links to other objects or files are not followed")
        child = group[name]
        if not isinstance(child, expected_type):
            raise InputError(f"{path}: expected a {expected_type.__name__}, found {type(child).__name__}")
        return child

    def _lazy_array(self, group: Any, path: str, name: str, shape: tuple[int | None, ...]) -> LazyArray:
        path = f"{path}/{name}"
        data = self._child(group, path, name, self.h5py.Dataset)
        dtype = data.dtype
        if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
            raise InputError(f"{path}: expected float16, float32 or float64, found {dtype}")
        stored_shape = tuple(data.shape)
        if len(stored_shape) != len(shape) or any(
            expected is not None and expected != stored for expected, stored in zip(shape, stored_shape, strict=True)
        ):
            wanted = tuple("any" if expected is None else expected for expected in shape)
            raise InputError(f"{path}: expected shape {wanted}, found {stored_shape}".replace("'", ""))
        size = data.nbytes
        creation = data.id.get_create_plist()
        unchunked = creation.get_layout() in (self.h5py.h5d.CONTIGUOUS, self.h5py.h5d.COMPACT)
        if data.external or data.is_virtual or not unchunked or creation.get_nfilters():
            raise InputError(
                f"{path}: expected a contiguous array, as Keras writes them (not chunked, external or virtual)"
            )
        self.bytes_left -= size
        if data.id.get_storage_size() != size or self.bytes_left < 0:
            raise InputError(f"{path}: claims {size} bytes that are not in the file")

        def read() -> Any:
            with wrap_read_errors(f"{self.where}: {path}"):
                return np.asarray(data[()], dtype=dtype.newbyteorder("="))

        return LazyArray(stored_shape, dtype.name, read)


@contextmanager
def open_model_file(
    where: str, path: Path, config: dict[str, Any] | None
) -> Iterator[tuple[dict[str, Any] | None, WeightsFile]]:
    """Open a .keras or .weights.h5 file; yield its architecture (`config` for .weights.h5) and its arrays."""
    h5py = require_package(where, "h5py", "keras")
    source: Any = path
    check_file(where, path)
    with wrap_read_errors(where):
        if path.is_dir():
            raise InputError(f"{where}: is a directory: save the model as one .keras file")
        size = path.stat().st_size
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        if is_zip:
            if config is not None:
                raise InputError(f"{where}: the architecture is read from the .keras file: leave config out")
            with zipfile.ZipFile(path) as archive:
                config = _parse_config(f"{where}: {CONFIG_MEMBER}", _read_member(where, archive, CONFIG_MEMBER))
                data = _read_member(where, archive, WEIGHTS_MEMBER)
            source, size = io.BytesIO(data), len(data)
        h5_file = h5py.File(source, "r")
    with h5_file:
        with wrap_read_errors(where):
            is_keras_2 = "model_config" in h5_file.attrs or "layer_names" in h5_file.attrs
        if is_keras_2:
            raise InputError(f"{where}: is an .h5 file of Keras 2: load it there and save it as .keras")
        yield config, WeightsFile(where, h5py, h5_file, size)
