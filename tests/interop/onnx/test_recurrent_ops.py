"""RNN, LSTM and GRU nodes with all attributes, on every array library: against a reference and ONNX Runtime."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from support.onnx_cases import (
    GATE_COUNTS,
    operator_model,
    outputs_by_name,
    random_case,
    reference_outputs,
    run_onnxruntime,
    to_layout_0,
    to_layout_1,
)

import xprnn
from xprnn.interop.onnx.graph_model import GraphModel

pytestmark = pytest.mark.needs("onnx")
each_op = pytest.mark.parametrize("op", GATE_COUNTS)
WEIGHTS = ("W", "R", "B", "P")


def onnx_node_tests():
    """The test cases of the three operators in the onnx package; none if it is not installed."""
    if importlib.util.find_spec("onnx") is None:
        return []
    cases = importlib.import_module("onnx.backend.test.case.node")
    for name in ("rnn", "lstm", "gru"):
        importlib.import_module(f"onnx.backend.test.case.node.{name}")
    return [case for case in cases._NodeTestCases if case.model.graph.node[0].op_type in GATE_COUNTS]


@pytest.mark.parametrize("case", onnx_node_tests(), ids=lambda case: case.name)
def test_onnx_node_tests(xp, case):
    model, params = xprnn.from_onnx(case.model, like=xp.asarray(np.zeros(1, np.float32)))
    assert params == {}
    for inputs, outputs in case.data_sets:
        names = [v.name for v in case.model.graph.input]
        arrays = {k: xp.asarray(a) for k, a in zip(names, inputs, strict=True)}
        found = outputs_by_name(model, model({}, arrays))
        for name, expected in zip(model.outputs, outputs, strict=True):
            np.testing.assert_allclose(xp.to_numpy(found[name]), expected, rtol=case.rtol, atol=case.atol)


def test_onnx_package_has_node_tests():
    assert len(onnx_node_tests()) >= 18


@each_op
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("initializers", [(), WEIGHTS], ids=["weights as inputs", "weights as initializers"])
def test_equals_reference(xp, op, seed, initializers):
    """Random attributes; some rows have length 0."""
    case = random_case(np.random.default_rng([seed, GATE_COUNTS[op]]), op, zero_lengths=seed % 2 == 0)
    like = xp.asarray(np.zeros(1))
    found = run(operator_model(case, initializers=initializers, dtype="float64"), case, initializers, like, xp.asarray)
    expected = reference_outputs(case)
    scale = max(1.0, *(float(np.abs(a).max()) for a in expected.values()))  # activations such as Affine are unbounded
    xp.assert_close(found, expected, condition=2000, scale=scale)
    assert all(a.dtype == like.dtype for a in found.values())


def run(proto, case, initializers, like, asarray):
    """The outputs by name, for the inputs of the case that are not initializers."""
    model, params = xprnn.from_onnx(proto, like=like)
    assert isinstance(model, GraphModel)
    inputs = {k: asarray(a) for k, a in case.inputs.items() if k not in initializers}
    return outputs_by_name(model, model(params, inputs))


@pytest.mark.needs("onnxruntime")
@each_op
@pytest.mark.parametrize("seed", range(25))
def test_equals_onnx_runtime(op, seed):
    # all_constants: ONNX Runtime 1.32 has other defaults for missing constants than the standard.
    case = random_case(np.random.default_rng([seed, 7, GATE_COUNTS[op]]), op, all_constants=True)
    layout_0 = to_layout_0(case)  # ONNX Runtime does not support layout 1
    expected = run_onnxruntime(operator_model(layout_0, opset=14), layout_0.inputs)
    expected = to_layout_1(expected) if case.attrs.get("layout", 0) else expected
    initializers = WEIGHTS if seed % 2 else ()
    opset = 22 if "layout" in case.attrs else 7  # opset 14 added the attribute layout
    proto = operator_model(case, initializers=initializers, opset=opset)
    found = run(proto, case, initializers, np.zeros(1, np.float32), to_float32)
    assert found.keys() == expected.keys()
    for name, a in expected.items():
        scale = max(1.0, float(np.abs(a).max()))  # activations such as Affine are unbounded
        np.testing.assert_allclose(found[name], a, rtol=0, atol=3e-6 * scale, err_msg=str(case.attrs))


def to_float32(a):
    return a.astype(np.float32) if a.dtype.kind == "f" else a


def test_gru_adds_each_bias_to_its_product():
    """Only a GRU with linear_before_reset=1 depends on which of its two biases is which."""
    seeds = (np.random.default_rng(k) for k in range(99))
    case = next(c for c in (random_case(r, "GRU") for r in seeds) if c.attrs["linear_before_reset"] and "B" in c.inputs)
    expected = reference_outputs(case)
    for initializers in ((), WEIGHTS):
        proto = operator_model(case, initializers=initializers, dtype="float64")
        found = run(proto, case, initializers, np.zeros(1), np.asarray)
        np.testing.assert_allclose(found["Y"], expected["Y"], rtol=0, atol=1e-12)


@each_op
def test_unsupported_attributes_raise_in_from_onnx(op):
    case = random_case(np.random.default_rng(5), op)
    invalid = case._replace(attrs=case.attrs | {"clip": -1.0})
    with pytest.raises(xprnn.InputError, match=rf"{op} 'the node' has clip=-1.0"):
        xprnn.from_onnx(operator_model(invalid))
    invalid = case._replace(attrs=case.attrs | {"activations": ["Swish"] * 9})
    with pytest.raises(xprnn.InputError, match="activations="):
        xprnn.from_onnx(operator_model(invalid))


@each_op
def test_weights_of_wrong_shape_raise(op):
    case = random_case(np.random.default_rng(3), op)
    inputs = case.inputs | {"R": case.inputs["R"][:, :-1]}
    with pytest.raises(xprnn.InputError, match=rf"{op} 'the node': R must have shape"):
        xprnn.from_onnx(operator_model(case._replace(inputs=inputs), initializers=WEIGHTS))
    model, params = xprnn.from_onnx(operator_model(case._replace(inputs=inputs)))
    with pytest.raises(xprnn.InputError, match=rf"{op} 'the node': R must have shape"):
        model(params, inputs)
