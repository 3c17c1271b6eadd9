"""Reading and writing models and arrays in files; the ending selects the format.

.safetensors   an xprnn model, or a state_dict of torch or another library; the header distinguishes them
.npz           an xprnn model
.pt .pth       a state_dict of torch
.onnx          an ONNX model
.keras .h5     model and weight files of Keras 3 (read only)
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays.namespace import Array, InputError, Params
from xprnn.io.archive import check_file, is_xprnn_file, write_atomically
from xprnn.layers.model_file import MODEL_FILENAME, load, load_metadata, save

__all__ = ["LoadedModel", "read_model", "read_npy", "write_model", "write_npy"]

SUPPORTED_SUFFIXES = ".safetensors, .npz, .pt, .pth, .onnx, .keras or .h5"


class LoadedModel(NamedTuple):
    """A model that was read from a file, with its parameters and metadata."""

    format: str
    model: Any
    params: Params
    metadata: dict[str, Any]

    @property
    def is_graph(self) -> bool:
        """True for a general ONNX graph, which can be run but not converted."""
        return hasattr(self.model, "reason")


def read_model(source: str | Path, like: Array | None = None, **hints: Any) -> LoadedModel:
    """Read a model file of any format.

    Args:
        source: model file, or directory of a run.
        like: array that gives the parameters their namespace, dtype and device; None for NumPy and the file's dtype.
        hints: nonlinearity, batch_first and order for a state_dict (see from_torch); config for a .weights.h5 file
            (see from_keras). Hints that are None are ignored.

    Raises:
        InputError: the file does not exist, has an unknown ending or cannot be read, or a hint does not apply to it.
    """
    path = Path(source)
    if path.is_dir():
        path = path / MODEL_FILENAME
    if not path.exists():
        raise InputError(f"{path}: no such model file")
    hints = {name: value for name, value in hints.items() if value is not None}
    kind = _detect_format(path)
    allowed = {"torch": {"nonlinearity", "batch_first", "order"}, "Keras": {"config"}}.get(kind, set())
    if unknown := sorted(hints.keys() - allowed):
        raise InputError(f"{path}: {', '.join(unknown)} does not apply to {kind} files: leave it out")
    if kind == "xprnn":
        return LoadedModel(kind, *load(path, like), load_metadata(path))
    from xprnn import interop

    readers: dict[str, Callable[..., Any]] = {
        "torch": interop.from_torch,
        "Keras": interop.from_keras,
        "ONNX": interop.from_onnx,
    }
    model, params = readers[kind](path, like, **hints)
    return LoadedModel(kind, model, params, {})


def _detect_format(path: Path) -> str:
    """Return the library that wrote the file: xprnn, torch, ONNX or Keras."""
    if path.suffix == ".safetensors":
        return "xprnn" if is_xprnn_file(path) else "torch"
    kinds = {".npz": "xprnn", ".pt": "torch", ".pth": "torch", ".onnx": "ONNX", ".keras": "Keras", ".h5": "Keras"}
    if path.suffix not in kinds:
        raise InputError(f"{path}: expected a name ending in {SUPPORTED_SUFFIXES}, found {path.suffix or 'no ending'}")
    return kinds[path.suffix]


def write_model(path: str | Path, loaded_model: LoadedModel) -> None:
    """Write a model to a file in the format of its ending; the file appears complete or not at all.

    Raises:
        InputError: the ending is unknown or read only, or the format cannot represent the model (with all reasons).
    """
    path = Path(path)
    model, params = loaded_model.model, loaded_model.params
    if loaded_model.is_graph:
        raise InputError(f"{path}: this ONNX graph is only run, not converted, since {model.reason}")
    if path.suffix in (".safetensors", ".npz"):
        save(path, model, params, loaded_model.metadata)
    elif path.suffix in (".pt", ".pth"):
        from xprnn.interop import to_torch
        from xprnn.interop.torch.files import require_torch

        content = io.BytesIO()
        require_torch(str(path)).save(to_torch(model, params).state_dict, content)
        write_atomically(path, content.getvalue())
    elif path.suffix == ".onnx":
        from xprnn.interop import to_onnx

        dtype = str(next(iter(params.values())).dtype) if params else "float32"
        to_onnx(model, params, path, dtype=dtype)
    else:
        hint = ": Keras files can only be read" if path.suffix in (".keras", ".h5") else ""
        raise InputError(f"{path}: expected a name ending in .safetensors, .npz, .pt, .pth or .onnx{hint}")


def read_npy(path: str | Path) -> Any:
    """Read the array of a `.npy` file, after checking that the file is as long as its header claims.

    Raises:
        InputError: the file does not exist, is damaged, or does not hold an array of numbers.
    """
    check_file(str(path), Path(path))
    try:
        with Path(path).open("rb") as file:
            if file.read(6) != b"\x93NUMPY":
                raise InputError(f"{path}: damaged, or not a .npy file")
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(mapped, np.ndarray) or mapped.dtype.kind not in "fiub":
            raise InputError(f"{path}: expected one array of numbers")
        return np.array(mapped, dtype=mapped.dtype.newbyteorder("="))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # NumPy raises many types of exception on a damaged header
        reason = " ".join(str(error).split())[:200]
        has_objects = "ickle" in reason or "Python object" in reason
        reason = "it holds Python objects, which are not read" if has_objects else reason
        raise InputError(f"{path}: damaged, or not a .npy file ({reason})") from None


def write_npy(path: str | Path, outputs: Mapping[str, Any]) -> None:
    """Write the outputs of a model: one to `path`, several to one file each with the output's name before the ending.

    Args:
        path: file with the ending `.npy`.
        outputs: name -> array.

    Raises:
        InputError: the ending is not `.npy`, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npy":
        raise InputError(f"{path}: expected a name ending in .npy")
    for name, array in outputs.items():
        content = io.BytesIO()
        np.save(content, np.asarray(array), allow_pickle=False)
        write_atomically(path if len(outputs) == 1 else path.with_suffix(f".{name}.npy"), content.getvalue())
