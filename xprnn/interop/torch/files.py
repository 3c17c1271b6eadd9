"""Readers of state_dicts, `.safetensors` files and torch's `.pt` files, which check shapes and dtypes before the data.

Files are not trusted, and code in a file is never run. `.safetensors` files cannot contain code. `.pt` files are read
by torch's weights-only loader and are memory-mapped, so that a false tensor size does not allocate memory.
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
    """Import and return torch.

    Raises:
        InputError: torch is not installed; the message says what to install.
    """
    return require_package(where, "torch", "torch")


def lazy_arrays(where: str, source: Mapping[Any, Any]) -> dict[str, LazyArray]:
    """Return name -> LazyArray for a state_dict of torch tensors or arrays.

    Raises:
        InputError: entries whose key is not a string or whose value is not an array; the message lists them.

    >>> lazy_arrays("from_torch", {"weight": np.zeros((2, 3))})["weight"].shape
    (2, 3)
    """
    invalid = [f"{k!r} ({type(a).__name__})" for k, a in source.items() if not isinstance(k, str) or not _is_array(a)]
    if invalid:
        listed = ", ".join(invalid[:10])
        raise InputError(f"{where}: expected a state_dict (name -> array), found {listed[:300]}")
    return {name: _lazy_array(where, name, array) for name, array in source.items()}


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _lazy_array(where: str, name: str, array: Any) -> LazyArray:
    def read() -> Any:
        with suppress(TypeError, ValueError, RuntimeError, NotImplementedError):
            # NumPy has no bfloat16. The conversion to float32 is exact.
            host_array = to_numpy(array.float() if dtype == "bfloat16" else array)
            return np.array(host_array, dtype=host_array.dtype.newbyteorder("="), order="C")
        raise InputError(f"{where}: {name} {dtype} cannot be read as a NumPy array")

    dtype = str(array.dtype).rpartition(".")[2]
    return LazyArray(tuple(int(n) for n in array.shape), dtype, read)


def read_weight_file(where: str, path: Path) -> tuple[dict[str, LazyArray], bool]:
    """Read the arrays of a `.safetensors`, `.pt` or `.pth` file.

    Returns:
        arrays, sorted_names. sorted_names is True for `.safetensors`, whose order of names is not that of the layers.

    Raises:
        InputError: the suffix is none of these, or the file cannot be read or is damaged.
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
        # safe_open itself checks every tensor's extent against the length of the file.
        with safetensors.safe_open(path, framework="numpy") as file:
            if FORMAT in (file.metadata() or {}):
                raise InputError(f"{path}: written by xprnn, with the model's configuration: read it with xprnn.load")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            headers = {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()}
    except InputError:
        raise
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path}: damaged, or not a .safetensors file ({str(error)[:300]})") from None

    def lazy_array(name: str, dtype_code: str, shape: tuple[int, ...]) -> LazyArray:
        return LazyArray(
            shape,
            _SAFETENSORS_DTYPES.get(dtype_code, dtype_code.lower()),
            lambda: _read_tensor(path, name, dtype_code, shape),
        )

    return {name: lazy_array(name, dtype_code, shape) for name, (dtype_code, shape) in headers.items()}


def _read_tensor(path: Path, name: str, dtype_code: str, shape: tuple[int, ...]) -> Any:
    if dtype_code != "BF16":
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)
    # NumPy has no bfloat16. A bfloat16 is the upper half of a float32, so the conversion is exact.
    with path.open("rb") as file:
        (header_length,) = struct.unpack("<Q", file.read(8))
        begin, end = json.loads(file.read(header_length))[name]["data_offsets"]
        file.seek(8 + header_length + begin)
        upper_halves = np.frombuffer(file.read(end - begin), "<u2")
    return (upper_halves.astype("<u4") << 16).view("<f4").reshape(shape)


def _read_torch_file(where: str, path: Path) -> dict[str, LazyArray]:
    torch = require_torch(f"{where} {path}")
    _check_zip(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises errors of many types on damaged files
        raise InputError(
            f"{path}: torch's weights-only loader cannot read it as a state_dict {_error_detail(error)}"
        ) from None
    if isinstance(content, Mapping) and not _is_array_dict(content):
        state_dicts = [value for value in content.values() if _is_array_dict(value)]
        content = state_dicts[0] if len(state_dicts) == 1 else content
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected a state_dict, found {type(content).__name__}")
    _check_tensors(path, content, torch)
    return lazy_arrays(str(path), content)


def _error_detail(error: Exception) -> str:
    """Shorten the message of torch.load, without colours and without its advice to load the file unsafely."""
    if "Weights only" in str(error):
        return (
            "(it has other pickled objects, perhaps a whole module): write it with torch.save(model.state_dict(), path)"
        )
    message = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    return f"({message[:160] or type(error).__name__})"


def _is_array_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(_is_array(a) for a in value.values())


def _check_zip(path: Path) -> None:
    """Raise InputError unless the file has torch's zip format, with members that are stored without compression."""
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError):
        raise InputError(f"{path}: damaged, or not written by torch.save of torch 1.6 or newer") from None
    if any(member.compress_type != zipfile.ZIP_STORED or member.file_size > path.stat().st_size for member in members):
        raise InputError(f"{path}: not written by torch.save (its members are compressed)")


def _check_tensors(path: Path, content: Mapping[Any, Any], torch: Any) -> None:
    """Raise InputError for a tensor that is larger than the file, or that is not a dense CPU tensor."""
    file_size = path.stat().st_size
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
        if not plain or tensor.numel() * tensor.element_size() > file_size:
            raise InputError(f"{path}: {str(name)[:200]} is not a dense tensor whose data is in the file")
