"""Implementations of a row on the GPU: the three tiers of CUDA kernels, torch's cuDNN layer, the bare products.

All are timed by CUDA events around a whole pass. That includes the cost of the launches, for which a user waits, too.
"""

from __future__ import annotations

import math
import statistics
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import xprnn
from benchmarks.harness import agreement
from benchmarks.harness.peers import missing_reason, torch_layer
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, Array, Call, Implementation, Problem
from benchmarks.harness.timing import time_interleaved
from benchmarks.harness.xprnn_contenders import core_layer, layer_arrays
from xprnn.kernels.config import reference_only
from xprnn.kernels.cuda import device, no_persistent

__all__ = ["CELLS", "TITLES", "ceilings", "float64_results", "make_implementations", "pass_errors", "time_in_turns"]

CELLS = ("elman", "lstm", "gru")
TITLES = {
    "tier1": "tier 1, generic",
    "tier2": "tier 2, fused steps",
    "tier3": "tier 3, persistent",
    "torch": "PyTorch (cuDNN)",
    "gemm": "recurrent products alone",
}
GEMM_SIZE, COPY_ELEMENTS = 8192, 1 << 28  # of the ceilings: side of a product's matrices, float32 numbers of a copy
WARMUP_CALLS = 3


def cupy_event_seconds(call: Call) -> float:
    """Time one call by CuPy's events."""
    import cupy

    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    cupy.cuda.get_current_stream().synchronize()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, stop)) * 1e-3


def _tier2_config(precision: str) -> AbstractContextManager[Any]:
    stack = ExitStack()
    stack.enter_context(no_persistent())
    stack.enter_context(xprnn.precision(precision))
    return stack


def _cupy_layer(problem: Problem, dtype: str, config: Any) -> Implementation:
    import cupy

    layer = core_layer(problem, cupy, dtype, config)
    return Implementation(layer.calls, layer.results, cupy_event_seconds)


def float64_results(problem: Problem) -> dict[str, Array]:
    """Compute the row's results in float64 with the reference scan."""
    return _cupy_layer(problem, "float64", reference_only).results()


def _explain(problem: Problem, precision: str) -> str:
    """Return the kernel that the layer would run on."""
    import cupy

    layer, params, x, _, _ = layer_arrays(problem, cupy)
    with xprnn.precision(precision):
        text: str = layer.explain(params, x)
    return text.partition(": ")[2]


def make_implementations(
    problem: Problem, tf32: bool, torch_device: str = "cuda"
) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Build the implementations of a row.

    Args:
        problem: the row.
        tf32: compute products in TF32.
        torch_device: "cuda", or "cpu" in tests.

    Returns:
        name -> implementation, and name -> reason for those that cannot run the row.
    """
    precision, missing = "tf32" if tf32 else "float32", {}
    implementations = {"tier2": _cupy_layer(problem, "float32", partial(_tier2_config, precision))}
    if tf32:
        missing["tier1"] = "the reference scan has no TF32"
    else:
        implementations = {"tier1": _cupy_layer(problem, "float32", reference_only)} | implementations
    kernel = _explain(problem, precision)
    if kernel.startswith("CUDA persistent"):
        implementations["tier3"] = _cupy_layer(problem, "float32", partial(xprnn.precision, precision))
    else:
        missing["tier3"] = kernel.partition("not persistent: ")[2].removesuffix(")") or kernel
    if reason := missing_reason("torch", torch_device):
        missing["torch"] = reason
    else:
        implementations["torch"] = torch_layer(problem, device=torch_device, tf32=tf32)
    implementations["gemm"] = _recurrent_products(problem, precision)
    return implementations, missing


def _recurrent_products(problem: Problem, precision: str) -> Implementation:
    """Run the recurrent products of a pass and nothing else: a lower bound for one launch per step."""
    u = device.zeros(problem.params["weight_hh"].shape, "float32")
    (width, hidden), (_, _, n, t) = u.shape, problem.shape
    h, g = device.zeros((n, hidden), "float32"), device.zeros((n, width), "float32")
    h_address, g_address, u_address = device.address(h), device.address(g), device.address(u)

    def run(with_backward: bool) -> Any:
        with xprnn.precision(precision), device.cublas_gemm("float32") as gemm:
            forward = gemm.make_gemm((n, width, hidden), (False, True), False)
            backward = gemm.make_gemm((n, hidden, width), (False, False), False)
            for _ in range(t):
                forward(g_address, h_address, u_address)
            for _ in range(t if with_backward else 0):
                backward(h_address, g_address, u_address)
        return u, h, g  # keep a reference: the arrays must outlive the pointers to them

    calls: dict[str, Call] = {FORWARD: partial(run, False), FORWARD_BACKWARD: partial(run, True)}
    return Implementation(calls, timer=cupy_event_seconds)


def time_in_turns(
    implementations: dict[str, Implementation], call_name: str, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Time a call of all implementations in turns, after three calls to warm up.

    Args:
        implementations: name -> implementation.
        call_name: FORWARD or FORWARD_BACKWARD.
        rounds: rounds to measure at most.
        seconds: stop after the round in which this time is used up, but not before 5 rounds.
    """
    calls = {name: implementation.calls[call_name] for name, implementation in implementations.items()}
    for call in calls.values():
        for _ in range(WARMUP_CALLS):
            call()
    timers = {name: timer for name, each in implementations.items() if (timer := each.timer)}
    return time_interleaved(calls, rounds, timers, max_s=seconds)


def ceilings(gemm_size: int = GEMM_SIZE, copy_elements: int = COPY_ELEMENTS) -> dict[str, float]:
    """Measure the device's limits: operations per second of large products, bytes per second of a copy, clock in Hz."""
    import cupy

    a, out = device.zeros((gemm_size, gemm_size), "float32"), device.zeros((gemm_size, gemm_size), "float32")
    limits = {}
    for name in ("float32", "tf32"):
        with xprnn.precision(name), device.cublas_gemm("float32") as gemm:
            times = [cupy_event_seconds(lambda gemm=gemm: gemm.matmul(out, a, a)) for _ in range(6)][1:]
        limits[name] = 2 * gemm_size**3 / statistics.median(times)
    source, target = device.zeros((copy_elements,), "float32"), device.zeros((copy_elements,), "float32")

    def copy() -> None:
        target[...] = source

    limits["bytes"] = 8 * copy_elements / statistics.median([cupy_event_seconds(copy) for _ in range(6)][1:])
    attributes = cupy.cuda.Device().attributes
    return limits | {"clock": 1e3 * attributes.get("ClockRate", 0)}


def pass_errors(results: dict[str, Array], expected: dict[str, Array]) -> dict[str, float]:
    """Return the largest relative error of each pass: outputs for FORWARD, outputs and gradients for FORWARD_BACKWARD.

    `expected` holds float64 results. No results: an empty dict.
    """
    errors = agreement.relative_errors(results, expected)
    if not errors:
        return {}
    outputs = [error for name, error in errors.items() if name.startswith("y")]
    return {FORWARD: _largest(outputs), FORWARD_BACKWARD: _largest(list(errors.values()))}


def _largest(errors: list[float]) -> float:
    """Return the largest error; NaN if one is NaN."""
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)
