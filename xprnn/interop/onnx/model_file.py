"""ONNX models read without trusting them: sizes are compared before memory is taken, and no file outside the model's
own folder is ever opened.

Source: the ONNX IR specification (onnx.ai), version 14 of it and opsets 7 to 28.
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
    """The onnx package.

    Raises:
        InputError: it is not installed; says what to install.
    """
    return require_package(where, "onnx", "onnx", "checker", "inliner", "numpy_helper")


def read_model(source: Any) -> Any:
    """A checked ModelProto, its functions inlined and its external data loaded.

    Args:
        source: a path, or an onnx.ModelProto, which is left as it is.

    Raises:
        InputError: not an ONNX model, a damaged or lying one, or one whose data lies outside its folder; no
            onnx package.
    """
    onnx = require_onnx("from_onnx")
    if isinstance(source, onnx.ModelProto):
        where, folder, model = "from_onnx", None, onnx.ModelProto()
        model.CopyFrom(source)
    else:
        path = as_path("from_onnx", source)
        where, folder, model = str(path), path.parent, _parse_model(onnx, path)
    if any(not isinstance(name, str) for name in _iter_names(onnx, model.graph)):
        raise InputError(f"{where}: damaged: names that are no text")
    for holder in _iter_tensors(onnx, model.graph):
        _check_tensor(onnx, where, holder, folder)
    try:
        onnx.checker.check_model(model)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"{where}: not a valid ONNX model ({_first_line(error)})") from None
    return model


def opset_version(where: str, model: Any) -> int:
    """The version of the standard's operators that the model uses.

    Raises:
        InputError: one older or newer than what is known here.
    """
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    found = versions[0] if versions else 0
    if not SUPPORTED_OPSETS[0] <= found <= SUPPORTED_OPSETS[1]:
        raise InputError(
            f"{where}: opset {found}: expected {SUPPORTED_OPSETS[0]} to {SUPPORTED_OPSETS[1]}; convert it with onnx"
        )
    return int(found)


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
    except Exception as error:  # protobuf's DecodeError, which is importable only from one of its versions' places
        raise InputError(f"{path}: damaged, or not an ONNX file ({_first_line(error)})") from None
    if not model.HasField("graph"):
        raise InputError(f"{path}: damaged, or not an ONNX file (it has no graph)")
    return model


def subgraphs(onnx: Any, node: Any) -> Iterator[Any]:
    """The graphs that stand in a node's attributes: bodies of Loop, branches of If."""
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
    """Every name; protobuf hands out bytes for what is no UTF-8."""
    for thing in (*graph.initializer, *graph.input, *graph.output):
        yield thing.name
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
        for inner in subgraphs(onnx, node):
            yield from _iter_names(onnx, inner)


def _check_tensor(onnx: Any, where: str, t: Any, folder: Path | None) -> None:
    """Raise InputError unless what the tensor holds is as much as its shape says; load what lies beside the model."""
    name = f"{where}: tensor {t.name or '(without a name)'}"
    if any(d < 0 for d in t.dims):
        raise InputError(f"{name} has shape {tuple(t.dims)}")
    if t.data_type not in _STORAGE_FIELDS:
        known = onnx.TensorProto.DataType.Name(t.data_type) if t.data_type in _known_data_types(onnx) else t.data_type
        raise InputError(f"{name} is of type {known}: expected floats, integers or booleans")
    count = math.prod(t.dims)
    field, size = _STORAGE_FIELDS[t.data_type]
    if t.data_location == onnx.TensorProto.EXTERNAL:
        _load_external(onnx, name, t, folder, count * size)
    found, wanted = (len(t.raw_data), count * size) if t.HasField("raw_data") else (len(getattr(t, field)), count)
    if found != wanted:
        raise InputError(f"{name} of shape {tuple(t.dims)} needs {wanted} values or bytes, found {found}")


def _known_data_types(onnx: Any) -> list[int]:
    return list(onnx.TensorProto.DataType.values())


# data type -> where its values stand when not in raw_data, and the bytes of one value there
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
    about = {entry.key: entry.value for entry in t.external_data}
    location = about.get("location", "")
    if folder is None:
        raise InputError(f"{name} lies in the file {location!r}: give the model's path, or load its data first")
    try:
        root = folder.resolve()
        path = (root / location).resolve()
        offset = int(about.get("offset", "0"))
        length = int(about.get("length", str(size)))
        inside = path.is_relative_to(root) and path.is_file() and not (root / location).is_symlink()
        if not location or not inside:
            raise InputError(f"{name} lies in {location!r}: only a file in the model's own folder is opened")
        if offset < 0 or length != size or offset + length > path.stat().st_size:
            held = f"bytes {offset} to {offset + length} of {path.stat().st_size}"
            raise InputError(f"{name} of shape {tuple(t.dims)} needs {size} bytes, found {held} in {location!r}")
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(length)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} lies in {location!r}, which cannot be read ({error})") from None
    t.ClearField("external_data")
    t.data_location = onnx.TensorProto.DEFAULT
    t.raw_data = content


def tensor_to_numpy(t: Any) -> Any:
    """A TensorProto's values as NumPy, a copy: what the package gives may lie in the message and be read-only."""
    return np.array(require_onnx("from_onnx").numpy_helper.to_array(t))


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
