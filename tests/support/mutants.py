"""Wrong backwards to plant, and the one question put to each: does check_gradients see it?

A mutant is the cell's own text with one thing changed. To add a cell: write its forward and backward once with `at`
(see `elman_passes`), list what can go wrong, and call `checker_message` (test_mutations.py does both for the Elman network).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from xprnn import GradientError, check_gradients

Passes = tuple[Callable[..., Any], Callable[..., Any]]


def checker_message(passes: Passes, args, names) -> str:
    """ "" if the checker finds nothing wrong, otherwise what it says."""
    try:
        check_gradients(*passes, args, names=names, rng=np.random.default_rng(5))
    except GradientError as error:
        return str(error)
    return ""


def elman_passes(bug: str = "") -> Passes:
    """The Elman network with its output layer, article formulas, time-major; `bug` names what is done wrongly."""

    def forward(x, h0, p):
        h = [h0]
        for xt in x:
            h.append(np.tanh(xt @ p["W"].T + h[-1] @ p["U"].T + p["b"]))
        h = np.stack(h)
        return (h[1:], h[-1], h[1:] @ p["V"].T + p["c"]), (x, h, p)

    def backward(tape, cotangents):
        (x, h, p), (dh, dlast, dlogits) = tape, cotangents
        if bug == "time reversed":
            dh = dh[::-1]
        if bug == "logits' time reversed":
            dlogits = dlogits[::-1]
        head = 0 if bug == "dlogits share forgotten" else dlogits @ (p["V"] if bug != "head's sign" else -p["V"])
        into, carried = dh + head, dlast if bug != "final state forgotten" else 0 * dlast
        dz = np.zeros_like(dh)
        for t in reversed(range(len(x))):
            total = into[t] if bug == "recurrent path dropped" and t < len(x) - 1 else into[t] + carried
            dz[t] = total * tanh_derivative(bug, h, t)
            carried = dz[t] @ (p["U"].T if bug == "transposed recurrent weight" else p["U"])
        before = h[1:] if bug == "state off by one" else h[:-1]
        if bug == "initial state taken for zero":
            before = np.concatenate((0 * h[:1], h[1:-1]))
        grads = {
            "W": np.einsum("tnh,tnd->hd", dz, x[::-1] if bug == "inputs reversed" else x),
            "U": np.einsum("tnh,tnk->hk", dz, before),
            "b": dz.sum((0, 1)),
            "V": np.einsum("tnv,tnh->vh", dlogits, h[:-1] if bug == "head sees the state before" else h[1:]),
            "c": dlogits.sum((0, 1)),
        }
        return mutate_gradients(
            bug, dz @ p["W"], dz @ p["U"] if bug == "dx from the wrong weight" else None, carried, into, grads
        )

    return forward, backward


def tanh_derivative(bug, h, t):
    """1 - a², or what a slip makes of it."""
    match bug:
        case "1 - a² missing":
            return 1.0
        case "1 - a for 1 - a²":
            return 1 - h[t + 1]
        case "slope of the state before":
            return 1 - h[t] ** 2
    return 1 - h[t + 1] ** 2


def mutate_gradients(bug, dx, wrong_dx, dh0, into, grads):
    """The gradients, those that go wrong at the very end among them."""
    match bug:
        case "all gradients zero":
            return 0 * dx, 0 * dh0, {k: 0 * g for k, g in grads.items()}
        case "dx from the wrong weight":
            dx = wrong_dx
        case "dx of the last step missing":
            dx = np.concatenate((dx[:-1], 0 * dx[-1:]))
        case "da0 stops a step early":
            dh0 = into[0]
        case "bias of one row":
            grads = grads | {"b": grads["b"] / dx.shape[1]}
        case "head's bias missing":
            grads = grads | {"c": 0 * grads["c"]}
        case "dWaa transposed":
            grads = grads | {"U": grads["U"].T}
        case "mean over the batch":
            grads = {k: g / dx.shape[1] for k, g in grads.items()}
    return dx, dh0, grads


# bug -> the argument that check_gradients must name, first of all it is asked to look at.
ELMAN_BUGS = {
    "all gradients zero": "x",
    "time reversed": "x",
    "logits' time reversed": "x",
    "state off by one": "p['U']",
    "initial state taken for zero": "p['U']",
    "recurrent path dropped": "x",
    "transposed recurrent weight": "x",
    "1 - a² missing": "x",
    "1 - a for 1 - a²": "x",
    "slope of the state before": "x",
    "dlogits share forgotten": "x",
    "head's sign": "x",
    "final state forgotten": "x",
    "inputs reversed": "p['W']",
    "head sees the state before": "p['V']",
    "dx from the wrong weight": "x",
    "dx of the last step missing": "x",
    "da0 stops a step early": "h0",
    "bias of one row": "p['b']",
    "head's bias missing": "p['c']",
    "dWaa transposed": "p['U']",
    "mean over the batch": "p['W']",
}
