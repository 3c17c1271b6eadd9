"""A file that to_onnx wrote, read back whole: its model, by its own word, held against the graph to the last bit.

The word alone proves nothing. Its model is written again, with the arrays that the file has where it would put them:
only if that is the file's graph, node by node and bit by bit, is the file what it says.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xprnn.arrays.namespace import InputError, Params
from xprnn.interop.onnx.layer_specs import pieces_of, with_structure
from xprnn.interop.onnx.model_file import need_onnx, tensor
from xprnn.interop.onnx.writer.export import Writer, exported
from xprnn.interop.onnx.writer.support_checks import refuse

__all__ = ["reread"]


def reread(proto: Any, told: Any) -> tuple[Any, Params] | None:
    """The model and its parameters (NumPy), if the graph is what to_onnx writes of `told`; else None.

    Args:
        proto: a checked ModelProto.
        told: the model that its metadata describes.
    """
    try:
        return _again(proto, told)
    except Exception:  # a graph that lacks what is looked for, or the onnx package's own about one it cannot check
        return None


def _again(proto: Any, told: Any) -> tuple[Any, Params] | None:
    onnx, graph = need_onnx("from_onnx"), proto.graph
    weights = {t.name: t for t in graph.initializer}
    names = [v.name for v in graph.input]
    floats = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.DOUBLE: "float64"}
    options: dict[str, Any] = {
        "lengths": "lengths" in names,
        "optional": any(name in weights for name in names),
        "dtype": floats[graph.output[0].type.tensor_type.elem_type],
    }
    refuse("from_onnx", told, options["dtype"], options["lengths"], options["optional"])
    shapes = told.shapes()
    if sum(len(t.raw_data) for t in graph.initializer) < sum(int(np.prod(s)) for s in shapes.values()):
        return None  # before a claim takes memory
    blank = {name: np.zeros(shape, options["dtype"]) for name, shape in shapes.items()}
    pieces = pieces_of(told, blank)
    writer = Writer(onnx, told, options["dtype"], options["lengths"], options["optional"])
    writer.write(pieces)
    for piece, own in zip(pieces, writer.readers, strict=True):
        found = own(lambda name: tensor(weights[name]))
        if {k: a.shape for k, a in found.items()} != {k: a.shape for k, a in piece.own.items()}:
            raise InputError("its arrays have other shapes")
        piece.own.update({k: np.ascontiguousarray(a) for k, a in found.items()})
    params = with_structure(told, pieces)
    again = exported(told, params, **options)
    return (told, params) if again.graph == graph else None
