"""from_onnx: a model of xprnn's own where the graph is one, else the graph itself, ready to run."""

from __future__ import annotations

from typing import Any

import numpy as np

from xprnn.arrays import Array, Params, from_numpy, resolve
from xprnn.interop.onnx_compile import compiled
from xprnn.interop.onnx_file import read_model
from xprnn.interop.onnx_graph import Graph

__all__ = ["from_onnx"]


def from_onnx(source: Any, like: Array | None = None) -> tuple[Any, Params]:
    block = compiled("from_onnx", read_model(source))
    if like is not None:
        resolve("from_onnx", {}, {"like": like})
    model, params = Graph(block, "?"), block.params
    if like is None:
        return model, {k: np.array(a) for k, a in params.items()}
    return model, {k: from_numpy(a, like) for k, a in params.items()}
