"""Who runs a row on the GPU: the three tiers, torch's cuDNN layer, the step's bare products; and how they are timed.

Everyone is timed by CUDA events around a whole pass, the launches' own cost included: that is what a user waits for.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import xprnn
from benchmarks.harness import peers
from benchmarks.harness.problem import Problem
from xprnn.kernels.config import reference_only
from xprnn.kernels.cuda import device, no_persistent

__all__ = [
    "LAYER_CLASSES",
    "TITLES",
    "GpuImplementation",
    "ceilings",
    "float64_results",
    "make_implementations",
    "relative_errors",
    "time_in_turns",
    "torch_missing_reason",
]

LAYER_CLASSES = {"elman": "RNN", "lstm": "LSTM", "gru": "GRU"}
TITLES = {
    "tier1": "tier 1, generic",
    "tier2": "tier 2, fused steps",
    "tier3": "tier 3, persistent",
    "torch": "PyTorch (cuDNN)",
    "gemm": "the steps' products alone",
}
GEMM_SIZE, COPY_ELEMENTS = 8192, 1 << 28  # of the ceilings: a product's side, a copy's float32 numbers


@dataclass(frozen=True)
class GpuImplementation:
    """`results` gives y and every gradient as NumPy arrays under the core's names; empty where there are none."""

    calls: dict[str, Callable[[], Any]]  # "forward", "both"
    timer: Callable[[Callable[[], Any]], float]  # one call by this one's events
    results: Callable[[], dict[str, Any]] = field(default=dict)


def cupy_event_seconds(call: Callable[[], Any]) -> float:
    """One call, by CuPy's events."""
    import cupy

    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    cupy.cuda.get_current_stream().synchronize()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, stop)) * 1e-3


def _torch_timer(where: str) -> Callable[[Callable[[], Any]], float]:
    import torch

    def seconds(call: Callable[[], Any]) -> float:
        if where == "cpu":  # for tests
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop)) * 1e-3

    return seconds


class _XprnnLayer:
    """A layer of xprnn on CuPy arrays of one dtype."""

    def __init__(self, problem: Problem, dtype: str) -> None:
        import cupy

        def put(a: Any) -> Any:
            return cupy.asarray(a.astype(dtype))

        d, h, _, _ = problem.shape
        self.layer = getattr(xprnn, LAYER_CLASSES[problem.cell])(d, h)
        self.params = {f"{name}_l0": put(a) for name, a in problem.params.items()}
        self.x, self.dy = put(problem.x), put(problem.dy)
        state = tuple(put(s[None]) for s in problem.state)
        self.state = state if len(state) > 1 else state[0]

    def forward(self) -> Any:
        """Inference."""
        return self.layer(self.params, self.x, self.state)

    def forward_backward(self) -> Any:
        """Forward and backward."""
        y, _, tape = self.layer.forward(self.params, self.x, self.state)
        return y, self.layer.backward(tape, self.dy)

    def results(self) -> dict[str, Any]:
        """y twice, and every gradient."""
        y, (dx, dstate, dparams) = self.forward_backward()
        found = {"y": self.forward()[0], "y (with a tape)": y, "dx": dx} | {f"d{k[:-3]}": g for k, g in dparams.items()}
        states = dstate if isinstance(dstate, tuple) else (dstate,)
        found |= {f"d{c}0": s[0] for c, s in zip("hc", states, strict=False)}
        return {k: v.get() for k, v in found.items()}

    def with_config(self, *contexts: Callable[[], Any]) -> GpuImplementation:
        """This layer, run within these contexts."""

        def within(call: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                with ExitStack() as stack:
                    for context in contexts:
                        stack.enter_context(context())
                    return call()

            return run

        return GpuImplementation(
            {"forward": within(self.forward), "both": within(self.forward_backward)},
            cupy_event_seconds,
            within(self.results),
        )


def float64_results(problem: Problem) -> dict[str, Any]:
    """The row's results in float64, by the generic scan."""
    return _XprnnLayer(problem, "float64").with_config(reference_only).results()


def make_implementations(
    problem: Problem, tf32: bool, torch_device: str = "cuda"
) -> tuple[dict[str, GpuImplementation], dict[str, str]]:
    """Those who can run the row, and why the others can't."""
    ours, missing = _XprnnLayer(problem, "float32"), {}
    precision = "tf32" if tf32 else "float32"
    found = {"tier2": ours.with_config(no_persistent, lambda: xprnn.precision(precision))}
    if tf32:
        missing["tier1"] = "the generic scan knows no TF32"
    else:
        found = {"tier1": ours.with_config(reference_only)} | found
    with xprnn.precision(precision):
        kernel = ours.layer.explain(ours.params, ours.x).partition(": ")[2]
    if kernel.startswith("CUDA persistent"):
        found["tier3"] = ours.with_config(lambda: xprnn.precision(precision))
    else:
        missing["tier3"] = kernel.partition("not persistent: ")[2].removesuffix(")") or kernel
    if why := torch_missing_reason(torch_device):
        missing["torch"] = why
    else:
        found["torch"] = _torch_cudnn(problem, tf32, torch_device)
    found["gemm"] = _recurrent_products(problem, precision)
    return found, missing


def torch_missing_reason(device: str) -> str:
    """Why torch can't take part, or ""."""
    try:
        import torch
    except Exception as error:  # a broken installation raises whatever it likes
        return f"torch can't be imported ({type(error).__name__})"
    return "" if device == "cpu" or torch.cuda.is_available() else "this torch has no CUDA device"


def _torch_cudnn(problem: Problem, tf32: bool, where: str) -> GpuImplementation:
    import torch

    def switch() -> None:
        # Both: the layer's products go through cuDNN, those of a loop around it through cuBLAS.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32

    switch()
    forward, both, results = peers.torch_calls(problem, where, switch)
    return GpuImplementation({"forward": forward, "both": both}, _torch_timer(where), results)


def _recurrent_products(problem: Problem, precision: str) -> GpuImplementation:
    """The recurrent products of a pass and nothing else: what no launch of one step's product can beat."""
    u = device.zeros(problem.params["weight_hh"].shape, "float32")
    (width, hidden), (_, _, n, t) = u.shape, problem.shape
    h, g = device.zeros((n, hidden), "float32"), device.zeros((n, width), "float32")
    h_at, g_at, u_at = device.address(h), device.address(g), device.address(u)

    def run(both: bool) -> Any:
        with xprnn.precision(precision), device.cublas_gemm("float32") as p:
            there = p.make_gemm((n, width, hidden), (False, True), False)
            back = p.make_gemm((n, hidden, width), (False, False), False)
            for _ in range(t):
                there(g_at, h_at, u_at)
            for _ in range(t if both else 0):
                back(h_at, g_at, u_at)
        return u, h, g  # alive until here

    return GpuImplementation({"forward": lambda: run(False), "both": lambda: run(True)}, cupy_event_seconds)


def time_in_turns(
    found: dict[str, GpuImplementation], call_name: str, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each contender's calls, in turns, after three to warm up; fewer rounds where they would take long."""
    for contender in found.values():
        for _ in range(3):
            contender.calls[call_name]()
    times: dict[str, list[float]] = {name: [] for name in found}
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for k in range(rounds):
            if k >= 5 and time.perf_counter() - begin > seconds:
                break
            for name, contender in found.items():
                times[name].append(contender.timer(contender.calls[call_name]))
    finally:
        gc.enable()
    return times


def ceilings(gemm_size: int = GEMM_SIZE, copy_elements: int = COPY_ELEMENTS) -> dict[str, float]:
    """What this device does at best: operations a second in large products, bytes a second in a copy, its clock."""
    a, out = device.zeros((gemm_size, gemm_size), "float32"), device.zeros((gemm_size, gemm_size), "float32")
    found = {}
    for name in ("float32", "tf32"):
        with xprnn.precision(name), device.cublas_gemm("float32") as p:
            times = [cupy_event_seconds(lambda p=p: p.matmul(out, a, a)) for _ in range(6)][1:]
        found[name] = 2 * gemm_size**3 / statistics.median(times)
    source, target = device.zeros((copy_elements,), "float32"), device.zeros((copy_elements,), "float32")

    def copied() -> None:
        target[...] = source

    found["bytes"] = 8 * copy_elements / statistics.median([cupy_event_seconds(copied) for _ in range(6)][1:])
    import cupy

    attributes = cupy.cuda.Device().attributes
    return found | {"clock": 1e3 * attributes.get("ClockRate", 0)}


def relative_errors(results: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest difference of y, and of any gradient, over the largest number of that array."""

    def relative(name: str) -> float:
        have, want = results[name].astype(np.float64), expected[name]
        return float(np.abs(have - want).max() / max(float(np.abs(want).max()), 1e-30))

    outputs = [relative(k) for k in results if k[0] == "y"]
    gradients = [relative(k) for k in results if k[0] == "d"]
    return {"forward": max(outputs), "both": max([*outputs, *gradients])} if results else {}
