"""Reference implementation of recurrent layers: loops over rows, steps and gates, from the equations, in float64 NumPy.

It shares no code with xprnn. Tests compare the forward pass with it for features that torch does not have: masks,
resets, zero lengths, peepholes, clipping, the original GRU and user-defined cells.

A cell here is `step(w, x, state) -> state` for one row of the batch: w holds the parameters of one layer and direction,
x is (D,), and the state is a tuple of vectors, h first.
"""

from __future__ import annotations

import numpy as np


def activation(name, alpha=None, beta=None):
    """Return an activation of the ONNX operators, written from the specification."""
    a, b = alpha, beta
    table = {
        "tanh": np.tanh,
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "relu": lambda x: np.where(x > 0, x, 0.0),
        "identity": lambda x: x,
        "softsign": lambda x: x / (1 + abs(x)),
        "softplus": lambda x: np.log(1 + np.exp(x)),
        "affine": lambda x: a * x + b,
        "scaledtanh": lambda x: a * np.tanh(b * x),
        "leakyrelu": lambda x: np.where(x >= 0, x, a * x),
        "thresholdedrelu": lambda x: np.where(x > a, x, 0.0),
        "hardsigmoid": lambda x: np.clip(a * x + b, 0, 1),
        "elu": lambda x: np.where(x >= 0, x, a * (np.exp(x) - 1)),
    }
    return table[name]


def gate_terms(w, k, count, x, h):
    """Return the input projection and the recurrent product of gate k of `count`, each with its bias."""
    size = w["weight_ih"].shape[0] // count
    rows = slice(k * size, (k + 1) * size)
    from_x, from_h = w["weight_ih"][rows] @ x, w["weight_hh"][rows] @ h
    if "bias_ih" in w:
        from_x, from_h = from_x + w["bias_ih"][rows], from_h + w["bias_hh"][rows]
    return from_x, from_h


def clip_function(clip):
    return (lambda v: v) if clip is None else (lambda v: np.clip(v, -clip, clip))


def elman(f=np.tanh, clip=None):
    bound = clip_function(clip)

    def step(w, x, state):
        return (f(bound(sum(gate_terms(w, 0, 1, x, state[0])))),)

    return step


def lstm(s=None, t=np.tanh, u=np.tanh, *, peepholes=False, coupled=False, clip=None):
    s, bound = s or activation("sigmoid"), clip_function(clip)

    def step(w, x, state):
        h, c = state
        a_i, a_f, a_g, a_o = (sum(gate_terms(w, k, 4, x, h)) for k in range(4))
        if peepholes:
            a_i, a_f = a_i + w["weight_pi"] * c, a_f + w["weight_pf"] * c
        i = s(bound(a_i))
        f = 1 - i if coupled else s(bound(a_f))
        new = f * c + i * t(bound(a_g))
        if peepholes:
            a_o = a_o + w["weight_po"] * new
        h = s(bound(a_o)) * u(new)
        return (w["weight_hr"] @ h if "weight_hr" in w else h), new

    return step


def gru(s=None, t=np.tanh, *, reset_after=True, clip=None):
    s, bound = s or activation("sigmoid"), clip_function(clip)

    def step(w, x, state):
        (h,) = state
        r = s(bound(sum(gate_terms(w, 0, 3, x, h))))
        z = s(bound(sum(gate_terms(w, 1, 3, x, h))))
        if reset_after:
            from_x, from_h = gate_terms(w, 2, 3, x, h)
            n = t(bound(from_x + r * from_h))
        else:
            n = t(bound(sum(gate_terms(w, 2, 3, x, r * h))))
        return ((1 - z) * n + z * h,)

    return step


def leaky(w, x, state):
    """Return the next state of a continuous-time Elman unit with a learned rate for each unit."""
    (h,) = state
    rate = 1 / (1 + np.exp(-w["rate"]))
    return ((1 - rate) * h + rate * np.tanh(sum(gate_terms(w, 0, 1, x, h))),)


def run_row(step, w, x, initial, reverse, length, mask, reset):
    """Run one row of the batch over time: x (T, D), mask and reset (T,) -> y (T, P), the final state."""
    state = initial
    y = [np.zeros_like(initial[0]) for _ in x]
    steps = range(length)  # steps beyond the length of the row are padding
    for t in reversed(steps) if reverse else steps:
        if reset is not None and reset[t]:
            state = initial
        if mask is None or mask[t]:
            state = step(w, x[t], state)
            y[t] = state[0]
    return y, state


def run_stack(step, layer, params, x, state, *, lengths=None, mask=None, reset=None):
    """Run all layers and directions of a recurrent layer, time-major.

    Args:
        step: one of the cells above.
        layer: an xprnn layer, of which only the configuration is read.
        params: NumPy arrays under the parameter names of torch.
        x: (T, N, D) floats or (T, N) integers.
        state: a list with a tuple (h,) or (h, c) of arrays (N, .) for each layer and direction.

    Returns:
        y (T, N, directions*P) and the final states, in the structure of `state`.
    """
    if x.dtype.kind in "iu":
        x = np.eye(layer.input_size)[x]
    T, N = x.shape[:2]
    directions = 2 if layer.bidirectional else 1
    finals = []
    for k in range(layer.num_layers):
        direction_outputs = []
        for d in range(directions):
            suffix = f"_l{k}" + ("_reverse" if d else "")
            w = {name.removesuffix(suffix): a for name, a in params.items() if name.endswith(suffix)}
            initial = state[k * directions + d]
            y = np.zeros((T, N, initial[0].shape[-1]))
            final = tuple(np.zeros_like(s) for s in initial)
            for n in range(N):
                row_y, row_final = run_row(
                    step,
                    w,
                    x[:, n],
                    tuple(s[n] for s in initial),
                    d == 1 or layer.reverse,
                    T if lengths is None else lengths[n],
                    None if mask is None else mask[:, n],
                    None if reset is None else reset[:, n],
                )
                for t in range(T):
                    y[t, n] = row_y[t]
                for array, value in zip(final, row_final, strict=True):
                    array[n] = value
            direction_outputs.append(y)
            finals.append(final)
        x = np.concatenate(direction_outputs, axis=-1)
    return x, finals
