"""What the commands `convert`, `info` and `run` do."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xprnn.cli.model_formats import LoadedModel, read_model, read_npy, write_model, write_npy

__all__ = ["convert_command", "info_command", "run_command"]


def _dtype_array(dtype: str | None) -> Any:
    return None if dtype is None else np.zeros(0, dtype)


def convert_command(source: str, target: str, dtype: str | None = None, **hints: Any) -> int:
    """Read one file, write another, and say what it holds. Returns 0."""
    found = read_model(source, _dtype_array(dtype), **hints)
    write_model(target, found)
    print(f"{source} ({found.format}) -> {target}: {_summary(found)}")
    ending = Path(target).suffix
    if found.metadata and ending not in (".safetensors", ".npz"):
        print(f"xprnn convert: {ending} has no place for its {', '.join(found.metadata)}", file=sys.stderr)
    if ending == ".onnx" and any(str(p.dtype) == "float64" for p in found.params.values()):
        print("xprnn convert: ONNX Runtime has no recurrent layers in float64: --dtype float32", file=sys.stderr)
    return 0


def _summary(found: LoadedModel) -> str:
    dtypes = sorted({str(p.dtype) for p in found.params.values()})
    return f"{sum(int(p.size) for p in found.params.values()):,} parameters, {' and '.join(dtypes) or 'no dtype'}"


def info_command(path: str, **hints: Any) -> int:
    """Say what is in a file: layers, parameters, shapes, dtype, metadata. Returns 0."""
    found = read_model(path, None, **hints)
    print(f"{path} ({found.format}): {_summary(found)}")
    parts = getattr(found.model, "layers", None)
    for name, part in (parts or {"model": found.model}).items():
        print(f"  {name}: {part!r}")
    if found.is_graph:
        print(f"  only run, since {found.model.reason}")
    for name, array in found.params.items():
        print(f"  {name:24} {tuple(array.shape)!s:16} {array.dtype}")
    for name, value in found.metadata.items():
        print(f"  {name} = {value!r}" if not isinstance(value, str) else f"  {name} = {value[:200]!r}")
    return 0


def run_command(path: str, input_path: str, output: str | None = None, stream: bool = False, **hints: Any) -> int:
    """Run a model on the array of a `.npy` file, and write or print what comes out. Returns 0."""
    found = read_model(path, None, **hints)
    x = _prepare_input(found, read_npy(input_path))
    start = time.perf_counter()
    outputs = _run_steps(found, x) if stream else _run_sequence(found, x)
    seconds = time.perf_counter() - start
    if output is not None:
        write_npy(output, outputs)
    else:
        for name, array in outputs.items():
            print(f"{name} {tuple(array.shape)} {array.dtype}\n{array}")
    print(f"{input_path} {x.shape} {x.dtype}: {1000 * seconds:.3g} ms", file=sys.stderr)
    return 0


def _named_outputs(y: Any) -> dict[str, Any]:
    if isinstance(y, Mapping):
        return dict(y)
    return {f"y_{k}": part for k, part in enumerate(y)} if isinstance(y, tuple) else {"y": y}


def _run_sequence(found: LoadedModel, x: Any) -> dict[str, Any]:
    out = found.model(found.params, x)
    return _named_outputs(out if found.is_graph else out[0])


def _run_steps(found: LoadedModel, x: Any) -> dict[str, Any]:
    """The output of every step, each on the state that the one before left."""
    axis = 1 if _batch_first(found.model) else 0
    if x.ndim <= axis:  # no time to walk in, as the whole call says
        return _run_sequence(found, x)
    steps, state, outputs = np.moveaxis(x, axis, 0), None, list[dict[str, Any]]()
    for x_t in steps:
        y_t, state = found.model.step(found.params, x_t, state)
        outputs.append(_named_outputs(y_t))
    if not outputs:
        return _run_sequence(found, x)
    return {name: np.stack([y_t[name] for y_t in outputs], axis) for name in outputs[0]}


def _leaf_layers(model: Any) -> Iterator[Any]:
    parts = getattr(model, "layers", None)
    for part in [] if parts is None else parts.values():
        yield from _leaf_layers(part)
    if parts is None:
        yield model


def _batch_first(model: Any) -> bool:
    return any(getattr(part, "batch_first", False) for part in _leaf_layers(model))


def _prepare_input(found: LoadedModel, x: Any) -> Any:
    """x in the parameters' dtype, integers where they are numbers of rows; a single sequence gets a batch of 1."""
    dtype = next((p.dtype for p in found.params.values()), np.dtype(np.float32))
    if x.dtype.kind == "f" or (x.ndim == 3 and not found.is_graph):
        x = x.astype(dtype)
    if not found.is_graph and x.ndim == (2 if x.dtype.kind == "f" else 1):
        x = np.expand_dims(x, 0 if _batch_first(found.model) else 1)
    return x
