"""Records what torch's own RNN, LSTM and GRU and its autograd say, for machines without torch.

    python tests/data/record.py        # writes the .npz files beside this script (torch 2.13.0, CPU, float64)

Each file holds one layer: params.*, x, state (and cell), the cotangents dy, dstate (dcell), and torch's answers under
"want.". Layouts and names are torch's, which are ours too. Numbers are drawn by NumPy, so the inputs stay the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

T, N, D, H = 5, 3, 4, 3
CASES = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu_2_layers": ("RNN", {"nonlinearity": "relu", "num_layers": 2}),
    "rnn_bidirectional_batch_first": ("RNN", {"bidirectional": True, "batch_first": True}),
    "lstm_2_layers_bidirectional": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "lstm_projected": ("LSTM", {"proj_size": 2}),
    "gru_2_layers": ("GRU", {"num_layers": 2}),
    "gru_bidirectional_no_bias": ("GRU", {"bidirectional": True, "bias": False}),
}


def record(kind: str, options: dict) -> dict[str, np.ndarray]:
    """One layer's inputs and torch's outputs and gradients."""
    rng = np.random.default_rng(20_24)
    layer = getattr(torch.nn, kind)(D, H, **options).double()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.tensor(rng.normal(size=tuple(weight.shape)) * 0.5))
    lead = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    first = (N, T) if options.get("batch_first") else (T, N)
    x = torch.tensor(rng.normal(size=(*first, D)), requires_grad=True)
    sizes = [options.get("proj_size") or H] + ([H] if kind == "LSTM" else [])
    states = [torch.tensor(rng.normal(size=(lead, N, size)), requires_grad=True) for size in sizes]
    y, final = layer(x, tuple(states) if kind == "LSTM" else states[0])
    finals = list(final) if kind == "LSTM" else [final]
    cotangents = [torch.tensor(rng.normal(size=tuple(out.shape))) for out in (y, *finals)]
    sum((out * u).sum() for out, u in zip((y, *finals), cotangents, strict=True)).backward()
    names = ("state", "cell")[: len(states)]
    out = {f"params.{k}": p for k, p in layer.named_parameters()} | {"x": x, "dy": cotangents[0], "want.y": y}
    out |= {f"want.dparams.{k}": p.grad for k, p in layer.named_parameters()} | {"want.dx": x.grad}
    for name, start, end, u in zip(names, states, finals, cotangents[1:], strict=True):
        out |= {name: start, f"d{name}": u, f"want.{name}": end, f"want.d{name}": start.grad}
    return {name: value.detach().numpy() for name, value in out.items()}


def main() -> None:
    """Write every case."""
    for name, (kind, options) in CASES.items():
        np.savez_compressed(Path(__file__).parent / f"{name}.npz", **record(kind, options))
        print(name)


if __name__ == "__main__":
    main()
