"""xprnn and the article as contenders: the core's layers, the article door, the article's own loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.harness import article_baseline
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, Implementation, Problem
from xprnn import article as article_functions
from xprnn.layers.rnn_lstm_gru import GRU, LSTM, RNN

__all__ = ["LAYERS", "article_api", "article_loop", "core_layer"]

LAYERS: dict[str, Callable[[int, int], Any]] = {
    "elman": RNN,
    "lstm": LSTM,
    "gru": GRU,
    "lstm-proj": lambda d, h: LSTM(d, h, proj_size=h // 2),
    "gru-before": partial(GRU, reset_after=False),
}


def core_layer(problem: Problem) -> Implementation:
    """xprnn.RNN, LSTM or GRU: a layer call, and forward + backward."""
    d, h, _, _ = problem.shape
    layer = LAYERS[problem.cell](d, h)
    params = {f"{k}_l0": v for k, v in problem.params.items()}
    states = tuple(s[None] for s in problem.state)
    state: Any = states if len(states) > 1 else states[0]

    def both() -> Any:
        y, _, tape = layer.forward(params, problem.x, state)
        return y, layer.backward(tape, problem.dy)

    def results() -> dict[str, Any]:
        y, (dx, dstate, dparams) = both()
        dstates = dstate if isinstance(dstate, tuple) else (dstate,)
        found = {"y": layer(params, problem.x, state)[0], "y (with a tape)": y, "dx": dx}
        found |= {f"d{name}0": s[0] for name, s in zip("hc", dstates, strict=False)}
        return found | {f"d{k}": dparams[f"{k}_l0"] for k in problem.params}

    return Implementation({FORWARD: lambda: layer(params, problem.x, state), FORWARD_BACKWARD: both}, results)


def _article_functions(module: Any, problem: Problem, **options: Any) -> Implementation:
    """The five functions of `module`, in the article's layout."""
    x, a0, da, parameters = problem.article_arrays()

    def forward() -> Any:
        return module.rnn_forward(x, a0, parameters, **options)

    def both() -> Any:
        a, y_pred, caches = forward()
        return a, y_pred, module.rnn_backward(da, caches, **options)

    def results() -> dict[str, Any]:
        a, y_pred, g = both()
        found = {"y": a.T, "y_pred": y_pred.T, "dx": g["dx"].T, "dh0": g["da0"].T, "dweight_ih": g["dWax"]}
        return found | {"dweight_hh": g["dWaa"], "dbias_ih": g["dba"][:, 0], "dbias_hh": g["dba"][:, 0]}

    return Implementation({FORWARD: forward, FORWARD_BACKWARD: both}, results)


def article_api(problem: Problem) -> Implementation:
    """xprnn.rnn_forward and rnn_backward."""
    return _article_functions(article_functions, problem)


def article_loop(problem: Problem, zeros_dtype: Any = None) -> Implementation:
    """The article's formulation, with zeros of x's dtype or of another."""
    return _article_functions(article_baseline, problem, zeros=zeros_dtype)
