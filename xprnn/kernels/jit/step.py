"""One step of a stream through a layer's stack, on NumPy arrays: printed for a layer's names and sizes.

Both ways to go return None where the arguments don't fit; the caller then asks those who can say why. The compiled way
hands the arrays to step_source.py's kernel, which checks them. The other checks and computes with plain NumPy calls:
for one row the arrays have no row axis, which halves what a call costs, and as in the in-place scan the gates that are
all tanh or sigmoid of their sum take one tanh together.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from xprnn.cells.cell import Cell
from xprnn.kernels.jit import compile_cache
from xprnn.kernels.step_plan import BITS, Step, Stepped, _fit, _head, _made, _result
from xprnn.kernels.tracing.cell_trace import trace_early, trace_step
from xprnn.kernels.tracing.graph import Graph, UntraceableError, leaves
from xprnn.kernels.tracing.scalar_code import Body

__all__ = [
    "QUEUE",
    "Traced",
    "argument_names",
    "compiled_step",
    "signature",
    "step_source",
    "traced",
]


# --- compiled


class _Kernels(dict[Any, Any]):
    """dtype -> its kernel, looked for once."""

    def __init__(self, its: Stepped, integer: bool, source: Callable[..., Any]) -> None:
        self.its, self.integer, self.source = its, integer, source

    def __missing__(self, dtype: Any) -> Any:
        its = self.its
        printed = self.source(its.cell, BITS[dtype], its.bias, self.integer, its.projection > 0)
        if printed is None or not compile_cache.works(*printed):
            raise KeyError(dtype)
        self[dtype] = compile_cache.compiled(*printed)
        return self[dtype]


def compiled_step(its: Stepped, integer: bool) -> Step | None:
    """The step by a compiled kernel, or None where there can be none."""
    return compiled_function(
        its, integer, step_source, [*_head(its, integer), f"y = empty((n, {its.widths[0]}), dtype)"], "y"
    )


def compiled_function(
    its: Stepped, integer: bool, source: Callable[..., Any], head: list[str], out: str
) -> Step | None:
    """The Python function around a compiled kernel, or None if the kernel cannot be compiled."""
    if not compile_cache.available() or source(its.cell, 32, its.bias, integer, its.projection > 0) is None:
        return None
    scope = {"first": _Kernels(its, integer, source), "later": _Kernels(its, False, source), "long": np.int64}
    count, after = len(its.names), [f"n{k}" for k in range(len(its.widths))]
    before = [f"s{k}" for k in range(len(after))]
    weights = [[f"w{j}_{k}" for j in range(len(names))] for k, names in enumerate(its.names)]
    named = dict(zip(chain(*weights), chain(*its.names), strict=True))
    lines = [*head, *_fit(its), "kernel = first[dtype]", *(f"{w} = params[{name!r}]" for w, name in named.items())]
    # numba would take a masked array for one of NumPy's own, and lose its mask.
    kinds = " is ".join(f"{name}.__class__" for name in (*before, *named))
    lines += [f"if not ({kinds} is ndarray): return None"]
    lines += ["x = x.astype(long, casting='safe', copy=False)"] if integer else []
    lines += [f"{name} = empty(({count}, n, {w}), dtype)" for name, w in zip(after, its.widths, strict=True)]
    x, d = "x", its.inputs
    for k, own in enumerate(weights):
        # A row is read before it is written: y may well be x.
        lines += [f"if kernel({', '.join((str(k), str(d), *own, x, *before, 'y', *after))}): return None"]
        lines += ["kernel = later[dtype]"] if integer and k == 0 and count > 1 else []
        x, d = "y", its.widths[0]
    return _made([*lines, f"return {out}, {_result(its)}"], scope)


# --- NumPy


QUEUE = 63  # the scope of q or of h before its projection, and from there down those of early gates' values
_HEAD = '''"""Written by xprnn for a step of the cell {cell!r}; it may be deleted at any time."""
import math
import numpy as np
from xprnn.kernels.jit.simd import {any}exp64, f{bits} as real, load, shift, store, tanh{bits} as tanh
from xprnn.kernels.jit.matvec import in_line, in_rows, product{bits} as product

F = np.float{bits}


def kernel({arguments}):
    {sizes}
    if not ({checks}):
        return 1
    room = np.empty({room}, F)
    X = real(room.ctypes.data)
    B = shift(X, W)
'''


class Traced(NamedTuple):
    """What a step computes."""

    new: tuple[Any, ...]
    sums: str  # for which gates g only x + h is used
    values: tuple[tuple[int, Any], ...] = ()  # of early gates, those that the step gets, by number
    q: Any = None


def traced(cell: Cell, projected: bool) -> Traced:
    """The step of a cell, its early gates first."""
    new, _, added = trace_step(cell, Graph())
    used = set().union(*(leaves(v) for v in new))
    if projected and (cell.early or "s0" in used):
        raise UntraceableError("a unit of an h that is projected")
    if not cell.early:
        return Traced(new, f"g < {added}")
    values, q, together = trace_early(cell, Graph())
    passed = tuple((k, v) for k, v in enumerate(values[: cell.early]) if f"x{k}" in used)
    return Traced(new, f"g < {added}" if together else f"{cell.early} <= g < {added}", passed, q)


@lru_cache(maxsize=256)
def step_source(cell: Cell, bits: int, bias: bool, integer: bool, projected: bool = False) -> tuple[str, str] | None:
    """The text of a cell's step and numba's signature for it, or None where the cell can't be traced."""
    try:
        text = _text(cell, bits, bias, integer, projected, traced(cell, projected))
        return text, signature(cell, bits, bias, integer, projected)
    except Exception:  # whatever goes wrong with stand-ins, arrays go on, and say so if it was the cell
        return None


def argument_names(cell: Cell, bias: bool) -> tuple[list[str], list[str], list[str]]:
    """The arguments' names: biases and vectors, states before, states after."""
    states = range(len(cell.states))
    lines = [*(["bi", "bh"] if bias else []), *(f"p{k}" for k in range(len(cell.vectors)))]
    return lines, [f"s{k}" for k in states], [f"n{k}" for k in states]


def signature(cell: Cell, bits: int, bias: bool, integer: bool, projected: bool, *, walk: bool = False) -> str:
    """Whatever its strides, and read-only too, an array is taken; what is written to was made for it."""
    lines, before, after = argument_names(cell, bias)

    def given(rank: int) -> str:
        return f"Array(float{bits}, {rank}, 'A', True)"

    x = f"Array(int64, {1 + walk}, 'A', True)" if integer else given(2 + walk)
    inputs = [given(2), given(2), *[given(1)] * len(lines), *[given(2)] * projected, x, *[given(3)] * len(before)]
    outputs = [
        f"Array(float{bits}, 3, 'A')" if walk else f"Array(float{bits}, 2, 'C')",
        *[f"Array(float{bits}, 3, 'C')"] * len(after),
    ]
    return f"int64(int64, int64, {', '.join((*inputs, *outputs))})"


def _text(cell: Cell, bits: int, bias: bool, integer: bool, projected: bool, its: Traced) -> str:
    lines, before, after = argument_names(cell, bias)
    text, item = [_step_header(cell, bits, bias, integer, projected, its)], bits // 8
    text += ["    Q = shift(B, W)"] * (projected or cell.early > 0)
    text += [f"    {name.upper()} = real({name}.ctypes.data)" for name in lines]
    text += ["    for r in range(N):"]
    text += [f"        {s.upper()} = real({s}[k, r].ctypes.data)" for s in before]
    text += [f"        {n.upper()} = real({n}[k, r].ctypes.data)" for n in after]
    text += ["        Y = real(y[r].ctypes.data)"]
    if integer:
        text += ["        if x[r] < 0 or x[r] >= D:", "            return 1"]
        text += ["        for j in range(W):", "            store(X, j, 0, w[j, x[r]])"]
    else:
        text += [f"        product(real(w.ctypes.data), w.strides[0] // {item}, real(x[r].ctypes.data), D, X, W)"]
    scopes = {name: 2 + i for i, name in enumerate((*lines, *before, "y", *after))}
    read = _read(scopes, bias)
    text += _early(cell, its, read, item) if cell.early else [_product(item, "S0", "P" if projected else "H", "W")]
    passed = {f"x{k}": f"load(Q, {i} * H + j, {QUEUE - i})" for i, (k, _) in enumerate(its.values, 1)}
    body = Body(lambda name: passed.get(name) or read(name))
    values = body.names(its.new)
    stores = [f"store({n.upper()}, j, {scopes[n]}, {v})" for n, v in zip(after, values, strict=True)]
    if projected:
        stores[0] = f"store(Q, j, {QUEUE}, {values[0]})"
    else:
        stores = [f"store(Y, j, {scopes['y']}, {values[0]})", *stores]
    text += ["        for j in range(H):", *(f"            {line}" for line in (*body.lines, *stores))]
    if projected:
        text += [f"        product(real(hr.ctypes.data), hr.strides[0] // {item}, Q, H, Y, P)"]
        text += ["        for j in range(P):", "            store(N0, j, ANY, load(Y, j, ANY))"]
    # Its memory is there as long as it has a name.
    return "\n".join((*text, "    return 0 * room.size", ""))


def _step_header(cell: Cell, bits: int, bias: bool, integer: bool, projected: bool, its: Traced) -> str:
    """The function's head, its checks and its room."""
    lines, before, after = argument_names(cell, bias)
    sizes = f"(N, H), W = y.shape, {cell.gates} * y.shape[1]"
    if projected:
        sizes = f"(N, P), H, W = y.shape, hr.shape[1], {cell.gates} * hr.shape[1]"
    return _HEAD.format(
        cell=cell.name,
        bits=bits,
        any="ANY, " if projected else "",
        arguments=", ".join(("k", "D", "w", "u", *lines, *["hr"] * projected, "x", *before, "y", *after)),
        sizes=sizes,
        checks=_checks(lines, before, after, integer, projected),
        room=f"2 * W + {1 + len(its.values)} * H" if projected or cell.early else "2 * W",
    )


def _checks(lines: list[str], before: list[str], after: list[str], integer: bool, projected: bool) -> str:
    """What must hold of the arguments, as an expression."""
    look_up, p = "w.shape[0] == W and w.shape[1] == D", "P" if projected else "H"  # one column is read, as it lies
    checks = [look_up if integer else "in_rows(w, W, D)", f"in_rows(u, W, {p})", "x.shape[0] == N"]
    checks += [f"in_line({name}, {'W' if name[0] == 'b' else 'H'})" for name in lines]
    checks += ["in_rows(hr, P, H)"] * projected
    checks += [] if integer else ["in_rows(x, N, D)"]
    for k, (s, n) in enumerate(zip(before, after, strict=True)):
        checks += [f"{s}.shape == {n}.shape and in_rows({s}[k], N, {'H' if k else p})"]
    return " and ".join(checks)


def _product(item: int, a: str, inner: str, rows: str, out: str = "B", first: str = "") -> str:
    """The recurrent product with some rows of u."""
    u, stride = "real(u.ctypes.data)", f"u.strides[0] // {item}"
    u = f"shift({u}, {first} * ({stride}))" if first else u
    return f"        product({u}, {stride}, {a}, {inner}, {out}, {rows})"


def _early(cell: Cell, its: Traced, read: Callable[[str], str], item: int) -> list[str]:
    """The early gates, and the other gates' product."""
    early, late = f"{cell.early} * H", f"{cell.gates - cell.early} * H"
    text = [_product(item, "S0", "H", early), "        for j in range(H):"]
    body = Body(read)
    named = [body.name(value) for value in (its.q, *(value for _, value in its.values))]
    text += [f"            {line}" for line in body.lines]
    text += [f"            store(Q, {i} * H + j, {QUEUE - i}, {value})" for i, value in enumerate(named)]
    return [*text, _product(item, "Q", "H", late, f"shift(B, {early})", early)]


def _read(scopes: dict[str, int], bias: bool) -> Callable[[str], str]:
    """How the step reads an input of the trace; every array is a scope of its own (lanes.py)."""

    def read(name: str) -> str:
        letter, k = name[0], name[1:]
        if letter in "sp":
            return f"load({name.upper()}, j, {scopes[name]})"
        at = f"{k} * H + j"
        x, h = f"load(X, {at}, 0)", f"load(B, {at}, 1)"
        if bias:
            bi, bh = (f"load({b.upper()}, {at}, {scopes[b]})" for b in ("bi", "bh"))
            return {"g": f"({x} + ({bi} + {bh})) + {h}", "x": f"{x} + {bi}", "h": f"{h} + {bh}"}[letter]
        return {"g": f"{x} + {h}", "x": x, "h": h}[letter]

    return read
