"""Prints a short walk of a cell as a compiled function of arrays as they come: for tiny nets, without a tape.

    kernel(k, D, w, u, [bi, bh], p..., [hr], x, s..., y, n...) -> 0, or 1 where something does not fit

as in step_source.py, but x (T, N, D) or the numbers (T, N) of one-hot classes, and y (T, N, V), V the width of h. For
a hundred steps of fifty units, source.py's preparations and its table of addresses take four times as long as the walk;
here all of it is inside. The weights are turned, which spares sums across lanes. The cell's maths goes beyond H to P, a
multiple of the lanes, so that no unit is left to scalar code: what it finds and leaves there is nobody's. Rows are
walked one by one: of many, or with large weights, source.py is faster.
"""

from functools import lru_cache

from xprnn.cells.cell import Cell
from xprnn.kernels.jit.step import SCRATCH_SCOPE, StepTrace, argument_names, kernel_wrapper, signature, step_trace
from xprnn.kernels.step_plan import LayerSignature, StepFn, argument_lines
from xprnn.kernels.tracing.scalar_code import ScalarCode

__all__ = ["compiled_sequence", "sequence_source"]

CACHE_LINE = 64  # bytes: where vectors of its memory lay across two lines of the cache, a walk took a quarter longer

_SEQUENCE_TEMPLATE = '''"""Written by xprnn for a walk of the cell {cell!r}; it may be deleted at any time."""
import math
import numpy as np
from xprnn.kernels.jit.simd import ANY_SCOPE as ANY, LANES{bits}, exp64, float{bits}_pointer as real, load
from xprnn.kernels.jit.simd import offset as shift, store, tanh{bits} as tanh
from xprnn.kernels.jit.matvec import has_unit_stride_rows, transpose as turn, vecmat{bits} as turned

F = np.float{bits}
LINE = {line} // {item}


def kernel({arguments}):
    {sizes}
    if not ({checks}):
        return 1
    P, W = -(-H // LANES{bits}) * LANES{bits}, -(-{gates} * H // LANES{bits}) * LANES{bits}
    S, E = max(1, min(T, 16)), {turned_inputs}
    R = W + LANES{bits} * (1 - W // LANES{bits} % 2)  # an even number of vectors would fill few of the cache's sets
    room = np.zeros((E + {h}) * R + (S * N + 3) * (W + P) + ({states} * N + {vectors}) * P{more} + LINE, F)
    w_turned = real(room.ctypes.data + -room.ctypes.data % {line})
    u_turned = shift(w_turned, E * R)
    projected = shift(u_turned, {h} * R)
    B = shift(projected, S * N * (W + P))
    K = shift(B, W + P)
    L = shift(K, W + P)
    first = shift(L, W + P)
{queue}    {turn_inputs}turn(u, u_turned, R)
    for g in range({gates}):
        for j in range(H):
            store(K, g * H + j, ANY, {bias_added} if {sums} else {bias_input})
            store(L, g * H + j, ANY, F(0.0) if {sums} else {bias_hidden})
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
{product}
                for j in range(P):
{body}
                Y = real(y[t, r].ctypes.data)
                for j in range({h}):
                    store(Y, j, {out}, load(C0, j, {state}))
{finish}
    return 0 * room.size  # its memory is there as long as it has a name
'''


def compiled_sequence(layer: LayerSignature, integer: bool, batch_first: bool) -> StepFn | None:
    """A walk over (T, N, .) arrays, or (N, T, .), by a compiled kernel; the state may be None for zero."""
    head = ["x = x.swapaxes(0, 1)"] * batch_first + ["T = len(x)", *argument_lines(layer, integer)]
    head[head.index("n = len(x)")] = "n = x.shape[1]"
    zeros = ", ".join(f"zeros(({len(layer.parameter_names)}, n, {w}), dtype)" for w in layer.state_sizes)
    nothing = "return None" if layer.initial_state_names else f"state = ({zeros})"
    head.insert(head.index("s0 = state") if len(layer.state_sizes) == 1 else -2, f"if state is None: {nothing}")
    head += [f"out = empty(({'n, T' if batch_first else 'T, n'}, {layer.state_sizes[0]}), dtype)"]
    head += ["y = out.swapaxes(0, 1)" if batch_first else "y = out"]
    return kernel_wrapper(layer, integer, sequence_source, head, "out")


@lru_cache(maxsize=256)
def sequence_source(
    cell: Cell, bits: int, bias: bool, integer: bool, projected: bool = False
) -> tuple[str, str] | None:
    """The text of a cell's walk and numba's signature for it, or None where the cell can't be traced."""
    try:
        text = _write_sequence(cell, bits, bias, integer, projected, step_trace(cell, projected))
        return text, signature(cell, bits, bias, integer, projected, sequence=True)
    except Exception:  # whatever goes wrong with stand-ins, arrays go on, and say so if it was the cell
        return None


def _indent(depth: int, lines: list[str]) -> str:
    return "\n".join("    " * depth + line for line in lines)


def _write_sequence(cell: Cell, bits: int, bias: bool, integer: bool, projected: bool, its: StepTrace) -> str:
    lines, before, after = argument_names(cell, bias)
    states, vectors, h = len(before), [name for name in lines if name[0] == "p"], "V" if projected else "H"
    widths = [h, *["H"] * (states - 1)]
    scopes = {name: 4 + i for i, name in enumerate((*vectors, *before))}  # 0 to 3: X, B, K, L
    prepare = [f"{name.upper()} = shift(first, ({states} * N + {i}) * P)" for i, name in enumerate(vectors)]
    prepare += [f"for j in range(H):\n        store({name.upper()}, j, ANY, {name}[j])" for name in vectors]
    seats = [f"first, ({i} * N + r) * P + j, ANY" for i in range(states)]
    prepare += _state_loops(widths, [f"store({at}, {s}[k, r, j])" for at, s in zip(seats, before, strict=True)])
    finish = _state_loops(widths, [f"{n}[k, r, j] = load({at})" for at, n in zip(seats, after, strict=True)])
    return _SEQUENCE_TEMPLATE.format(
        cell=cell.name,
        bits=bits,
        item=bits // 8,
        line=CACHE_LINE,
        arguments=", ".join(("k", "D", "w", "u", *lines, *["hr"] * projected, "x", *before, "y", *after)),
        sizes="(T, N, V), H = y.shape, hr.shape[1]" if projected else "T, N, H = y.shape",
        checks=_sequence_argument_checks(cell, lines, before, after, integer, projected),
        gates=cell.gates,
        states=states,
        vectors=len(vectors),
        h=h,
        more=f" + {1 + len(its.pregate_values)} * P" * (projected or cell.pregates > 0) + " + H * P" * projected,
        queue=_scratch(cell, states, len(vectors), projected, 1 + len(its.pregate_values)),
        sums=its.summed_condition,
        turned_inputs="0" if integer else "D",
        turn_inputs="" if integer else "turn(w, w_turned, R)\n    ",
        bias_added="bi[g * H + j] + bh[g * H + j]" if bias else "F(0.0)",
        bias_input="bi[g * H + j]" if bias else "F(0.0)",
        bias_hidden="bh[g * H + j]" if bias else "F(0.0)",
        prepare=_indent(1, prepare),
        project=_indent(4, _input_projection(cell, integer)),
        running=_indent(4, [f"C{i} = shift(first, ({i} * N + r) * P)" for i in range(states)]),
        product=_indent(4, _recurrent_product(cell, bits, scopes, its, h)),
        body=_indent(4, _step_body(before, bits, scopes, its, projected)),
        out=4 + len(scopes),
        state=scopes["s0"],
        finish=_indent(1, finish),
    )


def _input_projection(cell: Cell, integer: bool) -> list[str]:
    """X = x W' of one row."""
    if not integer:
        return ["turned(w_turned, R, real(x[t, r].ctypes.data), D, X, W)"]
    text = ["v = x[t, r]", "if v < 0 or v >= D:", "    return 1", f"for g in range({cell.gates}):"]
    return [*text, "    for j in range(H):", "        store(X, g * H + j, ANY, w[g * H + j, v])"]


def _state_loops(widths: list[str], lines: list[str]) -> list[str]:
    """A line for each state, over rows and units."""
    text, last = ["for r in range(N):"], ""
    for width, line in zip(widths, lines, strict=True):
        text += [f"    for j in range({width}):"] * (width != last)
        text, last = [*text, f"        {line}"], width
    return text


def _scratch(cell: Cell, states: int, vectors: int, projected: bool, rows: int) -> str:
    """Room for q and early gates' values, or for h before its projection and for what projects it."""
    if not projected and not cell.pregates:
        return ""
    text = [f"Q = shift(first, ({states} * N + {vectors}) * P)"]
    text += [f"hr_turned = shift(Q, {rows} * P)", "turn(hr, hr_turned, P)"] * projected
    return _indent(1, text) + "\n"


def _recurrent_product(cell: Cell, bits: int, scopes: dict[str, int], its: StepTrace, h: str) -> list[str]:
    """The recurrent product; with early gates theirs, these gates, and that of the others."""
    if not cell.pregates:
        return [f"turned(u_turned, R, C0, {h}, B, W)"]
    body = ScalarCode(lambda name: _load_sequence_input(name, scopes))
    named = [body.emit(value) for value in (its.gated_state, *(value for _, value in its.pregate_values))]
    stores = [f"store(Q, {i} * P + j, {SCRATCH_SCOPE - i}, {value})" for i, value in enumerate(named)]
    widths = [f"-(-{n} * H // LANES{bits}) * LANES{bits}" for n in (cell.pregates, cell.gates - cell.pregates)]
    first = f"{cell.pregates} * H"
    text = [f"turned(u_turned, R, C0, H, B, {widths[0]})", "for j in range(P):"]
    text += [f"    {line}" for line in (*body.lines, *stores)]
    return [*text, f"turned(shift(u_turned, {first}), R, Q, H, shift(B, {first}), {widths[1]})"]


def _step_body(before: list[str], bits: int, scopes: dict[str, int], its: StepTrace, projected: bool) -> list[str]:
    """The statements of the step's loop, and where h is projected what comes behind it."""
    passed = {f"x{k}": f"load(Q, {i} * P + j, {SCRATCH_SCOPE - i})" for i, (k, _) in enumerate(its.pregate_values, 1)}
    body = ScalarCode(lambda name: passed.get(name) or _load_sequence_input(name, scopes))
    values = body.emit_all(its.new_states)
    written = [f"store(C{i}, j, {scopes[s]}, {v})" for i, (s, v) in enumerate(zip(before, values, strict=True))]
    if projected:
        written[0] = f"store(Q, j, {SCRATCH_SCOPE}, {values[0]})"
    text = [f"    {line}" for line in (*body.lines, *written)]
    return [*text, f"turned(hr_turned, P, Q, H, C0, -(-V // LANES{bits}) * LANES{bits})"] if projected else text


def _sequence_argument_checks(
    cell: Cell, lines: list[str], before: list[str], after: list[str], integer: bool, projected: bool
) -> str:
    """What must hold of the arguments, as an expression."""
    rows, h = f"{cell.gates} * H", "V" if projected else "H"
    checks = [f"w.shape == ({rows}, D)", f"u.shape == ({rows}, {h})", "x.shape[0] == T", "x.shape[1] == N"]
    checks += ["hr.shape[0] == V"] * projected
    checks += [f"{name}.shape[0] == {'H' if name[0] == 'p' else rows}" for name in lines]
    checks += [] if integer else ["(T == 0 or has_unit_stride_rows(x[0], N, D))"]
    return " and ".join([*checks, *(f"{s}.shape == {n}.shape" for s, n in zip(before, after, strict=True))])


def _load_sequence_input(name: str, scopes: dict[str, int]) -> str:
    """How a step reads an input of the trace; every array is a scope of its own (lanes.py)."""
    letter, k = name[0], name[1:]
    if letter in "sp":
        return f"load({'C' + k if letter == 's' else name.upper()}, j, {scopes[name]})"
    at = f"{k} * H + j"
    x, h = f"load(X, {at}, 0) + load(K, {at}, 2)", f"load(B, {at}, 1)"
    return {"g": f"({x}) + {h}", "x": x, "h": f"{h} + load(L, {at}, 3)"}[letter]
