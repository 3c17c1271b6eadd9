"""Reference results in float64 NumPy: softmax, the loops of the article (see xprnn.article), and torch's results.

The functions share no arithmetic with xprnn. They are written to be obviously correct, not fast.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np

import xprnn

Arrays = dict[str, Any]


def article_inputs(rng, *, n_x=3, n_a=5, n_y=4, m=2, T=6, dtype="float64") -> tuple[Any, Any, Arrays]:
    """Return random x, a0 and parameters in the article's layout: float64 values that `dtype` represents exactly.

    Results in `dtype` and in float64 then start from the same values and differ by rounding only.
    """

    def draw(*shape):
        return rng.normal(size=shape).astype(dtype).astype("float64")

    shapes = {"Wax": (n_a, n_x), "Waa": (n_a, n_a), "Wya": (n_y, n_a), "ba": (n_a, 1), "by": (n_y, 1)}
    parameters = {name: 0.5 * draw(*shape) for name, shape in shapes.items()}
    return draw(n_x, m, T), draw(n_a, m), parameters


def softmax(z, axis=0):
    """Return the softmax, computed slice by slice."""
    return np.apply_along_axis(lambda v: np.exp(v - v.max()) / np.sum(np.exp(v - v.max())), axis, z) if z.size else z


def cell_forward(xt, a_prev, p):
    """Return a_next and yt_pred, as the article's rnn_cell_forward."""
    a_next = np.tanh(p["Wax"] @ xt + p["Waa"] @ a_prev + p["ba"])
    return a_next, softmax(p["Wya"] @ a_next + p["by"])


def cell_backward(da_next, a_next, a_prev, xt, p, dlogits=None) -> Arrays:
    """Return the gradients of the article's rnn_cell_backward; with dlogits, those of the output layer too."""
    head_gradients = {}
    if dlogits is not None:
        head_gradients = {"dWya": dlogits @ a_next.T, "dby": dlogits.sum(axis=1, keepdims=True)}
        da_next = (0 if da_next is None else da_next) + p["Wya"].T @ dlogits
    dz = (1 - a_next**2) * da_next
    return {
        "dxt": p["Wax"].T @ dz,
        "da_prev": p["Waa"].T @ dz,
        "dWax": dz @ xt.T,
        "dWaa": dz @ a_prev.T,
        "dba": dz.sum(axis=1, keepdims=True),
    } | head_gradients


def sequence_forward(x, a0, p):
    """Return a and y_pred, as the article's rnn_forward."""
    n_a, n_y, (_, m, steps) = p["Wax"].shape[0], p["Wya"].shape[0], x.shape
    a, y, state = np.zeros((n_a, m, steps)), np.zeros((n_y, m, steps)), a0
    for t in range(steps):
        state, y[:, :, t] = cell_forward(x[:, :, t], state, p)
        a[:, :, t] = state
    return a, y


def sequence_backward(da, x, a0, a, p, dlogits=None) -> Arrays:
    """Return the gradients of the article's rnn_backward, starting at the last time step of da (or dlogits)."""
    steps = (dlogits if da is None else da).shape[2]
    names = ["Wax", "Waa", "ba", *(["Wya", "by"] if dlogits is not None else [])]
    totals = {"d" + name: np.zeros_like(p[name]) for name in names}
    dx, da_prev = np.zeros((*x.shape[:2], steps)), np.zeros_like(a0)
    for t in reversed(range(steps)):
        da_next = da_prev if da is None else da[:, :, t] + da_prev
        a_prev = a[:, :, t - 1] if t else a0
        g = cell_backward(da_next, a[:, :, t], a_prev, x[:, :, t], p, None if dlogits is None else dlogits[:, :, t])
        dx[:, :, t], da_prev = g.pop("dxt"), g.pop("da_prev")
        totals = {name: totals[name] + g[name] for name in totals}
    return {"dx": dx, "da0": da_prev} | totals


def torch_results(x, a0, p, da, dlogits) -> tuple[Any, Any, Arrays]:
    """Return a, y_pred and every gradient from torch's nn.RNN and autograd, in the article's layout and names."""
    import torch

    def transposed_leaf(array):
        return torch.tensor(np.ascontiguousarray(array.T)).requires_grad_()

    rnn = torch.nn.RNN(p["Wax"].shape[1], p["Wax"].shape[0], dtype=torch.float64)
    head = torch.nn.Linear(p["Wya"].shape[1], p["Wya"].shape[0], dtype=torch.float64)
    values = (p["Wax"], p["Waa"], p["ba"][:, 0], 0 * p["ba"][:, 0], p["Wya"], p["by"][:, 0])
    weights = [*rnn.parameters(), *head.parameters()]
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(torch.tensor(value))
    x_leaf, a0_leaf = transposed_leaf(x), transposed_leaf(a0)
    hidden, _ = rnn(x_leaf, a0_leaf[None])
    logits = head(hidden)
    loss = sum((u * torch.tensor(np.ascontiguousarray(c.T))).sum() for u, c in ((hidden, da), (logits, dlogits)))
    names = ("dx", "da0", "dWax", "dWaa", "dba", "_", "dWya", "dby")
    results = torch.autograd.grad(loss, [x_leaf, a0_leaf, *weights])
    grads = {name: g.numpy() for name, g in zip(names, results, strict=True) if name != "_"}
    grads |= {name: grads[name].T for name in ("dx", "da0")} | {name: grads[name][:, None] for name in ("dba", "dby")}
    return hidden.detach().numpy().T, torch.softmax(logits, -1).detach().numpy().T, grads


def check_gradients_on(xp, forward, backward, args, **options) -> dict[str, float]:
    """Call check_gradients on backend `xp`: only the checker may convert arrays to the host, the passes may not."""

    def guarded(function):
        def call(*call_args):
            with xp.forbid_host_conversion() if xp is not None else nullcontext():
                return function(*call_args)

        return call

    with xp.allow_host_conversion() if xp is not None else nullcontext():
        return xprnn.check_gradients(guarded(forward), guarded(backward), args, **options)
