"""Random RNN, LSTM and GRU nodes, their ModelProto, and an independent reference implementation.

The reference follows the ONNX standard's text row by row in float64, in the gate order and layout of the standard. It
shares no code with xprnn. Helpers of several ONNX test files are here too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

GATE_COUNTS = {"RNN": 1, "LSTM": 4, "GRU": 3}
DEFAULT_ACTIVATIONS = {"RNN": ["Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}
INPUT_NAMES = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")


def sigmoid(x, a, b):
    return 0.5 * np.tanh(0.5 * x) + 0.5


# name -> (f(x, alpha, beta), the constants that it uses: a for alpha, b for beta)
ACTIVATIONS: dict[str, Any] = {
    "Tanh": (lambda x, a, b: np.tanh(x), ""),
    "Sigmoid": (sigmoid, ""),
    "Relu": (lambda x, a, b: np.maximum(x, 0), ""),
    "Softsign": (lambda x, a, b: x / (1 + abs(x)), ""),
    "Softplus": (lambda x, a, b: np.logaddexp(x, 0), ""),
    "Affine": (lambda x, a, b: a * x + b, "ab"),
    "ScaledTanh": (lambda x, a, b: a * np.tanh(b * x), "ab"),
    "HardSigmoid": (lambda x, a, b: min(max(a * x + b, 0), 1), "ab"),
    "LeakyRelu": (lambda x, a, b: x if x >= 0 else a * x, "a"),
    "ThresholdedRelu": (lambda x, a, b: x if x > a else 0.0, "a"),
    "Elu": (lambda x, a, b: x if x >= 0 else a * (np.exp(x) - 1), "a"),
}
DEFAULT_CONSTANTS = {"Affine": (1, 0), "ScaledTanh": (1, 1), "HardSigmoid": (0.2, 0.5), "LeakyRelu": (0.01, 0)}
DEFAULT_CONSTANTS |= {"ThresholdedRelu": (1, 0), "Elu": (1, 0)}


class OperatorCase(NamedTuple):
    """A recurrent node: operator, attributes, inputs (float64, lengths int32) and names of the outputs."""

    op: str
    attrs: dict[str, Any]
    inputs: dict[str, Any]
    outputs: tuple[str, ...]


def random_bool(rng):
    return bool(rng.integers(2))


def random_case(rng, op, *, zero_lengths=False, all_constants=False):
    """A case with random sizes, attributes and optional inputs."""
    direction = ["forward", "reverse", "bidirectional"][rng.integers(3)]
    d, g = 1 + (direction == "bidirectional"), GATE_COUNTS[op]
    t, n, i, h = (int(k) for k in rng.integers(1, 5, 4))
    attrs: dict[str, Any] = {"direction": direction, "hidden_size": h}
    if (layout := int(rng.integers(2))) or random_bool(rng):
        attrs["layout"] = layout
    if random_bool(rng):
        attrs |= random_activations(rng, len(DEFAULT_ACTIVATIONS[op]) * d, all_constants)
    if random_bool(rng):
        attrs["clip"] = float(np.float32(rng.uniform(0.2, 1.0)))
    if op == "LSTM" and random_bool(rng):
        attrs["input_forget"] = 1
    if op == "GRU":
        attrs["linear_before_reset"] = int(rng.integers(2))
    shapes = {"X": (t, n, i), "W": (d, g * h, i), "R": (d, g * h, h), "B": (d, 2 * g * h)}
    shapes |= {"initial_h": (d, n, h), "initial_c": (d, n, h), "P": (d, 3 * h)}
    if layout:
        shapes |= {"X": (n, t, i), "initial_h": (n, d, h), "initial_c": (n, d, h)}
    names = [k for k in shapes if k in "XWR" or ((op == "LSTM" or k not in ("initial_c", "P")) and random_bool(rng))]
    inputs = {k: rng.standard_normal(shapes[k]) * (1.0 if k == "X" else 0.6) for k in names}
    inputs = {k: a.astype(np.float32).astype(np.float64) for k, a in inputs.items()}
    if random_bool(rng) or zero_lengths:
        inputs["sequence_lens"] = rng.integers(0 if zero_lengths else 1, t + 1, n).astype(np.int32)
    outputs = ["Y", "Y_h", "Y_c"][: 3 if op == "LSTM" else 2]
    some_outputs = tuple(o if o == "Y" or random_bool(rng) else "" for o in outputs)
    return OperatorCase(op, attrs, inputs, some_outputs if random_bool(rng) else tuple(outputs))


def random_activations(rng, count, all_constants):
    """`count` random activations, with all constants, or with constants for the first few activations only."""
    names = [list(ACTIVATIONS)[k] for k in rng.integers(0, len(ACTIVATIONS), count)]
    out: dict[str, Any] = {"activations": names}
    for key, letter in (("activation_alpha", "a"), ("activation_beta", "b")):
        users = [n for n in names if letter in ACTIVATIONS[n][1]]
        values = [float(np.float32(rng.uniform(0.1, 0.9))) for _ in users]
        if values and (all_constants or random_bool(rng)):
            out[key] = values if all_constants else values[: int(rng.integers(1, len(values) + 1))]
    return out


def operator_model(case, *, initializers=(), opset=22, dtype="float32"):
    """A ModelProto of the node alone; inputs named in `initializers` are initializers, the others model inputs."""
    import onnx
    from onnx import helper, numpy_helper

    names = list(INPUT_NAMES[: 8 if case.op == "LSTM" else 6])
    while names[-1] not in case.inputs:
        names.pop()
    node = helper.make_node(
        case.op, [k if k in case.inputs else "" for k in names], list(case.outputs), name="the node", **case.attrs
    )
    types = {k: 6 if k == "sequence_lens" else helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for k in INPUT_NAMES}
    inputs = [
        helper.make_tensor_value_info(k, types[k], a.shape) for k, a in case.inputs.items() if k not in initializers
    ]
    ranks = {"Y": [None] * 4, "Y_h": [None] * 3, "Y_c": [None] * 3}
    outputs = [helper.make_tensor_value_info(k, types["X"], ranks[k]) for k in case.outputs if k]
    weights = [numpy_helper.from_array(case.inputs[k].astype(dtype), k) for k in initializers if k in case.inputs]
    graph = helper.make_graph([node], "one", inputs, outputs, weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(proto)
    return proto


def run_onnxruntime(model, inputs):
    """Run a ModelProto, its bytes or its path with ONNX Runtime: dict of output name -> array.

    Floats are converted to the dtype that the model declares for the input.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors only: it warns of inputs with a default value
    content = model if isinstance(model, (bytes, str)) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    float_types = {"tensor(float)": np.float32, "tensor(double)": np.float64}
    dtypes = {i.name: float_types.get(i.type) for i in (*session.get_inputs(), *session.get_overridable_initializers())}
    feed = {k: np.ascontiguousarray(a, dtypes[k]) for k, a in inputs.items()}
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def outputs_by_name(graph, result):
    """The outputs of a GraphModel by name, from the (y, state) that a call returned."""
    y, state = result
    named = dict(y) if isinstance(y, dict) else {graph.outputs[0]: y}
    if isinstance(state, dict):
        return named | state
    states = () if state is None else state if isinstance(state, tuple) else (state,)
    return named | dict(zip([name for name in graph.outputs if name not in named], states, strict=True))


def random_params(rng, model, dtype=np.float32):
    """Random parameters for a layer or Sequential; none is zero, as initialised biases are."""
    params = model.init(rng, like=np.zeros(0, dtype))
    return {k: (rng.standard_normal(a.shape) * 0.6).astype(a.dtype) for k, a in params.items()}


def is_batch_first(model):
    """True if a layer or Sequential is batch-first."""
    layers = getattr(model, "layers", {"": model}).values()
    return any(getattr(layer, "batch_first", False) for layer in layers)


def to_layout_0(case):
    """Convert a case to layout 0."""
    if not case.attrs.get("layout", 0):
        return case
    inputs = {k: a.swapaxes(0, 1) if k in ("X", "initial_h", "initial_c") else a for k, a in case.inputs.items()}
    return case._replace(attrs=case.attrs | {"layout": 0}, inputs=inputs)


def to_layout_1(outputs):
    """Convert outputs from layout 0 to layout 1."""
    return {k: a.transpose(2, 0, 1, 3) if k == "Y" else a.swapaxes(0, 1) for k, a in outputs.items()}


def reference_outputs(case):
    """Y, Y_h and Y_c, computed step by step and row by row."""
    layout_0 = to_layout_0(case)
    x, get = layout_0.inputs["X"], layout_0.inputs.get
    t, n, _ = x.shape
    directions = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[case.attrs["direction"]]
    h = layout_0.inputs["R"].shape[-1]
    lengths = get("sequence_lens", np.full(n, t))
    y = np.zeros((t, len(directions), n, h))
    finals = np.zeros((2, len(directions), n, h))
    functions = activation_functions(layout_0, len(directions))
    for d, reverse in enumerate(directions):
        for row in range(n):
            state = [get(k, np.zeros((len(directions), n, h)))[d, row] for k in ("initial_h", "initial_c")]
            steps = range(lengths[row])
            for s in reversed(steps) if reverse else steps:
                state = reference_step(layout_0, d, x[s, row], *state, functions[d])
                y[s, d, row] = state[0]
            finals[:, d, row] = state
    out = {"Y": y, "Y_h": finals[0], "Y_c": finals[1]}
    out = to_layout_1(out) if case.attrs.get("layout", 0) else out
    return {k: out[k] for k in case.outputs if k}


def activation_functions(case, directions):
    """The elementwise activation functions of each direction."""
    names = case.attrs.get("activations", DEFAULT_ACTIVATIONS[case.op] * directions)
    lists = {c: list(case.attrs.get(f"activation_{k}", [])) for c, k in (("a", "alpha"), ("b", "beta"))}
    functions = []
    for name in names:
        f, letters = ACTIVATIONS[name]
        constants = [
            lists[c].pop(0) if c in letters and lists[c] else DEFAULT_CONSTANTS.get(name, (0, 0))[k]
            for k, c in enumerate("ab")
        ]
        functions.append(np.vectorize(lambda v, f=f, c=tuple(constants): f(v, *c), otypes=[float]))
    count = len(DEFAULT_ACTIVATIONS[case.op])
    return [functions[d * count : d * count + count] for d in range(directions)]


def reference_step(case, d, x, h, c, f):
    """One step of one row, by the equations of the ONNX standard."""
    W, R = case.inputs["W"][d], case.inputs["R"][d]
    wb, rb = np.split(case.inputs["B"][d], 2) if "B" in case.inputs else np.zeros((2, len(W)))
    g, bound = GATE_COUNTS[case.op], case.attrs.get("clip", np.inf)
    xs, hs = np.split(W @ x + wb, g), np.split(R @ h + rb, g)

    def act(k, v):
        return f[k](np.clip(v, -bound, bound))

    if case.op == "RNN":
        return act(0, xs[0] + hs[0]), c
    if case.op == "GRU":
        z, r = act(0, xs[0] + hs[0]), act(0, xs[1] + hs[1])
        if case.attrs["linear_before_reset"]:
            n = act(1, xs[2] + r * hs[2])
        else:
            n = act(1, xs[2] + R[2 * len(h) :] @ (r * h) + rb[2 * len(h) :])
        return (1 - z) * n + z * h, c
    pi, po, pf = np.split(case.inputs["P"][d], 3) if "P" in case.inputs else np.zeros((3, len(h)))
    i = act(0, xs[0] + hs[0] + pi * c)
    forget = 1 - i if case.attrs.get("input_forget") else act(0, xs[2] + hs[2] + pf * c)
    c = forget * c + i * act(1, xs[3] + hs[3])
    return act(0, xs[1] + hs[1] + po * c) * f[2](c), c
