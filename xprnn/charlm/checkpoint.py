"""Checkpoint files of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Array, InputError, from_numpy, to_numpy
from xprnn.charlm.trainer import Snapshot
from xprnn.io.archive import read_arrays, write_arrays
from xprnn.layers.sequential import from_config
from xprnn.training.optimizers import adam


def keep(path: str | Path, model: Any, now: Snapshot, metadata: Mapping[str, Any]) -> None:
    """Write all of a run to one file, from which `restore` goes on to the last bit.

    Args:
        path: ends in `.safetensors`.
        model: the model.
        now: the snapshot.
        metadata: whatever JSON can hold.
    """
    parts = {"params": now.params, "moments": now.moments, "state": now.state, "loss": now.loss}
    arrays = {k: np.asarray(v, order="C") for k, v in _leaves(parts, "")}
    header = {"run": {"model": model.config(), "step": now.step, "seconds": now.seconds}, "metadata": dict(metadata)}
    write_arrays(path, arrays, header)


def restore(path: str | Path, like: Array) -> tuple[Any, Snapshot]:
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
        moments = _refill(adam(0.0).init(params), "/moments", arrays)
        if step == 0:
            return model, Snapshot(0, params, moments)
        _, state = model(params, from_numpy(np.zeros((1, 1), dtype=np.int64), like=like))
        loss = from_numpy(arrays["/loss"], like=like)
        return model, Snapshot(step, params, moments, _refill(state, "/state", arrays), loss, seconds)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: expected a run to resume, found another or a damaged file ({error})") from None


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for name, part in tree.items():
            yield from _leaves(part, f"{path}/{name}")
    elif isinstance(tree, tuple | list):
        for number, part in enumerate(tree):
            yield from _leaves(part, f"{path}/{number}")
    elif isinstance(tree, int | float):
        yield path, np.asarray(tree)
    elif tree is not None:
        yield path, to_numpy(tree)


def _refill(template: Any, path: str, arrays: Mapping[str, Any]) -> Any:
    if isinstance(template, Mapping):
        return {name: _refill(part, f"{path}/{name}", arrays) for name, part in template.items()}
    if isinstance(template, tuple | list):
        parts = [_refill(part, f"{path}/{number}", arrays) for number, part in enumerate(template)]
        return type(template)(*parts) if hasattr(template, "_fields") else type(template)(parts)
    if isinstance(template, int | float):
        return type(template)(arrays[path])
    return None if template is None else from_numpy(arrays[path], like=template)
