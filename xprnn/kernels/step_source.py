"""Prints one step of a cell as a compiled function of arrays as they come: for streams, where a call is all there is.

A sequence hands its kernel a table of addresses (source.py); for a single step, asking for the addresses would take
longer than the step. numba unpacks an array in 50 nanoseconds: the step takes arrays, and checks their shapes itself:

    kernel(k, D, w, u, [bi, bh], p..., x, s..., y, n...) -> 0, or 1 where something does not fit

for layer k of a stack, with w (G*H, D), u (G*H, H), bi, bh (G*H,), p (H,) the cell's vectors, x (N, D) or the numbers
(N,) of one-hot classes, s (L, N, H) the states; y (N, H) and the new states n (L, N, H) are written.
"""

from functools import lru_cache
from typing import Any

from xprnn.cells import Cell
from xprnn.kernels.plan import trace_step
from xprnn.kernels.scalar import Body
from xprnn.kernels.trace import Graph

__all__ = ["argument_names", "signature", "step_source"]

_HEAD = '''"""Written by xprnn for a step of the cell {cell!r}; it may be deleted at any time."""
import math
import numpy as np
from xprnn.kernels.lanes import exp64, f{bits} as real, load, shift, store, tanh{bits} as tanh
from xprnn.kernels.rowdot import in_line, in_rows, product{bits} as product

F = np.float{bits}


def kernel({arguments}):
    (N, H), W = y.shape, {gates} * y.shape[1]
    if not ({checks}):
        return 1
    room = np.empty(2 * W, F)
    X = real(room.ctypes.data)
    B = shift(X, W)
'''


@lru_cache(maxsize=256)
def step_source(cell: Cell, bits: int, bias: bool, integer: bool) -> tuple[str, str] | None:
    """The text of a cell's step and numba's signature for it, or None where the cell can't be traced."""
    if cell.early:
        return None
    try:
        new, _, _ = trace_step(cell, Graph())
        return _text(cell, bits, bias, integer, new), signature(cell, bits, bias, integer)
    except Exception:  # whatever goes wrong with stand-ins, arrays go on, and say so if it was the cell
        return None


def argument_names(cell: Cell, bias: bool) -> tuple[list[str], list[str], list[str]]:
    """The arguments' names: weights and vectors, states before, states after."""
    states = range(len(cell.states))
    lines = [*(["bi", "bh"] if bias else []), *(f"p{k}" for k in range(len(cell.vectors)))]
    return lines, [f"s{k}" for k in states], [f"n{k}" for k in states]


def signature(cell: Cell, bits: int, bias: bool, integer: bool, *, walk: bool = False) -> str:
    """Whatever its strides, and read-only too, an array is taken; what is written to was made for it."""
    lines, before, after = argument_names(cell, bias)

    def given(rank: int) -> str:
        return f"Array(float{bits}, {rank}, 'A', True)"

    x = f"Array(int64, {1 + walk}, 'A', True)" if integer else given(2 + walk)
    inputs = [given(2), given(2), *[given(1)] * len(lines), x, *[given(3)] * len(before)]
    outputs = [
        f"Array(float{bits}, 3, 'A')" if walk else f"Array(float{bits}, 2, 'C')",
        *[f"Array(float{bits}, 3, 'C')"] * len(after),
    ]
    return f"int64(int64, int64, {', '.join((*inputs, *outputs))})"


def _text(cell: Cell, bits: int, bias: bool, integer: bool, new: tuple[Any, ...]) -> str:
    lines, before, after = argument_names(cell, bias)
    look_up = "w.shape[0] == W and w.shape[1] == D"  # whatever its strides, one column is read
    checks = [look_up if integer else "in_rows(w, W, D)", "in_rows(u, W, H)", "x.shape[0] == N"]
    checks += [f"in_line({name}, {'W' if name[0] == 'b' else 'H'})" for name in lines]
    checks += [] if integer else ["in_rows(x, N, D)"]
    checks += [f"{s}.shape == {n}.shape and in_rows({s}[k], N, H)" for s, n in zip(before, after, strict=True)]
    arguments = ", ".join(("k", "D", "w", "u", *lines, "x", *before, "y", *after))
    text = [_HEAD.format(cell=cell.name, bits=bits, arguments=arguments, gates=cell.gates, checks=" and ".join(checks))]
    text += [f"    {name.upper()} = real({name}.ctypes.data)" for name in lines]
    text += ["    for r in range(N):"]
    text += [f"        {s.upper()} = real({s}[k, r].ctypes.data)" for s in before]
    text += [f"        {n.upper()} = real({n}[k, r].ctypes.data)" for n in after]
    text += ["        Y = real(y[r].ctypes.data)"]
    item = bits // 8
    if integer:
        text += ["        if x[r] < 0 or x[r] >= D:", "            return 1"]
        text += ["        for j in range(W):", "            store(X, j, 0, w[j, x[r]])"]
    else:
        text += [f"        product(real(w.ctypes.data), w.strides[0] // {item}, real(x[r].ctypes.data), D, X, W)"]
    text += [f"        product(real(u.ctypes.data), u.strides[0] // {item}, S0, H, B, W)", "        for j in range(H):"]
    body = Body(lambda name: _read(name, lines, before, bias))
    values = body.names(new)
    text += [f"            {line}" for line in body.lines]
    at = {name: 2 + len(lines) + len(before) + k for k, name in enumerate(("y", *after))}
    text += [f"            store(Y, j, {at['y']}, {values[0]})"]
    text += [f"            store({n.upper()}, j, {at[n]}, {v})" for n, v in zip(after, values, strict=True)]
    # Its memory is there as long as it has a name.
    return "\n".join((*text, "    return 0 * room.size", ""))


def _read(name: str, lines: list[str], before: list[str], bias: bool) -> str:
    """How the step reads an input of the trace; every array is a scope of its own (lanes.py)."""
    letter, k = name[0], name[1:]
    scopes = {array: 2 + i for i, array in enumerate((*lines, *before))}
    if letter in "sp":
        return f"load({name.upper()}, j, {scopes[name]})"
    at = f"{k} * H + j"
    x, h = f"load(X, {at}, 0)", f"load(B, {at}, 1)"
    if bias:
        bi, bh = (f"load({b.upper()}, {at}, {scopes[b]})" for b in ("bi", "bh"))
        return {"g": f"({x} + ({bi} + {bh})) + {h}", "x": f"{x} + {bi}", "h": f"{h} + {bh}"}[letter]
    return {"g": f"{x} + {h}", "x": x, "h": h}[letter]
