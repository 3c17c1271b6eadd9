"""Records outputs and gradients of torch's RNN, LSTM and GRU, so that tests can compare with torch without torch.

    python tests/data/record.py        # writes the .npz files next to this script (torch 2.13.0, CPU, float64)

Each file contains one layer: params.*, x, state (and cell), the cotangents dy, dstate (dcell), and torch's outputs and
gradients with the prefix "want.". Layouts and names are those of torch. NumPy's random numbers are used, so that the
inputs do not depend on the version of torch.
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
    """Return the inputs of one layer, and the outputs and gradients of torch."""
    rng = np.random.default_rng(20_24)
    layer = getattr(torch.nn, kind)(D, H, **options).double()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.tensor(rng.normal(size=tuple(weight.shape)) * 0.5))
    state_rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    leading_shape = (N, T) if options.get("batch_first") else (T, N)
    x = torch.tensor(rng.normal(size=(*leading_shape, D)), requires_grad=True)
    state_sizes = [options.get("proj_size") or H] + ([H] if kind == "LSTM" else [])
    states = [torch.tensor(rng.normal(size=(state_rows, N, size)), requires_grad=True) for size in state_sizes]
    y, final = layer(x, tuple(states) if kind == "LSTM" else states[0])
    finals = list(final) if kind == "LSTM" else [final]
    cotangents = [torch.tensor(rng.normal(size=tuple(output.shape))) for output in (y, *finals)]
    sum((output * cotangent).sum() for output, cotangent in zip((y, *finals), cotangents, strict=True)).backward()
    names = ("state", "cell")[: len(states)]
    results = {f"params.{k}": p for k, p in layer.named_parameters()} | {"x": x, "dy": cotangents[0], "want.y": y}
    results |= {f"want.dparams.{k}": p.grad for k, p in layer.named_parameters()} | {"want.dx": x.grad}
    for name, initial, final_state, cotangent in zip(names, states, finals, cotangents[1:], strict=True):
        results |= {name: initial, f"d{name}": cotangent, f"want.{name}": final_state, f"want.d{name}": initial.grad}
    return {name: value.detach().numpy() for name, value in results.items()}


def main() -> None:
    """Write every case."""
    for name, (kind, options) in CASES.items():
        np.savez_compressed(Path(__file__).parent / f"{name}.npz", **record(kind, options))
        print(name)


if __name__ == "__main__":
    main()
