"""Graphs that resemble models of xprnn but are not: they become GraphModels and agree with ONNX Runtime."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from support.onnx_cases import run_onnxruntime

import xprnn
from xprnn.interop.onnx.graph_model import GraphModel

pytestmark = pytest.mark.needs("onnx")
T, N, D, H = 5, 4, 3, 3


def initializers(rng):
    """Weights of two LSTMs and of matrix products, and integer constants."""
    shapes = {"W": (1, 4 * H, D), "R": (1, 4 * H, H), "B": (1, 8 * H), "M": (H, H), "L": (N, N), "b": (H,)}
    shapes |= {"W2": (1, 4 * H, H), "R2": (1, 4 * H, H)}
    out = {k: (rng.standard_normal(s) * 0.5).astype(np.float32) for k, s in shapes.items()}
    integers = {"0": [0], "1": [1], "2": [2], "swapped": [N, T, H], "same": [T, N, H], "0-d": 0, "last": -1}
    out |= {f"i{k}": np.asarray(v, np.int64) for k, v in integers.items()}
    return out | {"lengths": np.asarray([5, 2, 1, 3], np.int32)}


def lstm(x, h="", c="", *, second=False, name="", lengths=""):
    """A node (op, inputs, outputs, attributes); outputs are Y, H and C with the suffix `name`."""
    k = "2" if second else ""
    return ("LSTM", [x, f"W{k}", f"R{k}", "B", lengths, h, c], [f"Y{name}", f"H{name}", f"C{name}"], {"hidden_size": H})


def squeeze(name=""):
    return ("Squeeze", [f"Y{name}", "i1"], [f"y{name}"], {})


FIRST = [lstm("x", name="1"), squeeze("1")]
SECOND = [lstm("y1", second=True, name="2"), squeeze("2")]
# name -> (nodes, text in GraphModel.reason)
GRAPHS = {
    "time and batch merged": (
        [*FIRST, ("Reshape", ["y1", "iswapped"], ["y"], {})],
        "mixes axes",
    ),
    "second layer runs over the batch": (
        [
            *FIRST,
            ("Transpose", ["y1"], ["t"], {"perm": [1, 0, 2]}),
            lstm("t", second=True, name="2"),
            ("Squeeze", ["Y2", "i1"], ["y"], {}),
        ],
        "does not run along the time axis",
    ),
    "output is batch first": (
        [*FIRST, ("Transpose", ["y1"], ["y"], {"perm": [1, 0, 2]})],
        "the axes of its output are not in the order of those of its input",
    ),
    "output has features first": (
        [*FIRST, ("Transpose", ["y1"], ["t"], {"perm": [0, 2, 1]}), ("Transpose", ["t"], ["y"], {"perm": [1, 0, 2]})],
        "the axes of its output are not in the order of those of its input",
    ),
    "second layer reads x": (
        [*FIRST, lstm("x", name="2"), ("Squeeze", ["Y2", "i1"], ["y"], {})],
        "does not read the layer before it",
    ),
    "sum of two layers": (
        [*FIRST, *SECOND, ("Add", ["y1", "y2"], ["y"], {})],
        "does not add the bias of a linear layer",
    ),
    "output of the first layer": (
        [*FIRST, *SECOND, ("Identity", ["y1"], ["y"], {})],
        "not those of the last layer",
    ),
    "two biases": (
        [*FIRST, ("MatMul", ["y1", "M"], ["m"], {}), ("Add", ["m", "b"], ["a"], {}), ("Add", ["a", "b"], ["y"], {})],
        "does not add the bias of a linear layer",
    ),
    "weight on the left": (
        [*FIRST, ("MatMul", ["L", "y1"], ["y"], {})],
        "is not a product of the layer before it with a weight",
    ),
    "cell state as output": (
        [*FIRST, ("Gather", ["C1", "i0-d"], ["y"], {"axis": 0})],
        "reads a state of another layer",
    ),
    "final state of the first layer": (
        [*FIRST, *SECOND, ("Gather", ["H1", "ilast"], ["y"], {"axis": 0})],
        "reads a state of another layer",
    ),
    "final state of one row": (
        [*FIRST, ("Gather", ["H1", "ilast"], ["y"], {"axis": 1})],
        "or of one row",
    ),
    "hidden and cell states concatenated": (
        [*FIRST, ("Concat", ["H1", "C1"], ["j"], {"axis": 0}), ("Gather", ["j", "ilast"], ["y"], {"axis": 0})],
        "states of two kinds",
    ),
    "sum of halves of the batch": (
        [*FIRST, ("Split", ["y1"], ["p", "q"], {"axis": 1}), ("Sum", ["p", "q"], ["y"], {})],
        "slices data",
    ),
    "first step": ([*FIRST, ("Gather", ["y1", "i0-d"], ["y"], {"axis": 0})], "selects steps or features"),
    "last feature": ([*FIRST, ("Gather", ["y1", "ilast"], ["y"], {"axis": 2})], "slices data"),
    "softmax over time": ([*FIRST, ("Softmax", ["y1"], ["y"], {"axis": 0})], "not along the features"),
    "one step removed": (
        [*FIRST, ("Slice", ["y1", "i1", "i2", "i0"], ["s"], {}), ("Expand", ["s", "isame"], ["y"], {})],
        "slices data",
    ),
    "constant lengths of one layer": (
        [lstm("x", name="1", lengths="lengths"), squeeze("1"), *SECOND, ("Identity", ["y2"], ["y"], {})],
        "has constant lengths",
    ),
    "input lengths of one layer": (
        [lstm("x", name="1", lengths="rows"), squeeze("1"), *SECOND, ("Identity", ["y2"], ["y"], {})],
        "its layers have different lengths",
    ),
    "matrix product alone": ([("MatMul", ["x", "M"], ["y"], {})], "no recurrent operator"),
}
GRAPHS_WITH_STATES = {
    "states in another order": (
        [
            ("Slice", ["s", "i1", "i2", "i0"], ["s1"], {}),
            ("Slice", ["s", "i0", "i1", "i0"], ["s2"], {}),
            lstm("x", "s1", name="1"),
            squeeze("1"),
            lstm("y1", "s2", second=True, name="2"),
            ("Squeeze", ["Y2", "i1"], ["y"], {}),
        ],
        "in another order",
    ),
    "computed state": (
        [
            ("Tanh", ["s"], ["t"], {}),
            ("Slice", ["t", "i0", "i1", "i0"], ["s1"], {}),
            lstm("x", "s1", name="1"),
            ("Squeeze", ["Y1", "i1"], ["y"], {}),
        ],
        "Tanh",
    ),
}


def build(nodes, arrays, states):
    """A ModelProto with the input x, the input s if `states`, and the input rows if it is used; the output is y."""
    from onnx import helper, numpy_helper

    node_protos = [helper.make_node(op, i, o, name=f"n{k}", **a) for k, (op, i, o, a) in enumerate(nodes)]
    used = {name for _, inputs, _, _ in nodes for name in inputs}
    inputs = [helper.make_tensor_value_info("x", 1, [T, N, D])]
    inputs += [helper.make_tensor_value_info("s", 1, [2, N, H])] if states else []
    inputs += [helper.make_tensor_value_info("rows", 6, [N])] if "rows" in used else []
    weights = [numpy_helper.from_array(a, k) for k, a in arrays.items() if k in used]
    outputs = [helper.make_tensor_value_info("y", 1, ["any"])]
    graph = helper.make_graph(node_protos, "g", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.needs("onnxruntime")
@pytest.mark.parametrize("name", [*GRAPHS, *GRAPHS_WITH_STATES])
def test_graph_model_has_reason_and_equals_onnx_runtime(rng, name):
    nodes, reason = (GRAPHS | GRAPHS_WITH_STATES)[name]
    proto = build(nodes, initializers(rng), name in GRAPHS_WITH_STATES)
    model, params = xprnn.from_onnx(proto)
    assert isinstance(model, GraphModel)
    assert reason in model.reason
    data = {"x": rng.standard_normal((T, N, D)).astype(np.float32)}
    data |= {"s": rng.standard_normal((2, N, H)).astype(np.float32)} if name in GRAPHS_WITH_STATES else {}
    data |= {"rows": np.asarray([1, 5, 2, 3], np.int32)} if name == "input lengths of one layer" else {}
    np.testing.assert_allclose(model(params, data)[0], onnx_runtime_y(proto, data), rtol=0, atol=1e-6)


def onnx_runtime_y(proto, data):
    """The output y of ONNX Runtime, with an inferred output shape."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output[0].ClearField("type")
    return run_onnxruntime(onnx.shape_inference.infer_shapes(copy), data)["y"]


def test_values_are_freed_after_their_last_use(rng):
    """A chain of twenty nodes on an array of 4 MB uses less memory than four such arrays."""
    nodes = [("Tanh", ["x" if k == 0 else f"v{k}"], [f"v{k + 1}"], {}) for k in range(19)]
    proto = build([*nodes, ("Tanh", ["v19"], ["y"], {})], {}, states=False)
    del proto.graph.input[0].type.tensor_type.shape.dim[:]
    model, _ = xprnn.from_onnx(proto, like=np.zeros(1, np.float32))
    x = np.zeros((1 << 20,), np.float32)
    tracemalloc.start()
    try:
        model({}, x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * x.nbytes
