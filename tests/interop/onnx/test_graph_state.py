"""A GraphModel returns (y, state): which outputs of the graph are the state, and in what containers."""

from __future__ import annotations

import numpy as np
import pytest
from support.onnx_cases import run_onnxruntime

import xprnn
from xprnn.interop.onnx.graph_model import GraphModel

pytestmark = pytest.mark.needs("onnx", "onnxruntime")
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
H = 2
# Nodes (op, inputs, output, attributes): torch stacks the final states of layers; Keras removes the directions axis.
STACKED = [("Concat", ["a_h", "b_h"], "h", {"axis": 0}), ("Concat", ["a_c", "b_c"], "c", {"axis": 0})]
LAST_AND_STATES = [
    ("Squeeze", ["a_h", "zero"], "last", {}),
    ("Squeeze", ["a_h", "zero"], "h", {}),
    ("Squeeze", ["a_c", "zero"], "c", {}),
]


def recurrent_model(rng, ops, outputs, nodes=()):
    """A ModelProto of the recurrent nodes a, b, ... of kinds `ops`, all on x (T,N,H), and further nodes."""
    import onnx
    from onnx import helper, numpy_helper

    weights, protos = {"zero": np.asarray([0], np.int64), "two": np.float32(2)}, []
    for label, op in zip("ab", ops, strict=False):
        weights |= {f"{label}_{w}": rng.standard_normal((1, GATES[op] * H, H)).astype(np.float32) for w in "WR"}
        names = [f"{label}_{k}" for k in ("y", "h", "c")][: 3 if op == "LSTM" else 2]
        protos.append(helper.make_node(op, ["x", f"{label}_W", f"{label}_R"], names, label, hidden_size=H))
    protos += [helper.make_node(op, inputs, [output], **attrs) for op, inputs, output, attrs in nodes]
    graph = helper.make_graph(
        protos,
        "g",
        [helper.make_tensor_value_info("x", 1, ["t", "n", H])],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


# name -> (recurrent ops, outputs, further nodes, y, state). A str is an array, a tuple a tuple, a list a dict.
CASES = {
    "no state": (["LSTM"], ["a_y"], [], "a_y", None),
    "h and c": (["LSTM"], ["a_y", "a_h", "a_c"], [], "a_y", ("a_h", "a_c")),
    "c and h before y": (["LSTM"], ["a_c", "a_h", "a_y"], [], "a_y", ("a_h", "a_c")),
    "h alone": (["GRU"], ["a_y", "a_h"], [], "a_y", "a_h"),
    "c alone": (["LSTM"], ["a_y", "a_c"], [], "a_y", "a_c"),
    "stacked layers": (["LSTM", "LSTM"], ["b_y", "h", "c"], STACKED, "b_y", ("h", "c")),
    "separate layers": (["LSTM", "RNN"], ["b_h", "a_h", "b_y"], [], "b_y", ["b_h", "a_h"]),
    "several y": (["GRU", "GRU"], ["a_y", "b_y", "b_h"], [], ["a_y", "b_y"], "b_h"),
    "final states alone": (["LSTM"], ["a_h", "a_c"], [], ["a_h", "a_c"], None),
    "one final state alone": (["RNN"], ["a_h"], [], "a_h", None),
    "final state twice": (["LSTM"], ["last", "h", "c"], LAST_AND_STATES, "last", ("h", "c")),
    "computed from a final state": (
        ["RNN"],
        ["scaled", "a_y"],
        [("Mul", ["a_h", "two"], "scaled", {})],
        ["scaled", "a_y"],
        None,
    ),
    "states of h and c in one array": (
        ["LSTM"],
        ["a_y", "both"],
        [("Concat", ["a_h", "a_c"], "both", {"axis": 0})],
        ["a_y", "both"],
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_call_returns_y_and_state(rng, xp, name):
    ops, outputs, nodes, y_names, state_names = CASES[name]
    proto = recurrent_model(rng, ops, outputs, nodes)
    x = rng.standard_normal((5, 3, H)).astype(np.float32)
    expected = run_onnxruntime(proto, {"x": x})
    model, params = xprnn.from_onnx(proto, like=xp.asarray(np.zeros(0, np.float32)))
    assert isinstance(model, GraphModel)
    y, state = model(params, xp.asarray(x))
    assert_equal(xp, y, y_names, expected)
    assert_equal(xp, state, state_names, expected)


def assert_equal(xp, found, names, expected):
    """`found` holds the arrays of these names: alone for a str, a tuple for a tuple, a dict for a list."""
    if names is None:
        assert found is None
    elif isinstance(names, str):
        np.testing.assert_allclose(xp.to_numpy(found), expected[names], rtol=0, atol=1e-6)
    else:
        assert list(found) == names if isinstance(names, list) else isinstance(found, tuple)
        arrays = found.values() if isinstance(names, list) else found
        for array, name in zip(arrays, names, strict=True):
            np.testing.assert_allclose(xp.to_numpy(array), expected[name], rtol=0, atol=1e-6)


def test_state_of_exported_model_is_that_of_the_layer(rng):
    """A stack with a user-defined activation is read as a GraphModel of Scan nodes."""
    double = xprnn.Activation("double", lambda xp: (lambda v: v + v, lambda y: y))
    layer = xprnn.LSTM(3, 4, 2, cell=xprnn.cells.lstm(candidate=double), bidirectional=True)
    params = layer.init(rng, like=np.zeros(0, np.float32))
    model, loaded = xprnn.from_onnx(xprnn.to_onnx(layer, params))
    assert isinstance(model, GraphModel)
    x = rng.standard_normal((5, 2, 3)).astype(np.float32)
    (y, state), (expected, expected_state) = model(loaded, x), layer(params, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)
    for array, final in zip(state, expected_state, strict=True):
        assert array.shape == final.shape == (4, 2, 4)
        np.testing.assert_allclose(array, final, rtol=0, atol=1e-6)
