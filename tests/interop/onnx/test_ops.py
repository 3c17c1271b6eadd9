"""Every operator but RNN, LSTM and GRU, on every array library, against ONNX Runtime."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from support.onnx_cases import run_onnxruntime

import xprnn

pytestmark = pytest.mark.needs("onnx")
RNG = np.random.default_rng(20)
I64 = np.int64


class NodeCase(NamedTuple):
    """A model of one node.

    Args:
        op: the operator.
        data: the first inputs, which are inputs of the model.
        constants: the other inputs, which are initializers.
        attrs: the attributes.
        opset: the opset version.
        outputs: the number of outputs.
    """

    op: str
    data: list[Any]
    constants: list[Any]
    attrs: dict[str, Any]
    opset: int = 17
    outputs: int = 1

    def __str__(self) -> str:
        attrs = ",".join(f"{k}={v}" for k, v in self.attrs.items() if not hasattr(v, "dims"))
        return f"{self.op}-{self.opset}-{[list(np.shape(a)) for a in self.data]}-{attrs}".replace(" ", "")


def floats(*shape, low=-2.0, high=2.0):
    return RNG.uniform(low, high, shape).astype(np.float32)


def ints(*shape, low=-9, high=9):
    return RNG.integers(low, high, shape)


def bools(*shape):
    return RNG.integers(0, 2, shape).astype(bool)


def case(op, *data, constants=(), opset=17, outputs=1, **attrs):
    return NodeCase(op, list(data), [np.asarray(k) for k in constants], attrs, opset, outputs)


X = floats(3, 4, 5)
PAIRS = [(floats(3, 1, 5), floats(4, 1)), (ints(2, 3, low=1), ints(3, low=1))]
SAME = [(ints(4, 5, high=-6), ints(4, 5, high=-6)), (floats(4), floats(4))]
ARITHMETIC = [case(op, a, b) for op in ("Add", "Sub", "Mul", "Div") for a, b in PAIRS]
UNARY = ("Abs", "Ceil", "Exp", "Floor", "Neg", "Round", "Sign", "Tanh", "Sigmoid", "Relu", "Softplus", "Softsign")
MATH = [
    *(case(op, X) for op in (*UNARY, "Reciprocal")),
    *(case(op, floats(3, 4, low=0.1)) for op in ("Log", "Sqrt")),
    *(case(op, X, **a) for op in ("Elu", "LeakyRelu", "ThresholdedRelu") for a in ({}, {"alpha": 0.3})),
    *(case("HardSigmoid", X, **a) for a in ({}, {"alpha": 0.3, "beta": 0.4})),
    *ARITHMETIC,
    case("Div", ints(40), ints(40, low=1)),
    case("Div", ints(40), -ints(40, low=1)),
    case("Mod", ints(40), ints(40, low=1)),
    case("Mod", ints(40), -ints(40, low=1), fmod=1),
    case("Mod", floats(40), floats(40, low=0.5), fmod=1),
    case("Pow", floats(3, 4, low=0.1), floats(4)),
    case("Pow", floats(3, 4), constants=[I64(2)]),
    *(case(op, bools(3, 4), bools(4)) for op in ("And", "Or", "Xor")),
    case("Not", bools(3, 4)),
    *(case(op, *p) for op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual") for p in SAME),
    *(case(op, floats(3, 4), floats(4), floats(3, 1)) for op in ("Max", "Min", "Sum", "Mean")),
    case("Min", ints(4), ints(1)),
    case("Clip", X, constants=[np.float32(-0.5), np.float32(0.7)]),
    case("Clip", X, opset=7, min=-0.5, max=0.7),
    case("Where", bools(3, 1), floats(3, 4), floats(4)),
    case("MatMul", floats(3, 4, 5), floats(5, 2)),
    case("MatMul", floats(3, 4, 5), floats(3, 5, 2)),
    case("MatMul", floats(4, 5), floats(5)),
    case("Gemm", floats(3, 4), floats(4, 5), floats(5), alpha=0.5, beta=2.0),
    case("Gemm", floats(4, 3), floats(5, 4), floats(3, 5), transA=1, transB=1),
    case("Gemm", floats(3, 4), floats(4, 5)),
    case("ArgMax", X, axis=1),
    case("ArgMax", X, axis=-1, keepdims=0),
    *(case("CumSum", X, constants=[I64(k)], exclusive=e, reverse=r) for k in (0, -1) for e in (0, 1) for r in (0, 1)),
    *(case(op, X, axis=k) for op in ("Softmax", "LogSoftmax") for k in (0, 1, -1)),
    *(case(op, X, opset=11, **a) for op in ("Softmax", "LogSoftmax") for a in ({}, {"axis": 0}, {"axis": 2})),
    case("Softmax", np.asarray([[1e4, 0.0, -1e4], [1.0, 2.0, 3.0]], np.float32)),
]
REDUCTIONS = [
    *(
        case(op, X, axes=[0, 2], keepdims=k)
        for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd")
        for k in (0, 1)
    ),
    *(case(op, X, keepdims=0) for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum")),
    *(case(op, X, constants=[I64([1, -1])], opset=18) for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd")),
    case("ReduceSum", X, constants=[I64([-2])], keepdims=0),
    case("ReduceSum", X, constants=[I64([])], noop_with_empty_axes=1),
    case("ReduceSum", X, constants=[I64([])]),
    case("ReduceSum", X, opset=11, axes=[1]),
]
DATA_MOVEMENT = [
    *(case("Cast", floats(3, 4), to=t) for t in (1, 6, 7)),
    case("Cast", ints(3, 4), to=1),
    case("Cast", ints(3, 4, low=0, high=2), to=9),
    case("Cast", bools(5), to=1),
    case("Concat", floats(2, 3), floats(2, 1), floats(2, 4), axis=-1),
    case("Expand", floats(3, 1), constants=[I64([2, 1, 4])]),
    case("Flatten", X),
    case("Flatten", X, axis=-1),
    case("Flatten", X, axis=0),
    case("Gather", X, constants=[I64(-1)], axis=1),
    case("Gather", X, constants=[I64([[0, -1], [2, 2]])], axis=1),
    case("Gather", floats(6, 3), ints(4, 2, low=-6, high=6)),
    case("Gather", floats(6, 3), ints(4, low=0, high=3), axis=1),
    case("Identity", X),
    case("Dropout", X, opset=12),
    *(case(op, floats(40, low=-5, high=5)) for op in ("Celu", "Erf", "HardSwish", "Selu")),
    case("Celu", X, alpha=0.4),
    case("Selu", X, alpha=1.5, gamma=0.7),
    case("Mish", floats(40, low=-5, high=5), opset=18),
    *(case("Gelu", floats(40, low=-5, high=5), opset=20, approximate=mode) for mode in ("none", "tanh")),
    *(case("GatherElements", X, ints(2, 4, 3, low=-3, high=3), axis=k) for k in (0, 1, -1)),
    *(case("OneHot", ints(2, 3, low=0, high=4), constants=[I64(4), np.float32([2, 5])], axis=k) for k in (-1, 0, 1)),
    case("Reshape", X, constants=[I64([0, -1])]),
    case("Reshape", X, constants=[I64([5, 2, 6])]),
    case("Reshape", floats(0, 4), constants=[I64([4, 0])], allowzero=1),
    *(case("ReverseSequence", X, I64(n), batch_axis=b, time_axis=t)
      for n, b, t in (([1, 3, 2, 3], 1, 0), ([4, 2, 3], 0, 1))),
    case("ScatterElements", floats(6), np.asarray([4, 0, -1]), floats(3)),
    case("Slice", X, constants=[I64([1, -3]), I64([3, 2**62]), I64([0, 2])]),
    case("Slice", X, constants=[I64([-1, 3]), I64([-(2**62), 0]), I64([1, 2]), I64([-1, -2])]),
    case("Slice", X, constants=[I64([0, 1]), I64([2, 1])]),
    case("Slice", X, opset=9, starts=[1], ends=[-1], axes=[1]),
    case("Split", floats(2, 7), constants=[I64([3, 4])], axis=1, outputs=2),
    case("Split", floats(6, 2), outputs=3),
    case("Split", floats(7, 2), outputs=3, opset=18, num_outputs=3),
    case("Split", floats(6, 2), opset=11, split=[1, 5], outputs=2),
    case("Squeeze", floats(1, 3, 1), constants=[I64([-1])]),
    case("Squeeze", floats(1, 3, 1)),
    case("Squeeze", floats(1, 3, 1), opset=11, axes=[0]),
    case("Unsqueeze", floats(3, 4), constants=[I64([-1, 0])]),
    case("Unsqueeze", floats(3, 4), opset=11, axes=[1]),
    case("Tile", floats(2, 3), constants=[I64([2, 3])]),
    *(case("TopK", ints(3, 8).astype(np.float32), constants=[I64([5])], outputs=2, axis=k, largest=big)
      for k, big in ((1, 1), (-1, 0))),
    case("TopK", ints(9), constants=[I64([9])], outputs=2),
    case("Transpose", X),
    case("Transpose", X, perm=[1, 2, 0]),
    case("Shape", X),
    case("Shape", X, start=-2, end=2),
    case("Size", X),
    case("ConstantOfShape", constants=[I64([2, 3])]),
    case("Range", constants=[I64(3), I64(10), I64(2)]),
    case("Range", constants=[np.float32(3), np.float32(1), np.float32(-0.5)]),
]  # fmt: skip
CASES = [*MATH, *REDUCTIONS, *DATA_MOVEMENT]
each_case = pytest.mark.parametrize("node_case", CASES, ids=str)


def build(node_case):
    """(ModelProto, inputs by name). A case without data gets an unused input, which sets the array library."""
    import onnx
    from onnx import helper, numpy_helper

    constants = {f"k{i}": np.asarray(a) for i, a in enumerate(node_case.constants)}
    data = {f"x{i}": np.asarray(a) for i, a in enumerate(node_case.data)} or {"unused": np.zeros(1, np.float32)}
    names = [*(n for n in data if n != "unused"), *constants]
    outputs = [f"y{i}" for i in range(node_case.outputs)]
    node = helper.make_node(node_case.op, names, outputs, name="the node", **node_case.attrs)
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in data.items()
    ]
    weights = [numpy_helper.from_array(a, n) for n, a in constants.items()]
    graph = helper.make_graph([node], "one", inputs, [onnx.ValueInfoProto(name=o) for o in outputs], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", node_case.opset)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    return model, data


def run(proto, data, like):
    """The outputs by name."""
    model, params = xprnn.from_onnx(proto, like=like)
    y, state = model(params, data)
    assert state is None
    return y if isinstance(y, dict) else {model.outputs[0]: y}


@pytest.mark.needs("onnxruntime")
@each_case
def test_equals_onnx_runtime(node_case):
    proto, data = build(node_case)
    found, expected = run(proto, data, np.zeros(1, np.float32)), run_onnxruntime(proto, data)
    assert found.keys() == expected.keys()
    for name, a in expected.items():
        assert found[name].shape == a.shape
        assert found[name].dtype.kind == a.dtype.kind
        np.testing.assert_allclose(found[name], a, rtol=2e-6, atol=1e-6)


@each_case
def test_every_array_library_equals_numpy(xp, node_case):
    proto, data = build(node_case)
    like = np.zeros(1, np.float32)
    expected = run(proto, data, like)
    found = run(proto, xp.asarray(data), xp.asarray(like))
    for name, a in found.items():
        np.testing.assert_allclose(xp.to_numpy(a), expected[name], rtol=2e-6, atol=2e-6)
        xp.assert_like(a, xp.asarray(np.zeros(1, expected[name].dtype)))


def test_every_operator_has_a_case():
    from xprnn.interop.onnx.program import OPS

    tested_otherwise = {"RNN", "LSTM", "GRU", "Constant", "SplitToSequence", "SequenceAt"}
    assert {c.op for c in CASES} == OPS.keys() - tested_otherwise


def sequence_model(position, sizes=None, **attrs):
    """A ModelProto that splits x (2,5,3) into a sequence and returns the element at `position`."""
    import onnx
    from onnx import helper, numpy_helper

    constants = {"position": I64(position)} | ({} if sizes is None else {"sizes": I64(sizes)})
    nodes = [
        helper.make_node("SplitToSequence", ["x", *(["sizes"] if sizes is not None else [])], ["all"], **attrs),
        helper.make_node("SequenceAt", ["all", "position"], ["y"], name="the node"),
    ]
    weights = [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()]
    x, y = helper.make_tensor_value_info("x", 1, [2, 5, 3]), onnx.ValueInfoProto(name="y")
    graph = helper.make_graph(nodes, "one", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


# Never sizes with keepdims: the ONNX standard ignores keepdims if there are sizes, ONNX Runtime 1.32 does not.
SPLITS = [
    *((None, a) for a in ({}, {"axis": 1}, {"axis": -1, "keepdims": 0}, {"axis": 1, "keepdims": 0})),
    (1, {"axis": 1}),
    (2, {"axis": -1}),
    ([4, 1], {"axis": 1}),
    ([1, 1], {}),
]


@pytest.mark.needs("onnxruntime")
@pytest.mark.parametrize(("sizes", "attrs"), SPLITS, ids=str)
@pytest.mark.parametrize("position", [1, -1])
def test_split_to_sequence_equals_onnx_runtime(xp, attrs, sizes, position):
    """The new exporter of torch writes these operators for an nn.RNN with dynamic shapes."""
    proto, x = sequence_model(position, sizes, **attrs), floats(2, 5, 3)
    found = run(proto, {"x": xp.asarray(x)}, xp.asarray(np.zeros(1, np.float32)))["y"]
    expected = run_onnxruntime(proto, {"x": x})["y"]
    assert tuple(found.shape) == expected.shape
    np.testing.assert_array_equal(xp.to_numpy(found), expected)


def test_invalid_sequence_position_and_sizes_raise():
    x = {"x": floats(2, 5, 3)}
    with pytest.raises(xprnn.InputError, match="SequenceAt 'the node': position 2 is outside a sequence of length 2"):
        run(sequence_model(2), x, np.zeros(1, np.float32))
    proto = sequence_model(0, [4, 1], axis=1)
    proto.graph.initializer[1].CopyFrom(sequence_model(0, [4, 2], axis=1).graph.initializer[1])
    with pytest.raises(xprnn.InputError, match=r"axis of size 5 into parts of sizes \[4, 2\]"):
        run(proto, x, np.zeros(1, np.float32))
