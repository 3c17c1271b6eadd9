"""Prints a short walk of a cell as a compiled function of arrays as they come: for tiny nets, without a tape.

    kernel(k, D, w, u, [bi, bh], p..., x, s..., y, n...) -> 0, or 1 where something does not fit

as in step_source.py, but x (T, N, D) or the numbers (T, N) of one-hot classes, and y (T, N, H). For a hundred steps of
fifty units, source.py's preparations and its table of addresses take four times as long as the walk; here all of it is
inside. The weights are turned, which spares sums across lanes. The cell's maths goes beyond H to P, a multiple of the
lanes, so that no unit is left to scalar code: what it finds and leaves there is nobody's. Rows are walked one by one:
of many, or with large weights, source.py is faster.
"""

from functools import lru_cache
from typing import Any

from xprnn.cells import Cell
from xprnn.kernels.plan import trace_step
from xprnn.kernels.scalar import Body
from xprnn.kernels.step_source import argument_names, signature
from xprnn.kernels.trace import Graph

__all__ = ["walk_source"]

_TEXT = '''"""Written by xprnn for a walk of the cell {cell!r}; it may be deleted at any time."""
import math
import numpy as np
from xprnn.kernels.lanes import ANY, LANES{bits}, exp64, f{bits} as real, load, shift, store, tanh{bits} as tanh
from xprnn.kernels.rowdot import in_rows, turn, turned{bits} as turned

F = np.float{bits}


def kernel({arguments}):
    T, N, H = y.shape
    if not ({checks}):
        return 1
    P, W = -(-H // LANES{bits}) * LANES{bits}, -(-{gates} * H // LANES{bits}) * LANES{bits}
    S, E = max(1, min(T, 16)), {turned_inputs}
    R = W + LANES{bits} * (1 - W // LANES{bits} % 2)  # an even number of vectors would fill few of the cache's sets
    room = np.zeros((E + H) * R + (S * N + 3) * (W + P) + ({states} * N + {vectors}) * P, F)
    w_turned = real(room.ctypes.data)
    u_turned = shift(w_turned, E * R)
    projected = shift(u_turned, H * R)
    B = shift(projected, S * N * (W + P))
    K = shift(B, W + P)
    L = shift(K, W + P)
    first = shift(L, W + P)
    {turn_inputs}turn(u, u_turned, R)
    for g in range({gates}):
        for j in range(H):
            store(K, g * H + j, ANY, {bias_added} if g < {added} else {bias_input})
            store(L, g * H + j, ANY, F(0.0) if g < {added} else {bias_hidden})
{prepare}
    for t0 in range(0, T, S):
        for t in range(t0, min(t0 + S, T)):
            for r in range(N):
                X = shift(projected, ((t - t0) * N + r) * (W + P))
{project}
        for t in range(t0, min(t0 + S, T)):
            for r in range(N):
                X = shift(projected, ((t - t0) * N + r) * (W + P))
{running}
                turned(u_turned, R, C0, H, B, W)
                for j in range(P):
{body}
                Y = real(y[t, r].ctypes.data)
                for j in range(H):
                    store(Y, j, {out}, load(C0, j, {state}))
{finish}
    return 0 * room.size  # its memory is there as long as it has a name
'''


@lru_cache(maxsize=256)
def walk_source(cell: Cell, bits: int, bias: bool, integer: bool) -> tuple[str, str] | None:
    """The text of a cell's walk and numba's signature for it, or None where the cell can't be traced."""
    if cell.early:
        return None
    try:
        new, _, added = trace_step(cell, Graph())
        return _text(cell, bits, bias, integer, new, added), signature(cell, bits, bias, integer, walk=True)
    except Exception:  # whatever goes wrong with stand-ins, arrays go on, and say so if it was the cell
        return None


def _lines(depth: int, lines: list[str]) -> str:
    return "\n".join("    " * depth + line for line in lines)


def _text(cell: Cell, bits: int, bias: bool, integer: bool, new: tuple[Any, ...], added: int) -> str:
    lines, before, after = argument_names(cell, bias)
    states, vectors = len(before), [name for name in lines if name[0] == "p"]
    scopes = {name: 4 + i for i, name in enumerate((*vectors, *before))}  # 0 to 3: X, B, K, L
    prepare = [f"{name.upper()} = shift(first, ({states} * N + {i}) * P)" for i, name in enumerate(vectors)]
    prepare += [f"for j in range(H):\n        store({name.upper()}, j, ANY, {name}[j])" for name in vectors]
    prepare += ["for r in range(N):", "    for j in range(H):"]
    prepare += [f"        store(first, ({i} * N + r) * P + j, ANY, {s}[k, r, j])" for i, s in enumerate(before)]
    finish = ["for r in range(N):", "    for j in range(H):"]
    finish += [f"        {n}[k, r, j] = load(first, ({i} * N + r) * P + j, ANY)" for i, n in enumerate(after)]
    if integer:
        project = ["v = x[t, r]", "if v < 0 or v >= D:", "    return 1", f"for g in range({cell.gates}):"]
        project += ["    for j in range(H):", "        store(X, g * H + j, ANY, w[g * H + j, v])"]
    else:
        project = ["turned(w_turned, R, real(x[t, r].ctypes.data), D, X, W)"]
    body = Body(lambda name: _read(name, scopes))
    values = body.names(new)
    written = [f"store(C{i}, j, {scopes[s]}, {v})" for i, (s, v) in enumerate(zip(before, values, strict=True))]
    return _TEXT.format(
        cell=cell.name,
        bits=bits,
        arguments=", ".join(("k", "D", "w", "u", *lines, "x", *before, "y", *after)),
        checks=_checks(cell, lines, before, after, integer),
        gates=cell.gates,
        states=states,
        vectors=len(vectors),
        added=added,
        turned_inputs="0" if integer else "D",
        turn_inputs="" if integer else "turn(w, w_turned, R)\n    ",
        bias_added="bi[g * H + j] + bh[g * H + j]" if bias else "F(0.0)",
        bias_input="bi[g * H + j]" if bias else "F(0.0)",
        bias_hidden="bh[g * H + j]" if bias else "F(0.0)",
        prepare=_lines(1, prepare),
        project=_lines(4, project),
        running=_lines(4, [f"C{i} = shift(first, ({i} * N + r) * P)" for i in range(states)]),
        body=_lines(5, [*body.lines, *written]),
        out=4 + len(scopes),
        state=scopes["s0"],
        finish=_lines(1, finish),
    )


def _checks(cell: Cell, lines: list[str], before: list[str], after: list[str], integer: bool) -> str:
    """What must hold of the arguments, as an expression."""
    rows = f"{cell.gates} * H"
    checks = [f"w.shape == ({rows}, D)", f"u.shape == ({rows}, H)", "x.shape[0] == T", "x.shape[1] == N"]
    checks += [f"{name}.shape[0] == {'H' if name[0] == 'p' else rows}" for name in lines]
    checks += [] if integer else ["(T == 0 or in_rows(x[0], N, D))"]
    return " and ".join([*checks, *(f"{s}.shape == {n}.shape" for s, n in zip(before, after, strict=True))])


def _read(name: str, scopes: dict[str, int]) -> str:
    """How a step reads an input of the trace; every array is a scope of its own (lanes.py)."""
    letter, k = name[0], name[1:]
    if letter in "sp":
        return f"load({'C' + k if letter == 's' else name.upper()}, j, {scopes[name]})"
    at = f"{k} * H + j"
    x, h = f"load(X, {at}, 0) + load(K, {at}, 2)", f"load(B, {at}, 1)"
    return {"g": f"({x}) + {h}", "x": x, "h": f"{h} + load(L, {at}, 3)"}[letter]
