"""Layers against ONNX Runtime: ragged batches, reverse directions, activations, clip, peepholes, coupled gates.

These are features that torch does not have. ONNX Runtime computes the forward pass of its recurrent operators, in
float32 only.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.backends import Backend
from support.layer_cases import random_inputs, recurrent_factory, split_state

import xprnn
from xprnn import cells

pytestmark = pytest.mark.needs("onnxruntime", "onnx")
XP = Backend.NUMPY

# Gate order of xprnn -> of ONNX: LSTM i,f,g,o -> i,o,f,c; GRU r,z,n -> z,r,h.
GATE_ORDER = {"RNN": [0], "LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2]}
# Activation names of xprnn -> of ONNX, where they are not just capitalized.
ONNX_NAMES = {"hardsigmoid": "HardSigmoid", "scaledtanh": "ScaledTanh", "leakyrelu": "LeakyRelu"}
ONNX_NAMES |= {"thresholdedrelu": "ThresholdedRelu"}


def reorder_gates(op, a):
    return np.concatenate([np.split(a, len(GATE_ORDER[op]))[k] for k in GATE_ORDER[op]])


def onnx_weights(op, layer, params):
    """W, R, B and, with peepholes, P in the layout of ONNX: directions first."""
    ends = ["_l0", "_l0_reverse"][: layer.num_directions]
    W, R = (np.stack([reorder_gates(op, params[f"{name}{e}"]) for e in ends]) for name in ("weight_ih", "weight_hh"))
    biases = [[reorder_gates(op, params[f"{name}{e}"]) for name in ("bias_ih", "bias_hh")] for e in ends]
    B = np.stack([np.concatenate(pair) for pair in biases])
    P = None
    if "weight_pi_l0" in params:
        P = np.stack([np.concatenate([params[f"weight_p{g}{e}"] for g in "iof"]) for e in ends])
    return W, R, B, P


def make_session(op, inputs, hidden, directions, attributes):
    """An InferenceSession of one recurrent node."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    names = ["X", "W", "R", "B", "lengths", "h", *(["c", "P"] if op == "LSTM" else [])]
    outputs = ["Y", "Y_h", "Y_c"][: 3 if op == "LSTM" else 2]
    direction = "bidirectional" if directions == 2 else attributes.pop("direction", "forward")
    node = helper.make_node(
        op, [n if n in inputs else "" for n in names], outputs, hidden_size=hidden, direction=direction, **attributes
    )
    elem_types = {"lengths": TensorProto.INT32}
    ranks = {n: [None] * (4 if n == "Y" else 3) for n in outputs}
    input_infos = [
        helper.make_tensor_value_info(n, elem_types.get(n, TensorProto.FLOAT), inputs[n].shape) for n in inputs
    ]
    output_infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ranks[n]) for n in outputs]
    model = helper.make_model(
        helper.make_graph([node], "one", input_infos, output_infos),
        opset_imports=[helper.make_opsetid("", 14)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_onnxruntime(op, layer, p, **attributes):
    """(y, state) of ONNX Runtime in the layout of xprnn."""
    W, R, B, P = onnx_weights(op, layer, p.params)
    states = [np.stack(column) for column in zip(*split_state(layer, p.state), strict=True)]
    inputs = {"X": p.x, "W": W, "R": R, "B": B, "h": states[0]}
    if op == "LSTM":
        inputs["c"] = states[1]
    if P is not None:
        inputs["P"] = P
    inputs = {k: np.ascontiguousarray(v, np.float32) for k, v in inputs.items()}
    if "lengths" in p.flags:
        inputs["lengths"] = p.flags["lengths"].astype(np.int32)
    session = make_session(op, inputs, layer.hidden_size, layer.num_directions, attributes)
    Y, *final = session.run(None, inputs)
    y = np.concatenate([Y[:, d] for d in range(layer.num_directions)], axis=-1)
    return y, tuple(final) if op == "LSTM" else final[0]


def assert_equals_onnx_runtime(rng, op, layer, lengths=None, condition=64, scale=0.6, **attributes):
    """Compare y and the final states of random inputs; return the inputs."""
    p = random_inputs(rng, layer, T=6, N=4, scale=scale)
    if lengths is not None:
        p.flags["lengths"] = np.array(lengths)
    params = {k: v.astype(np.float32) for k, v in p.params.items()}
    state = tuple(s.astype(np.float32) for s in p.state) if op == "LSTM" else p.state.astype(np.float32)
    y, final = layer(params, p.x.astype(np.float32), state, **p.flags)
    expected_y, expected_final = run_onnxruntime(op, layer, p, **attributes)
    # A row without steps keeps its initial state. ONNX Runtime 1.32 returns 0 there, which the standard does not say.
    for found, expected, initial in zip(*map(as_tuple, (final, expected_final, state)), strict=True):
        empty = np.flatnonzero(p.flags["lengths"] == 0) if lengths is not None else []
        assert not expected[:, empty].any()
        expected[:, empty] = initial[:, empty]
        XP.assert_close(found, expected, condition=condition, scale=1.0)
    XP.assert_close(y, expected_y, condition=condition, scale=1.0)
    return p


def as_tuple(state):
    return state if isinstance(state, tuple) else (state,)


# name -> (op, layer class, attributes)
STANDARD = {
    "RNN": ("RNN", xprnn.RNN, {}),
    "LSTM": ("LSTM", xprnn.LSTM, {}),
    "GRU": ("GRU", xprnn.GRU, {"linear_before_reset": 1}),
    "GRU, reset before": ("GRU", lambda *a, **k: xprnn.GRU(*a, reset_after=False, **k), {"linear_before_reset": 0}),
}
each_layer = pytest.mark.parametrize("name", STANDARD)
each_lengths = pytest.mark.parametrize(
    "lengths", [None, [6, 6, 6, 6], [6, 4, 3, 1], [2, 6, 1, 5], [0, 3, 6, 0]], ids=str
)


@each_layer
@each_lengths
@pytest.mark.parametrize("bidirectional", [False, True])
def test_ragged_batch(rng, name, lengths, bidirectional):
    op, make, attributes = STANDARD[name]
    assert_equals_onnx_runtime(rng, op, make(3, 5, bidirectional=bidirectional), lengths, **attributes)


@each_layer
def test_second_direction_equals_reverse_operator(rng, name):
    """The second half of the features of a bidirectional layer equals direction="reverse" in ONNX Runtime."""
    op, make, attributes = STANDARD[name]
    both, one = make(3, 4, bidirectional=True), make(3, 4)
    p = random_inputs(rng, both, T=5, N=3)
    p.flags["lengths"] = np.array([5, 2, 3])
    y, _ = both(p.params, p.x, p.state, **p.flags)
    params = {k.removesuffix("_reverse"): v for k, v in p.params.items() if k.endswith("_reverse")}
    state = tuple(s[1:] for s in p.state) if op == "LSTM" else p.state[1:]
    expected, _ = run_onnxruntime(op, one, p._replace(params=params, state=state), direction="reverse", **attributes)
    np.testing.assert_allclose(y[..., 4:], expected, rtol=0, atol=1e-6)


# (name, alpha, beta); the constants differ from the defaults.
ACTIVATIONS = [
    ("affine", 0.5, 0.1),
    ("relu", None, None),
    ("softsign", None, None),
    ("softplus", None, None),
    ("elu", 0.6, None),
    ("leakyrelu", 0.2, None),
    ("thresholdedrelu", 0.3, None),
    ("scaledtanh", 1.5, 0.75),
    ("hardsigmoid", 0.25, 0.4),
]


def activation_attributes(functions, directions=1):
    """The attributes for activations (name, alpha, beta), repeated for each direction."""
    functions = functions * directions
    out = {"activations": [ONNX_NAMES.get(n, n.capitalize()) for n, _, _ in functions]}
    # Each list has one entry for each activation that has such a constant.
    alphas, betas = [a for _, a, _ in functions if a is not None], [b for _, _, b in functions if b is not None]
    return out | ({"activation_alpha": alphas} if alphas else {}) | ({"activation_beta": betas} if betas else {})


@pytest.mark.parametrize("f", ACTIVATIONS, ids=lambda f: f[0])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_activations_of_rnn(rng, f, bidirectional):
    layer = recurrent_factory(cells.elman(xprnn.activation(*f)))(3, 4, bidirectional=bidirectional)
    assert_equals_onnx_runtime(
        rng, "RNN", layer, [6, 2, 4, 1], condition=200, scale=0.4, **activation_attributes([f], layer.num_directions)
    )


@pytest.mark.parametrize("f", ACTIVATIONS, ids=lambda f: f[0])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_activations_of_lstm(rng, f, position):
    functions = [("sigmoid", None, None), ("tanh", None, None), ("tanh", None, None)]
    functions[position] = f
    layer = recurrent_factory(cells.lstm(*(xprnn.activation(*a) for a in functions)))(3, 4, bidirectional=True)
    assert_equals_onnx_runtime(rng, "LSTM", layer, condition=200, scale=0.3, **activation_attributes(functions, 2))


@pytest.mark.parametrize("reset_after", [0, 1])
@pytest.mark.parametrize("f", ACTIVATIONS, ids=lambda f: f[0])
@pytest.mark.parametrize("position", [0, 1])
def test_activations_of_gru(rng, f, position, reset_after):
    functions = [("sigmoid", None, None), ("tanh", None, None)]
    functions[position] = f
    cell = (cells.gru if reset_after else cells.gru_reset_before)(*(xprnn.activation(*a) for a in functions))
    assert_equals_onnx_runtime(
        rng,
        "GRU",
        recurrent_factory(cell)(3, 4),
        condition=200,
        scale=0.3,
        linear_before_reset=reset_after,
        **activation_attributes(functions),
    )


CLIPPED = {
    "RNN": ("RNN", lambda c: cells.elman(clip=c), {}),
    "LSTM": ("LSTM", lambda c: cells.lstm(clip=c), {}),
    "GRU": ("GRU", lambda c: cells.gru(clip=c), {"linear_before_reset": 1}),
    "GRU, reset before": ("GRU", lambda c: cells.gru_reset_before(clip=c), {"linear_before_reset": 0}),
}


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("clip", [0.2, 1.0])
def test_clip(rng, name, clip):
    op, make, attributes = CLIPPED[name]
    assert_equals_onnx_runtime(
        rng, op, recurrent_factory(make(clip))(3, 4, bidirectional=True), [6, 3, 2, 6], clip=clip, **attributes
    )


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_peepholes_and_coupled_gates(rng, coupled, bidirectional):
    layer = recurrent_factory(cells.lstm(peepholes=True, coupled=coupled))(3, 4, bidirectional=bidirectional)
    p = assert_equals_onnx_runtime(rng, "LSTM", layer, [6, 3, 2, 6], input_forget=int(coupled))
    without = {k: v * 0 if "weight_p" in k else v for k, v in p.params.items()}
    assert not np.allclose(layer(p.params, p.x)[0], layer(without, p.x)[0], atol=1e-2)


def test_coupled_gates_without_peepholes(rng):
    assert_equals_onnx_runtime(rng, "LSTM", recurrent_factory(cells.lstm(coupled=True))(3, 4), input_forget=1)


def test_clip_with_peepholes(rng):
    """The clipped value includes the peephole term."""
    layer = recurrent_factory(cells.lstm(peepholes=True, clip=0.4))(3, 4)
    assert_equals_onnx_runtime(rng, "LSTM", layer, clip=0.4)
