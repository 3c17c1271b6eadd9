"""Prints the compiled kernel for one time step of a layer, and the Python function that calls it.

    kernel(k, D, w, u, [bi, bh], p..., [hr], x, s..., y, n...) -> 0, or 1 if a shape or memory order does not fit

for layer k of the stack: x (N, D) or integers (N,), states s and n (L, N, H) before and after the step, y (N, H) the
output, and the parameters as stored. The Python function returns None if the arguments do not fit. The caller then
takes the validated path, which raises the error.
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


class _KernelCache(dict[Any, Any]):
    """Compiled kernels by dtype. Raises KeyError for a dtype without one."""

    def __init__(self, layer: LayerSignature, integer: bool, source: Callable[..., Any]) -> None:
        self.layer, self.integer, self.source = layer, integer, source

    def __missing__(self, dtype: Any) -> Any:
        layer = self.layer
        printed = self.source(layer.cell, DTYPE_BITS[dtype], layer.bias, self.integer, layer.projection_size > 0)
        if printed is None or not compile_cache.can_compile(*printed):
            raise KeyError(dtype)
        self[dtype] = compile_cache.compile_kernel(*printed)
        return self[dtype]


def compiled_step(layer: LayerSignature, integer: bool) -> StepFn | None:
    """Return the function that runs a step by a compiled kernel, or None if the cell cannot be compiled."""
    return kernel_wrapper(
        layer,
        integer,
        step_source,
        [*argument_lines(layer, integer), f"y = empty((n, {layer.state_sizes[0]}), dtype)"],
        "y",
    )


def kernel_wrapper(
    layer: LayerSignature, integer: bool, source: Callable[..., Any], head: list[str], result: str
) -> StepFn | None:
    """Make the Python function around a compiled kernel.

    Args:
        layer: the layer.
        integer: x holds integers.
        source: step_source or sequence_source.
        head: first lines of the function, which set x, y, n, dtype and the states s0, s1.
        result: the expression that the function returns as y.

    Returns:
        The function (params, x, state) -> (y, new state), or None if the cell cannot be compiled.
    """
    printed = compile_cache.numba_available() and source(layer.cell, 32, layer.bias, integer, layer.projection_size > 0)
    if not printed:
        return None
    first, later = _KernelCache(layer, integer, source), _KernelCache(layer, False, source)
    scope = {"first": first, "later": later, "int64": np.int64}
    num_layers, after = len(layer.parameter_names), [f"n{k}" for k in range(len(layer.state_sizes))]
    before = [f"s{k}" for k in range(len(after))]
    weights = [[f"w{j}_{k}" for j in range(len(names))] for k, names in enumerate(layer.parameter_names)]
    parameters = dict(zip(chain(*weights), chain(*layer.parameter_names), strict=True))
    lines = [
        *head,
        *initial_state_checks(layer),
        "kernel = first[dtype]",
        *(f"{variable} = params[{name!r}]" for variable, name in parameters.items()),
    ]
    # numba treats a masked array as a plain one and would ignore its mask.
    classes = " is ".join(f"{name}.__class__" for name in (*before, *parameters))
    lines += [f"if not ({classes} is ndarray): return None"]
    lines += ["x = x.astype(int64, casting='safe', copy=False)"] if integer else []
    lines += [
        f"{name} = empty(({num_layers}, n, {size}), dtype)" for name, size in zip(after, layer.state_sizes, strict=True)
    ]
    x, d = "x", layer.input_size
    for k, variables in enumerate(weights):
        # y may be the x of the next layer: the kernel reads a row before it writes it.
        lines += [f"if kernel({', '.join((str(k), str(d), *variables, x, *before, 'y', *after))}): return None"]
        lines += ["kernel = later[dtype]"] if integer and k == 0 and num_layers > 1 else []
        x, d = "y", layer.state_sizes[0]
    return compile_python([*lines, f"return {result}, {result_expression(layer)}"], scope)


# Alias scope of Q: the gated state, or h before its projection. The values of the pregates have the scopes below it.
SCRATCH_SCOPE = 63
_STEP_TEMPLATE = '''"""Step kernel printed by xprnn for the cell {cell!r} (a cache entry, safe to delete)"""
import math
import numpy as np
from xprnn.kernels.jit.matvec import has_unit_stride_rows, is_unit_stride, matvec{bits} as matvec
from xprnn.kernels.jit.simd import {any_scope}exp64, float{bits}_pointer as float_pointer, load, offset, store
from xprnn.kernels.jit.simd import tanh{bits} as tanh

F = np.float{bits}


def kernel({arguments}):
    {sizes}
    if not ({checks}):
        return 1
    scratch = np.empty({scratch_size}, F)
    X = float_pointer(scratch.ctypes.data)
    B = offset(X, W)
'''


class StepTrace(NamedTuple):
    """Traced step of a cell."""

    new_states: tuple[Any, ...]
    summed_condition: str  # expression in g: gate g is used only as the sum x + h
    pregate_values: tuple[tuple[int, Any], ...] = ()  # (number, value) of the pregates that the step reads
    gated_state: Any = None


def step_trace(cell: Cell, projected: bool) -> StepTrace:
    """Trace a cell's pregates and its step."""
    new, _, summed_gates = trace_step(cell, TraceGraph())
    used = set().union(*(input_names(v) for v in new))
    if projected and (cell.pregates or "s0" in used):
        raise UntraceableError("an element of a projected h")
    if not cell.pregates:
        return StepTrace(new, f"g < {summed_gates}")
    values, gated_state, is_summed = trace_pregates(cell, TraceGraph())
    step_inputs = tuple((k, v) for k, v in enumerate(values[: cell.pregates]) if f"x{k}" in used)
    condition = f"g < {summed_gates}" if is_summed else f"{cell.pregates} <= g < {summed_gates}"
    return StepTrace(new, condition, step_inputs, gated_state)


@lru_cache(maxsize=256)
def step_source(cell: Cell, bits: int, bias: bool, integer: bool, projected: bool = False) -> tuple[str, str] | None:
    """Print the source of a cell's step and its numba signature; None if the cell cannot be traced."""
    try:
        text = _write_step(cell, bits, bias, integer, projected, step_trace(cell, projected))
        return text, signature(cell, bits, bias, integer, projected)
    except Exception:  # tracing runs user code; the reference step runs it too and reports its errors
        return None


def argument_names(cell: Cell, bias: bool) -> tuple[list[str], list[str], list[str]]:
    """Return the names of the 1-D parameters (biases and vectors), of the states before and of the states after."""
    states = range(len(cell.states))
    vectors = [*(["bi", "bh"] if bias else []), *(f"p{k}" for k in range(len(cell.vectors)))]
    return vectors, [f"s{k}" for k in states], [f"n{k}" for k in states]


def signature(cell: Cell, bits: int, bias: bool, integer: bool, projected: bool, *, sequence: bool = False) -> str:
    """Return numba's signature. Inputs may be strided and read-only; outputs are C-contiguous."""
    vectors, before, after = argument_names(cell, bias)

    def readonly(rank: int) -> str:
        return f"Array(float{bits}, {rank}, 'A', True)"

    x = f"Array(int64, {1 + sequence}, 'A', True)" if integer else readonly(2 + sequence)
    inputs = [readonly(2), readonly(2), *[readonly(1)] * len(vectors), *[readonly(2)] * projected, x]
    inputs += [readonly(3)] * len(before)
    outputs = [
        f"Array(float{bits}, 3, 'A')" if sequence else f"Array(float{bits}, 2, 'C')",
        *[f"Array(float{bits}, 3, 'C')"] * len(after),
    ]
    return f"int64(int64, int64, {', '.join((*inputs, *outputs))})"


def _write_step(cell: Cell, bits: int, bias: bool, integer: bool, projected: bool, trace: StepTrace) -> str:
    vectors, before, after = argument_names(cell, bias)
    text, item = [_step_header(cell, bits, bias, integer, projected, trace)], bits // 8
    text += ["    Q = offset(B, W)"] * (projected or cell.pregates > 0)
    text += [f"    {name.upper()} = float_pointer({name}.ctypes.data)" for name in vectors]
    text += ["    for r in range(N):"]
    text += [f"        {s.upper()} = float_pointer({s}[k, r].ctypes.data)" for s in before]
    text += [f"        {n.upper()} = float_pointer({n}[k, r].ctypes.data)" for n in after]
    text += ["        Y = float_pointer(y[r].ctypes.data)"]
    if integer:
        text += ["        if x[r] < 0 or x[r] >= D:", "            return 1"]
        text += ["        for j in range(W):", "            store(X, j, 0, w[j, x[r]])"]
    else:
        w, x = f"float_pointer(w.ctypes.data), w.strides[0] // {item}", "float_pointer(x[r].ctypes.data)"
        text += [f"        matvec({w}, {x}, D, X, W)"]
    scopes = {name: 2 + i for i, name in enumerate((*vectors, *before, "y", *after))}
    read = _step_input_loader(scopes, bias)
    text += (
        _pregate_lines(cell, trace, read, item)
        if cell.pregates
        else [_matvec_call(item, "S0", "P" if projected else "H", "W")]
    )
    pregate_reads = {
        f"x{k}": f"load(Q, {i} * H + j, {SCRATCH_SCOPE - i})" for i, (k, _) in enumerate(trace.pregate_values, 1)
    }
    body = ScalarCode(lambda name: pregate_reads.get(name) or read(name))
    values = body.emit_all(trace.new_states)
    stores = [f"store({n.upper()}, j, {scopes[n]}, {v})" for n, v in zip(after, values, strict=True)]
    if projected:
        stores[0] = f"store(Q, j, {SCRATCH_SCOPE}, {values[0]})"
    else:
        stores = [f"store(Y, j, {scopes['y']}, {values[0]})", *stores]
    text += ["        for j in range(H):", *(f"            {line}" for line in (*body.lines, *stores))]
    if projected:
        text += [f"        matvec(float_pointer(hr.ctypes.data), hr.strides[0] // {item}, Q, H, Y, P)"]
        text += ["        for j in range(P):", "            store(N0, j, ANY_SCOPE, load(Y, j, ANY_SCOPE))"]
    # The use of `scratch` in the last line keeps its memory alive while the pointers are in use.
    return "\n".join((*text, "    return 0 * scratch.size", ""))


def _step_header(cell: Cell, bits: int, bias: bool, integer: bool, projected: bool, trace: StepTrace) -> str:
    """Print the imports, the argument checks and the allocation of the workspace."""
    vectors, before, after = argument_names(cell, bias)
    sizes = f"(N, H), W = y.shape, {cell.gates} * y.shape[1]"
    if projected:
        sizes = f"(N, P), H, W = y.shape, hr.shape[1], {cell.gates} * hr.shape[1]"
    has_scratch_state = projected or cell.pregates
    return _STEP_TEMPLATE.format(
        cell=cell.name,
        bits=bits,
        any_scope="ANY_SCOPE, " if projected else "",
        arguments=", ".join(("k", "D", "w", "u", *vectors, *["hr"] * projected, "x", *before, "y", *after)),
        sizes=sizes,
        checks=_step_argument_checks(vectors, before, after, integer, projected),
        scratch_size=f"2 * W + {1 + len(trace.pregate_values)} * H" if has_scratch_state else "2 * W",
    )


def _step_argument_checks(
    vectors: list[str], before: list[str], after: list[str], integer: bool, projected: bool
) -> str:
    """Print the expression that is true if all shapes and memory orders fit."""
    p = "P" if projected else "H"
    checks = [  # for integer x, w is read element by element, so its strides do not matter
        "w.shape[0] == W and w.shape[1] == D" if integer else "has_unit_stride_rows(w, W, D)",
        f"has_unit_stride_rows(u, W, {p})",
        "x.shape[0] == N",
    ]
    checks += [f"is_unit_stride({name}, {'W' if name[0] == 'b' else 'H'})" for name in vectors]
    checks += ["has_unit_stride_rows(hr, P, H)"] * projected
    checks += [] if integer else ["has_unit_stride_rows(x, N, D)"]
    for k, (s, n) in enumerate(zip(before, after, strict=True)):
        checks += [f"{s}.shape == {n}.shape and has_unit_stride_rows({s}[k], N, {'H' if k else p})"]
    return " and ".join(checks)


def _matvec_call(item: int, a: str, inner: str, rows: str, out: str = "B", first: str = "") -> str:
    """Print the recurrent product with the rows of u from `first` on."""
    u, stride = "float_pointer(u.ctypes.data)", f"u.strides[0] // {item}"
    u = f"offset({u}, {first} * ({stride}))" if first else u
    return f"        matvec({u}, {stride}, {a}, {inner}, {out}, {rows})"


def _pregate_lines(cell: Cell, trace: StepTrace, read: Callable[[str], str], item: int) -> list[str]:
    """Print the pregates, and the recurrent product of the other gates."""
    first_width, second_width = f"{cell.pregates} * H", f"{cell.gates - cell.pregates} * H"
    text = [_matvec_call(item, "S0", "H", first_width), "        for j in range(H):"]
    body = ScalarCode(read)
    values = [body.emit(value) for value in (trace.gated_state, *(value for _, value in trace.pregate_values))]
    text += [f"            {line}" for line in body.lines]
    text += [f"            store(Q, {i} * H + j, {SCRATCH_SCOPE - i}, {value})" for i, value in enumerate(values)]
    return [*text, _matvec_call(item, "Q", "H", second_width, f"offset(B, {first_width})", first_width)]


def _step_input_loader(scopes: dict[str, int], bias: bool) -> Callable[[str], str]:
    """Return the function that prints how the step reads an input of the trace. Every array has its alias scope."""

    def read(name: str) -> str:
        letter, k = name[0], name[1:]
        if letter in "sp":
            return f"load({name.upper()}, j, {scopes[name]})"
        index = f"{k} * H + j"
        x, h = f"load(X, {index}, 0)", f"load(B, {index}, 1)"
        if bias:
            bi, bh = (f"load({b.upper()}, {index}, {scopes[b]})" for b in ("bi", "bh"))
            return {"g": f"({x} + ({bi} + {bh})) + {h}", "x": f"{x} + {bi}", "h": f"{h} + {bh}"}[letter]
        return {"g": f"{x} + {h}", "x": x, "h": h}[letter]

    return read
