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
from xprnn.kernels.step_plan import (
    DTYPE_BITS,
    LayerSignature,
    StepFn,
    argument_lines,
    compile_python,
    initial_state_checks,
    result_expression,
)
from xprnn.kernels.tracing.cell_trace import trace_pregates, trace_step
from xprnn.kernels.tracing.graph import TraceGraph, UntraceableError, input_names
from xprnn.kernels.tracing.scalar_code import ScalarCode

__all__ = [
    "SCRATCH_SCOPE",
    "StepTrace",
    "argument_names",
    "compiled_step",
    "signature",
    "step_source",
    "step_trace",
]


# --- compiled


class _KernelCache(dict[Any, Any]):
    """dtype -> its kernel, looked for once."""

    def __init__(self, its: LayerSignature, integer: bool, source: Callable[..., Any]) -> None:
        self.layer, self.integer, self.source = its, integer, source

    def __missing__(self, dtype: Any) -> Any:
        its = self.layer
        printed = self.source(its.cell, DTYPE_BITS[dtype], its.bias, self.integer, its.projection_size > 0)
        if printed is None or not compile_cache.can_compile(*printed):
            raise KeyError(dtype)
        self[dtype] = compile_cache.compile_kernel(*printed)
        return self[dtype]


def compiled_step(layer: LayerSignature, integer: bool) -> StepFn | None:
    """The step by a compiled kernel, or None where there can be none."""
    return kernel_wrapper(
        layer,
        integer,
        step_source,
        [*argument_lines(layer, integer), f"y = empty((n, {layer.state_sizes[0]}), dtype)"],
        "y",
    )


def kernel_wrapper(
    its: LayerSignature, integer: bool, source: Callable[..., Any], head: list[str], out: str
) -> StepFn | None:
    """The Python function around a compiled kernel, or None if the kernel cannot be compiled."""
    if not compile_cache.numba_available() or source(its.cell, 32, its.bias, integer, its.projection_size > 0) is None:
        return None
    scope = {"first": _KernelCache(its, integer, source), "later": _KernelCache(its, False, source), "long": np.int64}
    count, after = len(its.parameter_names), [f"n{k}" for k in range(len(its.state_sizes))]
    before = [f"s{k}" for k in range(len(after))]
    weights = [[f"w{j}_{k}" for j in range(len(names))] for k, names in enumerate(its.parameter_names)]
    named = dict(zip(chain(*weights), chain(*its.parameter_names), strict=True))
    lines = [
        *head,
        *initial_state_checks(its),
        "kernel = first[dtype]",
        *(f"{w} = params[{name!r}]" for w, name in named.items()),
    ]
    # numba would take a masked array for one of NumPy's own, and lose its mask.
    kinds = " is ".join(f"{name}.__class__" for name in (*before, *named))
    lines += [f"if not ({kinds} is ndarray): return None"]
    lines += ["x = x.astype(long, casting='safe', copy=False)"] if integer else []
    lines += [f"{name} = empty(({count}, n, {w}), dtype)" for name, w in zip(after, its.state_sizes, strict=True)]
    x, d = "x", its.input_size
    for k, own in enumerate(weights):
        # A row is read before it is written: y may well be x.
        lines += [f"if kernel({', '.join((str(k), str(d), *own, x, *before, 'y', *after))}): return None"]
        lines += ["kernel = later[dtype]"] if integer and k == 0 and count > 1 else []
        x, d = "y", its.state_sizes[0]
    return compile_python([*lines, f"return {out}, {result_expression(its)}"], scope)


# --- NumPy


SCRATCH_SCOPE = 63  # the scope of q or of h before its projection, and from there down those of early gates' values
_STEP_TEMPLATE = '''"""Written by xprnn for a step of the cell {cell!r}; it may be deleted at any time."""
import math
import numpy as np
from xprnn.kernels.jit.simd import {any}exp64, float{bits}_pointer as real, load, offset as shift, store
from xprnn.kernels.jit.simd import tanh{bits} as tanh
from xprnn.kernels.jit.matvec import is_unit_stride, has_unit_stride_rows, matvec{bits} as product

F = np.float{bits}


def kernel({arguments}):
    {sizes}
    if not ({checks}):
        return 1
    room = np.empty({room}, F)
    X = real(room.ctypes.data)
    B = shift(X, W)
'''


class StepTrace(NamedTuple):
    """What a step computes."""

    new_states: tuple[Any, ...]
    summed_condition: str  # for which gates g only x + h is used
    pregate_values: tuple[tuple[int, Any], ...] = ()  # of early gates, those that the step gets, by number
    gated_state: Any = None


def step_trace(cell: Cell, projected: bool) -> StepTrace:
    """The step of a cell, its early gates first."""
    new, _, added = trace_step(cell, TraceGraph())
    used = set().union(*(input_names(v) for v in new))
    if projected and (cell.pregates or "s0" in used):
        raise UntraceableError("a unit of an h that is projected")
    if not cell.pregates:
        return StepTrace(new, f"g < {added}")
    values, q, together = trace_pregates(cell, TraceGraph())
    passed = tuple((k, v) for k, v in enumerate(values[: cell.pregates]) if f"x{k}" in used)
    return StepTrace(new, f"g < {added}" if together else f"{cell.pregates} <= g < {added}", passed, q)


@lru_cache(maxsize=256)
def step_source(cell: Cell, bits: int, bias: bool, integer: bool, projected: bool = False) -> tuple[str, str] | None:
    """The text of a cell's step and numba's signature for it, or None where the cell can't be traced."""
    try:
        text = _write_step(cell, bits, bias, integer, projected, step_trace(cell, projected))
        return text, signature(cell, bits, bias, integer, projected)
    except Exception:  # whatever goes wrong with stand-ins, arrays go on, and say so if it was the cell
        return None


def argument_names(cell: Cell, bias: bool) -> tuple[list[str], list[str], list[str]]:
    """The arguments' names: biases and vectors, states before, states after."""
    states = range(len(cell.states))
    lines = [*(["bi", "bh"] if bias else []), *(f"p{k}" for k in range(len(cell.vectors)))]
    return lines, [f"s{k}" for k in states], [f"n{k}" for k in states]


def signature(cell: Cell, bits: int, bias: bool, integer: bool, projected: bool, *, sequence: bool = False) -> str:
    """Whatever its strides, and read-only too, an array is taken; what is written to was made for it."""
    lines, before, after = argument_names(cell, bias)

    def given(rank: int) -> str:
        return f"Array(float{bits}, {rank}, 'A', True)"

    x = f"Array(int64, {1 + sequence}, 'A', True)" if integer else given(2 + sequence)
    inputs = [given(2), given(2), *[given(1)] * len(lines), *[given(2)] * projected, x, *[given(3)] * len(before)]
    outputs = [
        f"Array(float{bits}, 3, 'A')" if sequence else f"Array(float{bits}, 2, 'C')",
        *[f"Array(float{bits}, 3, 'C')"] * len(after),
    ]
    return f"int64(int64, int64, {', '.join((*inputs, *outputs))})"


def _write_step(cell: Cell, bits: int, bias: bool, integer: bool, projected: bool, its: StepTrace) -> str:
    lines, before, after = argument_names(cell, bias)
    text, item = [_step_header(cell, bits, bias, integer, projected, its)], bits // 8
    text += ["    Q = shift(B, W)"] * (projected or cell.pregates > 0)
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
    read = _step_input_loader(scopes, bias)
    text += (
        _pregate_lines(cell, its, read, item)
        if cell.pregates
        else [_matvec_call(item, "S0", "P" if projected else "H", "W")]
    )
    passed = {f"x{k}": f"load(Q, {i} * H + j, {SCRATCH_SCOPE - i})" for i, (k, _) in enumerate(its.pregate_values, 1)}
    body = ScalarCode(lambda name: passed.get(name) or read(name))
    values = body.emit_all(its.new_states)
    stores = [f"store({n.upper()}, j, {scopes[n]}, {v})" for n, v in zip(after, values, strict=True)]
    if projected:
        stores[0] = f"store(Q, j, {SCRATCH_SCOPE}, {values[0]})"
    else:
        stores = [f"store(Y, j, {scopes['y']}, {values[0]})", *stores]
    text += ["        for j in range(H):", *(f"            {line}" for line in (*body.lines, *stores))]
    if projected:
        text += [f"        product(real(hr.ctypes.data), hr.strides[0] // {item}, Q, H, Y, P)"]
        text += ["        for j in range(P):", "            store(N0, j, ANY, load(Y, j, ANY))"]
    # Its memory is there as long as it has a name.
    return "\n".join((*text, "    return 0 * room.size", ""))


def _step_header(cell: Cell, bits: int, bias: bool, integer: bool, projected: bool, its: StepTrace) -> str:
    """The function's head, its checks and its room."""
    lines, before, after = argument_names(cell, bias)
    sizes = f"(N, H), W = y.shape, {cell.gates} * y.shape[1]"
    if projected:
        sizes = f"(N, P), H, W = y.shape, hr.shape[1], {cell.gates} * hr.shape[1]"
    return _STEP_TEMPLATE.format(
        cell=cell.name,
        bits=bits,
        any="ANY_SCOPE as ANY, " if projected else "",
        arguments=", ".join(("k", "D", "w", "u", *lines, *["hr"] * projected, "x", *before, "y", *after)),
        sizes=sizes,
        checks=_step_argument_checks(lines, before, after, integer, projected),
        room=f"2 * W + {1 + len(its.pregate_values)} * H" if projected or cell.pregates else "2 * W",
    )


def _step_argument_checks(lines: list[str], before: list[str], after: list[str], integer: bool, projected: bool) -> str:
    """What must hold of the arguments, as an expression."""
    look_up, p = "w.shape[0] == W and w.shape[1] == D", "P" if projected else "H"  # one column is read, as it lies
    checks = [
        look_up if integer else "has_unit_stride_rows(w, W, D)",
        f"has_unit_stride_rows(u, W, {p})",
        "x.shape[0] == N",
    ]
    checks += [f"is_unit_stride({name}, {'W' if name[0] == 'b' else 'H'})" for name in lines]
    checks += ["has_unit_stride_rows(hr, P, H)"] * projected
    checks += [] if integer else ["has_unit_stride_rows(x, N, D)"]
    for k, (s, n) in enumerate(zip(before, after, strict=True)):
        checks += [f"{s}.shape == {n}.shape and has_unit_stride_rows({s}[k], N, {'H' if k else p})"]
    return " and ".join(checks)


def _matvec_call(item: int, a: str, inner: str, rows: str, out: str = "B", first: str = "") -> str:
    """The recurrent product with some rows of u."""
    u, stride = "real(u.ctypes.data)", f"u.strides[0] // {item}"
    u = f"shift({u}, {first} * ({stride}))" if first else u
    return f"        product({u}, {stride}, {a}, {inner}, {out}, {rows})"


def _pregate_lines(cell: Cell, its: StepTrace, read: Callable[[str], str], item: int) -> list[str]:
    """The early gates, and the other gates' product."""
    early, late = f"{cell.pregates} * H", f"{cell.gates - cell.pregates} * H"
    text = [_matvec_call(item, "S0", "H", early), "        for j in range(H):"]
    body = ScalarCode(read)
    named = [body.emit(value) for value in (its.gated_state, *(value for _, value in its.pregate_values))]
    text += [f"            {line}" for line in body.lines]
    text += [f"            store(Q, {i} * H + j, {SCRATCH_SCOPE - i}, {value})" for i, value in enumerate(named)]
    return [*text, _matvec_call(item, "Q", "H", late, f"shift(B, {early})", early)]


def _step_input_loader(scopes: dict[str, int], bias: bool) -> Callable[[str], str]:
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
