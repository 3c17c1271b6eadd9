"""One time step at a time, the state carried: the distribution of what a step takes, ours beside the peers'."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import numpy as np

from benchmarks.harness.problem import Problem
from benchmarks.harness.xprnn_contenders import LAYERS

__all__ = ["StreamStep", "compare_steps", "measure_latency", "onnxruntime_step", "torch_step", "xprnn_step"]

StreamStep: TypeAlias = Callable[[], Any]  # one step of an endless stream; returns y (1, H)
ContextFor: TypeAlias = Callable[[str], AbstractContextManager[Any]]
D = 1
BLOCK_STEPS = 500  # steps of a turn
TOLERANCE = 1e-5  # float32 values below 1, after a few steps


def xprnn_step(problem: Problem) -> StreamStep:
    """`layer.step`."""
    layer = LAYERS[problem.cell](*problem.shape[:2])
    params = {f"{k}_l0": v for k, v in problem.params.items()}
    x, kept = problem.x[0], {"state": None}

    def step() -> Any:
        y, kept["state"] = layer.step(params, x, kept["state"])
        return y

    return step


def torch_step(problem: Problem) -> StreamStep:
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


def onnxruntime_step(problem: Problem) -> StreamStep:
    """The operator on a sequence of one step, its states fed back."""
    from benchmarks.harness.peers import onnx_session

    states = ["initial_h", "initial_c"][: len(problem.state)]
    session, shape = onnx_session(problem, 1, outputs=["Y_h", "Y_c"][: len(states)]), (1, 1, problem.shape[1])
    feed = {"X": problem.x[:1]} | {name: np.zeros(shape, np.float32) for name in states}

    def step() -> Any:
        feed.update(zip(states, session.run(None, feed), strict=True))
        return feed["initial_h"][0]

    return step


def _step_times(steps: dict[str, StreamStep], count: int, around: ContextFor) -> dict[str, Any]:
    """Nanoseconds of each step of each contender, who take turns in blocks; the empty clock's own are taken off."""
    clock, times = time.perf_counter_ns, {name: np.empty(count) for name in steps}
    clock_cost = float(np.median([-(clock() - clock()) for _ in range(1000)]))
    order = list(steps)
    gc.collect()
    gc.disable()
    try:
        for at in range(0, count, BLOCK_STEPS):
            for name in order:
                step, here = steps[name], times[name]
                with around(name):
                    for _ in range(20):
                        step()
                    for k in range(at, min(at + BLOCK_STEPS, count)):
                        start = clock()
                        step()
                        here[k] = clock() - start
            order = order[1:] + order[:1]
    finally:
        gc.enable()
    return {name: t - clock_cost for name, t in times.items()}


def compare_steps(
    factories: Mapping[str, Callable[[Problem], StreamStep]],
    problem: Problem,
    count: int,
    context: ContextFor = lambda _: nullcontext(),
) -> dict[str, Any]:
    """One row: {"cell", "hidden", "microseconds": name -> p50, p99, p99.9, "disagree": [...]}.

    Args:
        makers: name -> what makes its step; whose first steps differ from the first's is not timed.
        problem: of one step and one row.
        count: steps of each.
        around: name -> the context in which it runs.
    """
    steps, wrong, wanted = {}, [], None
    for name, make in factories.items():
        try:
            step = make(problem)
            with context(name):
                found = np.array([np.asarray(step()).copy() for _ in range(5)])
        except Exception as error:  # the table must say so; the others' figures still count
            wrong.append(f"{name} raises {type(error).__name__}: {error}")
            continue
        wanted = found if wanted is None else wanted
        if found.shape == wanted.shape and np.max(np.abs(found - wanted)) <= TOLERANCE:
            steps[name] = step
        else:
            wrong.append(f"{name}: other values than the first's")
    seen = _step_times(steps, count, context)
    percentiles = {n: {f"p{q:g}": float(np.percentile(t, q)) / 1e3 for q in (50, 99, 99.9)} for n, t in seen.items()}
    return {"cell": problem.cell, "hidden": problem.shape[1], "microseconds": percentiles, "disagree": wrong}


def measure_latency(cell: str, hidden: int, names: list[str], count: int) -> dict[str, Any]:
    """The row of our step and of those of the peers' names who have one."""
    peers = {"torch": torch_step, "onnxruntime": onnxruntime_step}
    makers = {"core": xprnn_step} | {k: make for k, make in peers.items() if k in names}
    return compare_steps(makers, Problem(cell, (D, hidden, 1, 1)), count)
