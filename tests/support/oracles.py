"""Independent answers, in plain float64 NumPy: the article's loops, step by step, and a few shared helpers.

Nothing here imports xprnn's arithmetic; it is meant to be obviously right, not fast.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np

import xprnn

Arrays = dict[str, Any]


def article_inputs(rng, *, n_x=3, n_a=5, n_y=4, m=2, T=6, dtype="float64") -> tuple[Any, Any, Arrays]:
    """x, a0, parameters in the article's layout, float64 numbers that `dtype` holds exactly.

    Two results of one dtype then start from the same numbers, and differences are rounding alone.
    """

    def draw(*shape):
        return rng.normal(size=shape).astype(dtype).astype("float64")

    shapes = {"Wax": (n_a, n_x), "Waa": (n_a, n_a), "Wya": (n_y, n_a), "ba": (n_a, 1), "by": (n_y, 1)}
    parameters = {name: 0.5 * draw(*shape) for name, shape in shapes.items()}
    return draw(n_x, m, T), draw(n_a, m), parameters


def softmax(z, axis=0):
    """Softmax slice by slice, each with its own maximum."""
    return np.apply_along_axis(lambda v: np.exp(v - v.max()) / np.sum(np.exp(v - v.max())), axis, z) if z.size else z


def cell_forward(xt, a_prev, p):
    """The article's rnn_cell_forward: a_next, yt_pred."""
    a_next = np.tanh(p["Wax"] @ xt + p["Waa"] @ a_prev + p["ba"])
    return a_next, softmax(p["Wya"] @ a_next + p["by"])


def cell_backward(da_next, a_next, a_prev, xt, p, dlogits=None) -> Arrays:
    """The article's rnn_cell_backward; with dlogits the output layer's gradients too."""
    heads = {}
    if dlogits is not None:
        heads = {"dWya": dlogits @ a_next.T, "dby": dlogits.sum(axis=1, keepdims=True)}
        da_next = (0 if da_next is None else da_next) + p["Wya"].T @ dlogits
    dz = (1 - a_next**2) * da_next
    return {
        "dxt": p["Wax"].T @ dz,
        "da_prev": p["Waa"].T @ dz,
        "dWax": dz @ xt.T,
        "dWaa": dz @ a_prev.T,
        "dba": dz.sum(axis=1, keepdims=True),
    } | heads


def sequence_forward(x, a0, p):
    """The article's rnn_forward: a, y_pred."""
    n_a, n_y, (_, m, steps) = p["Wax"].shape[0], p["Wya"].shape[0], x.shape
    a, y, state = np.zeros((n_a, m, steps)), np.zeros((n_y, m, steps)), a0
    for t in range(steps):
        state, y[:, :, t] = cell_forward(x[:, :, t], state, p)
        a[:, :, t] = state
    return a, y


def sequence_backward(da, x, a0, a, p, dlogits=None) -> Arrays:
    """The article's rnn_backward, from the last step that da (or dlogits) has back to the first."""
    steps = (dlogits if da is None else da).shape[2]
    names = ["Wax", "Waa", "ba", *(["Wya", "by"] if dlogits is not None else [])]
    out = {"d" + name: np.zeros_like(p[name]) for name in names}
    dx, da_prev = np.zeros((*x.shape[:2], steps)), np.zeros_like(a0)
    for t in reversed(range(steps)):
        here = da_prev if da is None else da[:, :, t] + da_prev
        before = a[:, :, t - 1] if t else a0
        g = cell_backward(here, a[:, :, t], before, x[:, :, t], p, None if dlogits is None else dlogits[:, :, t])
        dx[:, :, t], da_prev = g.pop("dxt"), g.pop("da_prev")
        out = {name: out[name] + g[name] for name in out}
    return {"dx": dx, "da0": da_prev} | out


def torch_results(x, a0, p, da, dlogits) -> tuple[Any, Any, Arrays]:
    """a, y_pred and every gradient by torch's own nn.RNN and autograd, in the article's layout and names."""
    import torch

    def turned(array):
        return torch.tensor(np.ascontiguousarray(array.T)).requires_grad_()

    rnn = torch.nn.RNN(p["Wax"].shape[1], p["Wax"].shape[0], dtype=torch.float64)
    head = torch.nn.Linear(p["Wya"].shape[1], p["Wya"].shape[0], dtype=torch.float64)
    values = (p["Wax"], p["Waa"], p["ba"][:, 0], 0 * p["ba"][:, 0], p["Wya"], p["by"][:, 0])
    weights = [*rnn.parameters(), *head.parameters()]
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(torch.tensor(value))
    given, start = turned(x), turned(a0)
    hidden, _ = rnn(given, start[None])
    logits = head(hidden)
    total = sum((u * torch.tensor(np.ascontiguousarray(c.T))).sum() for u, c in ((hidden, da), (logits, dlogits)))
    names = ("dx", "da0", "dWax", "dWaa", "dba", "_", "dWya", "dby")
    found = torch.autograd.grad(total, [given, start, *weights])
    grads = {name: g.numpy() for name, g in zip(names, found, strict=True) if name != "_"}
    grads |= {name: grads[name].T for name in ("dx", "da0")} | {name: grads[name][:, None] for name in ("dba", "dby")}
    return hidden.detach().numpy().T, torch.softmax(logits, -1).detach().numpy().T, grads


def check_gradients_on(xp, forward, backward, args, **options) -> dict[str, float]:
    """check_gradients on `xp`: the passes stay guarded, the checker itself may bring numbers home."""

    def within(function):
        def call(*given):
            with xp.forbid_host_conversion() if xp is not None else nullcontext():
                return function(*given)

        return call

    with xp.allow_host_conversion() if xp is not None else nullcontext():
        return xprnn.check_gradients(within(forward), within(backward), args, **options)
