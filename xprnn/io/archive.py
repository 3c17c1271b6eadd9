"""Archives: named arrays and a JSON header in one `.safetensors` or `.npz` file.

Loading runs no code from the file and validates everything before use. The header of a safetensors file and every
array of both formats carry a CRC-32 that is checked at each read; a zip file has a CRC-32 for each member as well.
Files are written under a temporary name and then renamed, so that a reader sees either the old or the new file.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from xprnn.arrays.namespace import Array, InputError, Params, from_numpy

FORMAT = "xprnn"
DTYPES = ("float16", "float32", "float64", "int32", "int64")
_CHECKSUM = "xprnn.crc32"  # metadata key for the CRC-32 of the JSON header; its entry "crc32" has those of the arrays
_NPZ_HEADER = "__xprnn__"
_Shapes = dict[str, tuple[int, ...]]
_ReadArray = Callable[[str], Any]
_RawArchive = tuple[str | None, _Shapes, _ReadArray]


class Archive(NamedTuple):
    """An open archive: header and shapes are in memory, `read(name)` loads one array."""

    header: dict[str, Any]
    shapes: _Shapes
    read: _ReadArray


def as_path(where: str, path: Any) -> Path:
    """Return `path` as a Path.

    Raises:
        InputError: `path` is not a path, or contains a NUL character.

    >>> as_path("load", None)
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: load: expected a path, found NoneType
    """
    try:
        result = Path(path)
    except TypeError:
        raise InputError(f"{where}: expected a path, found {type(path).__name__}") from None
    if "\0" in str(result):
        raise InputError(f"{where}: expected a path, found {str(result)!r} with a NUL character in it")
    return result


def check_file(where: str, path: Path) -> None:
    """Check, before opening it, that `path` is a regular file or directory: reading a device or pipe may never end.

    Raises:
        InputError: `path` does not exist, or is a device, pipe or socket.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{where}: expected a regular file, found a device, pipe or socket")


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write `content` to a temporary file in the same folder and rename it to `path`, so that no partial file remains.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)
    if not path.name:
        raise InputError(f"{path}: cannot be written (expected a file's name, found a directory)")
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        with suppress(OSError, UnicodeError):
            temporary.unlink()


def read_header(path: str | Path) -> dict[str, Any]:
    """Return the JSON header of an archive; files written by `xprnn.save` have the keys "model" and "metadata"."""
    with open_archive(path) as file:
        return file.header


def is_xprnn_file(path: str | Path) -> bool:
    """Return True if a `.safetensors` file has the metadata of xprnn, False if it has not or cannot be read."""
    try:
        check_file(str(path), Path(path))
        with safetensors.safe_open(path, framework="numpy") as file:
            return FORMAT in (file.metadata() or {})
    except (OSError, ValueError, safetensors.SafetensorError):
        return False


def read_arrays(path: str | Path) -> tuple[Params, dict[str, Any]]:
    """Return all arrays of a file that `write_arrays` wrote, and its header.

    Raises:
        InputError: the file is missing, damaged, or was not written by xprnn.
    """
    with open_archive(path) as file:
        return {name: file.read(name) for name in file.shapes}, file.header


def write_arrays(path: str | Path, arrays: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    """Write NumPy arrays and a JSON header to a `.safetensors` or `.npz` file, atomically.

    Raises:
        InputError: the name has another suffix, an array has a dtype that is not in DTYPES, the header is not valid
            JSON data, or the file cannot be written.
    """
    path = as_path("write_arrays", path)
    if path.suffix not in _OPENERS:
        found = f"found {path.suffix or 'no ending'}{_format_hint(path, 0)}"
        raise InputError(f"{path}: expected a name ending in .safetensors or .npz, {found}")
    arrays = {name: _as_storable(f"{path}: {name}", array) for name, array in arrays.items()}
    try:
        text = json.dumps({**header, "crc32": {name: _crc32(array) for name, array in arrays.items()}})
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected metadata that JSON can hold, but {error}") from None
    if path.suffix == ".safetensors":
        content = safetensors.numpy.save(arrays, {FORMAT: text, _CHECKSUM: str(zlib.crc32(text.encode()))})
    else:
        content = _npz_bytes({**arrays, _NPZ_HEADER: np.frombuffer(text.encode(), np.uint8)})
    write_atomically(path, content)


# suffix -> the functions of xprnn that write and read this format
_FOREIGN_FORMATS = {
    ".onnx": ("to_onnx", "from_onnx"),
    ".pt": ("to_torch", "from_torch"),
    ".pth": ("to_torch", "from_torch"),
    ".keras": ("", "from_keras"),
    ".h5": ("", "from_keras"),
}


def _format_hint(path: Path, reading: int) -> str:
    """Return a hint at the function for a foreign suffix, to write (0) or read (1) it, or ""."""
    name = _FOREIGN_FORMATS.get(path.suffix, ("", ""))[reading]
    return f" (use xprnn.{name} for {path.suffix})" if name else ""


def _as_storable(where: str, array: Any) -> Any:
    """Return a C-contiguous little-endian array, or raise InputError for an unsupported dtype."""
    array = np.asarray(array)
    if array.dtype.name not in DTYPES:
        raise InputError(f"{where} has dtype {array.dtype.name}, a file holds {', '.join(DTYPES)}: convert it first")
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _crc32(array: Any) -> int:
    # Dtype and shape are included, so that damage to either of them in the file is detected too.
    start = zlib.crc32(f"{array.dtype.str} {array.shape}".encode())
    content: Any = np.asarray(array, order="C").reshape(-1).view(np.uint8)
    return zlib.crc32(content, start)


def _npz_bytes(arrays: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
    return buffer.getvalue()


@contextmanager
def open_archive(path: str | Path) -> Iterator[Archive]:
    """Open an archive for reading.

    Raises:
        InputError: the file is missing, damaged, or was not written by xprnn. Damage that appears only while reading
            an array within the `with` block raises it too.
    """
    path = as_path("load", path)
    if path.suffix not in _OPENERS:
        raise InputError(f"{path}: expected a .safetensors or .npz file{_format_hint(path, 1)}")
    check_file(str(path), path)
    try:
        with path.open("rb"), _OPENERS[path.suffix](path) as (text, shapes, read):
            if text is None:
                raise InputError(f"{path}: not written by xprnn (its header has no {FORMAT!r} entry)")
            header = json.loads(text)
            if not isinstance(header, dict):
                raise ValueError("its header is not a JSON object")
            yield Archive(header, shapes, _with_checksum_check(read, header.pop("crc32", None)))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except _CORRUPTION_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise InputError(f"{path}: damaged, or not a {path.suffix} file ({reason})") from None


def _with_checksum_check(read: _ReadArray, checksums: Any) -> _ReadArray:
    """Wrap `read`: an array whose CRC-32 differs from the header's raises ValueError."""

    def checked(name: str) -> Any:
        array = read(name)
        if not isinstance(checksums, dict) or checksums.get(name) != _crc32(array):
            raise ValueError(f"{name} does not match its checksum")
        return array

    return checked


@contextmanager
def _open_safetensors(path: Path) -> Iterator[_RawArchive]:
    # safe_open has already checked that every tensor lies within the file.
    with safetensors.safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        for name, tensor in slices.items():
            _check_dtype(name, tensor.get_dtype(), ("F16", "F32", "F64", "I32", "I64"))
        shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
        metadata = file.metadata() or {}
        text = metadata.get(FORMAT)
        if text is not None and metadata.get(_CHECKSUM) != str(zlib.crc32(text.encode())):
            raise ValueError("its header does not match its checksum")
        yield text, shapes, file.get_tensor


@contextmanager
def _open_npz(path: Path) -> Iterator[_RawArchive]:
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
    """Return the shape in the header of an npy member, after checking it against the member's size."""
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"{member.filename} has npy version {version}")
    try:
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # a damaged header raises SyntaxError, TokenError and other exceptions
        raise ValueError(f"{member.filename}: {error}") from None
    if not all(0 <= n < 2**62 for n in shape):
        raise ValueError(f"{member.filename} has shape {str(shape)[:100]}")
    _check_dtype(member.filename, dtype.str[1:], ("f2", "f4", "f8", "i4", "i8", "u1"))
    if math.prod(shape) * dtype.itemsize != member.file_size - stream.tell():
        raise ValueError(f"{member.filename} does not have the size of its shape {shape}")
    return shape


def _check_dtype(name: str, found: str, known: tuple[str, ...]) -> None:
    if found not in known:
        raise ValueError(f"{name} has dtype {found}, expected one of {', '.join(known)}")


# zipfile raises RuntimeError if a damaged directory marks a member as encrypted, and its subclass NotImplementedError.
_CORRUPTION_ERRORS = (safetensors.SafetensorError, zipfile.BadZipFile, ValueError, EOFError, RuntimeError)
_OPENERS = {".safetensors": _open_safetensors, ".npz": _open_npz}


def to_like(where: str, array: Any, like: Array) -> Array:
    """Copy a NumPy array to the library and device of `like`; floats take the dtype of `like`.

    Raises:
        InputError: `like` has a dtype that NumPy does not have.
    """
    try:
        return from_numpy(array, like=like)
    except TypeError:
        raise InputError(f"{where}: cannot be loaded as {like.dtype}; load as another dtype and convert") from None


def check_layer_count(config: Any, num_arrays: int) -> None:
    """Raise InputError if a configuration has more layers than the file has arrays.

    The check comes before the layers are created, because listing the parameters of a corrupt layer count could fill
    the memory.
    """
    if isinstance(config, dict):
        count = config.get("num_layers", 1)
        if isinstance(count, int) and count > max(1, num_arrays):
            raise InputError(f"num_layers is {str(count)[:20]} but there are {num_arrays} arrays")
        for value in config.values():
            check_layer_count(value, num_arrays)
