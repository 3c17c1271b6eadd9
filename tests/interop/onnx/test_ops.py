"""Every operator of the plumbing, against ONNX Runtime with random numbers, and on every array library."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from support.onnx_cases import run_onnxruntime

import xprnn

pytestmark = pytest.mark.needs("onnx")
RNG = np.random.default_rng(20)
I64 = np.int64


class One(NamedTuple):
    """A node: its data, its numbers that stand in the file, attributes, outputs and the operator set."""

    op: str
    data: list[Any]
    known: list[Any]
    attrs: dict[str, Any]
    opset: int = 17
    outputs: int = 1

    def __str__(self) -> str:
        attrs = ",".join(f"{k}={v}" for k, v in self.attrs.items() if not hasattr(v, "dims"))
        return f"{self.op}-{self.opset}-{[list(np.shape(a)) for a in self.data]}-{attrs}".replace(" ", "")


def some(*shape, low=-2.0, high=2.0):
    return RNG.uniform(low, high, shape).astype(np.float32)


def ints(*shape, low=-9, high=9):
    return RNG.integers(low, high, shape)


def bools(*shape):
    return RNG.integers(0, 2, shape).astype(bool)


def one(op, *data, known=(), opset=17, outputs=1, **attrs):
    return One(op, list(data), [np.asarray(k) for k in known], attrs, opset, outputs)


X = some(3, 4, 5)
PAIRS = [(some(3, 1, 5), some(4, 1)), (ints(2, 3, low=1), ints(3, low=1))]
SAME = [(ints(4, 5, high=-6), ints(4, 5, high=-6)), (some(4), some(4))]
ARITHMETIC = [one(op, a, b) for op in ("Add", "Sub", "Mul", "Div") for a, b in PAIRS]
PLAIN = ("Abs", "Ceil", "Exp", "Floor", "Neg", "Round", "Sign", "Tanh", "Sigmoid", "Relu", "Softplus", "Softsign")
MATH = [
    *(one(op, X) for op in (*PLAIN, "Reciprocal")),
    *(one(op, some(3, 4, low=0.1)) for op in ("Log", "Sqrt")),
    *(one(op, X, **a) for op in ("Elu", "LeakyRelu", "ThresholdedRelu") for a in ({}, {"alpha": 0.3})),
    *(one("HardSigmoid", X, **a) for a in ({}, {"alpha": 0.3, "beta": 0.4})),
    *ARITHMETIC,
    one("Div", ints(40), ints(40, low=1)),
    one("Div", ints(40), -ints(40, low=1)),
    one("Mod", ints(40), ints(40, low=1)),
    one("Mod", ints(40), -ints(40, low=1), fmod=1),
    one("Mod", some(40), some(40, low=0.5), fmod=1),
    one("Pow", some(3, 4, low=0.1), some(4)),
    one("Pow", some(3, 4), known=[I64(2)]),
    *(one(op, bools(3, 4), bools(4)) for op in ("And", "Or", "Xor")),
    one("Not", bools(3, 4)),
    *(one(op, *p) for op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual") for p in SAME),
    *(one(op, some(3, 4), some(4), some(3, 1)) for op in ("Max", "Min", "Sum", "Mean")),
    one("Min", ints(4), ints(1)),
    one("Clip", X, known=[np.float32(-0.5), np.float32(0.7)]),
    one("Clip", X, opset=7, min=-0.5, max=0.7),
    one("Where", bools(3, 1), some(3, 4), some(4)),
    one("MatMul", some(3, 4, 5), some(5, 2)),
    one("MatMul", some(3, 4, 5), some(3, 5, 2)),
    one("MatMul", some(4, 5), some(5)),
    one("Gemm", some(3, 4), some(4, 5), some(5), alpha=0.5, beta=2.0),
    one("Gemm", some(4, 3), some(5, 4), some(3, 5), transA=1, transB=1),
    one("Gemm", some(3, 4), some(4, 5)),
    one("ArgMax", X, axis=1),
    one("ArgMax", X, axis=-1, keepdims=0),
    *(one("CumSum", X, known=[I64(k)], exclusive=e, reverse=r) for k in (0, -1) for e in (0, 1) for r in (0, 1)),
    *(one(op, X, axis=k) for op in ("Softmax", "LogSoftmax") for k in (0, 1, -1)),
    *(one(op, X, opset=11, **a) for op in ("Softmax", "LogSoftmax") for a in ({}, {"axis": 0}, {"axis": 2})),
    one("Softmax", np.asarray([[1e4, 0.0, -1e4], [1.0, 2.0, 3.0]], np.float32)),
]
REDUCTIONS = [
    *(
        one(op, X, axes=[0, 2], keepdims=k)
        for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd")
        for k in (0, 1)
    ),
    *(one(op, X, keepdims=0) for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum")),
    *(one(op, X, known=[I64([1, -1])], opset=18) for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd")),
    one("ReduceSum", X, known=[I64([-2])], keepdims=0),
    one("ReduceSum", X, known=[I64([])], noop_with_empty_axes=1),
    one("ReduceSum", X, known=[I64([])]),
    one("ReduceSum", X, opset=11, axes=[1]),
]
PLUMBING = [
    *(one("Cast", some(3, 4), to=t) for t in (1, 6, 7)),
    one("Cast", ints(3, 4), to=1),
    one("Cast", ints(3, 4, low=0, high=2), to=9),
    one("Cast", bools(5), to=1),
    one("Concat", some(2, 3), some(2, 1), some(2, 4), axis=-1),
    one("Expand", some(3, 1), known=[I64([2, 1, 4])]),
    one("Flatten", X),
    one("Flatten", X, axis=-1),
    one("Flatten", X, axis=0),
    one("Gather", X, known=[I64(-1)], axis=1),
    one("Gather", X, known=[I64([[0, -1], [2, 2]])], axis=1),
    one("Gather", some(6, 3), ints(4, 2, low=-6, high=6)),
    one("Gather", some(6, 3), ints(4, low=0, high=3), axis=1),
    one("Identity", X),
    one("Dropout", X, opset=12),
    *(one(op, some(40, low=-5, high=5)) for op in ("Celu", "Erf", "HardSwish", "Selu")),
    one("Celu", X, alpha=0.4),
    one("Selu", X, alpha=1.5, gamma=0.7),
    one("Mish", some(40, low=-5, high=5), opset=18),
    *(one("Gelu", some(40, low=-5, high=5), opset=20, approximate=how) for how in ("none", "tanh")),
    *(one("GatherElements", X, ints(2, 4, 3, low=-3, high=3), axis=k) for k in (0, 1, -1)),
    *(one("OneHot", ints(2, 3, low=0, high=4), known=[I64(4), np.float32([2, 5])], axis=k) for k in (-1, 0, 1)),
    one("Reshape", X, known=[I64([0, -1])]),
    one("Reshape", X, known=[I64([5, 2, 6])]),
    one("Reshape", some(0, 4), known=[I64([4, 0])], allowzero=1),
    *(one("ReverseSequence", X, I64(n), batch_axis=b, time_axis=t)
      for n, b, t in (([1, 3, 2, 3], 1, 0), ([4, 2, 3], 0, 1))),
    one("ScatterElements", some(6), np.asarray([4, 0, -1]), some(3)),
    one("Slice", X, known=[I64([1, -3]), I64([3, 2**62]), I64([0, 2])]),
    one("Slice", X, known=[I64([-1, 3]), I64([-(2**62), 0]), I64([1, 2]), I64([-1, -2])]),
    one("Slice", X, known=[I64([0, 1]), I64([2, 1])]),
    one("Slice", X, opset=9, starts=[1], ends=[-1], axes=[1]),
    one("Split", some(2, 7), known=[I64([3, 4])], axis=1, outputs=2),
    one("Split", some(6, 2), outputs=3),
    one("Split", some(7, 2), outputs=3, opset=18, num_outputs=3),
    one("Split", some(6, 2), opset=11, split=[1, 5], outputs=2),
    one("Squeeze", some(1, 3, 1), known=[I64([-1])]),
    one("Squeeze", some(1, 3, 1)),
    one("Squeeze", some(1, 3, 1), opset=11, axes=[0]),
    one("Unsqueeze", some(3, 4), known=[I64([-1, 0])]),
    one("Unsqueeze", some(3, 4), opset=11, axes=[1]),
    one("Tile", some(2, 3), known=[I64([2, 3])]),
    *(one("TopK", ints(3, 8).astype(np.float32), known=[I64([5])], outputs=2, axis=k, largest=big)
      for k, big in ((1, 1), (-1, 0))),
    one("TopK", ints(9), known=[I64([9])], outputs=2),
    one("Transpose", X),
    one("Transpose", X, perm=[1, 2, 0]),
    one("Shape", X),
    one("Shape", X, start=-2, end=2),
    one("Size", X),
    one("ConstantOfShape", known=[I64([2, 3])]),
    one("Range", known=[I64(3), I64(10), I64(2)]),
    one("Range", known=[np.float32(3), np.float32(1), np.float32(-0.5)]),
]  # fmt: skip
CASES = [*MATH, *REDUCTIONS, *PLUMBING]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def built(case):
    """A model of the node; an Identity of nothing but data keeps a graph without inputs runnable."""
    import onnx
    from onnx import helper, numpy_helper

    known = {f"k{i}": np.asarray(a) for i, a in enumerate(case.known)}
    data = {f"x{i}": np.asarray(a) for i, a in enumerate(case.data)} or {"unused": np.zeros(1, np.float32)}
    names = [*(n for n in data if n != "unused"), *known]
    outputs = [f"y{i}" for i in range(case.outputs)]
    node = helper.make_node(case.op, names, outputs, name="the node", **case.attrs)
    given = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in data.items()
    ]
    weights = [numpy_helper.from_array(a, n) for n, a in known.items()]
    graph = helper.make_graph([node], "one", given, [onnx.ValueInfoProto(name=o) for o in outputs], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    return model, data


def ran(model, data, like):
    graph, params = xprnn.from_onnx(model, like=like)
    y, state = graph(params, data)
    assert state is None
    return y if isinstance(y, dict) else {graph.outputs[0]: y}


@pytest.mark.needs("onnxruntime")
@each_case
def test_equals_onnx_runtime(case):
    model, data = built(case)
    got, want = ran(model, data, np.zeros(1, np.float32)), run_onnxruntime(model, data)
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert got[name].shape == expected.shape
        assert got[name].dtype.kind == expected.dtype.kind
        np.testing.assert_allclose(got[name], expected, rtol=2e-6, atol=1e-6)


@each_case
def test_equals_numpy_on_every_array_library(xp, case):
    model, data = built(case)
    like = np.zeros(1, np.float32)
    want = ran(model, data, like)
    got = ran(model, xp.asarray(data), xp.asarray(like))
    for name, a in got.items():
        np.testing.assert_allclose(xp.to_numpy(a), want[name], rtol=2e-6, atol=2e-6)
        xp.assert_like(a, xp.asarray(np.zeros(1, want[name].dtype)))


def test_every_operator_has_a_case():
    pytest.importorskip("onnx")
    from xprnn.interop.onnx.program import OPS

    elsewhere = {"RNN", "LSTM", "GRU", "Constant", "SplitToSequence", "SequenceAt"}
    assert {c.op for c in CASES} == OPS.keys() - elsewhere


def taken(position, sizes=None, **attrs):
    """A model that splits x (2, 5, 3) into a sequence and takes one part of it."""
    import onnx
    from onnx import helper, numpy_helper

    known = {"position": I64(position)} | ({} if sizes is None else {"sizes": I64(sizes)})
    nodes = [
        helper.make_node("SplitToSequence", ["x", *(["sizes"] if sizes is not None else [])], ["all"], **attrs),
        helper.make_node("SequenceAt", ["all", "position"], ["y"], name="the node"),
    ]
    weights = [numpy_helper.from_array(np.asarray(a), n) for n, a in known.items()]
    x, y = helper.make_tensor_value_info("x", 1, [2, 5, 3]), onnx.ValueInfoProto(name="y")
    graph = helper.make_graph(nodes, "one", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


# With sizes, the standard ignores keepdims; ONNX Runtime (1.32) does not: never both here.
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
def test_sequences(xp, attrs, sizes, position):
    """torch's newest exporter unrolls an nn.RNN whose T is free over the parts of a sequence."""
    model, x = taken(position, sizes, **attrs), some(2, 5, 3)
    got = ran(model, {"x": xp.asarray(x)}, xp.asarray(np.zeros(1, np.float32)))["y"]
    want = run_onnxruntime(model, {"x": x})["y"]
    assert tuple(got.shape) == want.shape
    np.testing.assert_array_equal(xp.to_numpy(got), want)


def test_sequences_that_cannot_be():
    x = {"x": some(2, 5, 3)}
    with pytest.raises(xprnn.InputError, match="SequenceAt 'the node': position 2 is outside a sequence of length 2"):
        ran(taken(2), x, np.zeros(1, np.float32))
    model = taken(0, [4, 1], axis=1)
    model.graph.initializer[1].CopyFrom(taken(0, [4, 2], axis=1).graph.initializer[1])
    with pytest.raises(xprnn.InputError, match=r"axis of size 5 into parts of sizes \[4, 2\]"):
        ran(model, x, np.zeros(1, np.float32))
