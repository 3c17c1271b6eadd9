"""torch, JAX and ONNX Runtime on the CPU, each at its best for the same task; missing ones are left out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, Call, Implementation, Problem

__all__ = ["PEERS", "UNSUPPORTED_CELLS", "jax_cell", "make_peer", "missing_reason", "onnx_session", "torch_calls"]

# What must be importable for each; in the order of the tables' columns.
PEERS = {"loop": ("numba",), "torch": ("torch",), "jax": ("jax",), "onnxruntime": ("onnxruntime", "onnx")}
# What each has no layer or operator of.
UNSUPPORTED_CELLS = {
    "loop": {"gru-before", "lstm-proj"},
    "torch": {"gru-before"},
    "jax": {"gru-before", "lstm-proj"},
    "onnxruntime": {"lstm-proj"},
}


def missing_reason(name: str) -> str:
    """Why a peer is left out, or "". It is imported to know: some import only in part."""
    try:
        for module in PEERS[name]:
            importlib.import_module(module)
    except Exception as error:  # a broken installation raises whatever it likes
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def make_peer(name: str, problem: Problem, threads: int) -> Implementation:
    """The contender of this name."""
    makers: dict[str, Callable[[Problem, int], Implementation]] = {"loop": _numba_loop, "torch": _torch, "jax": _jax}
    return (makers | {"onnxruntime": _onnxruntime})[name](problem, threads)


def _numba_loop(problem: Problem, _: int) -> Implementation:
    from benchmarks.harness.numba_loop import numba_loop

    return numba_loop(problem)


def _torch(problem: Problem, threads: int) -> Implementation:
    import torch

    torch.set_num_threads(threads)
    forward, both, results = torch_calls(problem)
    return Implementation({FORWARD: forward, FORWARD_BACKWARD: both}, results)


def torch_calls(
    problem: Problem, device: str = "cpu", before_forward: Callable[[], None] = lambda: None
) -> tuple[Call, Call, Call]:
    """torch's layer on a device: forward without gradients, both passes, results; `before` runs before each forward."""
    import torch

    kinds = {"elman": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
    projected = {"proj_size": problem.output_size} if problem.cell == "lstm-proj" else {}
    layer = kinds[problem.cell.removesuffix("-proj")](*problem.shape[:2], **projected).to(device)
    with torch.no_grad():
        for name, value in problem.params.items():
            getattr(layer, f"{name}_l0").copy_(torch.from_numpy(value))
    dy = torch.from_numpy(problem.dy).to(device)
    x, *states = (torch.from_numpy(a).to(device) for a in (problem.x, *(s[None] for s in problem.state)))
    own = [a.clone().requires_grad_() for a in (x, *states)]
    weights = [getattr(layer, f"{name}_l0") for name in problem.params]

    def run(x: Any, *states: Any) -> Any:
        before_forward()
        return layer(x, states if len(states) > 1 else states[0])

    def forward() -> Any:
        with torch.no_grad():
            return run(x, *states)

    def both() -> Any:
        y, _ = run(*own)
        return y, torch.autograd.grad(y, [*own, *weights], dy)

    def results() -> dict[str, Any]:
        y, (dx, *rest) = both()
        names = [f"d{c}0" for c in "hc"[: len(states)]] + [f"d{name}" for name in problem.params]
        found = {"y": forward()[0], "y (with a tape)": y.detach(), "dx": dx}
        found |= {k: v[0] if k in ("dh0", "dc0") else v for k, v in zip(names, rest, strict=True)}
        return {k: v.cpu().numpy() for k, v in found.items()}

    return forward, both, results


def jax_cell(cell: str) -> Callable[..., Any]:
    """(state, x's projection, h's projection) -> state, in torch's gate order."""
    import jax
    import jax.numpy as jnp

    def elman(state: Any, x: Any, h: Any) -> Any:
        return (jnp.tanh(x + h),)

    def lstm(state: Any, x: Any, h: Any) -> Any:
        i, f, g, o = jnp.split(x + h, 4, axis=-1)
        c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    def gru(state: Any, x: Any, h: Any) -> Any:
        (xr, xz, xn), (hr, hz, hn) = jnp.split(x, 3, axis=-1), jnp.split(h, 3, axis=-1)
        z = jax.nn.sigmoid(xz + hz)
        return ((1 - z) * jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn) + z * state[0],)

    return {"elman": elman, "lstm": lstm, "gru": gru}[cell]


def _jax(problem: Problem, _: int) -> Implementation:
    """A jitted lax.scan, the input's projection hoisted out of it; compiled before the clock starts."""
    import jax

    step = jax_cell(problem.cell)

    def run(p: Any, x: Any, state: Any) -> Any:
        ut = p["weight_hh"].T
        xg = x @ p["weight_ih"].T + p["bias_ih"]

        def body(state: Any, xt: Any) -> Any:
            state = step(state, xt, state[0] @ ut + p["bias_hh"])
            return state, state[0]

        return jax.lax.scan(body, state, xg)[1]

    def value_and_vjp(p: Any, x: Any, state: Any, dy: Any) -> Any:
        y, back = jax.vjp(run, p, x, state)
        return y, back(dy)

    arguments = jax.device_put((problem.params, problem.x, problem.state))
    dy = jax.device_put(problem.dy)
    fast, fast_vjp = jax.jit(run), jax.jit(value_and_vjp)

    def forward() -> Any:
        return jax.block_until_ready(fast(*arguments))

    def both() -> Any:
        return jax.block_until_ready(fast_vjp(*arguments, dy))

    def results() -> dict[str, Any]:
        y, (dp, dx, ds) = both()
        found = {"y": forward(), "y (with a tape)": y, "dx": dx} | {f"d{k}": v for k, v in dp.items()}
        found |= {f"d{c}0": s for c, s in zip("hc", ds, strict=False)}
        return {k: np.asarray(v) for k, v in found.items()}

    return Implementation({FORWARD: forward, FORWARD_BACKWARD: both}, results)


# For each ONNX gate, in its order, the number of torch's.
ONNX_GATE_ORDER = {"elman": (0,), "lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "gru-before": (1, 0, 2)}


def onnx_session(problem: Problem, threads: int, outputs: list[str]) -> Any:
    """The ONNX operator in a model of its own: inputs X, initial_h and initial_c; outputs among Y, Y_h, Y_c."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    d, h, n, t = problem.shape
    gates = ONNX_GATE_ORDER[problem.cell]

    def ordered(a: Any) -> Any:
        return np.concatenate([a[k * h : (k + 1) * h] for k in gates])[None]

    p = {k: ordered(v) for k, v in problem.params.items()}
    weights = {"W": p["weight_ih"], "R": p["weight_hh"], "B": np.concatenate((p["bias_ih"], p["bias_hh"]), axis=1)}
    kind = {"elman": "RNN", "lstm": "LSTM"}.get(problem.cell, "GRU")
    names = ("initial_h", "initial_c")[: len(problem.state)]
    options = {"linear_before_reset": int(problem.cell == "gru")} if kind == "GRU" else {}
    every = [k if k in outputs else "" for k in ("Y", "Y_h", "Y_c")[: 1 + len(names)]]
    node = helper.make_node(kind, ["X", "W", "R", "B", "", *names], every, hidden_size=h, **options)
    inputs = {"X": (t, n, d)} | dict.fromkeys(names, (1, n, h))
    infos = [helper.make_tensor_value_info(k, TensorProto.FLOAT, s) for k, s in inputs.items()]
    shapes = {"Y": (t, 1, n, h), "Y_h": (1, n, h), "Y_c": (1, n, h)}
    out = [helper.make_tensor_value_info(k, TensorProto.FLOAT, shapes[k]) for k in outputs]
    stored = [numpy_helper.from_array(v, k) for k, v in weights.items()]
    graph = helper.make_graph([node], "row", infos, out, stored)
    # Old enough for every runtime in use; the operators have not changed in what is asked of them here.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def _onnxruntime(problem: Problem, threads: int) -> Implementation:
    """Inference only."""
    session = onnx_session(problem, threads, ["Y"])
    names = ("initial_h", "initial_c")[: len(problem.state)]
    feed = {"X": problem.x} | {k: s[None] for k, s in zip(names, problem.state, strict=True)}

    def forward() -> Any:
        return session.run(None, feed)

    return Implementation({FORWARD: forward}, lambda: {"y": forward()[0][:, 0]})
