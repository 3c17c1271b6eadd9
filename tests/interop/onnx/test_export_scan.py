"""Scan and GatherElements nodes, and every activation in exported models, against ONNX Runtime."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.onnx_cases import outputs_by_name, run_onnxruntime

import xprnn
from xprnn.cells.activations import FROM_INPUT, activation, activation_names

pytestmark = pytest.mark.needs("onnx", "onnxruntime")
T, N, D = 4, 2, 3


def scan_model(axes, reverse, output_axis, output_reverse, outer=False):
    """A ModelProto of a Scan over a and b, and the shapes of a and b.

    States: s' = s + a * b; p' = p * a, or p * outside if `outer`, where `outside` is an initializer of the outer graph.
    Outputs: y = s' - b, z = p'.
    """
    from onnx import helper, numpy_helper

    def value(name, shape):
        return helper.make_tensor_value_info(name, 1, shape)

    nodes = [
        helper.make_node("Mul", ["ak", "bk"], ["m"]),
        helper.make_node("Add", ["s", "m"], ["s1"]),
        helper.make_node("Mul", ["p", "outside" if outer else "ak"], ["p1"]),
        helper.make_node("Sub", ["s1", "bk"], ["y1"]),
        helper.make_node("Identity", ["p1"], ["z1"]),
    ]
    inner = [value(n, None) for n in ("s", "p", "ak", "bk")]
    body = helper.make_graph(nodes, "body", inner, [value(n, None) for n in ("s1", "p1", "y1", "z1")])
    scan = helper.make_node(
        "Scan",
        ["s0", "p0", "a", "b"],
        ["s", "p", "y", "z"],
        body=body,
        num_scan_inputs=2,
        scan_input_axes=axes,
        scan_input_directions=reverse,
        scan_output_axes=[output_axis, 0],
        scan_output_directions=[0, output_reverse],
    )
    shapes = {name: np.insert([N, D], axis, T).tolist() for name, axis in zip("ab", axes, strict=True)}
    inputs = [value("s0", [N, D]), value("p0", [N, D]), *(value(k, s) for k, s in shapes.items())]
    outputs = [value(n, ["?"] * r) for n, r in (("s", 2), ("p", 2), ("y", 3), ("z", 3))]
    weights = [numpy_helper.from_array(np.full((N, D), 1.5, np.float32), "outside")]
    graph = helper.make_graph([scan], "g", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), shapes


@pytest.mark.parametrize("axes", [[0, 0], [1, 2], [-1, 0]], ids=str)
def test_scan_equals_onnx_runtime(rng, xp, axes):
    options = itertools.product([[0, 0], [1, 0], [0, 1]], [0, -1], [0, 1], [False, True])
    for reverse, output_axis, output_reverse, outer in options:
        proto, shapes = scan_model([a % 3 for a in axes], reverse, output_axis % 3, output_reverse, outer)
        shapes = {"s0": (N, D), "p0": (N, D), **shapes}
        inputs = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        expected = run_onnxruntime(proto, inputs)
        model, params = xprnn.from_onnx(proto, like=xp.asarray(np.zeros(0, np.float32)))
        with xp.allow_host_conversion():
            found = outputs_by_name(model, model(params, {k: xp.asarray(a) for k, a in inputs.items()}))
        xp.assert_close(found, expected, condition=60)


def test_scan_inputs_of_different_lengths_raise(rng):
    proto, shapes = scan_model([0, 0], [0, 0], 0, 0)
    proto.graph.input[3].type.tensor_type.shape.dim[0].dim_param = "any"
    model, params = xprnn.from_onnx(proto)
    inputs = {"s0": np.ones((N, D), np.float32), "p0": np.ones((N, D), np.float32)}
    inputs |= {"a": np.ones(shapes["a"], np.float32), "b": np.ones((T + 1, N, D), np.float32)}
    with pytest.raises(xprnn.InputError, match=r"scan inputs have lengths \[4, 5\]"):
        model(params, inputs)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gather_elements_equals_onnx_runtime(rng, xp, axis):
    from onnx import helper

    node = helper.make_node("GatherElements", ["x", "ids"], ["y"], axis=axis)
    inputs = [helper.make_tensor_value_info("x", 1, ["a", "b", "c"])]
    inputs += [helper.make_tensor_value_info("ids", 7, ["d", "e", "f"])]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", 1, ["d", "e", "f"])])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = rng.standard_normal((4, 3, 5)).astype(np.float32)
    ids = rng.integers(-x.shape[axis], x.shape[axis], (3, 2, 4))
    model, params = xprnn.from_onnx(proto, like=xp.asarray(np.zeros(0, np.float32)))
    y, _ = model(params, {"x": xp.asarray(x), "ids": xp.asarray(ids)})
    xp.assert_close(y, run_onnxruntime(proto, {"x": x, "ids": ids})["y"], condition=0)


def test_last_index_with_lengths_is_not_last_valid_step(rng):
    """y[-1] is 0 in a row that ends before T: in ONNX Runtime and in the LastStep(valid_only=False) that is read."""
    model = xprnn.Sequential(rnn=xprnn.GRU(3, 4), last=xprnn.LastStep(valid_only=False), head=xprnn.Linear(4, 2))
    params = model.init(rng, like=np.zeros(0, np.float32))
    proto = xprnn.to_onnx(model, params)
    x, lengths = rng.standard_normal((5, 3, 3)).astype(np.float32), [2, 5, 1]
    expected = run_onnxruntime(proto, {"x": x, "lengths": np.asarray(lengths, np.int32)})["y"]
    for _ in range(2):
        loaded_model, loaded = xprnn.from_onnx(proto)
        (last_step,) = (layer for layer in loaded_model.layers.values() if isinstance(layer, xprnn.LastStep))
        assert last_step == xprnn.LastStep(valid_only=False)
        np.testing.assert_allclose(loaded_model(loaded, x, lengths=lengths)[0], expected, atol=1e-6)
        del proto.metadata_props[:]  # the second pass reads the graph alone


@pytest.mark.parametrize("name", activation_names())
def test_every_activation_is_exported(rng, name):
    """In an ActivationLayer, and, if it can be an activation of a cell, in a GRU and an RNN."""
    low = {"rnn": xprnn.GRU(3, 4), "bend": xprnn.ActivationLayer(name)}
    if name not in FROM_INPUT:
        cell = xprnn.cells.gru_reset_before(candidate=name)
        low = {
            "rnn": xprnn.GRU(3, 4, cell=cell, bidirectional=True),
            "down": xprnn.MergeDirections(4, "ave"),
            "bend": xprnn.RNN(4, 4, nonlinearity=activation(name)),
        }
    model = xprnn.Sequential(**low, head=xprnn.Linear(4, 2), end=xprnn.ActivationLayer(name))
    # Small weights, since exponential activations grow fast.
    params = {k: 0.4 * a for k, a in model.init(rng, like=np.zeros(0, np.float32)).items()}
    proto = xprnn.to_onnx(model, params)
    x, lengths = rng.standard_normal((5, 3, 3)).astype(np.float32), [5, 1, 3]
    y, _ = model(params, x, lengths=lengths)
    found = run_onnxruntime(proto, {"x": x, "lengths": np.asarray(lengths, np.int32)})["y"]
    np.testing.assert_allclose(found, y, rtol=2e-5, atol=2e-6)
    assert xprnn.from_onnx(proto)[0] == model
