"""The arrays of a source, looked at before they are read: state_dicts, `.safetensors` files, torch's `.pt` files.

Files are not trusted. Nothing in one is ever run: `.safetensors` cannot hold code, and of `.pt` files only what torch's
weights-only loader takes is read, mapped from the file, so that no claim in it takes memory.
"""

from __future__ import annotations

import json
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from xprnn.arrays.namespace import InputError, to_numpy
from xprnn.interop.assemble import LazyArray
from xprnn.interop.optional_import import require_package
from xprnn.io.archive import FORMAT, check_file

__all__ = ["lazy_arrays", "read_weight_file", "require_torch"]

_SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def require_torch(where: str) -> Any:
    """The module torch.

    Raises:
        InputError: it is not installed; says what to install.
    """
    return require_package(where, "torch", "torch")


def lazy_arrays(where: str, source: Mapping[Any, Any]) -> dict[str, LazyArray]:
    """Name -> array of a state_dict.

    Raises:
        InputError: something in it that is not an array under a name, all of it named.

    >>> lazy_arrays("from_torch", {"weight": np.zeros((2, 3))})["weight"].shape
    (2, 3)
    """
    strangers = [f"{k!r} ({type(a).__name__})" for k, a in source.items() if not isinstance(k, str) or not _is_array(a)]
    if strangers:
        some = ", ".join(strangers[:10])
        raise InputError(f"{where}: expected a state_dict, names and arrays, found {some[:300]}")
    return {name: _lazy_array(where, name, array) for name, array in source.items()}


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _lazy_array(where: str, name: str, array: Any) -> LazyArray:
    def read() -> Any:
        with suppress(TypeError, ValueError, RuntimeError, NotImplementedError):
            # NumPy has no bfloat16; float32 holds its numbers exactly.
            host = to_numpy(array.float() if dtype == "bfloat16" else array)
            return np.array(host, dtype=host.dtype.newbyteorder("="), order="C")
        raise InputError(f"{where}: {name} {dtype} cannot be read as a NumPy array")

    dtype = str(array.dtype).rpartition(".")[2]
    return LazyArray(tuple(int(n) for n in array.shape), dtype, read)


def read_weight_file(where: str, path: Path) -> tuple[dict[str, LazyArray], bool]:
    """The arrays of a `.safetensors`, `.pt` or `.pth` file, and whether their order says nothing.

    Raises:
        InputError: another ending, a file that cannot be read, or a damaged one.
    """
    check_file(str(path), path)
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if path.suffix == ".safetensors":
        return _read_safetensors(path), True
    if path.suffix in (".pt", ".pth"):
        return _read_torch_file(where, path), False
    raise InputError(f"{path}: expected a .safetensors, .pt or .pth file")


def _read_safetensors(path: Path) -> dict[str, LazyArray]:
    try:
        # The library compares every tensor's extent with the file's length before it hands out a name.
        with safetensors.safe_open(path, framework="numpy") as file:
            if FORMAT in (file.metadata() or {}):
                raise InputError(f"{path}: written by xprnn, whose configuration it holds: read it with xprnn.load")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            about = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except InputError:
        raise
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path}: damaged, or not a .safetensors file ({str(error)[:300]})") from None

    def entry(name: str, kind: str, shape: tuple[int, ...]) -> LazyArray:
        return LazyArray(
            shape, _SAFETENSORS_DTYPES.get(kind, kind.lower()), lambda: _read_tensor(path, name, kind, shape)
        )

    return {name: entry(name, kind, shape) for name, (kind, shape) in about.items()}


def _read_tensor(path: Path, name: str, kind: str, shape: tuple[int, ...]) -> Any:
    if kind != "BF16":
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)
    # NumPy has no bfloat16: it is the upper half of a float32, which holds its numbers exactly.
    with path.open("rb") as raw:
        (length,) = struct.unpack("<Q", raw.read(8))
        begin, end = json.loads(raw.read(length))[name]["data_offsets"]
        raw.seek(8 + length + begin)
        halves = np.frombuffer(raw.read(end - begin), "<u2")
    return (halves.astype("<u4") << 16).view("<f4").reshape(shape)


def _read_torch_file(where: str, path: Path) -> dict[str, LazyArray]:
    torch = require_torch(f"{where} {path}")
    _check_zip(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # on damaged files the loader raises whatever its parts do
        raise InputError(
            f"{path}: holds no state_dict that torch's weights-only loader reads {_error_detail(error)}"
        ) from None
    if isinstance(found, Mapping) and not _is_array_dict(found):
        inner = [value for value in found.values() if _is_array_dict(value)]
        found = inner[0] if len(inner) == 1 else found
    if not isinstance(found, Mapping):
        raise InputError(f"{path}: expected a state_dict, found {type(found).__name__}")
    _check_tensors(path, found, torch)
    return lazy_arrays(str(path), found)


def _error_detail(error: Exception) -> str:
    """What torch's loader has found, without its colours, and without its advice to read the file all the same."""
    if "Weights only" in str(error):
        return "(but pickled objects, a whole module perhaps); torch.save(model.state_dict(), path) writes one"
    said = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    return f"({said[:160] or type(error).__name__})"


def _is_array_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(_is_array(a) for a in value.values())


def _check_zip(path: Path) -> None:
    """Raise InputError for what is not torch's zip format, or a zip whose members grow when they are read."""
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError):
        raise InputError(f"{path}: damaged, or not written by torch.save of torch 1.6 or newer") from None
    if any(m.compress_type != zipfile.ZIP_STORED or m.file_size > path.stat().st_size for m in members):
        raise InputError(f"{path}: not written by torch.save (its members are compressed)")


def _check_tensors(path: Path, found: Mapping[Any, Any], torch: Any) -> None:
    """Raise InputError for a tensor of more numbers than the file has, or none at all."""
    most = path.stat().st_size
    for name, tensor in found.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
        if not plain or tensor.numel() * tensor.element_size() > most:
            raise InputError(f"{path}: {str(name)[:200]} is no plain tensor that the file holds")
