"""The text job on a GPU: xprnn on CuPy beside torch on CUDA, as their users would write it, loss read now and then.

The model, text, windows and first parameters of training_steps.py; the losses of the first windows are compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import xprnn
from benchmarks.cpu.training_steps import (
    COMPARED_WINDOWS,
    LEARNING_RATE,
    LOSS_INTERVAL,
    MAX_GRAD_NORM,
    H,
    T,
    TrainStep,
    text_windows,
)
from benchmarks.gpu.contenders import LAYER_CLASSES, torch_missing_reason

__all__ = ["measure_training"]

LOSS_TOLERANCE = 1e-3  # of the loss


def xprnn_train_step(model: Any, params: dict[str, Any]) -> TrainStep:
    """xprnn on CuPy; the state is carried, nothing waits for the device."""
    import cupy

    optimizer = xprnn.adam(LEARNING_RATE)
    kept: dict[str, Any] = {"params": {k: cupy.asarray(a) for k, a in params.items()}, "state": None}
    kept["moments"] = optimizer.init(kept["params"])

    def step(x: Any, target: Any) -> Any:
        y, kept["state"], tape = model.forward(kept["params"], cupy.asarray(x), kept["state"])
        loss, dy = xprnn.cross_entropy(y, cupy.asarray(target))
        grads, _ = xprnn.clip_by_global_norm(model.backward(tape, dy).dparams, MAX_GRAD_NORM)
        kept["params"], kept["moments"] = optimizer.update(kept["params"], grads, kept["moments"])
        return loss

    return step


def torch_train_step(model: Any, params: dict[str, Any], device: str) -> TrainStep:
    """torch: one-hot rows, cuDNN's layer, nn.Linear, eager; Adam in its fused form."""
    import torch

    v, kind = model.layers["head"].out_features, type(model.layers["rnn"]).__name__
    rnn, head = getattr(torch.nn, kind)(v, H).to(device), torch.nn.Linear(H, v).to(device)
    rnn.load_state_dict({k[4:]: torch.tensor(a) for k, a in params.items() if k.startswith("rnn.")})
    head.load_state_dict({k[5:]: torch.tensor(a) for k, a in params.items() if k.startswith("head.")})
    every = [*rnn.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(every, LEARNING_RATE, fused=True)
    kept: dict[str, Any] = {"state": None}
    one_hot = torch.eye(v, device=device)

    def step(x: Any, target: Any) -> Any:
        y, state = rnn(one_hot[torch.from_numpy(x).to(device)], kept["state"])
        kept["state"] = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        goal = torch.from_numpy(target).to(device).reshape(-1)
        loss = torch.nn.functional.cross_entropy(head(y).reshape(-1, v), goal)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(every, MAX_GRAD_NORM)
        optimizer.step()
        return loss.detach()

    return step


def measure_training(
    cell: str, n: int, tf32: bool, rounds: int = 5, windows: int = 50, device: str = "cuda"
) -> dict[str, Any]:
    """A row: characters a second of each, medians of rounds in turns."""
    v = text_windows(n)[1]
    model = xprnn.Sequential(rnn=getattr(xprnn, LAYER_CLASSES[cell])(v, H), head=xprnn.Linear(H, v))
    params = model.init(np.random.default_rng(0), like=np.zeros(0, np.float32))
    steps: dict[str, Callable[..., Any]] = {"xprnn": xprnn_train_step(model, params)}
    if not (why := torch_missing_reason(device)):
        import torch

        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        steps["torch"] = torch_train_step(model, params, device)
    sources = {who: text_windows(n)[0] for who in steps}
    with xprnn.precision("tf32" if tf32 else "float32"):
        losses = {
            who: [float(step(*next(sources[who]))) for _ in range(COMPARED_WINDOWS)] for who, step in steps.items()
        }
        rates: dict[str, list[float]] = {who: [] for who in steps}
        for _ in range(rounds):
            for who, step in steps.items():
                begin = time.perf_counter()
                for k in range(1, windows + 1):
                    loss = step(*next(sources[who]))
                    if k % LOSS_INTERVAL == 0 or k == windows:
                        float(loss)  # waits for the device
                rates[who].append(windows * n * T / (time.perf_counter() - begin))
    agree = all(
        abs(a - b) <= (1e-2 if tf32 else LOSS_TOLERANCE) * a
        for seen in losses.values()
        for a, b in zip(losses["xprnn"], seen, strict=True)
    )
    out = {"cell": cell, "batch": n, "tf32": tf32, "rates": {who: statistics.median(r) for who, r in rates.items()}}
    return out | {"agree": agree, "losses": losses, "missing": {"torch": why} if why else {}}
