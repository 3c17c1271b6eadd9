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
from benchmarks.cpu.training_steps import FIRST, LOOK, NORM, RATE, H, Step, T, batches
from benchmarks.gpu.contenders import CELLS, torch_missing

__all__ = ["training"]

CLOSE = 1e-3  # of the loss


def ours(model: Any, params: dict[str, Any]) -> Step:
    """xprnn on CuPy; the state is carried, nothing waits for the device."""
    import cupy

    optimizer = xprnn.adam(RATE)
    kept: dict[str, Any] = {"params": {k: cupy.asarray(a) for k, a in params.items()}, "state": None}
    kept["moments"] = optimizer.init(kept["params"])

    def step(x: Any, target: Any) -> Any:
        y, kept["state"], tape = model.forward(kept["params"], cupy.asarray(x), kept["state"])
        loss, dy = xprnn.cross_entropy(y, cupy.asarray(target))
        grads, _ = xprnn.clip_by_global_norm(model.backward(tape, dy).dparams, NORM)
        kept["params"], kept["moments"] = optimizer.update(kept["params"], grads, kept["moments"])
        return loss

    return step


def torchs(model: Any, params: dict[str, Any], where: str) -> Step:
    """torch: one-hot rows, cuDNN's layer, nn.Linear, eager; Adam in its fused form."""
    import torch

    v, kind = model.parts["head"].out_features, type(model.parts["rnn"]).__name__
    rnn, head = getattr(torch.nn, kind)(v, H).to(where), torch.nn.Linear(H, v).to(where)
    rnn.load_state_dict({k[4:]: torch.tensor(a) for k, a in params.items() if k.startswith("rnn.")})
    head.load_state_dict({k[5:]: torch.tensor(a) for k, a in params.items() if k.startswith("head.")})
    every = [*rnn.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(every, RATE, fused=True)
    kept: dict[str, Any] = {"state": None}
    one_hot = torch.eye(v, device=where)

    def step(x: Any, target: Any) -> Any:
        y, state = rnn(one_hot[torch.from_numpy(x).to(where)], kept["state"])
        kept["state"] = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        goal = torch.from_numpy(target).to(where).reshape(-1)
        loss = torch.nn.functional.cross_entropy(head(y).reshape(-1, v), goal)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(every, NORM)
        optimizer.step()
        return loss.detach()

    return step


def training(cell: str, n: int, tf32: bool, rounds: int = 5, windows: int = 50, where: str = "cuda") -> dict[str, Any]:
    """A row: characters a second of each, medians of rounds in turns."""
    v = batches(n)[1]
    model = xprnn.Sequential(rnn=getattr(xprnn, CELLS[cell])(v, H), head=xprnn.Linear(H, v))
    params = model.init(np.random.default_rng(0), like=np.zeros(0, np.float32))
    steps: dict[str, Callable[..., Any]] = {"xprnn": ours(model, params)}
    if not (why := torch_missing(where)):
        import torch

        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        steps["torch"] = torchs(model, params, where)
    sources = {who: batches(n)[0] for who in steps}
    with xprnn.precision("tf32" if tf32 else "float32"):
        losses = {who: [float(step(*next(sources[who]))) for _ in range(FIRST)] for who, step in steps.items()}
        rates: dict[str, list[float]] = {who: [] for who in steps}
        for _ in range(rounds):
            for who, step in steps.items():
                begin = time.perf_counter()
                for k in range(1, windows + 1):
                    loss = step(*next(sources[who]))
                    if k % LOOK == 0 or k == windows:
                        float(loss)  # waits for the device
                rates[who].append(windows * n * T / (time.perf_counter() - begin))
    agree = all(
        abs(a - b) <= (1e-2 if tf32 else CLOSE) * a
        for seen in losses.values()
        for a, b in zip(losses["xprnn"], seen, strict=True)
    )
    out = {"cell": cell, "batch": n, "tf32": tf32, "rates": {who: statistics.median(r) for who, r in rates.items()}}
    return out | {"agree": agree, "losses": losses, "missing": {"torch": why} if why else {}}
