"""Mutants: an Elman network whose backward pass has one planted bug, to test that check_gradients detects it.

`elman_passes(bug)` returns the forward pass and a backward pass with the named bug. `ELMAN_BUGS` lists the bugs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from xprnn import GradientError, check_gradients

Passes = tuple[Callable[..., Any], Callable[..., Any]]


def checker_message(passes: Passes, args, names) -> str:
    """Return the error message of check_gradients, or "" if it raises none."""
    try:
        check_gradients(*passes, args, names=names, rng=np.random.default_rng(5))
    except GradientError as error:
        return str(error)
    return ""


def elman_passes(bug: str = "") -> Passes:
    """Return forward and backward of an Elman network with an output layer, time-major, with `bug` in backward."""

    def forward(x, h0, p):
        h = [h0]
        for xt in x:
            h.append(np.tanh(xt @ p["W"].T + h[-1] @ p["U"].T + p["b"]))
        h = np.stack(h)
        return (h[1:], h[-1], h[1:] @ p["V"].T + p["c"]), (x, h, p)

    def backward(tape, cotangents):
        (x, h, p), (dh, dfinal, dlogits) = tape, cotangents
        if bug == "time reversed":
            dh = dh[::-1]
        if bug == "logits' time reversed":
            dlogits = dlogits[::-1]
        head = 0 if bug == "dlogits missing in dh" else dlogits @ (p["V"] if bug != "head's sign" else -p["V"])
        dh_external, dh_recurrent = dh + head, dfinal if bug != "final state forgotten" else 0 * dfinal
        dz = np.zeros_like(dh)
        for t in reversed(range(len(x))):
            no_recurrence = bug == "recurrent path dropped" and t < len(x) - 1
            total = dh_external[t] if no_recurrence else dh_external[t] + dh_recurrent
            dz[t] = total * tanh_derivative(bug, h, t)
            dh_recurrent = dz[t] @ (p["U"].T if bug == "transposed recurrent weight" else p["U"])
        h_prev = h[1:] if bug == "state off by one" else h[:-1]
        if bug == "initial state treated as zero":
            h_prev = np.concatenate((0 * h[:1], h[1:-1]))
        grads = {
            "W": np.einsum("tnh,tnd->hd", dz, x[::-1] if bug == "inputs reversed" else x),
            "U": np.einsum("tnh,tnk->hk", dz, h_prev),
            "b": dz.sum((0, 1)),
            "V": np.einsum("tnv,tnh->vh", dlogits, h[:-1] if bug == "head uses the previous state" else h[1:]),
            "c": dlogits.sum((0, 1)),
        }
        return mutate_gradients(
            bug,
            dz @ p["W"],
            dz @ p["U"] if bug == "dx from the wrong weight" else None,
            dh_recurrent,
            dh_external,
            grads,
        )

    return forward, backward


def tanh_derivative(bug, h, t):
    """Return the derivative of tanh from its output, 1 - a², or a wrong one."""
    match bug:
        case "1 - a² missing":
            return 1.0
        case "1 - a for 1 - a²":
            return 1 - h[t + 1]
        case "derivative at the previous state":
            return 1 - h[t] ** 2
    return 1 - h[t + 1] ** 2


def mutate_gradients(bug, dx, wrong_dx, dh0, dh_external, grads):
    """Return the gradients, changed by the bugs that act on the final results."""
    match bug:
        case "all gradients zero":
            return 0 * dx, 0 * dh0, {k: 0 * g for k, g in grads.items()}
        case "dx from the wrong weight":
            dx = wrong_dx
        case "dx of the last step missing":
            dx = np.concatenate((dx[:-1], 0 * dx[-1:]))
        case "da0 stops a step early":
            dh0 = dh_external[0]
        case "bias of one row":
            grads = grads | {"b": grads["b"] / dx.shape[1]}
        case "head's bias missing":
            grads = grads | {"c": 0 * grads["c"]}
        case "dWaa transposed":
            grads = grads | {"U": grads["U"].T}
        case "mean over the batch":
            grads = {k: g / dx.shape[1] for k, g in grads.items()}
    return dx, dh0, grads


# bug -> the first argument with a wrong gradient, which check_gradients must name
ELMAN_BUGS = {
    "all gradients zero": "x",
    "time reversed": "x",
    "logits' time reversed": "x",
    "state off by one": "p['U']",
    "initial state treated as zero": "p['U']",
    "recurrent path dropped": "x",
    "transposed recurrent weight": "x",
    "1 - a² missing": "x",
    "1 - a for 1 - a²": "x",
    "derivative at the previous state": "x",
    "dlogits missing in dh": "x",
    "head's sign": "x",
    "final state forgotten": "x",
    "inputs reversed": "p['W']",
    "head uses the previous state": "p['V']",
    "dx from the wrong weight": "x",
    "dx of the last step missing": "x",
    "da0 stops a step early": "h0",
    "bias of one row": "p['b']",
    "head's bias missing": "p['c']",
    "dWaa transposed": "p['U']",
    "mean over the batch": "p['W']",
}
