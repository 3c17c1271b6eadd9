"""Measures the training rate of the text model on a GPU: xprnn on CuPy against torch on CUDA.

Model, text, windows and initial parameters are those of `benchmarks.cpu.training_steps`. The losses of the first
windows are compared.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import xprnn
from benchmarks.cpu.training_steps import (
    COMPARED_WINDOWS,
    LEARNING_RATE,
    LOSS_INTERVAL,
    MAX_GRAD_NORM,
    T,
    TrainStep,
    text_model,
    text_windows,
    torch_train_step,
)
from benchmarks.harness.peers import missing_reason

__all__ = ["measure_training"]

LOSS_RTOL = {False: 1e-3, True: 1e-2}  # relative difference of the losses, by TF32


def xprnn_train_step(model: Any, params: dict[str, Any]) -> TrainStep:
    """Train with xprnn on CuPy; the state is carried, and nothing waits for the device."""
    import cupy

    optimizer = xprnn.adam(LEARNING_RATE)
    carried: dict[str, Any] = {"params": {k: cupy.asarray(a) for k, a in params.items()}, "state": None}
    carried["moments"] = optimizer.init(carried["params"])

    def step(x: Any, target: Any) -> Any:
        y, carried["state"], tape = model.forward(carried["params"], cupy.asarray(x), carried["state"])
        loss, dy = xprnn.cross_entropy(y, cupy.asarray(target))
        grads, _ = xprnn.clip_by_global_norm(model.backward(tape, dy).dparams, MAX_GRAD_NORM)
        carried["params"], carried["moments"] = optimizer.update(carried["params"], grads, carried["moments"])
        return loss

    return step


def _losses_agree(losses: dict[str, list[float]], rtol: float) -> bool:
    return all(abs(a - b) <= rtol * a for seen in losses.values() for a, b in zip(losses["xprnn"], seen, strict=True))


def _characters_per_second(step: TrainStep, source: Any, n: int, windows: int) -> float:
    start = time.perf_counter()
    for k in range(1, windows + 1):
        loss = step(*next(source))
        if k % LOSS_INTERVAL == 0 or k == windows:
            float(loss)  # waits for the device
    return windows * n * T / (time.perf_counter() - start)


def measure_training(
    cell: str, n: int, tf32: bool, rounds: int = 5, windows: int = 50, device: str = "cuda"
) -> dict[str, Any]:
    """Measure characters per second of xprnn and torch: medians of rounds in turns.

    Args:
        cell: "elman", "lstm" or "gru".
        n: number of streams of text.
        tf32: compute products in TF32.
        rounds: number of turns of each.
        windows: windows of a turn.
        device: of torch.
    """
    v = text_windows(n)[1]
    model, params = text_model(cell, v)
    steps = {"xprnn": xprnn_train_step(model, params)}
    if not (reason := missing_reason("torch", device)):
        import torch

        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        steps["torch"] = torch_train_step(model, params, device=device)
    sources = {name: text_windows(n)[0] for name in steps}
    with xprnn.precision("tf32" if tf32 else "float32"):
        losses = {
            name: [float(step(*next(sources[name]))) for _ in range(COMPARED_WINDOWS)] for name, step in steps.items()
        }
        rates: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                rates[name].append(_characters_per_second(step, sources[name], n, windows))
    medians = {name: statistics.median(seen) for name, seen in rates.items()}
    row = {"cell": cell, "batch": n, "tf32": tf32, "rates": medians, "losses": losses}
    return row | {"agree": _losses_agree(losses, LOSS_RTOL[tf32]), "missing": {"torch": reason} if reason else {}}
