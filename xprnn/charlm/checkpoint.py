"""Checkpoint files of a training run."""

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
    """Write all of a run to one file, from which `load_checkpoint` goes on to the last bit.

    Args:
        path: ends in `.safetensors`.
        model: the model.
        now: the snapshot.
        metadata: whatever JSON can hold.
    """
    parts = {
        "params": train_state.params,
        "moments": train_state.optimizer_state,
        "state": train_state.recurrent_state,
        "loss": train_state.loss,
    }
    arrays = {k: np.asarray(v, order="C") for k, v in _flatten(parts, "")}
    header = {
        "run": {"model": model.config(), "step": train_state.step, "seconds": train_state.seconds},
        "metadata": dict(metadata),
    }
    write_arrays(path, arrays, header)


def load_checkpoint(path: str | Path, like: Array) -> tuple[Any, TrainState]:
    """Return the model and the snapshot that `keep` wrote, on `like`'s device.

    Raises:
        InputError: not a file of `keep`, or a damaged one.
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
        raise InputError(f"{path}: expected a run to resume, found another or a damaged file ({error})") from None


def _flatten(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for name, part in tree.items():
            yield from _flatten(part, f"{path}/{name}")
    elif isinstance(tree, tuple | list):
        for number, part in enumerate(tree):
            yield from _flatten(part, f"{path}/{number}")
    elif isinstance(tree, int | float):
        yield path, np.asarray(tree)
    elif tree is not None:
        yield path, to_numpy(tree)


def _unflatten(template: Any, path: str, arrays: Mapping[str, Any]) -> Any:
    if isinstance(template, Mapping):
        return {name: _unflatten(part, f"{path}/{name}", arrays) for name, part in template.items()}
    if isinstance(template, tuple | list):
        parts = [_unflatten(part, f"{path}/{number}", arrays) for number, part in enumerate(template)]
        return type(template)(*parts) if hasattr(template, "_fields") else type(template)(parts)
    if isinstance(template, int | float):
        return type(template)(arrays[path])
    return None if template is None else from_numpy(arrays[path], like=template)
