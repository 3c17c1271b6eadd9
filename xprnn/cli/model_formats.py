"""Models and arrays in files, the format told by the ending.

.safetensors   xprnn's, or a state_dict that torch or another wrote: its header tells which
.npz           xprnn's
.pt .pth       a state_dict that torch wrote
.onnx          an ONNX model
.keras .h5     Keras 3's model and weight files (only read)
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
    """A model from a file."""

    format: str
    model: Any
    params: Params
    metadata: dict[str, Any]

    @property
    def is_graph(self) -> bool:
        """Whether it is a general ONNX graph, which is only run."""
        return hasattr(self.model, "reason")


def read_model(source: str | Path, like: Array | None = None, **hints: Any) -> LoadedModel:
    """The model in a file, whatever wrote it.

    Args:
        place: a file, or the DIR of a run.
        like: as in `load`.
        hints: nonlinearity, batch_first, order, for state_dicts (see from_torch); config, for .weights.h5 (see
            from_keras).

    Raises:
        InputError: no such file, another ending, a file that cannot be read; or hints for a format that needs none.
    """
    path = Path(source)
    if path.is_dir():
        path = path / MODEL_FILENAME
    if not path.exists():
        raise InputError(f"{path}: there is no such model")
    hints = {name: value for name, value in hints.items() if value is not None}
    kind = _detect_format(path)
    allowed = {"torch": {"nonlinearity", "batch_first", "order"}, "Keras": {"config"}}.get(kind, set())
    if strangers := sorted(hints.keys() - allowed):
        raise InputError(f"{path}: a file of {kind} needs no {', '.join(strangers)}: leave that out")
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
    """Whose file it is."""
    if path.suffix == ".safetensors":
        return "xprnn" if is_xprnn_file(path) else "torch"
    kinds = {".npz": "xprnn", ".pt": "torch", ".pth": "torch", ".onnx": "ONNX", ".keras": "Keras", ".h5": "Keras"}
    if path.suffix not in kinds:
        raise InputError(f"{path}: expected a name ending in {SUPPORTED_SUFFIXES}, found {path.suffix or 'no ending'}")
    return kinds[path.suffix]


def write_model(path: str | Path, loaded_model: LoadedModel) -> None:
    """Write a model to a file in the format of its ending, in one step.

    Raises:
        InputError: an ending that is not written, or a model that the format cannot hold, with all reasons.
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
        only = ": Keras's files are only read" if path.suffix in (".keras", ".h5") else ""
        raise InputError(f"{path}: expected a name ending in .safetensors, .npz, .pt, .pth or .onnx{only}")


def read_npy(path: str | Path) -> Any:
    """The array of a `.npy` file, whose header is not believed before the file's length bears it out.

    Raises:
        InputError: no such file, a damaged one, or one that holds something else than numbers.
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
    except Exception as error:  # on a damaged header NumPy raises whatever its parts do
        said = " ".join(str(error).split())[:200]
        said = "it holds Python objects, which are not read" if "ickle" in said or "Python object" in said else said
        raise InputError(f"{path}: damaged, or not a .npy file ({said})") from None


def write_npy(path: str | Path, outputs: Mapping[str, Any]) -> None:
    """Write one output to a `.npy` file; several to one file each, with their names before its ending.

    Raises:
        InputError: another ending, or a place that cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npy":
        raise InputError(f"{path}: expected a name ending in .npy")
    for name, array in outputs.items():
        content = io.BytesIO()
        np.save(content, np.asarray(array), allow_pickle=False)
        write_atomically(path if len(outputs) == 1 else path.with_suffix(f".{name}.npy"), content.getvalue())
