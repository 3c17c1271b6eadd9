"""Implementation of the commands `convert`, `info` and `run`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xprnn.cli.model_formats import LoadedModel, read_model, read_npy, write_model, write_npy

__all__ = ["convert_command", "info_command", "run_command"]

_LONGEST_REPEATED = 20.0  # seconds: a call that takes longer is not repeated to be timed


def _dtype_array(dtype: str | None) -> Any:
    return None if dtype is None else np.zeros(0, dtype)


def convert_command(source: str, target: str, dtype: str | None = None, **hints: Any) -> int:
    """Read a model file, write it in another format, and print a summary.

    Args:
        source: model file, or directory of a run.
        target: file to write; its ending selects the format.
        dtype: dtype of the written parameters, "float32" or "float64"; None for that of the source.
        hints: keyword arguments of `read_model`.

    Returns:
        The exit code 0.
    """
    loaded = read_model(source, _dtype_array(dtype), **hints)
    write_model(target, loaded)
    print(f"{source} ({loaded.format}) -> {target}: {_summary(loaded)}")
    ending = Path(target).suffix
    if loaded.metadata and ending not in (".safetensors", ".npz"):
        names = ", ".join(loaded.metadata)
        print(f"xprnn convert: {ending} files store no metadata; left out: {names}", file=sys.stderr)
    if ending == ".onnx" and any(str(p.dtype) == "float64" for p in loaded.params.values()):
        print("xprnn convert: ONNX Runtime has no float64 recurrent layers; use --dtype float32", file=sys.stderr)
    return 0


def _summary(loaded: LoadedModel) -> str:
    dtypes = sorted({str(p.dtype) for p in loaded.params.values()})
    return f"{sum(int(p.size) for p in loaded.params.values()):,} parameters, {' and '.join(dtypes) or 'no dtype'}"


def info_command(path: str, **hints: Any) -> int:
    """Print the layers, parameters, shapes, dtypes and metadata of a model file.

    Args:
        path: model file, or directory of a run.
        hints: keyword arguments of `read_model`.

    Returns:
        The exit code 0.
    """
    loaded = read_model(path, None, **hints)
    print(f"{path} ({loaded.format}): {_summary(loaded)}")
    layers = getattr(loaded.model, "layers", None)
    for name, layer in (layers or {"model": loaded.model}).items():
        print(f"  {name}: {layer!r}")
    if loaded.is_graph:
        print(f"  only run, not converted, since {loaded.model.reason}")
    for name, array in loaded.params.items():
        print(f"  {name:24} {tuple(array.shape)!s:16} {array.dtype}")
    for name, value in loaded.metadata.items():
        print(f"  {name} = {value!r}" if not isinstance(value, str) else f"  {name} = {value[:200]!r}")
    return 0


def run_command(path: str, input_path: str, output: str | None = None, stream: bool = False, **hints: Any) -> int:
    """Run a model on the array of a `.npy` file; write the outputs or print them, and print the time on stderr.

    Args:
        path: model file, or directory of a run.
        input_path: `.npy` file of the input.
        output: `.npy` file to write; None prints the outputs.
        stream: True runs one step at a time with a carried state.
        hints: keyword arguments of `read_model`.

    Returns:
        The exit code 0.
    """
    loaded = read_model(path, None, **hints)
    given = read_npy(input_path)
    x = _prepare_input(loaded, given)
    outputs, duration = _timed(_run_steps if stream else _run_sequence, loaded, x)
    if x.dtype != given.dtype:
        print(f"xprnn run: {input_path}: {given.dtype} cast to {x.dtype}, the parameters' dtype", file=sys.stderr)
    if output is not None:
        write_npy(output, outputs)
    else:
        for name, array in outputs.items():
            print(f"{name} {tuple(array.shape)} {array.dtype}\n{array}")
    print(f"{input_path} {x.shape} {x.dtype}: {duration}", file=sys.stderr)
    return 0


def _timed(
    run: Callable[[LoadedModel, Any], dict[str, Any]], loaded: LoadedModel, x: Any
) -> tuple[dict[str, Any], str]:
    """Return the outputs and a text with the time, of a second call because the first one may compile kernels."""
    start = time.perf_counter()
    outputs = run(loaded, x)
    first = time.perf_counter() - start
    if first > _LONGEST_REPEATED:
        return outputs, f"{1000 * first:.3g} ms, with the start-up of the kernels"
    start = time.perf_counter()
    run(loaded, x)
    seconds = time.perf_counter() - start
    return outputs, f"{1000 * seconds:.3g} ms (first call {1000 * first:.3g} ms, with the start-up of the kernels)"


def _named_outputs(y: Any) -> dict[str, Any]:
    """Return the outputs by name: y for one, y_0, y_1, ... for a tuple."""
    if isinstance(y, Mapping):
        return dict(y)
    return {f"y_{k}": output for k, output in enumerate(y)} if isinstance(y, tuple) else {"y": y}


def _run_sequence(loaded: LoadedModel, x: Any) -> dict[str, Any]:
    y, _ = loaded.model(loaded.params, x)
    return _named_outputs(y)


def _run_steps(loaded: LoadedModel, x: Any) -> dict[str, Any]:
    """Run one step at a time with a carried state, and stack the outputs along time."""
    axis = 1 if _batch_first(loaded.model) else 0
    if x.ndim <= axis:  # no time axis: the call on the whole sequence raises the error
        return _run_sequence(loaded, x)
    steps, state, outputs = np.moveaxis(x, axis, 0), None, list[dict[str, Any]]()
    for x_t in steps:
        y_t, state = loaded.model.step(loaded.params, x_t, state)
        outputs.append(_named_outputs(y_t))
    if not outputs:
        return _run_sequence(loaded, x)
    return {name: np.stack([y_t[name] for y_t in outputs], axis) for name in outputs[0]}


def _leaf_layers(model: Any) -> Iterator[Any]:
    """Yield the layers of a model, those of nested Sequentials included."""
    layers = getattr(model, "layers", None)
    for layer in [] if layers is None else layers.values():
        yield from _leaf_layers(layer)
    if layers is None:
        yield model


def _batch_first(model: Any) -> bool:
    return any(getattr(layer, "batch_first", False) for layer in _leaf_layers(model))


def _prepare_input(loaded: LoadedModel, x: Any) -> Any:
    """Cast features to the dtype of the parameters, keep class ids as integers, add a batch axis to a lone sequence."""
    dtype = next((p.dtype for p in loaded.params.values()), np.dtype(np.float32))
    if x.dtype.kind == "f" or (x.ndim == 3 and not loaded.is_graph):
        x = x.astype(dtype)
    if not loaded.is_graph and x.ndim == (2 if x.dtype.kind == "f" else 1):
        x = np.expand_dims(x, 0 if _batch_first(loaded.model) else 1)
    return x
