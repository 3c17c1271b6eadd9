"""Prints the compiled scan for short sequences and small layers without a tape, as one function of the plain arrays.

    kernel(k, D, w, u, [bi, bh], p..., [hr], x, s..., y, n...) -> 0, or 1 if a shape or memory order does not fit

as in step.py, but with x (T, N, D) or integers (T, N), and y (T, N, V), where V is the width of h. For a hundred steps
of fifty units, the argument preparation of scan_plan.py would take four times as long as the scan itself. This kernel
prepares everything inside. It transposes the weights, which replaces horizontal additions by broadcasts. The cell is
evaluated for P units, H rounded up to whole vectors, so that no scalar remainder loop is left; the units beyond H are
padding and never read. Rows are processed one by one. For many rows or large weights, forward_driver.py's kernel is
faster.
"""

from functools import lru_cache

from xprnn.cells.cell import Cell
from xprnn.kernels.jit.step import SCRATCH_SCOPE, StepTrace, argument_names, kernel_wrapper, signature, step_trace
from xprnn.kernels.step_plan import LayerSignature, StepFn, argument_lines
from xprnn.kernels.tracing.scalar_code import ScalarCode

__all__ = ["compiled_sequence", "sequence_source"]

CACHE_LINE = 64  # bytes: with vectors that straddle two cache lines, a scan took a quarter longer

# w_t, u_t: transposed weights, rows of R elements. projected: x W' of a chunk of S steps. B: h U'. K, L: the biases
# added to x W' and, for gates that use x and h apart, to h U'. states: vectors of the cell and running states.
_SEQUENCE_TEMPLATE = '''"""Scan kernel printed by xprnn for the cell {cell!r} (a cache entry, safe to delete)"""
import math
import numpy as np
from xprnn.kernels.jit.matvec import has_unit_stride_rows, transpose, vecmat{bits} as vecmat
from xprnn.kernels.jit.simd import ANY_SCOPE, LANES{bits} as LANES, exp64, float{bits}_pointer as float_pointer, load
from xprnn.kernels.jit.simd import offset, store, tanh{bits} as tanh

F = np.float{bits}
LINE = {line} // {item}


def kernel({arguments}):
    {sizes}
    if not ({checks}):
        return 1
    P, W = -(-H // LANES) * LANES, -(-{gates} * H // LANES) * LANES
    S, E = max(1, min(T, 16)), {transposed_inputs}
    R = W + LANES * (1 - W // LANES % 2)  # an odd number of vectors: an even one would map to few cache sets
    scratch = np.zeros((E + {h}) * R + (S * N + 3) * (W + P) + ({states} * N + {vectors}) * P{extra_scratch} + LINE, F)
    w_t = float_pointer(scratch.ctypes.data + -scratch.ctypes.data % {line})
    u_t = offset(w_t, E * R)
    projected = offset(u_t, {h} * R)
    B = offset(projected, S * N * (W + P))
    K = offset(B, W + P)
    L = offset(K, W + P)
    states = offset(L, W + P)
{allocate_scratch_state}    {transpose_inputs}transpose(u, u_t, R)
    for g in range({gates}):
        for j in range(H):
            store(K, g * H + j, ANY_SCOPE, {bias_added} if {summed} else {bias_input})
            store(L, g * H + j, ANY_SCOPE, F(0.0) if {summed} else {bias_hidden})
{prepare}
    for t0 in range(0, T, S):
        for t in range(t0, min(t0 + S, T)):
            for r in range(N):
                X = offset(projected, ((t - t0) * N + r) * (W + P))
{project}
        for t in range(t0, min(t0 + S, T)):
            for r in range(N):
                X = offset(projected, ((t - t0) * N + r) * (W + P))
{running_states}
{recurrent_product}
                for j in range(P):
{body}
                Y = float_pointer(y[t, r].ctypes.data)
                for j in range({h}):
                    store(Y, j, {y_scope}, load(C0, j, {h_scope}))
{finish}
    return 0 * scratch.size  # this use keeps the memory alive while the pointers are in use
'''


def compiled_sequence(layer: LayerSignature, integer: bool, batch_first: bool) -> StepFn | None:
    """Return the function that scans x (T, N, .), or (N, T, .) if `batch_first`, by a compiled kernel.

    Its state may be None for zeros. The result is None if the cell cannot be compiled.
    """
    head = ["x = x.swapaxes(0, 1)"] * batch_first + ["T = len(x)", *argument_lines(layer, integer)]
    head[head.index("n = len(x)")] = "n = x.shape[1]"
    zeros = ", ".join(f"zeros(({len(layer.parameter_names)}, n, {w}), dtype)" for w in layer.state_sizes)
    default_state = "return None" if layer.initial_state_names else f"state = ({zeros})"
    head.insert(head.index("s0 = state") if len(layer.state_sizes) == 1 else -2, f"if state is None: {default_state}")
    head += [f"out = empty(({'n, T' if batch_first else 'T, n'}, {layer.state_sizes[0]}), dtype)"]
    head += ["y = out.swapaxes(0, 1)" if batch_first else "y = out"]
    return kernel_wrapper(layer, integer, sequence_source, head, "out")


@lru_cache(maxsize=256)
def sequence_source(
    cell: Cell, bits: int, bias: bool, integer: bool, projected: bool = False
) -> tuple[str, str] | None:
    """Print the source of a cell's scan and its numba signature; None if the cell cannot be traced."""
    try:
        text = _write_sequence(cell, bits, bias, integer, projected, step_trace(cell, projected))
        return text, signature(cell, bits, bias, integer, projected, sequence=True)
    except Exception:  # tracing runs user code; the reference scan runs it too and reports its errors
        return None


def _indent(depth: int, lines: list[str]) -> str:
    return "\n".join("    " * depth + line for line in lines)


def _write_sequence(cell: Cell, bits: int, bias: bool, integer: bool, projected: bool, trace: StepTrace) -> str:
    names, before, after = argument_names(cell, bias)
    num_states, vectors, h = len(before), [name for name in names if name[0] == "p"], "V" if projected else "H"
    widths, num_values = [h, *["H"] * (num_states - 1)], 1 + len(trace.pregate_values)
    has_scratch_state = projected or cell.pregates > 0
    scopes = {name: 4 + i for i, name in enumerate((*vectors, *before))}  # 0 to 3: X, B, K, L
    prepare = [f"{name.upper()} = offset(states, ({num_states} * N + {i}) * P)" for i, name in enumerate(vectors)]
    prepare += [f"for j in range(H):\n        store({name.upper()}, j, ANY_SCOPE, {name}[j])" for name in vectors]
    elements = [f"states, ({i} * N + r) * P + j, ANY_SCOPE" for i in range(num_states)]
    prepare += _state_loops(widths, [f"store({at}, {s}[k, r, j])" for at, s in zip(elements, before, strict=True)])
    finish = _state_loops(widths, [f"{n}[k, r, j] = load({at})" for at, n in zip(elements, after, strict=True)])
    return _SEQUENCE_TEMPLATE.format(
        cell=cell.name,
        bits=bits,
        item=bits // 8,
        line=CACHE_LINE,
        arguments=", ".join(("k", "D", "w", "u", *names, *["hr"] * projected, "x", *before, "y", *after)),
        sizes="(T, N, V), H = y.shape, hr.shape[1]" if projected else "T, N, H = y.shape",
        checks=_sequence_argument_checks(cell, names, before, after, integer, projected),
        gates=cell.gates,
        states=num_states,
        vectors=len(vectors),
        h=h,
        extra_scratch=f" + {num_values} * P" * has_scratch_state + " + H * P" * projected,
        allocate_scratch_state=_allocate_scratch_state(cell, num_states, len(vectors), projected, num_values),
        summed=trace.summed_condition,
        transposed_inputs="0" if integer else "D",
        transpose_inputs="" if integer else "transpose(w, w_t, R)\n    ",
        bias_added="bi[g * H + j] + bh[g * H + j]" if bias else "F(0.0)",
        bias_input="bi[g * H + j]" if bias else "F(0.0)",
        bias_hidden="bh[g * H + j]" if bias else "F(0.0)",
        prepare=_indent(1, prepare),
        project=_indent(4, _input_projection(cell, integer)),
        running_states=_indent(4, [f"C{i} = offset(states, ({i} * N + r) * P)" for i in range(num_states)]),
        recurrent_product=_indent(4, _recurrent_product(cell, scopes, trace, h)),
        body=_indent(4, _step_body(before, scopes, trace, projected)),
        y_scope=4 + len(scopes),
        h_scope=scopes["s0"],
        finish=_indent(1, finish),
    )


def _input_projection(cell: Cell, integer: bool) -> list[str]:
    """Print X = x W' of one row."""
    if not integer:
        return ["vecmat(w_t, R, float_pointer(x[t, r].ctypes.data), D, X, W)"]
    text = ["v = x[t, r]", "if v < 0 or v >= D:", "    return 1", f"for g in range({cell.gates}):"]
    return [*text, "    for j in range(H):", "        store(X, g * H + j, ANY_SCOPE, w[g * H + j, v])"]


def _state_loops(widths: list[str], lines: list[str]) -> list[str]:
    """Print the loops over rows and units of the states, one line for each state."""
    text, last = ["for r in range(N):"], ""
    for width, line in zip(widths, lines, strict=True):
        text += [f"    for j in range({width}):"] * (width != last)
        text, last = [*text, f"        {line}"], width
    return text


def _allocate_scratch_state(cell: Cell, num_states: int, num_vectors: int, projected: bool, num_values: int) -> str:
    """Print the pointer Q of the gated state and the pregates, or of h before its projection and of the projection."""
    if not projected and not cell.pregates:
        return ""
    text = [f"Q = offset(states, ({num_states} * N + {num_vectors}) * P)"]
    text += [f"hr_t = offset(Q, {num_values} * P)", "transpose(hr, hr_t, P)"] * projected
    return _indent(1, text) + "\n"


def _recurrent_product(cell: Cell, scopes: dict[str, int], trace: StepTrace, h: str) -> list[str]:
    """Print the recurrent product; for a cell with pregates theirs, the pregates, and that of the other gates."""
    if not cell.pregates:
        return [f"vecmat(u_t, R, C0, {h}, B, W)"]
    body = ScalarCode(lambda name: _load_sequence_input(name, scopes))
    values = [body.emit(value) for value in (trace.gated_state, *(value for _, value in trace.pregate_values))]
    stores = [f"store(Q, {i} * P + j, {SCRATCH_SCOPE - i}, {value})" for i, value in enumerate(values)]
    widths = [f"-(-{n} * H // LANES) * LANES" for n in (cell.pregates, cell.gates - cell.pregates)]
    first = f"{cell.pregates} * H"
    text = [f"vecmat(u_t, R, C0, H, B, {widths[0]})", "for j in range(P):"]
    text += [f"    {line}" for line in (*body.lines, *stores)]
    return [*text, f"vecmat(offset(u_t, {first}), R, Q, H, offset(B, {first}), {widths[1]})"]


def _step_body(before: list[str], scopes: dict[str, int], trace: StepTrace, projected: bool) -> list[str]:
    """Print the body of the loop over units, and the projection of h after the loop."""
    pregate_reads = {
        f"x{k}": f"load(Q, {i} * P + j, {SCRATCH_SCOPE - i})" for i, (k, _) in enumerate(trace.pregate_values, 1)
    }
    body = ScalarCode(lambda name: pregate_reads.get(name) or _load_sequence_input(name, scopes))
    values = body.emit_all(trace.new_states)
    stores = [f"store(C{i}, j, {scopes[s]}, {v})" for i, (s, v) in enumerate(zip(before, values, strict=True))]
    if projected:
        stores[0] = f"store(Q, j, {SCRATCH_SCOPE}, {values[0]})"
    text = [f"    {line}" for line in (*body.lines, *stores)]
    return [*text, "vecmat(hr_t, P, Q, H, C0, -(-V // LANES) * LANES)"] if projected else text


def _sequence_argument_checks(
    cell: Cell, names: list[str], before: list[str], after: list[str], integer: bool, projected: bool
) -> str:
    """Print the expression that is true if all shapes and memory orders fit."""
    rows, h = f"{cell.gates} * H", "V" if projected else "H"
    checks = [f"w.shape == ({rows}, D)", f"u.shape == ({rows}, {h})", "x.shape[0] == T", "x.shape[1] == N"]
    checks += ["hr.shape[0] == V"] * projected
    checks += [f"{name}.shape[0] == {'H' if name[0] == 'p' else rows}" for name in names]
    checks += [] if integer else ["(T == 0 or has_unit_stride_rows(x[0], N, D))"]
    return " and ".join([*checks, *(f"{s}.shape == {n}.shape" for s, n in zip(before, after, strict=True))])


def _load_sequence_input(name: str, scopes: dict[str, int]) -> str:
    """Print how a step reads an input of the trace. Every array has its alias scope."""
    letter, k = name[0], name[1:]
    if letter in "sp":
        return f"load({'C' + k if letter == 's' else name.upper()}, j, {scopes[name]})"
    index = f"{k} * H + j"
    x, h = f"load(X, {index}, 0) + load(K, {index}, 2)", f"load(B, {index}, 1)"
    return {"g": f"({x}) + {h}", "x": x, "h": f"{h} + load(L, {index}, 3)"}[letter]
