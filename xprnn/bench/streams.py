"""One time step at a time, the state carried: the distribution of what a step takes, ours beside the peers'."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from xprnn.bench.ours import LAYERS
from xprnn.bench.problem import Problem

__all__ = ["measure", "onnxruntime_step", "ours", "percentiles", "torch_cell"]

Step = Callable[[], Any]  # one step of an endless stream; returns y (1, H)
D = 1
CLOSE = 1e-5  # float32 values below 1, after a few steps


def ours(problem: Problem) -> Step:
    """`layer.step`."""
    layer = LAYERS[problem.cell](*problem.shape[:2])
    params = {f"{k}_l0": v for k, v in problem.params.items()}
    x, kept = problem.x[0], {"state": None}

    def step() -> Any:
        y, kept["state"] = layer.step(params, x, kept["state"])
        return y

    return step


def torch_cell(problem: Problem) -> Step:
    """torch's cell, no gradients."""
    import torch

    kinds = {"elman": torch.nn.RNNCell, "lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell}
    cell = kinds[problem.cell](*problem.shape[:2]).requires_grad_(False)
    for name, value in problem.params.items():
        getattr(cell, name).copy_(torch.from_numpy(value))
    x, kept = torch.from_numpy(problem.x[0]), {"state": None}

    def step() -> Any:
        with torch.inference_mode():
            state = kept["state"] = cell(x, kept["state"])
        return state[0] if isinstance(state, tuple) else state

    return step


def onnxruntime_step(problem: Problem) -> Step:
    """The operator on a sequence of one step, its states fed back."""
    from xprnn.bench.peers import onnx_session

    states = ["initial_h", "initial_c"][: len(problem.state)]
    session, shape = onnx_session(problem, 1, outputs=["Y_h", "Y_c"][: len(states)]), (1, 1, problem.shape[1])
    feed = {"X": problem.x[:1]} | {name: np.zeros(shape, np.float32) for name in states}

    def step() -> Any:
        feed.update(zip(states, session.run(None, feed), strict=True))
        return feed["initial_h"][0]

    return step


def _distribution(step: Step, count: int) -> dict[str, float]:
    """Microseconds a step: p50, p99, p99.9."""
    times, clock = np.empty(count), time.perf_counter_ns
    for _ in range(min(count, 200)):
        step()
    gc.collect()
    gc.disable()
    try:
        for k in range(count):
            start = clock()
            step()
            times[k] = clock() - start
    finally:
        gc.enable()
    return percentiles(times)


def percentiles(nanoseconds: Any) -> dict[str, float]:
    """p50, p99 and p99.9, in microseconds."""
    return {f"p{q:g}": float(np.percentile(nanoseconds, q)) / 1e3 for q in (50, 99, 99.9)}


def measure(cell: str, hidden: int, names: list[str], count: int) -> dict[str, Any]:
    """One row: {"cell", "hidden", "microseconds": name -> percentiles, "disagree": [...]}."""
    problem = Problem(cell, (D, hidden, 1, 1))
    makers = {"core": ours} | {
        k: m for k, m in (("torch", torch_cell), ("onnxruntime", onnxruntime_step)) if k in names
    }
    steps, wrong, wanted = {}, [], None
    for name, make in makers.items():
        try:
            step = make(problem)
            found = np.array([np.asarray(step()) for _ in range(5)])
        except Exception as error:  # the table must say so; the others' figures still count
            wrong.append(f"{name} raises {type(error).__name__}: {error}")
            continue
        wanted = found if wanted is None else wanted
        if found.shape == wanted.shape and np.max(np.abs(found - wanted)) <= CLOSE:
            steps[name] = step
        else:
            wrong.append(f"{name}: other values than the core's")
    times = {name: _distribution(step, count) for name, step in steps.items()}
    return {"cell": cell, "hidden": hidden, "microseconds": times, "disagree": wrong}
