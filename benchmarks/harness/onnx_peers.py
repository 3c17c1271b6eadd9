"""Runtimes that execute a row's ONNX operator: ONNX Runtime, OpenVINO and tract. They run inference only."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.problem import FORWARD, Array, Call, Implementation, Problem

__all__ = [
    "initial_states",
    "onnx_model",
    "onnx_session",
    "onnxruntime_layer",
    "openvino_layer",
    "openvino_request",
    "tract_state",
]

# The index of torch's gate, for each gate in ONNX's order.
GATE_ORDER = {"elman": (0,), "lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "gru-before": (1, 0, 2)}


def initial_states(problem: Problem) -> dict[str, Array]:
    """Return the states (1, N, H) by the names of the operator's inputs."""
    names = ("initial_h", "initial_c")[: len(problem.state)]
    return {name: state[None] for name, state in zip(names, problem.state, strict=True)}


def onnx_model(problem: Problem, outputs: list[str]) -> bytes:
    """Build a model of one ONNX operator.

    Args:
        problem: the row.
        outputs: outputs of the model, among "Y", "Y_h" and "Y_c". The inputs are "X", "initial_h" and "initial_c".

    Returns:
        The content of an ONNX file.
    """
    from onnx import TensorProto, helper, numpy_helper

    d, h, n, t = problem.shape
    gates = GATE_ORDER[problem.cell]

    def in_onnx_order(a: Any) -> Any:
        return np.concatenate([a[k * h : (k + 1) * h] for k in gates])[None]

    p = {k: in_onnx_order(v) for k, v in problem.params.items()}
    weights = {"W": p["weight_ih"], "R": p["weight_hh"], "B": np.concatenate((p["bias_ih"], p["bias_hh"]), axis=1)}
    operator = {"elman": "RNN", "lstm": "LSTM"}.get(problem.cell, "GRU")
    names = list(initial_states(problem))
    options = {"linear_before_reset": int(problem.cell == "gru")} if operator == "GRU" else {}
    output_names = [k if k in outputs else "" for k in ("Y", "Y_h", "Y_c")[: 1 + len(names)]]
    node = helper.make_node(operator, ["X", "W", "R", "B", "", *names], output_names, hidden_size=h, **options)
    inputs = {"X": (t, n, d)} | dict.fromkeys(names, (1, n, h))
    input_infos = [helper.make_tensor_value_info(k, TensorProto.FLOAT, s) for k, s in inputs.items()]
    shapes = {"Y": (t, 1, n, h), "Y_h": (1, n, h), "Y_c": (1, n, h)}
    output_infos = [helper.make_tensor_value_info(k, TensorProto.FLOAT, shapes[k]) for k in outputs]
    initializers = [numpy_helper.from_array(v, k) for k, v in weights.items()]
    graph = helper.make_graph([node], "row", input_infos, output_infos, initializers)
    # Old enough for every runtime in use; the operators have not changed since in what is used here.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


def onnx_session(problem: Problem, threads: int, outputs: list[str]) -> Any:
    """Return ONNX Runtime's session of `onnx_model(problem, outputs)`."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(onnx_model(problem, outputs), settings, providers=["CPUExecutionProvider"])


def onnxruntime_layer(problem: Problem, threads: int) -> Implementation:
    """Run the operator in ONNX Runtime."""
    session = onnx_session(problem, threads, ["Y"])
    feed = {"X": problem.x} | initial_states(problem)

    def forward() -> Any:
        return session.run(None, feed)

    return Implementation({FORWARD: forward}, lambda: {"y": forward()[0][:, 0]})


def openvino_request(problem: Problem, threads: int, outputs: list[str]) -> Callable[..., Call]:
    """Compile `onnx_model(problem, outputs)` with OpenVINO for the CPU, in float32.

    Returns:
        A function of arrays by name, of inputs and outputs. It returns a call that reads and writes these arrays; this
        is OpenVINO's fastest kind of call, which copies and allocates nothing.
    """
    import openvino

    core = openvino.Core()
    # On processors with bfloat16 units the default precision is bfloat16.
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    compiled = core.compile_model(core.read_model(onnx_model(problem, outputs)), "CPU", config)

    def bind(**arrays: Array) -> Call:
        request = compiled.create_infer_request()
        for name, array in arrays.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

        def infer(_alive: Any = arrays) -> Any:  # the tensors do not keep the arrays' memory
            return request.infer()

        return infer

    return bind


def openvino_layer(problem: Problem, threads: int) -> Implementation:
    """Run the operator in OpenVINO."""
    _, h, n, t = problem.shape
    y = np.empty((t, 1, n, h), np.float32)
    forward = openvino_request(problem, threads, ["Y"])(X=problem.x, Y=y, **initial_states(problem))

    def results() -> dict[str, Array]:
        y.fill(np.nan)
        forward()
        return {"y": y[:, 0].copy()}

    return Implementation({FORWARD: forward}, results)


def tract_state(problem: Problem, outputs: list[str]) -> Any:
    """Compile `onnx_model(problem, outputs)` with tract, which runs on one thread.

    Returns:
        An object whose method `run` takes and returns lists of `tract.Tensor`.
    """
    import tract

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.onnx"
        file.write_bytes(onnx_model(problem, outputs))
        return tract.onnx().load(file).into_model().into_runnable().spawn_state()
