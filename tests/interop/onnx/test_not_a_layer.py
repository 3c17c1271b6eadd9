"""Graphs that look like one of xprnn's own models and are not: they stay graphs, and compute what they say."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from support.onnx_cases import run_onnxruntime

import xprnn
from xprnn.interop.onnx.graph_model import GraphModel

pytestmark = pytest.mark.needs("onnx")
T, N, D, H = 5, 4, 3, 3


def weights(rng):
    """Of two LSTMs, two GRUs and a matrix, and integers."""
    shapes = {"W": (1, 4 * H, D), "R": (1, 4 * H, H), "B": (1, 8 * H), "M": (H, H), "L": (N, N), "b": (H,)}
    shapes |= {"W2": (1, 4 * H, H), "R2": (1, 4 * H, H), "V": (1, 3 * H, D), "S": (1, 3 * H, H)}
    out = {k: (rng.standard_normal(s) * 0.5).astype(np.float32) for k, s in shapes.items()}
    numbers = {"0": [0], "1": [1], "2": [2], "turned": [N, T, H], "same": [T, N, H], "0-d": 0, "last": -1}
    numbers |= {"half": [1, 3, 2, 5]}
    out |= {f"i{k}": np.asarray(v, np.int64) for k, v in numbers.items()}
    return out | {"lengths": np.asarray([5, 2, 1, 3], np.int32)}


def lstm(x, h="", c="", *, second=False, name="", lens=""):
    k = "2" if second else ""
    return ("LSTM", [x, f"W{k}", f"R{k}", "B", lens, h, c], [f"Y{name}", f"H{name}", f"C{name}"], {"hidden_size": H})


def squeezed(name=""):
    return ("Squeeze", [f"Y{name}", "i1"], [f"y{name}"], {})


FIRST = [lstm("x", name="1"), squeezed("1")]
SECOND = [lstm("y1", second=True, name="2"), squeezed("2")]
# name -> (nodes, output, whether there are states as inputs, what the reason says)
LOOKALIKES = {
    "time and batch are mixed": (
        [*FIRST, ("Reshape", ["y1", "iturned"], ["y"], {})],
        "mixes axes",
    ),
    "the steps are the rows": (
        [
            *FIRST,
            ("Transpose", ["y1"], ["t"], {"perm": [1, 0, 2]}),
            lstm("t", second=True, name="2"),
            ("Squeeze", ["Y2", "i1"], ["y"], {}),
        ],
        "does not run along the time axis",
    ),
    "it is laid out otherwise than its input": (
        [*FIRST, ("Transpose", ["y1"], ["y"], {"perm": [1, 0, 2]})],
        "the axes of its output are not in the order of those of its input",
    ),
    "features stand where steps stood": (
        [*FIRST, ("Transpose", ["y1"], ["t"], {"perm": [0, 2, 1]}), ("Transpose", ["t"], ["y"], {"perm": [1, 0, 2]})],
        "the axes of its output are not in the order of those of its input",
    ),
    "a second layer passes the first one by": (
        [*FIRST, lstm("x", name="2"), ("Squeeze", ["Y2", "i1"], ["y"], {})],
        "does not read the layer before it",
    ),
    "a sum of two layers": (
        [*FIRST, *SECOND, ("Add", ["y1", "y2"], ["y"], {})],
        "does not add the bias of a linear layer",
    ),
    "the first layer is the output": (
        [*FIRST, *SECOND, ("Identity", ["y1"], ["y"], {})],
        "not those of the last layer",
    ),
    "a bias twice": (
        [*FIRST, ("MatMul", ["y1", "M"], ["m"], {}), ("Add", ["m", "b"], ["a"], {}), ("Add", ["a", "b"], ["y"], {})],
        "does not add the bias of a linear layer",
    ),
    "a weight from the left": (
        [*FIRST, ("MatMul", ["L", "y1"], ["y"], {})],
        "is not a product of the layer before it with a weight",
    ),
    "a cell state as output": (
        [*FIRST, ("Gather", ["C1", "i0-d"], ["y"], {"axis": 0})],
        "reads a state of another layer",
    ),
    "another layer's final state": (
        [*FIRST, *SECOND, ("Gather", ["H1", "ilast"], ["y"], {"axis": 0})],
        "reads a state of another layer",
    ),
    "the last row's final state": (
        [*FIRST, ("Gather", ["H1", "ilast"], ["y"], {"axis": 1})],
        "or of one row",
    ),
    "hidden and cell states joined": (
        [*FIRST, ("Concat", ["H1", "C1"], ["j"], {"axis": 0}), ("Gather", ["j", "ilast"], ["y"], {"axis": 0})],
        "states of two kinds",
    ),
    "rows added in pairs": (
        [*FIRST, ("Split", ["y1"], ["p", "q"], {"axis": 1}), ("Sum", ["p", "q"], ["y"], {})],
        "slices data",
    ),
    "the first step": ([*FIRST, ("Gather", ["y1", "i0-d"], ["y"], {"axis": 0})], "selects steps or features"),
    "the last feature": ([*FIRST, ("Gather", ["y1", "ilast"], ["y"], {"axis": 2})], "slices data"),
    "softmax over time": ([*FIRST, ("Softmax", ["y1"], ["y"], {"axis": 0})], "not along the features"),
    "a step left out": (
        [*FIRST, ("Slice", ["y1", "i1", "i2", "i0"], ["s"], {}), ("Expand", ["s", "isame"], ["y"], {})],
        "slices data",
    ),
    "lengths for one layer alone": (
        [lstm("x", name="1", lens="lengths"), squeezed("1"), *SECOND, ("Identity", ["y2"], ["y"], {})],
        "has constant lengths",
    ),
    "lengths from outside for one layer alone": (
        [lstm("x", name="1", lens="rows"), squeezed("1"), *SECOND, ("Identity", ["y2"], ["y"], {})],
        "its layers have different lengths",
    ),
    "a matrix product alone": ([("MatMul", ["x", "M"], ["y"], {})], "no recurrent operator"),
}
STATES = {
    "the layers' states change places": (
        [
            ("Slice", ["s", "i1", "i2", "i0"], ["s1"], {}),
            ("Slice", ["s", "i0", "i1", "i0"], ["s2"], {}),
            lstm("x", "s1", name="1"),
            squeezed("1"),
            lstm("y1", "s2", second=True, name="2"),
            ("Squeeze", ["Y2", "i1"], ["y"], {}),
        ],
        "in another order",
    ),
    "a state is computed": (
        [
            ("Tanh", ["s"], ["t"], {}),
            ("Slice", ["t", "i0", "i1", "i0"], ["s1"], {}),
            lstm("x", "s1", name="1"),
            ("Squeeze", ["Y1", "i1"], ["y"], {}),
        ],
        "Tanh",
    ),
}


def built(nodes, arrays, states):
    from onnx import helper, numpy_helper

    made = [helper.make_node(op, i, o, name=f"n{k}", **a) for k, (op, i, o, a) in enumerate(nodes)]
    used = {name for _, inputs, _, _ in nodes for name in inputs}
    inputs = [helper.make_tensor_value_info("x", 1, [T, N, D])]
    inputs += [helper.make_tensor_value_info("s", 1, [2, N, H])] if states else []
    inputs += [helper.make_tensor_value_info("rows", 6, [N])] if "rows" in used else []
    kept = [numpy_helper.from_array(a, k) for k, a in arrays.items() if k in used]
    outputs = [helper.make_tensor_value_info("y", 1, ["any"])]
    graph = helper.make_graph(made, "g", inputs, outputs, kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.needs("onnxruntime")
@pytest.mark.parametrize("name", [*LOOKALIKES, *STATES])
def test_lookalikes_stay_graphs(rng, name):
    nodes, reason = (LOOKALIKES | STATES)[name]
    model = built(nodes, weights(rng), name in STATES)
    graph, params = xprnn.from_onnx(model)
    assert isinstance(graph, GraphModel)
    assert reason in graph.reason
    data = {"x": rng.standard_normal((T, N, D)).astype(np.float32)}
    data |= {"s": rng.standard_normal((2, N, H)).astype(np.float32)} if name in STATES else {}
    data |= {"rows": np.asarray([1, 5, 2, 3], np.int32)} if "from outside" in name else {}
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    np.testing.assert_allclose(graph(params, data)[0], answer(model, data), rtol=0, atol=1e-6)


def answer(model, data):
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output[0].ClearField("type")
    return run_onnxruntime(onnx.shape_inference.infer_shapes(copy), data)["y"]


def test_what_is_done_with_is_let_go(rng):
    """Twenty steps over an array of 4 MB hold a few of them at a time."""
    nodes = [("Tanh", ["x" if k == 0 else f"v{k}"], [f"v{k + 1}"], {}) for k in range(19)]
    model = built([*nodes, ("Tanh", ["v19"], ["y"], {})], {}, states=False)
    del model.graph.input[0].type.tensor_type.shape.dim[:]
    graph, _ = xprnn.from_onnx(model, like=np.zeros(1, np.float32))
    x = np.zeros((1 << 20,), np.float32)
    tracemalloc.start()
    try:
        graph({}, x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * x.nbytes
