"""Keras's files, looked at before they are read: the .keras archive, its JSON, and the arrays of a .weights.h5.

Nothing in a file is trusted, and nothing in one is ever run. Members of the archive are read whole and held against
their checksums, so chance damage never reaches the HDF5 library; an array is read only when it is a plain one of a real
dtype, lies in the file as many bytes long as it says, and has the shape that the architecture asks for.

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
MAX_COMPRESSION_RATIO = {
    CONFIG_MEMBER: 100,
    WEIGHTS_MEMBER: 20,
}  # a compressed member may unpack to so many times its size
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
    """Whatever a library makes of a damaged file, said as one error."""
    try:
        yield
    except InputError:
        raise
    except _CORRUPTION_ERRORS as error:
        said = " ".join(str(error).split())[:120]
        raise InputError(f"{where}: damaged, or not a file of Keras 3 ({said or type(error).__name__})") from None


def _read_member(where: str, archive: zipfile.ZipFile, name: str) -> bytes:
    """One member, whole; its size is looked at before."""
    found = [info for info in archive.infolist() if info.filename == name]
    if len(found) != 1:
        raise InputError(f"{where}: expected one {name} in the archive, found {len(found)}")
    info = found[0]
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{where}: {name} is compressed in a way that Keras doesn't use (method {info.compress_type})")
    if info.file_size > MAX_COMPRESSION_RATIO[name] * max(info.compress_size, 1000):
        raise InputError(f"{where}: {name} claims {info.file_size} bytes of {info.compress_size}: not unpacked")
    if name == CONFIG_MEMBER and info.file_size > MAX_JSON_BYTES:
        raise InputError(f"{where}: {name} claims {info.file_size} bytes, at most {MAX_JSON_BYTES} are read")
    with archive.open(info) as member:
        data = member.read(info.file_size + 1)
    if len(data) != info.file_size:
        raise InputError(f"{where}: {name} has {len(data)} bytes, the archive says {info.file_size}")
    return data


def _parse_config(where: str, text: str | bytes) -> dict[str, Any]:
    """JSON; the architecture of a model is a dict with a class_name and a config."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected an architecture as JSON ({' '.join(str(error).split())[:80]})") from None
    return _check_config(where, found)


def _check_config(where: str, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict) or "class_name" not in found:
        raise InputError(f"{where}: expected the architecture of a model (class_name, config), as model.to_json() says")
    return found


def read_config(where: str, config: Any) -> dict[str, Any]:
    """An architecture as the caller gives it: the dict or text of `model.to_json()`, or a .json or .keras file."""
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
        raise InputError(f"{where}: config must be what model.to_json() says, or a file of it ({error})") from None
    where = f"{where}: config {path}"
    if data[:2] != b"PK":
        return _parse_config(where, data)
    with wrap_read_errors(where), zipfile.ZipFile(io.BytesIO(data)) as archive:
        return _parse_config(where, _read_member(where, archive, CONFIG_MEMBER))


class WeightsFile:
    """The arrays of an open .weights.h5, by the path that Keras gives them; none is read before `LazyArray.read`."""

    def __init__(self, where: str, h5py: Any, file: Any, size: int) -> None:
        self.where, self.h5py, self.file, self.bytes_left = where, h5py, file, size

    def layer_names(self) -> list[str]:
        """The names of the layers in it, for hints."""
        with wrap_read_errors(self.where):
            found = self.file.get("layers", default={})
            return sorted(str(name) for name in list(found)[:20])

    def variables(self, path: str, *shapes: tuple[int | None, ...]) -> list[LazyArray]:
        """The variables of the layer at `path`, in Keras's order.

        Args:
            path: as "layers/lstm/cell".
            shapes: what each must have; None: any length.

        Raises:
            InputError: missing or more ones, another shape or dtype, or what is not a plain array of the file.
        """
        with wrap_read_errors(f"{self.where}: {path}"):
            group = self._group(f"{path}/vars")
            if len(group) != len(shapes):
                raise InputError(f"{path}: expected {len(shapes)} arrays, found {len(group)}")
            return [self._lazy_array(group, f"{path}/vars", str(k), shape) for k, shape in enumerate(shapes)]

    def _group(self, path: str) -> Any:
        found = self.file
        for name in path.split("/"):
            found = self._child(found, path, name, self.h5py.Group)
        return found

    def _child(self, group: Any, path: str, name: str, kind: type) -> Any:
        link = group.get(name, getlink=True)
        if link is None:
            raise InputError(f"{path}: not in the file")
        if not isinstance(link, self.h5py.HardLink):
            raise InputError(f"{path}: is a {type(link).__name__}: only what lies in the file itself is read")
        found = group[name]
        if not isinstance(found, kind):
            raise InputError(f"{path}: expected a {kind.__name__}, found {type(found).__name__}")
        return found

    def _lazy_array(self, group: Any, path: str, name: str, shape: tuple[int | None, ...]) -> LazyArray:
        path = f"{path}/{name}"
        data = self._child(group, path, name, self.h5py.Dataset)
        dtype = data.dtype
        if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
            raise InputError(f"{path}: expected float16, float32 or float64, found {dtype}")
        found = tuple(data.shape)
        if len(found) != len(shape) or any(s is not None and s != f for s, f in zip(shape, found, strict=True)):
            want = tuple("any" if s is None else s for s in shape)
            raise InputError(f"{path}: expected shape {want}, found {found}".replace("'", ""))
        size = data.nbytes
        made = data.id.get_create_plist()
        plain = made.get_layout() in (self.h5py.h5d.CONTIGUOUS, self.h5py.h5d.COMPACT)
        if data.external or data.is_virtual or not plain or made.get_nfilters():
            raise InputError(f"{path}: expected a plain array, as Keras writes them (not chunked, external or virtual)")
        self.bytes_left -= size
        if data.id.get_storage_size() != size or self.bytes_left < 0:
            raise InputError(f"{path}: claims {size} bytes that are not in the file")

        def read() -> Any:
            with wrap_read_errors(f"{self.where}: {path}"):
                return np.asarray(data[()], dtype=dtype.newbyteorder("="))

        return LazyArray(found, dtype.name, read)


@contextmanager
def open_model_file(
    where: str, path: Path, config: dict[str, Any] | None
) -> Iterator[tuple[dict[str, Any] | None, WeightsFile]]:
    """The architecture (the one given where the file has none) and the arrays of a .keras or .weights.h5 file."""
    h5py = require_package(where, "h5py", "keras")
    source: Any = path
    check_file(where, path)
    with wrap_read_errors(where):
        if path.is_dir():
            raise InputError(f"{where}: is a directory: save the model as one .keras file")
        size = path.stat().st_size
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        if zipped:
            if config is not None:
                raise InputError(f"{where}: has an architecture of its own: leave config out")
            with zipfile.ZipFile(path) as archive:
                config = _parse_config(f"{where}: {CONFIG_MEMBER}", _read_member(where, archive, CONFIG_MEMBER))
                data = _read_member(where, archive, WEIGHTS_MEMBER)
            source, size = io.BytesIO(data), len(data)
        found = h5py.File(source, "r")
    with found:
        with wrap_read_errors(where):
            old = "model_config" in found.attrs or "layer_names" in found.attrs
        if old:
            raise InputError(f"{where}: is an .h5 file of Keras 2: load it there and save it as .keras")
        yield config, WeightsFile(where, h5py, found, size)
