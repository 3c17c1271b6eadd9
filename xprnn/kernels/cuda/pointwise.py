"""Prints a cell's two CUDA kernels from its trace: all that one step does beside its matrix product.

Each thread has one unit of one row; i counts them. With W = G*H, forward:

    X (T,N,W)  in: the projection, with the recurrent product added where `mixed` is false; out: the first saved values
    B (N,W)    the product, where some gate keeps its two halves apart (mixed)      Vj (T,N,H)  the other saved values
    K (W,)     b_ih, and b_hh where the two are added before anything else          L (W,)      b_hh elsewhere
    Sk, Mk     the states before and after each step, sk and mk numbers apart       Ek (N,H)    where a reset leads
    Y (T,N,H)  the output, where it is not M0    pk (H,)  the cell's vectors

and backward, where the product with U is added to D0 between two launches:

    X (T,N,W)  dx        Y (T,N,W)  dh, or X     Dk (N,H)  the states' adjoints     Ek (N,H)  the home states'
    O (T,N,H)  dy        Ik (T,N,H) what the caller sends into state k              Pk (N,H)  the vectors'
    G (T,N,W)  the first saved values; Vj, Sk, Mk  the tape

An array that may be missing is a null pointer. `next` is the step that the walk forward takes after this one: a reset
is done at the end of the step before, so that the product finds the state that it starts from.
"""

from functools import lru_cache
from typing import Any, NamedTuple

from xprnn.cells.cell import Cell
from xprnn.kernels.tracing.cell_trace import assign_buffers, trace_backward, trace_step
from xprnn.kernels.tracing.graph import TraceGraph
from xprnn.kernels.tracing.scalar_code import OP_TEMPLATES, ScalarCode

__all__ = ["PointwiseKernels", "pointwise_kernels"]

_SCALARS = ("t", "T", "N", "H", "W", "turned", "keep", "from")
_PROLOGUE = """// Written by xprnn for the cell {cell!r}; `t` and the sizes are 64 bits wide, so no index can overflow.
typedef {real} real;
typedef long long size;
typedef unsigned char flag;

"""
_KERNEL_PROLOGUE = """extern "C" __global__ void {name}(const {struct} a) {{
  const size i = (size)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= a.N * a.H) return;
  const size r = i >> 32 ? i / a.H : (unsigned)i / (unsigned)a.H, j = i - r * a.H;
  const size n = a.t * a.N + r, m = n * a.H + j, x = (n - a.from * a.N) * a.W + j;
  const size next = a.turned ? a.t - 1 : a.t + 1;
  const bool more = next >= 0 && next < a.T;
  const bool on = !a.active || a.active[n];
"""
_MATH_FUNCTIONS = ["cos", "cosh", "exp", "expm1", "log", "log1p", "sin", "sinh", "sqrt", "tanh"]


class PointwiseKernels(NamedTuple):
    """A cell's kernels, `forward_step` and `backward_step`, and how to call them."""

    source: str
    forward_fields: tuple[str, ...]  # the fields of forward_step's argument, 8 bytes each
    backward_fields: tuple[str, ...]
    separate_recurrent: bool  # some gate keeps its two halves apart
    summed_gates: int  # the first gates, of which only x + h is used
    saved_buffers: tuple[str, ...]  # where each entry of `saved` is: Xk, Vj, Mk (after) or Sk (before)
    dx_is_dh: bool  # dh is dx, gate by gate


class _CudaScalarCode(ScalarCode):
    """A body in CUDA C++. Functions are called by their C names: `tanhf` for float32, never a double on the way."""

    assignment_template = "const auto {0} = {1};"
    cast_template = "real({0})"

    def __init__(self, read: Any, bits: int) -> None:
        super().__init__(read)
        f = "f" if bits == 32 else ""
        self.op_templates = OP_TEMPLATES | {name: f"{name}{f}({{0}})" for name in _MATH_FUNCTIONS}
        self.op_templates |= {
            "abs": f"fabs{f}({{0}})",
            "maximum": "{0} > {1} || {0} != {0} ? {0} : {1}",
            "minimum": "{0} < {1} || {0} != {0} ? {0} : {1}",
            "pow": f"pow{f}({{0}}, {{1}})",
            "sign": "{0} > real(0) ? real(1) : {0} < real(0) ? real(-1) : {0}",
            "where": "{0} ? {1} : {2}",
        }

    @staticmethod
    def format_constant(number: float) -> str:
        """A constant of the arrays' dtype."""
        number = float(number)
        if number - number == 0:
            return f"real({number!r})"
        bits = "7ff8" if number != number else "7ff0" if number > 0 else "fff0"
        return f"real(__longlong_as_double(0x{bits}000000000000ll))"


@lru_cache(maxsize=256)
def pointwise_kernels(cell: Cell, bits: int) -> PointwiseKernels | None:
    """The cell's kernels for float32 or float64, or None where it can't be traced."""
    try:
        new, saved, added = trace_step(cell, graph := TraceGraph())
        slots, own = assign_buffers(cell, graph, new, saved)
        mixed = added < cell.gates
        forward, fields = _forward_source(cell, bits, mixed, new, own)
        backward, fields_back, same = _backward_source(cell, bits, slots)
    except Exception:  # whatever goes wrong with stand-ins, the generic scan goes on, and says so if it was the cell
        return None
    head = _PROLOGUE.format(cell=cell.name, real="float" if bits == 32 else "double")
    return PointwiseKernels(head + forward + "\n" + backward, fields, fields_back, mixed, added, slots, same)


def _kernel_source(name: str, strides: list[str], pointers: list[str], lines: list[str]) -> tuple[str, tuple[str, ...]]:
    """The text of a kernel and of its argument, and the argument's fields."""
    struct, numbers, own = f"{name}_arguments", (*_SCALARS, *strides), ", ".join(f"*{p}" for p in pointers)
    text = f"struct {struct} {{\n  size {', '.join(numbers)};\n  real {own};\n  const flag *active, *reset;\n}};\n\n"
    fields = (*numbers, *pointers, "active", "reset")
    return text + _KERNEL_PROLOGUE.format(name=name, struct=struct) + "".join(
        f"  {line}\n" for line in lines
    ) + "}\n", fields


def _forward_source(cell: Cell, bits: int, mixed: bool, new: Any, own: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    states, vectors = range(len(cell.states)), range(len(cell.vectors))
    strides = [f"{c}{k}" for c in "sm" for k in states]
    pointers = ["X", "B", "K", "L", "Y", *(f"{c.upper()}{k}" for c in "SME" for k in states)]
    pointers += [*(slot for slot in own if slot[0] == "V"), *(f"p{k}" for k in vectors)]
    body = _CudaScalarCode(lambda name: _load_forward(name, mixed), bits)
    named = [(slot, body.emit(value)) for slot, value in own.items()]
    after = body.emit_all(new)
    out = [f"real h{k} = a.S{k}[a.t * a.s{k} + i];" for k in states]
    out += ["if (on) {", *(f"  {line}" for line in body.lines), "  if (a.keep) {"]
    for slot, value in named:
        place = f"a.X[x + {slot[1:]} * a.H]" if slot[0] == "X" else f"a.{slot}[m]"
        out.append(f"    {place} = {value};")
    out += ["  }", *(f"  h{k} = {value};" for k, value in enumerate(after)), "}"]
    out += [f"a.M{k}[a.t * a.m{k} + i] = h{k};" for k in states]
    out += ["if (a.Y) a.Y[m] = on ? h0 : real(0);", "if (a.reset && more) {"]
    out += ["  const bool home = a.reset[next * a.N + r];"]
    out += [f"  a.S{k}[next * a.s{k} + i] = home ? a.E{k}[i] : h{k};" for k in states]
    return _kernel_source("forward_step", strides, pointers, [*out, "}"])


def _load_forward(name: str, mixed: bool) -> str:
    """How `forward_step` reads an input of the traced step."""
    letter, k = name[0], name[1:]
    gate, product = f"a.X[x + {k} * a.H] + a.K[{k} * a.H + j]", f"a.B[r * a.W + {k} * a.H + j]"
    return {
        "g": f"{gate} + {product}" if mixed else gate,
        "x": gate,
        "h": f"{product} + a.L[{k} * a.H + j]",
        "s": f"h{k}",
        "p": f"a.p{k}[j]",
    }[letter]


def _backward_source(cell: Cell, bits: int, slots: tuple[str, ...]) -> tuple[str, tuple[str, ...], bool]:
    outputs, same, through = trace_backward(cell, len(slots))
    states, vectors = range(len(cell.states)), range(len(cell.vectors))
    spare = dict.fromkeys(s for s in slots if s[0] == "V")
    pointers = ["X", "Y", "G", "O", *(f"{c}{k}" for c in "DEISM" for k in states), *spare]
    pointers += [f"{c}{k}" for c in "pP" for k in vectors]
    out = [f"real d{k} = a.D{k}[i];" for k in states]
    out += ["if (a.reset && more && a.reset[next * a.N + r]) {"]
    out += [f"  a.E{k}[i] += d{k}, d{k} = 0;" for k in states]
    out += ["}", *(f"if (a.I{k}) d{k} += a.I{k}[m];" for k in states)]
    gates = [f"a.{c}[x + {k} * a.H]" for c in ("X" if same else "XY") for k in range(cell.gates)]
    out += ["if (!on) {", *(f"  {gate} = 0;" for gate in gates), *(f"  a.D{k}[i] = d{k};" for k in states)]
    out += ["  return;", "}", "if (a.O) d0 += a.O[m];"]
    body = _CudaScalarCode(lambda name: _load_backward(name, slots), bits)
    named = [(name, body.emit(value)) for name, value in outputs]
    out += [*body.lines, *(_store_backward(name, value) for name, value in named)]
    out += [] if through else ["a.D0[i] = 0;"]
    return *_kernel_source("backward_step", [], pointers, out), same


def _load_backward(name: str, slots: tuple[str, ...]) -> str:
    """How `backward_step` reads an input of the traced adjoint."""
    letter, k = name[0], int(name[1:])
    if letter in "dp":
        return f"d{k}" if letter == "d" else f"a.p{k}[j]"
    slot = f"S{k}" if letter == "s" else slots[k]
    return f"a.G[x + {slot[1:]} * a.H]" if slot[0] == "X" else f"a.{slot}[m]"


def _store_backward(name: str, value: str) -> str:
    letter, k = name[0], name[1:]
    if letter == "P":
        return f"a.{name}[i] += {value};"
    if letter in "XU":
        return f"a.{'X' if letter == 'X' else 'Y'}[x + {k} * a.H] = {value};"
    return f"a.D{k}[i] = {value};"
