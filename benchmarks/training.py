"""Characters a second while learning to write: xprnn's training step beside torch's, the same model and windows.

    python benchmarks/training.py [--cell elman|lstm|gru] [--rounds N]

Each round is one window for each contender, in turn: forward, cross-entropy, backward, clipping by global norm, Adam.
The losses of the first windows are compared (float32), so that both do the same work. One thread each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import machine
import numpy as np

import xprnn
from xprnn.text import Vocabulary, default_text

CELLS = {"elman": ("RNN", xprnn.RNN), "lstm": ("LSTM", xprnn.LSTM), "gru": ("GRU", xprnn.GRU)}
H, RATE, NORM = 256, 2e-3, 1.0
Step = Callable[[Any, Any], float]


def ours(cell: str, v: int, params: dict[str, Any], n: int) -> Step:
    """One training step of xprnn, the state carried."""
    model = xprnn.Sequential(rnn=CELLS[cell][1](v, H), head=xprnn.Linear(H, v))
    optimizer = xprnn.adam(RATE)
    kept: dict[str, Any] = {"params": params, "moments": optimizer.init(params), "state": None}

    def step(x: Any, target: Any) -> float:
        y, kept["state"], tape = model.forward(kept["params"], x, kept["state"])
        value, dy = xprnn.cross_entropy(y, target)
        grads, _ = xprnn.clip_by_global_norm(model.backward(tape, dy).dparams, NORM)
        kept["params"], kept["moments"] = optimizer.update(kept["params"], grads, kept["moments"])
        return float(value)

    return step


def torchs(cell: str, v: int, params: dict[str, Any], n: int) -> Step:
    """The same in torch: one-hot rows, nn.RNN and nn.Linear, eager."""
    import torch

    torch.set_num_threads(1)
    rnn, head = getattr(torch.nn, CELLS[cell][0])(v, H), torch.nn.Linear(H, v)
    rnn.load_state_dict({k[4:]: torch.tensor(a) for k, a in params.items() if k.startswith("rnn.")})
    head.load_state_dict({k[5:]: torch.tensor(a) for k, a in params.items() if k.startswith("head.")})
    every = [*rnn.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(every, RATE)
    kept: dict[str, Any] = {"state": None}
    one_hot = torch.eye(v)

    def step(x: Any, target: Any) -> float:
        y, state = rnn(one_hot[torch.from_numpy(x)], kept["state"])
        kept["state"] = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        loss = torch.nn.functional.cross_entropy(head(y).reshape(-1, v), torch.from_numpy(target).reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(every, NORM)
        optimizer.step()
        return float(loss.detach())

    return step


def measure(cell: str, n: int, window: int, rounds: int) -> str:
    """A row of the table."""
    text = default_text()
    ids = np.asarray(Vocabulary.of(text).encode(text))[: n * (len(text) // n)].reshape(n, -1).T.copy()
    v = len(set(text))
    model = xprnn.Sequential(rnn=CELLS[cell][1](v, H), head=xprnn.Linear(H, v))
    params = model.init(np.random.default_rng(0), like=np.zeros(0, np.float32))
    makers = {"xprnn": ours, "torch": torchs}
    steps = {name: make(cell, v, params, n) for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(rounds):
        t = (k * window) % (ids.shape[0] - window - 1)
        x, target = ids[t : t + window], ids[t + 1 : t + window + 1]
        losses = {}
        for name, step in steps.items():
            start = time.perf_counter()
            losses[name] = step(x, target)
            times[name].append(time.perf_counter() - start)
        if k < 5 and abs(losses["xprnn"] - losses["torch"]) > 1e-3 * losses["torch"]:
            raise SystemExit(f"window {k}: the losses differ, {losses}: these are not the same model")
    rate = {name: n * window / statistics.median(seen[5:]) for name, seen in times.items()}
    ratios = [b / a for a, b in zip(times["xprnn"][5:], times["torch"][5:], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return (
        f"| {cell} | {n} | {window} | {rate['xprnn']:,.0f} | {rate['torch']:,.0f} "
        f"| {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}) |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", nargs="*", choices=CELLS, default=list(CELLS))
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    from threadpoolctl import threadpool_limits

    print("\n".join(f"{k}: {value}" for k, value in machine.describe().items()))
    print(f"\nH = {H}, Adam, global norm {NORM}, float32, one thread; ratio: median of the rounds, and quartiles\n")
    print("| cell | N | window | xprnn, characters/s | torch, characters/s | ratio |\n|---|---|---|---|---|---|")
    with threadpool_limits(1):
        for cell in args.cell:
            for n in (16, 32):
                print(measure(cell, n, 64, args.rounds), flush=True)


if __name__ == "__main__":
    main()
