"""RNN, LSTM and GRU of the standard, with everything their attributes can say, on every array library."""

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

pytestmark = pytest.mark.needs("onnx")
operators = pytest.mark.parametrize("op", GATE_COUNTS)
SEEDS = range(25)
WEIGHTS = ("W", "R", "B", "P")


def standard():
    """The standard's own tests of the three operators, as the onnx package carries them."""
    if importlib.util.find_spec("onnx") is None:
        return []
    cases = importlib.import_module("onnx.backend.test.case.node")
    for name in ("rnn", "lstm", "gru"):
        importlib.import_module(f"onnx.backend.test.case.node.{name}")
    return [case for case in cases._NodeTestCases if case.model.graph.node[0].op_type in GATE_COUNTS]


@pytest.mark.parametrize("case", standard(), ids=lambda case: case.name)
def test_the_standards_own_node_tests(xp, case):
    graph, params = xprnn.from_onnx(case.model, like=xp.asarray(np.zeros(1, np.float32)))
    assert params == {}
    for inputs, outputs in case.data_sets:
        names = [v.name for v in case.model.graph.input]
        got = outputs_by_name(graph, graph({}, {k: xp.asarray(a) for k, a in zip(names, inputs, strict=True)}))
        for name, want in zip(graph.outputs, outputs, strict=True):
            np.testing.assert_allclose(xp.to_numpy(got[name]), want, rtol=case.rtol, atol=case.atol)


def test_all_of_the_standards_node_tests_are_here():
    pytest.importorskip("onnx")
    assert len(standard()) >= 18


@operators
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("known", [False, True], ids=["weights are inputs", "weights are in the file"])
def test_equals_the_plain_loop(xp, op, seed, known):
    """Every attribute at random, rows without steps among them."""
    case = random_case(np.random.default_rng([seed, GATE_COUNTS[op]]), op, zero_lengths=seed % 2 == 0)
    weights = WEIGHTS if known else ()
    like = xp.asarray(np.zeros(1))
    graph, params = xprnn.from_onnx(operator_model(case, initializers=weights, dtype="float64"), like=like)
    given = {k: xp.asarray(a) for k, a in case.inputs.items() if k not in weights}
    got, want = run(graph, params, given), reference_outputs(case)
    size = max(1.0, *(float(np.abs(a).max()) for a in want.values()))  # states can grow, as with Affine
    xp.assert_close(got, want, condition=2000, scale=size)
    assert all(a.dtype == like.dtype for a in got.values())


def run(graph, params, given):
    """The named outputs, also where the model is one of xprnn's own."""
    if hasattr(graph, "reason"):
        return outputs_by_name(graph, graph(params, given))
    pytest.fail("an operator alone is laid out as no layer of xprnn's")


@pytest.mark.needs("onnxruntime")
@operators
@pytest.mark.parametrize("seed", SEEDS)
def test_equals_onnx_runtime(op, seed):
    # Where a constant is left out, ONNX Runtime (1.32) does not take the corresponding operator's default.
    case = random_case(np.random.default_rng([seed, 7, GATE_COUNTS[op]]), op, all_constants=True)
    plain = to_layout_0(case)  # all that ONNX Runtime knows
    want = run_onnxruntime(operator_model(plain, opset=14), plain.inputs)
    want = to_layout_1(want) if case.attrs.get("layout", 0) else want
    weights = WEIGHTS if seed % 2 else ()
    opset = 22 if "layout" in case.attrs else 7  # which is new in 14
    graph, params = xprnn.from_onnx(
        operator_model(case, initializers=weights, opset=opset), like=np.zeros(1, np.float32)
    )
    given = {k: a.astype(np.float32) if a.dtype.kind == "f" else a for k, a in case.inputs.items() if k not in weights}
    got = run(graph, params, given)
    assert got.keys() == want.keys()
    for name, expected in want.items():
        size = max(1.0, float(np.abs(expected).max()))  # states can grow, as with Affine
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=3e-6 * size, err_msg=str(case.attrs))


def test_each_bias_goes_to_its_own_product():
    """A GRU that resets after the product is the one operator that can tell its two biases apart."""
    seeds = (np.random.default_rng(k) for k in range(99))
    case = next(c for c in (random_case(r, "GRU") for r in seeds) if c.attrs["linear_before_reset"] and "B" in c.inputs)
    for weights in ((), WEIGHTS):
        graph, params = xprnn.from_onnx(operator_model(case, initializers=weights, dtype="float64"), like=np.zeros(1))
        got, want = (
            run(graph, params, {k: a for k, a in case.inputs.items() if k not in weights}),
            reference_outputs(case),
        )
        np.testing.assert_allclose(got["Y"], want["Y"], rtol=0, atol=1e-12)


@operators
def test_what_cannot_be_is_named_before_anything_runs(op):
    case = random_case(np.random.default_rng(5), op)
    bad = case._replace(attrs=case.attrs | {"clip": -1.0})
    with pytest.raises(xprnn.InputError, match=rf"{op} 'the node' has clip=-1.0"):
        xprnn.from_onnx(operator_model(bad))
    bad = case._replace(attrs=case.attrs | {"activations": ["Swish"] * 9})
    with pytest.raises(xprnn.InputError, match="activations="):
        xprnn.from_onnx(operator_model(bad))


@operators
def test_weights_that_do_not_fit_are_named(op):
    case = random_case(np.random.default_rng(3), op)
    inputs = case.inputs | {"R": case.inputs["R"][:, :-1]}
    with pytest.raises(xprnn.InputError, match=rf"{op} 'the node': R must have shape"):
        xprnn.from_onnx(operator_model(case._replace(inputs=inputs), initializers=WEIGHTS))
    graph, params = xprnn.from_onnx(operator_model(case._replace(inputs=inputs)))
    with pytest.raises(xprnn.InputError, match=rf"{op} 'the node': R must have shape"):
        graph(params, inputs)
