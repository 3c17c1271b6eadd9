"""GraphModel: control flow, invalid inputs, and limits on memory and iterations."""

from __future__ import annotations

import numpy as np
import pytest

import xprnn

pytestmark = pytest.mark.needs("onnx")


def graph_of(nodes, inputs=(("x", 1, ["n"]),), weights=()):
    """A ModelProto with the output y; inputs are (name, elem_type, shape), weights are (name, array)."""
    from onnx import helper, numpy_helper

    input_infos = [helper.make_tensor_value_info(*i) for i in inputs]
    graph = helper.make_graph(
        nodes,
        "g",
        input_infos,
        [helper.make_tensor_value_info("y", 1, ["any"])],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in weights],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("op", ["Expand", "Tile", "ConstantOfShape", "Range"])
def test_output_of_more_than_2_28_elements_raises(op):
    from onnx import helper

    big = np.asarray([2**40])
    weights = {"Range": [("a", np.int64(0)), ("b", np.int64(2**60)), ("c", np.int64(1))]}.get(op, [("a", big)])
    names = [n for n, _ in weights]
    node = helper.make_node(op, names if op in ("Range", "ConstantOfShape") else ["x", *names], ["y"], name="big")
    model, params = xprnn.from_onnx(graph_of([node], weights=weights))
    with pytest.raises(xprnn.InputError, match=rf"{op} 'big'.* at most 2\^28 elements"):
        model(params, np.ones(1, np.float32))


def loop_model(trip_count):
    """A ModelProto of a Loop that returns 3 after `trip_count` iterations."""
    from onnx import helper

    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["v"], ["w"])],
        "body",
        [helper.make_tensor_value_info(n, k, []) for n, k in (("i", 7), ("go", 9), ("v", 1))],
        [helper.make_tensor_value_info(n, k, []) for n, k in (("on", 9), ("w", 1))],
    )
    loop = helper.make_node("Loop", ["m", "c", "v0"], ["y"], name="loop", body=body)
    return graph_of([loop], weights=[("m", np.int64(trip_count)), ("c", np.asarray(True)), ("v0", np.float32(3))])


def test_loop_over_iteration_limit_raises(monkeypatch):
    from xprnn.interop.onnx import graph_model

    monkeypatch.setattr(graph_model, "_MAX_ITERATIONS", 100)
    model, params = xprnn.from_onnx(loop_model(100))
    assert model(params, np.ones(1, np.float32)) == (3, None)
    model, params = xprnn.from_onnx(loop_model(101))
    with pytest.raises(xprnn.InputError, match="Loop 'loop': more than 100 iterations"):
        model(params, np.ones(1, np.float32))


@pytest.mark.parametrize("condition", [True, False])
def test_if_runs_one_branch(condition):
    from onnx import helper

    def branch(op):
        node = helper.make_node(op, ["x"], [op])
        return helper.make_graph([node], op, [], [helper.make_tensor_value_info(op, 1, ["any"])])

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("Neg"), else_branch=branch("Abs"))
    model, params = xprnn.from_onnx(graph_of([node], weights=[("c", np.asarray(condition))]))
    x = np.asarray([2.0, -3.0], np.float32)
    np.testing.assert_array_equal(model(params, x)[0], -x if condition else abs(x))


@pytest.mark.parametrize("index", [-4, 3, [0, 3], [-4, 1]])
def test_gather_index_out_of_range_raises(index):
    from onnx import helper

    node = helper.make_node("Gather", ["x", "i"], ["y"], name="pick")
    model, params = xprnn.from_onnx(graph_of([node], weights=[("i", np.asarray(index))]))
    with pytest.raises(xprnn.InputError, match=r"Gather 'pick': an index of .* is outside the axis of size 3"):
        model(params, np.ones(3, np.float32))


def test_invalid_inputs_and_unsupported_methods_raise():
    from onnx import helper

    node = helper.make_node("Add", ["a", "b"], ["y"], name="plus")
    model, params = xprnn.from_onnx(graph_of([node], (("a", 1, [2, "n"]), ("b", 1, ["i", "j"]))))
    a = np.ones((2, 3), np.float32)
    assert repr(model) == "GraphModel(a, b -> y; 1 nodes)"
    np.testing.assert_array_equal(model(params, a, b=a)[0], a + a)
    np.testing.assert_array_equal(model(params, {"a": a, "b": a})[0], a + a)
    for args, named, text in (
        ((a,), {}, "missing b"),
        ((a, a, a), {}, "expected 2 inputs, found 3"),
        ((a, a), {"b": a}, "b passed twice"),
        ((a, a), {"c": a}, "unknown c"),
        ((a, a.astype(np.float64)), {}, "b is float64 but a is float32"),
        ((a.T, a), {}, r"a must have shape (2, any), found (3, 2)"),
        ((a, np.ones((7, 5), np.float32)), {}, "Add 'plus' cannot compute with its inputs"),
    ):
        with pytest.raises(xprnn.InputError) as caught:
            model(params, *args, **named)
        assert text in str(caught.value)
    for method in (lambda: model.init(None, a), lambda: model.step(params, a), lambda: model.backward(None)):
        with pytest.raises(xprnn.InputError, match="can only be called, since"):
            method()
    with pytest.raises(xprnn.InputError, match="can only be called, since"):
        model.config()


def test_nodes_of_equal_names_keep_their_weights(rng):
    """The ONNX standard does not require the names of nodes to be unique."""
    from onnx import helper

    weights = [(name, rng.standard_normal((1, 8, 2)).astype(np.float32)) for name in ("W1", "R1", "W2", "R2")]
    x = rng.standard_normal((4, 1, 2)).astype(np.float32)
    results = []
    for names in (["a", "b", "sum"], ["a", "a", "a"], ["", "LSTM_0", ""]):
        nodes = [helper.make_node("LSTM", ["x", f"W{k}", f"R{k}"], [f"y{k}"], hidden_size=2) for k in (1, 2)]
        nodes.append(helper.make_node("Sub", ["y1", "y2"], ["y"]))
        for node, name in zip(nodes, names, strict=True):
            node.name = name
        proto = graph_of(nodes, (("x", 1, ["t", "n", 2]),), weights)
        model, params = xprnn.from_onnx(proto)
        assert len(params) == 4
        results.append(model(params, x)[0])
    assert np.any(results[0])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
