"""A file that to_onnx wrote, read back whole: its model, by its own word, held against the graph to the last bit.

The word alone proves nothing. Its model is written again, with the arrays that the file has where it would put them:
only if that is the file's graph, node by node and bit by bit, is the file what it says.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xprnn.arrays.namespace import InputError, Params
from xprnn.interop.onnx.layer_specs import params_for, to_specs
from xprnn.interop.onnx.model_file import require_onnx, tensor_to_numpy
from xprnn.interop.onnx.writer.export import ModelWriter, build_model_proto
from xprnn.interop.onnx.writer.support_checks import check_supported

__all__ = ["verify_round_trip"]


def verify_round_trip(proto: Any, declared_model: Any) -> tuple[Any, Params] | None:
    """The model and its parameters (NumPy), if the graph is what to_onnx writes of `told`; else None.

    Args:
        proto: a checked ModelProto.
        told: the model that its metadata describes.
    """
    try:
        return _rebuild_and_compare(proto, declared_model)
    except Exception:  # a graph that lacks what is looked for, or the onnx package's own about one it cannot check
        return None


def _rebuild_and_compare(proto: Any, told: Any) -> tuple[Any, Params] | None:
    onnx, graph = require_onnx("from_onnx"), proto.graph
    weights = {t.name: t for t in graph.initializer}
    names = [v.name for v in graph.input]
    floats = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.DOUBLE: "float64"}
    options: dict[str, Any] = {
        "lengths": "lengths" in names,
        "optional": any(name in weights for name in names),
        "dtype": floats[graph.output[0].type.tensor_type.elem_type],
    }
    check_supported("from_onnx", told, options["dtype"], options["lengths"], options["optional"])
    shapes = told.shapes()
    if sum(len(t.raw_data) for t in graph.initializer) < sum(int(np.prod(s)) for s in shapes.values()):
        return None  # before a claim takes memory
    blank = {name: np.zeros(shape, options["dtype"]) for name, shape in shapes.items()}
    pieces = to_specs(told, blank)
    writer = ModelWriter(onnx, told, options["dtype"], options["lengths"], options["optional"])
    writer.write(pieces)
    for piece, own in zip(pieces, writer.weight_readers, strict=True):
        found = own(lambda name: tensor_to_numpy(weights[name]))
        if {k: a.shape for k, a in found.items()} != {k: a.shape for k, a in piece.params.items()}:
            raise InputError("its arrays have other shapes")
        piece.params.update({k: np.ascontiguousarray(a) for k, a in found.items()})
    params = params_for(told, pieces)
    again = build_model_proto(told, params, **options)
    return (told, params) if again.graph == graph else None
