"""Time loops for one sequence (N = 1) that a user of numba could write by hand, with the large products in NumPy.

They are written for speed. The input projection and the gradients of the weights are one product each. The recurrent
product adds four rows of the transposed matrix at a time. tanh is a rational function that the compiler vectorizes
(error 2e-7), and numba may reorder sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, Implementation, Problem

__all__ = ["numba_loop"]

_jit: Callable[[Any], Any] = numba.njit(cache=True, fastmath=True, error_model="numpy")
F = np.float32
P3, P5, P7 = F(17325), F(378), F(1)
Q0, Q2, Q4, Q6 = F(135135), F(62370), F(3150), F(28)


@_jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """Compute tanh(2u) = 2 p q / (p^2 + q^2), where p/q is Lambert's continued fraction of tanh(u), truncated."""
    u = min(max(F(0.5) * x, F(-4.5)), F(4.5))
    s = u * u
    p, q = u * (Q0 + s * (P3 + s * (P5 + s * P7))), Q0 + s * (Q2 + s * (Q4 + s * Q6))
    return F(2) * p * q / (p * p + q * q)


@_jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return F(0.5) + F(0.5) * _tanh(F(0.5) * x)


@_jit
def _add_vecmat(a, v, m):  # type: ignore[no-untyped-def]
    """Compute a += v @ m."""
    rows, width = m.shape
    for k in range(0, rows - 3, 4):
        v0, v1, v2, v3 = v[k], v[k + 1], v[k + 2], v[k + 3]
        for i in range(width):
            a[i] += v0 * m[k, i] + v1 * m[k + 1, i] + v2 * m[k + 2, i] + v3 * m[k + 3, i]
    for k in range(rows - rows % 4, rows):
        for i in range(width):
            a[i] += v[k] * m[k, i]


@_jit
def _elman(a, ut, h, saved):  # type: ignore[no-untyped-def]
    """Run the time loop. a (T,H): projected inputs. h (T+1,H): row 0 is the initial state, the others are written."""
    for t in range(len(a)):
        _add_vecmat(a[t], h[t], ut)
        for i in range(h.shape[1]):
            h[t + 1, i] = _tanh(a[t, i])


@_jit
def _elman_backward(dy, u, h, a, saved, dh, da, dhg):  # type: ignore[no-untyped-def]
    """Run the time loop backward. da (T,H) is written. dh (H,): zeros, then the gradient of the initial state."""
    for t in range(len(dy) - 1, -1, -1):
        for i in range(len(dh)):
            y = h[t + 1, i]
            da[t, i] = (dy[t, i] + dh[i]) * (F(1) - y * y)
            dh[i] = F(0)
        _add_vecmat(dh, da[t], u)


@_jit
def _lstm(a, ut, h, saved):  # type: ignore[no-untyped-def]
    """Run the time loop. a (T,4H): projected inputs, then gates. saved (T+1,H): cell states, row 0 is initial."""
    n = h.shape[1]
    for t in range(len(a)):
        g = a[t]
        _add_vecmat(g, h[t], ut)
        for i in range(2 * n):
            g[i] = _sigmoid(g[i])
        for i in range(n):
            g[2 * n + i] = _tanh(g[2 * n + i])
        for i in range(n):
            g[3 * n + i] = _sigmoid(g[3 * n + i])
        for i in range(n):
            saved[t + 1, i] = g[n + i] * saved[t, i] + g[i] * g[2 * n + i]
            h[t + 1, i] = g[3 * n + i] * _tanh(saved[t + 1, i])


@_jit
def _lstm_backward(dy, u, h, a, saved, dh, da, dc):  # type: ignore[no-untyped-def]
    """Run the time loop backward. da (T,4H) is written. dh, dc (H,): zeros, then gradients of the initial states."""
    n = h.shape[1]
    for t in range(len(dy) - 1, -1, -1):
        g, d = a[t], da[t]
        for i in range(n):
            in_, forget, new, out, tc = g[i], g[n + i], g[2 * n + i], g[3 * n + i], _tanh(saved[t + 1, i])
            dy_i = dy[t, i] + dh[i]
            dci = dc[i] + dy_i * out * (F(1) - tc * tc)
            d[i] = dci * new * in_ * (F(1) - in_)
            d[n + i] = dci * saved[t, i] * forget * (F(1) - forget)
            d[2 * n + i] = dci * in_ * (F(1) - new * new)
            d[3 * n + i] = dy_i * tc * out * (F(1) - out)
            dc[i] = dci * forget
            dh[i] = F(0)
        _add_vecmat(dh, d, u)


@_jit
def _gru(a, ut, h, saved):  # type: ignore[no-untyped-def]
    """Run the time loop. a (T,3H): projected inputs, then gates. saved (T,3H): biases, then projected states."""
    n = h.shape[1]
    for t in range(len(a)):
        g, hg = a[t], saved[t]
        _add_vecmat(hg, h[t], ut)
        for i in range(2 * n):
            g[i] = _sigmoid(g[i] + hg[i])
        for i in range(n):
            g[2 * n + i] = _tanh(g[2 * n + i] + g[i] * hg[2 * n + i])
            h[t + 1, i] = g[2 * n + i] + g[n + i] * (h[t, i] - g[2 * n + i])


@_jit
def _gru_backward(dy, u, h, a, saved, dh, da, dhg):  # type: ignore[no-untyped-def]
    """Run the time loop backward. da, dhg (T,3H) are written. dh (H,): zeros, then gradient of the initial state."""
    n = h.shape[1]
    for t in range(len(dy) - 1, -1, -1):
        g, d, dg = a[t], da[t], dhg[t]
        for i in range(n):
            r, z, new, dyi = g[i], g[n + i], g[2 * n + i], dy[t, i] + dh[i]
            dn = dyi * (F(1) - z) * (F(1) - new * new)
            d[i] = dn * saved[t, 2 * n + i] * r * (F(1) - r)
            d[n + i] = dyi * (h[t, i] - new) * z * (F(1) - z)
            d[2 * n + i] = dn
            dg[i], dg[n + i], dg[2 * n + i] = d[i], d[n + i], dn * r
            dh[i] = dyi * z
        _add_vecmat(dh, dg, u)


KERNELS = {"elman": (_elman, _elman_backward), "lstm": (_lstm, _lstm_backward), "gru": (_gru, _gru_backward)}


def numba_loop(problem: Problem) -> Implementation:
    """Run one sequence by the compiled loops."""
    cell, (_, size, _, steps), p = problem.cell, problem.shape, problem.params
    forward_loop, backward_loop = KERNELS[cell]
    w, u, x, dy = p["weight_ih"], p["weight_hh"], problem.x[:, 0], problem.dy[:, 0]
    wt, ut = np.ascontiguousarray(w.T), np.ascontiguousarray(u.T)
    bias = p["bias_ih"] if cell == "gru" else p["bias_ih"] + p["bias_hh"]
    initial = [s[0] for s in problem.state]

    def forward() -> Any:
        a, h = x @ wt, np.empty((steps + 1, size), F)
        a += bias
        h[0] = initial[0]
        if cell == "gru":
            saved = np.empty((steps, 3 * size), F)
            saved[:] = p["bias_hh"]
        else:
            saved = np.empty((steps + 1 if cell == "lstm" else 1, size), F)
            saved[0] = initial[-1]
        forward_loop(a, ut, h, saved)
        return h, a, saved

    def forward_backward() -> Any:
        h, a, saved = forward()
        dh, da = np.zeros(size, F), np.empty_like(a)
        dhg = np.empty_like(a) if cell == "gru" else np.zeros(size, F)
        backward_loop(dy, u, h, a, saved, dh, da, dhg)
        dg = dhg if cell == "gru" else da
        return h, dh, dhg, da @ w, da.T @ x, dg.T @ h[:-1], da.sum(0), dg.sum(0)

    def results() -> dict[str, Any]:
        h, dh, dhg, dx, dw, du, dbi, dbh = forward_backward()
        arrays = {"y": h[1:, None], "dx": dx[:, None], "dh0": dh[None], "dweight_ih": dw, "dweight_hh": du}
        arrays |= {"dbias_ih": dbi, "dbias_hh": dbh}
        return arrays | ({"dc0": dhg[None]} if cell == "lstm" else {})

    return Implementation({FORWARD: forward, FORWARD_BACKWARD: forward_backward}, results)
