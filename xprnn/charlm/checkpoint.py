"""Checkpoint files: the model, the parameters and the training state of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Array, InputError, from_numpy, to_numpy
from xprnn.charlm.trainer import TrainState
from xprnn.io.archive import read_arrays, write_arrays
from xprnn.layers.sequential import from_config
from xprnn.training.optimizers import adam


def save_checkpoint(path: str | Path, model: Any, train_state: TrainState, metadata: Mapping[str, Any]) -> None:
    """Write a training run to one file, so that training resumed from it continues bit for bit.

    Args:
        path: file to write, with the ending `.safetensors`.
        model: a model that `from_config` can build again.
        train_state: state of the run between two steps.
        metadata: JSON-serialisable values to store with it.
    """
    tree = {
        "params": train_state.params,
        "moments": train_state.optimizer_state,
        "state": train_state.recurrent_state,
        "loss": train_state.loss,
    }
    arrays = {key: np.asarray(leaf, order="C") for key, leaf in _flatten(tree, "")}
    header = {
        "run": {"model": model.config(), "step": train_state.step, "seconds": train_state.seconds},
        "metadata": dict(metadata),
    }
    write_arrays(path, arrays, header)


def load_checkpoint(path: str | Path, like: Array) -> tuple[Any, TrainState]:
    """Read a file that `save_checkpoint` wrote.

    Args:
        path: the file.
        like: array that gives namespace and device of the arrays.

    Returns:
        The model and the training state.

    Raises:
        InputError: the file is damaged or is not a checkpoint.
    """
    arrays, header = read_arrays(path)
    try:
        run = header["run"]
        model, step, seconds = from_config(run["model"]), int(run["step"]), float(run["seconds"])
        params = {name: arrays[f"/params/{name}"] for name in model.shapes()}
        params = {name: from_numpy(array, like=like) for name, array in params.items()}
        moments = _unflatten(adam(0.0).init(params), "/moments", arrays)
        if step == 0:
            return model, TrainState(0, params, moments)
        _, state = model(params, from_numpy(np.zeros((1, 1), dtype=np.int64), like=like))
        loss = from_numpy(arrays["/loss"], like=like)
        return model, TrainState(step, params, moments, _unflatten(state, "/state", arrays), loss, seconds)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: expected a training checkpoint, found another or a damaged file ({error})") from None


def _flatten(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (path, NumPy array) for every leaf of nested mappings, tuples and lists; None is left out."""
    if isinstance(tree, Mapping):
        for name, child in tree.items():
            yield from _flatten(child, f"{path}/{name}")
    elif isinstance(tree, tuple | list):
        for index, child in enumerate(tree):
            yield from _flatten(child, f"{path}/{index}")
    elif isinstance(tree, int | float):
        yield path, np.asarray(tree)
    elif tree is not None:
        yield path, to_numpy(tree)


def _unflatten(template: Any, path: str, arrays: Mapping[str, Any]) -> Any:
    """Build a tree with the structure of `template` from the arrays that `_flatten` yielded."""
    if isinstance(template, Mapping):
        return {name: _unflatten(child, f"{path}/{name}", arrays) for name, child in template.items()}
    if isinstance(template, tuple | list):
        children = [_unflatten(child, f"{path}/{index}", arrays) for index, child in enumerate(template)]
        return type(template)(*children) if hasattr(template, "_fields") else type(template)(children)
    if isinstance(template, int | float):
        return type(template)(arrays[path])
    return None if template is None else from_numpy(arrays[path], like=template)
