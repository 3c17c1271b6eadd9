"""Implementations by xprnn: its layers and its article functions. Also the article's own code."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np

from benchmarks.harness import article_baseline
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, Call, Implementation, Problem
from xprnn import article as article_functions
from xprnn.layers.rnn_lstm_gru import GRU, LSTM, RNN

__all__ = ["LAYERS", "article_api", "article_loop", "core_layer", "layer_arrays"]

LAYERS: dict[str, Callable[[int, int], Any]] = {
    "elman": RNN,
    "lstm": LSTM,
    "gru": GRU,
    "lstm-proj": lambda d, h: LSTM(d, h, proj_size=h // 2),
    "gru-before": partial(GRU, reset_after=False),
}


def layer_arrays(problem: Problem, xp: Any = np, dtype: str = "float32") -> tuple[Any, dict[str, Any], Any, Any, Any]:
    """Return (layer, params, x, state, dy) of a problem, as arrays of `xp`."""
    d, h, _, _ = problem.shape

    def to_array(a: Any) -> Any:
        return xp.asarray(a.astype(dtype, copy=False))

    params = {f"{name}_l0": to_array(a) for name, a in problem.params.items()}
    states = tuple(to_array(s[None]) for s in problem.state)
    state = states if len(states) > 1 else states[0]
    return LAYERS[problem.cell](d, h), params, to_array(problem.x), state, to_array(problem.dy)


def core_layer(
    problem: Problem,
    xp: Any = np,
    dtype: str = "float32",
    config: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Implementation:
    """Run xprnn.RNN, LSTM or GRU.

    Args:
        problem: the row.
        xp: NumPy or CuPy.
        dtype: of all arrays.
        config: returns the context of each call, such as `no_persistent`.
    """
    layer, params, x, state, dy = layer_arrays(problem, xp, dtype)

    def forward() -> Any:
        return layer(params, x, state)

    def forward_backward() -> Any:
        y, _, tape = layer.forward(params, x, state)
        return y, layer.backward(tape, dy)

    def results() -> dict[str, Any]:
        y, (dx, dstate, dparams) = forward_backward()
        dstates = dstate if isinstance(dstate, tuple) else (dstate,)
        arrays = {"y": forward()[0], "y (with a tape)": y, "dx": dx}
        arrays |= {f"d{name}0": s[0] for name, s in zip("hc", dstates, strict=False)}
        arrays |= {f"d{name}": dparams[f"{name}_l0"] for name in problem.params}
        return arrays if xp is np else {name: a.get() for name, a in arrays.items()}

    def within(call: Call) -> Call:
        def run() -> Any:
            assert config is not None
            with config():
                return call()

        return call if config is None else run  # entering a context would cost a microsecond of a small pass

    return Implementation({FORWARD: within(forward), FORWARD_BACKWARD: within(forward_backward)}, within(results))


def _article_functions(module: Any, problem: Problem, **options: Any) -> Implementation:
    """Run `module`'s rnn_forward and rnn_backward, in the article's layout."""
    x, a0, da, parameters = problem.article_arrays()

    def forward() -> Any:
        return module.rnn_forward(x, a0, parameters, **options)

    def forward_backward() -> Any:
        a, y_pred, caches = forward()
        return a, y_pred, module.rnn_backward(da, caches, **options)

    def results() -> dict[str, Any]:
        a, y_pred, g = forward_backward()
        arrays = {"y": a.T, "y_pred": y_pred.T, "dx": g["dx"].T, "dh0": g["da0"].T, "dweight_ih": g["dWax"]}
        return arrays | {"dweight_hh": g["dWaa"], "dbias_ih": g["dba"][:, 0], "dbias_hh": g["dba"][:, 0]}

    return Implementation({FORWARD: forward, FORWARD_BACKWARD: forward_backward}, results)


def article_api(problem: Problem) -> Implementation:
    """Run xprnn.rnn_forward and xprnn.rnn_backward."""
    return _article_functions(article_functions, problem)


def article_loop(problem: Problem, zeros_dtype: Any = None) -> Implementation:
    """Run the article's code. `zeros_dtype` is the dtype of its zero arrays (default: that of x)."""
    return _article_functions(article_baseline, problem, zeros_dtype=zeros_dtype)
