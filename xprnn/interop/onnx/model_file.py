"""Reading of ONNX files that are not trusted.

Sizes are compared before memory is allocated, and no file outside the folder of the model is opened.

Source: the ONNX IR specification (onnx.ai), IR version 14 and opsets 7 to 28.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xprnn.arrays.namespace import InputError
from xprnn.interop.optional_import import require_package
from xprnn.io.archive import as_path, check_file

__all__ = ["SUPPORTED_OPSETS", "opset_version", "read_model", "require_onnx", "subgraphs", "tensor_to_numpy"]

SUPPORTED_OPSETS = (7, 28)
_MAX_BYTES = 1 << 31  # bytes: protobuf's own limit for one message


def require_onnx(where: str) -> Any:
    """Import and return the onnx package.

    Raises:
        InputError: the package is not installed; the message says what to install.
    """
    return require_package(where, "onnx", "onnx", "checker", "inliner", "numpy_helper")


def read_model(source: Any) -> Any:
    """Read and check a ModelProto, inline its functions and load its external data.

    Args:
        source: a path, or an onnx.ModelProto, which is not changed.

    Raises:
        InputError: the source is not an ONNX model, is damaged or contradicts itself, or refers to data outside its
            folder; the onnx package is missing.
    """
    onnx = require_onnx("from_onnx")
    if isinstance(source, onnx.ModelProto):
        where, folder, model = "from_onnx", None, onnx.ModelProto()
        model.CopyFrom(source)
    else:
        path = as_path("from_onnx", source)
        where, folder, model = str(path), path.parent, _parse_model(onnx, path)
    if any(not isinstance(name, str) for name in _iter_names(onnx, model.graph)):
        raise InputError(f"{where}: damaged: some names are not valid UTF-8")
    for tensor in _iter_tensors(onnx, model.graph):
        _check_tensor(onnx, where, tensor, folder)
    try:
        onnx.checker.check_model(model)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"{where}: not a valid ONNX model ({_first_line(error)})") from None
    return model


def opset_version(where: str, model: Any) -> int:
    """The opset version of a model.

    Raises:
        InputError: the version is not one of SUPPORTED_OPSETS.
    """
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    version = versions[0] if versions else 0
    first, last = SUPPORTED_OPSETS
    if not first <= version <= last:
        raise InputError(
            f"{where}: opset {version}, expected {first} to {last}: convert it with onnx.version_converter"
        )
    return int(version)


def _parse_model(onnx: Any, path: Path) -> Any:
    check_file(str(path), path)
    try:
        if path.stat().st_size >= _MAX_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes: a model file holds less than 2 GiB")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError, whose module depends on the version of protobuf
        raise InputError(f"{path}: damaged, or not an ONNX file ({_first_line(error)})") from None
    if not model.HasField("graph"):
        raise InputError(f"{path}: damaged, or not an ONNX file (it has no graph)")
    return model


def subgraphs(onnx: Any, node: Any) -> Iterator[Any]:
    """The graphs in the attributes of a node: bodies of Loop and Scan, branches of If."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def _iter_tensors(onnx: Any, graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
        for inner in subgraphs(onnx, node):
            yield from _iter_tensors(onnx, inner)


def _iter_names(onnx: Any, graph: Any) -> Iterator[Any]:
    """Every name in a graph; protobuf returns bytes for a name that is not valid UTF-8."""
    for value in (*graph.initializer, *graph.input, *graph.output):
        yield value.name
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
        for inner in subgraphs(onnx, node):
            yield from _iter_names(onnx, inner)


def _check_tensor(onnx: Any, where: str, t: Any, folder: Path | None) -> None:
    """Raise InputError unless the size of a tensor's data is that of its shape; load external data."""
    name = f"{where}: tensor {t.name or '(without a name)'}"
    if any(d < 0 for d in t.dims):
        raise InputError(f"{name} has shape {tuple(t.dims)}")
    if t.data_type not in _STORAGE_FIELDS:
        known = onnx.TensorProto.DataType.Name(t.data_type) if t.data_type in _known_data_types(onnx) else t.data_type
        raise InputError(f"{name} is of type {known}, expected floats, integers or booleans")
    count = math.prod(t.dims)
    field, size = _STORAGE_FIELDS[t.data_type]
    if t.data_location == onnx.TensorProto.EXTERNAL:
        _load_external(onnx, name, t, folder, count * size)
    if t.HasField("raw_data"):
        found, expected, unit = len(t.raw_data), count * size, "bytes"
    else:
        found, expected, unit = len(getattr(t, field)), count, "values"
    if found != expected:
        raise InputError(f"{name} of shape {tuple(t.dims)} needs {expected} {unit}, found {found}")


def _known_data_types(onnx: Any) -> list[int]:
    return list(onnx.TensorProto.DataType.values())


# data type -> the field that holds its values if raw_data does not, and the bytes of one value in raw_data
_STORAGE_FIELDS = {
    1: ("float_data", 4),  # FLOAT
    2: ("int32_data", 1),  # UINT8
    3: ("int32_data", 1),  # INT8
    4: ("int32_data", 2),  # UINT16
    5: ("int32_data", 2),  # INT16
    6: ("int32_data", 4),  # INT32
    7: ("int64_data", 8),  # INT64
    9: ("int32_data", 1),  # BOOL
    10: ("int32_data", 2),  # FLOAT16
    11: ("double_data", 8),  # DOUBLE
    12: ("uint64_data", 4),  # UINT32
    13: ("uint64_data", 8),  # UINT64
}


def _load_external(onnx: Any, name: str, t: Any, folder: Path | None, size: int) -> None:
    entries = {entry.key: entry.value for entry in t.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise InputError(
            f"{name} is in the file {location!r}: pass the path of the model, or load its external data first"
        )
    try:
        root = folder.resolve()
        path = (root / location).resolve()
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(size)))
        inside = path.is_relative_to(root) and path.is_file() and not (root / location).is_symlink()
        if not location or not inside:
            raise InputError(f"{name} is in {location!r}: only files in the folder of the model are opened")
        if offset < 0 or length != size or offset + length > path.stat().st_size:
            found = f"bytes {offset} to {offset + length} of {path.stat().st_size}"
            raise InputError(f"{name} of shape {tuple(t.dims)} needs {size} bytes, found {found} in {location!r}")
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(length)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} is in {location!r}, which cannot be read ({error})") from None
    t.ClearField("external_data")
    t.data_location = onnx.TensorProto.DEFAULT
    t.raw_data = content


def tensor_to_numpy(t: Any) -> Any:
    """Copy the values of a TensorProto to a NumPy array; numpy_helper.to_array may return a read-only view."""
    return np.array(require_onnx("from_onnx").numpy_helper.to_array(t))


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
