"""The article's code: five functions, a dict of parameters and a loop over time.

One thing differs from the article: its arrays of zeros have x's dtype unless `zeros_dtype` is given. The published code
uses float64 zeros (`zeros_dtype=np.float64`); its whole backward pass then runs in float64 for any input.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

__all__ = ["rnn_backward", "rnn_forward"]

Array: TypeAlias = "np.ndarray[Any, Any]"


def softmax(x: Array) -> Array:
    """Return the softmax of each column, after subtracting the maximum of the whole array."""
    e = np.exp(x - np.max(x))
    probabilities: Array = e / e.sum(axis=0)
    return probabilities


def rnn_cell_forward(xt: Array, a_prev: Array, parameters: dict[str, Array]) -> tuple[Array, Array, Any]:
    """Compute one step. Return the state, the prediction and the cache for backward."""
    wax, waa, wya = parameters["Wax"], parameters["Waa"], parameters["Wya"]
    ba, by = parameters["ba"], parameters["by"]
    a_next = np.tanh(np.dot(wax, xt) + np.dot(waa, a_prev) + ba)
    yt_pred = softmax(np.dot(wya, a_next) + by)
    return a_next, yt_pred, (a_next, a_prev, xt, parameters)


def rnn_forward(x: Array, a0: Array, parameters: dict[str, Array], zeros_dtype: Any = None) -> tuple[Array, Array, Any]:
    """Run the whole sequence.

    Args:
        x: (n_x, m, T).
        a0: (n_a, m), the initial state.
        parameters: Wax, Waa, Wya, ba and by.
        zeros_dtype: dtype of arrays of zeros; None: that of x.

    Returns:
        The states (n_a, m, T), the predictions (n_y, m, T) and the caches for backward.
    """
    caches = []
    _, m, t_x = x.shape
    n_y, n_a = parameters["Wya"].shape
    a = np.zeros((n_a, m, t_x), zeros_dtype or x.dtype)
    y_pred = np.zeros((n_y, m, t_x), zeros_dtype or x.dtype)
    a_next = a0
    for t in range(t_x):
        a_next, yt_pred, cache = rnn_cell_forward(x[:, :, t], a_next, parameters)
        a[:, :, t] = a_next
        y_pred[:, :, t] = yt_pred
        caches.append(cache)
    return a, y_pred, (caches, x)


def rnn_cell_backward(da_next: Array, cache: Any) -> dict[str, Array]:
    """Run one step backward. Return the gradients of its inputs and parameters."""
    a_next, a_prev, xt, parameters = cache
    wax, waa = parameters["Wax"], parameters["Waa"]
    dtanh = (1 - a_next**2) * da_next
    return {
        "dxt": np.dot(wax.T, dtanh),
        "dWax": np.dot(dtanh, xt.T),
        "da_prev": np.dot(waa.T, dtanh),
        "dWaa": np.dot(dtanh, a_prev.T),
        "dba": np.sum(dtanh, axis=1, keepdims=True),
    }


def rnn_backward(da: Array, caches: Any, zeros_dtype: Any = None) -> dict[str, Array]:
    """Run the whole sequence backward.

    Args:
        da: (n_a, m, T), the cotangent of the states.
        caches: as `rnn_forward` returns them.
        zeros_dtype: dtype of arrays of zeros; None: that of x.

    Returns:
        dx, da0, dWax, dWaa and dba.
    """
    caches, x = caches
    _, m, t_x = da.shape
    dtype = zeros_dtype or x.dtype
    parameters = caches[0][3]
    dx = np.zeros(x.shape, dtype)
    total = {"d" + k: np.zeros(parameters[k].shape, dtype) for k in ("Wax", "Waa", "ba")}
    da_prev = np.zeros((da.shape[0], m), dtype)
    for t in reversed(range(t_x)):
        gradients = rnn_cell_backward(da[:, :, t] + da_prev, caches[t])
        da_prev = gradients["da_prev"]
        dx[:, :, t] = gradients["dxt"]
        for k in total:
            total[k] += gradients[k]
    return {"dx": dx, "da0": da_prev} | total
