"""Bidirectional and one-directional LSTMs of one or more layers, by xprnn and torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import xprnn
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, Array, Implementation

__all__ = ["MODELS", "Model", "make_implementation"]


class Model(NamedTuple):
    """An LSTM of `size` features in and out, on `steps` steps of one row."""

    size: int
    steps: int
    num_layers: int
    bidirectional: bool


MODELS = {
    "LSTM 64, T=12, one direction": Model(64, 12, 1, False),
    "LSTM 64, T=12, both directions": Model(64, 12, 1, True),
    "3-layer bi-LSTM 256, T=24": Model(256, 24, 3, True),
}


def make_implementation(framework: str, name: str, threads: int) -> Implementation:
    """Build a model.

    Args:
        framework: "xprnn" or "torch".
        name: a key of MODELS.
        threads: number of threads of torch.

    Returns:
        An implementation whose results have the model's name in front of their own.
    """
    model = MODELS[name]
    rng = np.random.default_rng(0)
    layer = xprnn.LSTM(model.size, model.size, num_layers=model.num_layers, bidirectional=model.bidirectional)
    params = layer.init(rng, like=np.zeros(0, np.float32))
    x = rng.standard_normal((model.steps, 1, model.size), dtype=np.float32)
    dy = rng.standard_normal((model.steps, 1, layer.output_size), dtype=np.float32)
    makers: dict[str, Callable[[], Implementation]] = {
        "xprnn": lambda: _xprnn(layer, params, x, dy),
        "torch": lambda: _torch(model, params, x, dy, threads),
    }
    implementation = makers[framework]()
    return Implementation(
        implementation.calls, lambda: {f"{name}, {key}": a for key, a in implementation.results().items()}
    )


def _xprnn(layer: Any, params: dict[str, Array], x: Array, dy: Array) -> Implementation:
    def forward() -> Any:
        return layer(params, x)

    def forward_backward() -> Any:
        y, _, tape = layer.forward(params, x)
        return y, layer.backward(tape, dy)

    def results() -> dict[str, Array]:
        y, (dx, _, dparams) = forward_backward()
        return {"y": forward()[0], "y (with a tape)": y, "dx": dx} | {f"d{k}": v for k, v in dparams.items()}

    return Implementation({FORWARD: forward, FORWARD_BACKWARD: forward_backward}, results)


def _torch(model: Model, params: dict[str, Array], x: Array, dy: Array, threads: int) -> Implementation:
    import torch

    torch.set_num_threads(threads)
    layer: Any = torch.nn.LSTM(model.size, model.size, num_layers=model.num_layers, bidirectional=model.bidirectional)
    with torch.no_grad():
        for name, value in params.items():
            getattr(layer, name).copy_(torch.from_numpy(value))
    inputs, cotangent = torch.from_numpy(x), torch.from_numpy(dy)
    leaf = inputs.clone().requires_grad_()
    weights = [getattr(layer, name) for name in params]

    def forward() -> Any:
        with torch.no_grad():
            return layer(inputs)

    def forward_backward() -> Any:
        y, _ = layer(leaf)
        return y, torch.autograd.grad(y, [leaf, *weights], cotangent)

    def results() -> dict[str, Array]:
        y, gradients = forward_backward()
        names = ("dx", *(f"d{name}" for name in params))
        tensors = {"y": forward()[0], "y (with a tape)": y.detach()} | dict(zip(names, gradients, strict=True))
        return {name: tensor.numpy() for name, tensor in tensors.items()}

    return Implementation({FORWARD: forward, FORWARD_BACKWARD: forward_backward}, results)
