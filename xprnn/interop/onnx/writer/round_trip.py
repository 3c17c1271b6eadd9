"""Verification of the model that the metadata of an ONNX file describes.

to_onnx stores the configuration of the model in the file. It is trusted only if exporting that model again, with the
arrays of the file as parameters, gives the same graph: every node and every bit.
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
    """Return (declared_model, params) with NumPy arrays if to_onnx writes the same graph for them, else None.

    Args:
        proto: a checked ModelProto.
        declared_model: the model that the metadata of the file describes.
    """
    try:
        return _rebuild_and_compare(proto, declared_model)
    except Exception:  # an array is missing, or the onnx package cannot check the graph
        return None


def _rebuild_and_compare(proto: Any, model: Any) -> tuple[Any, Params] | None:
    onnx, graph = require_onnx("from_onnx"), proto.graph
    weights = {t.name: t for t in graph.initializer}
    names = [v.name for v in graph.input]
    floats = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.DOUBLE: "float64"}
    options: dict[str, Any] = {
        "lengths": "lengths" in names,
        "optional": any(name in weights for name in names),
        "dtype": floats[graph.output[0].type.tensor_type.elem_type],
    }
    check_supported("from_onnx", model, options["dtype"], options["lengths"], options["optional"])
    shapes = model.shapes()
    if sum(len(t.raw_data) for t in graph.initializer) < sum(int(np.prod(s)) for s in shapes.values()):
        return None  # the described model is larger than the file: do not allocate it
    zeros = {name: np.zeros(shape, options["dtype"]) for name, shape in shapes.items()}
    specs = to_specs(model, zeros)
    writer = ModelWriter(onnx, model, options["dtype"], options["lengths"], options["optional"])
    writer.write(specs)
    for spec, read_weights in zip(specs, writer.weight_readers, strict=True):
        arrays = read_weights(lambda name: tensor_to_numpy(weights[name]))
        if {k: a.shape for k, a in arrays.items()} != {k: a.shape for k, a in spec.params.items()}:
            raise InputError("the arrays of the file have other shapes")
        spec.params.update({k: np.ascontiguousarray(a) for k, a in arrays.items()})
    params = params_for(model, specs)
    rebuilt = build_model_proto(model, params, **options)
    return (model, params) if rebuilt.graph == graph else None
