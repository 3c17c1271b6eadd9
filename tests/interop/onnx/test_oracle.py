"""ONNX Runtime as an oracle for ragged batches, both directions, and what the ONNX operators have beyond torch's.

Forward only and in float32, which is all it has for these operators. Where it deviates from the standard is said where
a test meets it.
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

# Where each of our gates stands in the standard's order: LSTM i,f,g,o -> i,o,f,c; GRU r,z,n -> z,r,h.
GATES = {"RNN": [0], "LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2]}
# The standard's names of xprnn's, whose case does not matter.
SPELLED = {"hardsigmoid": "HardSigmoid", "scaledtanh": "ScaledTanh", "leakyrelu": "LeakyRelu"}
SPELLED |= {"thresholdedrelu": "ThresholdedRelu"}


def by_gate(op, a):
    return np.concatenate([np.split(a, len(GATES[op]))[k] for k in GATES[op]])


def weights(op, layer, params):
    """W, R, B and, with peepholes, P in the standard's shapes: directions first."""
    ends = ["_l0", "_l0_reverse"][: layer.num_directions]
    W, R = (np.stack([by_gate(op, params[f"{name}{e}"]) for e in ends]) for name in ("weight_ih", "weight_hh"))
    biases = [[by_gate(op, params[f"{name}{e}"]) for name in ("bias_ih", "bias_hh")] for e in ends]
    B = np.stack([np.concatenate(pair) for pair in biases])
    P = None
    if "weight_pi_l0" in params:
        P = np.stack([np.concatenate([params[f"weight_p{g}{e}"] for g in "iof"]) for e in ends])
    return W, R, B, P


def session(op, inputs, hidden, directions, attributes):
    """A model of this one operator, with the inputs that are there."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    names = ["X", "W", "R", "B", "lengths", "h", *(["c", "P"] if op == "LSTM" else [])]
    outputs = ["Y", "Y_h", "Y_c"][: 3 if op == "LSTM" else 2]
    direction = "bidirectional" if directions == 2 else attributes.pop("direction", "forward")
    node = helper.make_node(
        op, [n if n in inputs else "" for n in names], outputs, hidden_size=hidden, direction=direction, **attributes
    )
    kinds = {"lengths": TensorProto.INT32}
    ranks = {n: [None] * (4 if n == "Y" else 3) for n in outputs}
    given = [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), inputs[n].shape) for n in inputs]
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ranks[n]) for n in outputs]
    model = helper.make_model(
        helper.make_graph([node], "one", given, results), opset_imports=[helper.make_opsetid("", 14)], ir_version=8
    )
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def answer(op, layer, p, **attributes):
    """y and the final states as xprnn lays them out, from ONNX Runtime."""
    W, R, B, P = weights(op, layer, p.params)
    states = [np.stack(column) for column in zip(*split_state(layer, p.state), strict=True)]
    inputs = {"X": p.x, "W": W, "R": R, "B": B, "h": states[0]}
    if op == "LSTM":
        inputs["c"] = states[1]
    if P is not None:
        inputs["P"] = P
    inputs = {k: np.ascontiguousarray(v, np.float32) for k, v in inputs.items()}
    if "lengths" in p.flags:
        inputs["lengths"] = p.flags["lengths"].astype(np.int32)
    run = session(op, inputs, layer.hidden_size, layer.num_directions, attributes)
    Y, *final = run.run(None, inputs)
    y = np.concatenate([Y[:, d] for d in range(layer.num_directions)], axis=-1)
    return y, tuple(final) if op == "LSTM" else final[0]


def compare(rng, op, layer, lengths=None, condition=64, scale=0.6, **attributes):
    p = random_inputs(rng, layer, T=6, N=4, scale=scale)
    if lengths is not None:
        p.flags["lengths"] = np.array(lengths)
    small = {k: v.astype(np.float32) for k, v in p.params.items()}
    state = tuple(s.astype(np.float32) for s in p.state) if op == "LSTM" else p.state.astype(np.float32)
    y, final = layer(small, p.x.astype(np.float32), state, **p.flags)
    want_y, want_final = answer(op, layer, p, **attributes)
    # A row without steps keeps its initial state; ONNX Runtime (1.32) gives 0 instead, which the standard doesn't say.
    for have, want, start in zip(*map(parts, (final, want_final, state)), strict=True):
        empty = np.flatnonzero(p.flags["lengths"] == 0) if lengths is not None else []
        assert not want[:, empty].any()
        want[:, empty] = start[:, empty]
        XP.assert_close(have, want, condition=condition, scale=1.0)
    XP.assert_close(y, want_y, condition=condition, scale=1.0)
    return p


def parts(state):
    return state if isinstance(state, tuple) else (state,)


PLAIN = {
    "RNN": ("RNN", xprnn.RNN, {}),
    "LSTM": ("LSTM", xprnn.LSTM, {}),
    "GRU": ("GRU", xprnn.GRU, {"linear_before_reset": 1}),
    "original GRU": ("GRU", lambda *a, **k: xprnn.GRU(*a, reset_after=False, **k), {"linear_before_reset": 0}),
}
plain = pytest.mark.parametrize("name", PLAIN)
ragged = pytest.mark.parametrize("lengths", [None, [6, 6, 6, 6], [6, 4, 3, 1], [2, 6, 1, 5], [0, 3, 6, 0]], ids=str)


@plain
@ragged
@pytest.mark.parametrize("bidirectional", [False, True])
def test_sequence_lens(rng, name, lengths, bidirectional):
    op, make, attributes = PLAIN[name]
    compare(rng, op, make(3, 5, bidirectional=bidirectional), lengths, **attributes)


@plain
def test_the_reverse_direction_alone_is_half_of_both(rng, name):
    """direction="reverse" is what our second direction computes."""
    op, make, attributes = PLAIN[name]
    both, one = make(3, 4, bidirectional=True), make(3, 4)
    p = random_inputs(rng, both, T=5, N=3)
    p.flags["lengths"] = np.array([5, 2, 3])
    y, _ = both(p.params, p.x, p.state, **p.flags)
    own_ = {k.removesuffix("_reverse"): v for k, v in p.params.items() if k.endswith("_reverse")}
    state = tuple(s[1:] for s in p.state) if op == "LSTM" else p.state[1:]
    want, _ = answer(op, one, p._replace(params=own_, state=state), direction="reverse", **attributes)
    np.testing.assert_allclose(y[..., 4:], want, rtol=0, atol=1e-6)


# One activation after another in a place; the constants are not the defaults.
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


def spelled(chosen, directions=1):
    """The attributes of activations (name, alpha, beta), repeated for each direction."""
    chosen = chosen * directions
    out = {"activations": [SPELLED.get(n, n.capitalize()) for n, _, _ in chosen]}
    # The lists hold the constants of those functions that have them, in order.
    alphas, betas = [a for _, a, _ in chosen if a is not None], [b for _, _, b in chosen if b is not None]
    return out | ({"activation_alpha": alphas} if alphas else {}) | ({"activation_beta": betas} if betas else {})


@pytest.mark.parametrize("f", ACTIVATIONS, ids=lambda f: f[0])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_activations_of_the_rnn(rng, f, bidirectional):
    layer = recurrent_factory(cells.elman(xprnn.activation(*f)))(3, 4, bidirectional=bidirectional)
    compare(rng, "RNN", layer, [6, 2, 4, 1], condition=200, scale=0.4, **spelled([f], layer.num_directions))


@pytest.mark.parametrize("f", ACTIVATIONS, ids=lambda f: f[0])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_activations_of_the_lstm(rng, f, place):
    chosen = [("sigmoid", None, None), ("tanh", None, None), ("tanh", None, None)]
    chosen[place] = f
    layer = recurrent_factory(cells.lstm(*(xprnn.activation(*a) for a in chosen)))(3, 4, bidirectional=True)
    compare(rng, "LSTM", layer, condition=200, scale=0.3, **spelled(chosen, 2))


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("f", ACTIVATIONS, ids=lambda f: f[0])
@pytest.mark.parametrize("place", [0, 1])
def test_activations_of_the_gru(rng, f, place, after):
    chosen = [("sigmoid", None, None), ("tanh", None, None)]
    chosen[place] = f
    cell = (cells.gru if after else cells.gru_reset_before)(*(xprnn.activation(*a) for a in chosen))
    compare(
        rng,
        "GRU",
        recurrent_factory(cell)(3, 4),
        condition=200,
        scale=0.3,
        linear_before_reset=after,
        **spelled(chosen),
    )


CLIPPED = {
    "RNN": ("RNN", lambda c: cells.elman(clip=c), {}),
    "LSTM": ("LSTM", lambda c: cells.lstm(clip=c), {}),
    "GRU": ("GRU", lambda c: cells.gru(clip=c), {"linear_before_reset": 1}),
    "original GRU": ("GRU", lambda c: cells.gru_reset_before(clip=c), {"linear_before_reset": 0}),
}


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("clip", [0.2, 1.0])
def test_clip(rng, name, clip):
    op, make, attributes = CLIPPED[name]
    compare(rng, op, recurrent_factory(make(clip))(3, 4, bidirectional=True), [6, 3, 2, 6], clip=clip, **attributes)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_peepholes_and_coupled_gates(rng, coupled, bidirectional):
    layer = recurrent_factory(cells.lstm(peepholes=True, coupled=coupled))(3, 4, bidirectional=bidirectional)
    p = compare(rng, "LSTM", layer, [6, 3, 2, 6], input_forget=int(coupled))
    without = {k: v * 0 if "weight_p" in k else v for k, v in p.params.items()}
    assert not np.allclose(layer(p.params, p.x)[0], layer(without, p.x)[0], atol=1e-2)


def test_coupled_gates_without_peepholes(rng):
    compare(rng, "LSTM", recurrent_factory(cells.lstm(coupled=True))(3, 4), input_forget=1)


def test_clip_with_peepholes(rng):
    """The peephole's share is in what is clipped."""
    layer = recurrent_factory(cells.lstm(peepholes=True, clip=0.4))(3, 4)
    compare(rng, "LSTM", layer, clip=0.4)
