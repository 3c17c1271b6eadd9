"""One step of a stream, with the state carried, by xprnn, its peers, the article's code, and bare kernels.

A "floor" is the arithmetic of a step on arrays that exist already: the compiled kernel, or NumPy calls written by hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.harness import article_baseline, onnx_peers
from benchmarks.harness.problem import STEP, Array, Call, Implementation, Problem
from benchmarks.harness.xprnn_contenders import layer_arrays
from xprnn.kernels.jit.kernel import scan_kernel

__all__ = [
    "article_step",
    "compiled_floor",
    "numpy_floor",
    "onnxruntime_step",
    "openvino_step",
    "torch_step",
    "tract_step",
    "xprnn_step",
]

COMPARED_STEPS = 5


def _implementation(step: Call) -> Implementation:
    """Wrap a function that computes the next step and returns y (1, H). The results are its first steps."""
    return Implementation(
        {STEP: step}, lambda: {"y": np.array([np.asarray(step()).copy() for _ in range(COMPARED_STEPS)])}
    )


def xprnn_step(problem: Problem) -> Implementation:
    """Run `layer.step`."""
    layer, params, x, _, _ = layer_arrays(problem)
    x_t, state = x[0], [None]

    def step() -> Any:
        y, state[0] = layer.step(params, x_t, state[0])
        return y

    return _implementation(step)


def torch_step(problem: Problem) -> Implementation:
    """Run torch's cell, without gradients."""
    import torch

    cell_class = {"elman": torch.nn.RNNCell, "lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell}[problem.cell]
    cell = cell_class(*problem.shape[:2]).requires_grad_(False)
    for name, value in problem.params.items():
        getattr(cell, name).copy_(torch.from_numpy(value))
    x, state = torch.from_numpy(problem.x[0]), [None]

    def step() -> Any:
        with torch.inference_mode():
            after = state[0] = cell(x, state[0])
        return after[0] if isinstance(after, tuple) else after

    return _implementation(step)


def _zero_states(problem: Problem) -> dict[str, Array]:
    """Return zero states (1, 1, H) by the names of the ONNX operator's inputs."""
    return {name: np.zeros_like(state) for name, state in onnx_peers.initial_states(problem).items()}


def onnxruntime_step(problem: Problem) -> Implementation:
    """Run the ONNX operator on a sequence of one step, and feed its states back."""
    states = _zero_states(problem)
    session = onnx_peers.onnx_session(problem, 1, outputs=["Y_h", "Y_c"][: len(states)])
    feed = {"X": problem.x[:1]} | states

    def step() -> Any:
        feed.update(zip(states, session.run(None, feed), strict=True))
        return feed["initial_h"][0]

    return _implementation(step)


def openvino_step(problem: Problem) -> Implementation:
    """Run the ONNX operator on a sequence of one step in OpenVINO. Two calls read and write the states alternately."""
    before, after = _zero_states(problem), _zero_states(problem)
    outputs = ["Y_h", "Y_c"][: len(before)]
    bind, x = onnx_peers.openvino_request(problem, 1, outputs), problem.x[:1]
    turns = [
        (bind(X=x, **read, **dict(zip(outputs, written.values(), strict=True))), written["initial_h"][0])
        for read, written in ((after, before), (before, after))
    ]

    def step() -> Any:
        turns.reverse()
        infer, y = turns[0]
        infer()
        return y

    return _implementation(step)


def tract_step(problem: Problem) -> Implementation:
    """Run the ONNX operator on a sequence of one step in tract, and feed its states back as tensors of tract."""
    import tract

    zeros = _zero_states(problem)
    state = onnx_peers.tract_state(problem, ["Y_h", "Y_c"][: len(zeros)])
    x, *states = (tract.Tensor.from_numpy(a) for a in (problem.x[:1], *zeros.values()))

    def step() -> Any:
        states[:] = state.run([x, *states])
        return states[0]

    # The conversion of the output to NumPy takes longer than the step and is not timed.
    results = _implementation(lambda: step().to_numpy()[0]).results
    return Implementation({STEP: step}, results)


def article_step(problem: Problem) -> Implementation:
    """Run the article's cell, including the prediction that it always computes."""
    _, _, _, parameters = problem.article_arrays()
    x, state = problem.x[0].T.copy(), [np.zeros((problem.shape[1], 1), np.float32)]

    def step() -> Any:
        state[0], _, _ = article_baseline.rnn_cell_forward(x, state[0], parameters)
        return state[0].T

    return _implementation(step)


def compiled_floor(problem: Problem) -> Implementation:
    """Call the bare compiled entry point of a step on arrays that exist already."""
    layer, _, _, _, _ = layer_arrays(problem)
    kernel = scan_kernel(layer.resolved_cell, np.dtype(np.float32), False)
    assert not isinstance(kernel, str), kernel
    entry, template, x = kernel.entry("step", False), kernel.template(False, False), problem.x[0]
    weights = tuple(problem.params[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    states = tuple(np.zeros((1, 1, problem.shape[1]), np.float32) for _ in problem.state)
    after, y = tuple(np.empty_like(s) for s in states), np.empty((1, problem.shape[1]), np.float32)
    # Two calls in turns: one reads `states` and writes `after`, the other reads `after` and writes `states`.
    head = (template, 0, x, *weights, ())
    before, after = kernel.states_tuple(states), kernel.states_tuple(after)
    calls = [(*head, before, y, after), (*head, after, y, before)]

    def step() -> Any:
        calls.reverse()
        entry(*calls[1])
        return y

    return _implementation(step)


def numpy_floor(problem: Problem) -> Implementation:
    """Call NumPy directly, for one row, as a user would by hand."""
    h_size, dot, add, multiply, tanh = problem.shape[1], np.ndarray.dot, np.add, np.multiply, np.tanh
    w, u, bi, bh = (problem.params[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    x, h, c = problem.x[0, 0], np.zeros(h_size, np.float32), np.zeros(h_size, np.float32)
    # sigmoid(a) = 0.5 tanh(0.5 a) + 0.5; the LSTM's cell candidate is a plain tanh.
    scale = np.full(len(bi), 0.5, np.float32)
    scale[2 * h_size : 3 * h_size] = 1.0
    half, offset, state = scale[: 2 * h_size].copy(), 1 - scale, [h, c]

    def elman() -> Any:
        state[0] = tanh(add(add(dot(w, x), dot(u, state[0])), add(bi, bh)))
        return state[0][None]

    def lstm() -> Any:
        a = add(add(dot(w, x), dot(u, state[0])), add(bi, bh))
        a = add(multiply(tanh(multiply(a, scale)), scale), offset)
        i, f, g, o = a[:h_size], a[h_size : 2 * h_size], a[2 * h_size : 3 * h_size], a[3 * h_size :]
        state[1] = add(multiply(f, state[1]), multiply(i, g))
        state[0] = multiply(o, tanh(state[1]))
        return state[0][None]

    def gru() -> Any:
        a, b = add(dot(w, x), bi), add(dot(u, state[0]), bh)
        s = add(a[: 2 * h_size], b[: 2 * h_size])
        s = add(multiply(tanh(multiply(s, half)), half), half)
        n = tanh(add(a[2 * h_size :], multiply(s[:h_size], b[2 * h_size :])))
        state[0] = add(n, multiply(s[h_size:], np.subtract(state[0], n)))
        return state[0][None]

    return _implementation({"elman": elman, "lstm": lstm, "gru": gru}[problem.cell])
