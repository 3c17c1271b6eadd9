"""One time step of a stack on NumPy arrays, printed as straight-line NumPy code."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from xprnn.arrays.linear import gather_columns
from xprnn.cells.cell import Cell
from xprnn.kernels.step_plan import (
    LayerSignature,
    StepFn,
    argument_lines,
    array_check,
    compile_python,
    initial_state_checks,
    result_expression,
)
from xprnn.kernels.tracing.cell_trace import fusable_gates, trace_step
from xprnn.kernels.tracing.graph import UFUNCS, TraceGraph, UntraceableError, Value, nodes

__all__ = [
    "numpy_step",
]


class _GateScales(dict[Any, Any]):
    """dtype -> how the added gates become tanh or sigmoid in one call: sigmoid(x) = tanh(x/2)/2 + 1/2."""

    def __init__(self, squash: tuple[str, ...], hidden: int) -> None:
        self.gate_activations, self.hidden_size = squash, hidden

    def __missing__(self, dtype: Any) -> Any:
        half = np.repeat(
            np.asarray([0.5 if op == "sigmoid" else 1.0 for op in self.gate_activations], dtype), self.hidden_size
        )
        self[dtype] = half, 1 - half
        return self[dtype]


def numpy_step(layer: LayerSignature, integer: bool, single_row: bool, reference_step: Callable[..., Any]) -> StepFn:
    """The step in NumPy, of one row or of any number; by `once` for each layer where the cell can't be traced."""
    traced = _cached_trace(layer.cell)
    print_layer = None if traced is None else _LayerPrinter(layer, single_row, *traced)
    row = "[0]" if single_row and print_layer else ""
    lines, count = [*argument_lines(layer, integer), "if dtype not in bits: return None"], len(layer.parameter_names)
    lines += _input_checks(layer, integer, single_row)
    lines += [array_check(f"s{k}", f"({count}, n, {w})") for k, w in enumerate(layer.state_sizes)]
    lines += initial_state_checks(layer)
    for k, names in enumerate(layer.parameter_names):
        for j, name in enumerate(names):
            lines += [f"w{j}_{k} = params[{name!r}]", array_check(f"w{j}_{k}", str(layer.parameter_shapes[name]))]
    lines += ["half, offset = squash[dtype]"] if print_layer and print_layer.has_sigmoid else []
    lines += [f"x = x{row}"]
    if count > 1:
        lines += [f"n{k} = empty(({count}, n, {w}), dtype)" for k, w in enumerate(layer.state_sizes)]
    for k in range(count):
        lines += [f"r{i} = s{i}[{k}]{row}" for i in range(len(layer.state_sizes))]
        lines += print_layer.lines(k, integer and k == 0) if print_layer else _reference_layer(layer, k)
        lines += [f"n{i}[{k}] = e{i}" for i in range(len(layer.state_sizes))] if count > 1 else []
        lines += ["x = e0"]
    if count == 1:
        lines += ["x = e0.copy()", *(f"n{i} = e{i}.reshape(1, n, {w})" for i, w in enumerate(layer.state_sizes))]
    lines += [f"return x.reshape(n, {layer.state_sizes[0]}), {result_expression(layer)}"]
    squash = _GateScales(traced[1] if traced else (), layer.hidden_size)
    scope = {"where": np.where, "inf": np.inf, "nan": np.nan, "columns": partial(gather_columns, np)}
    return compile_python(lines, {**UFUNCS, **scope, "once": reference_step, "squash": squash})


def _input_checks(its: LayerSignature, integer: bool, one: bool) -> list[str]:
    """x is (n, D) of the parameters' dtype, or (n,) integers below D."""
    if not integer:
        return [f"if x.shape != (n, {its.input_size}): return None"]
    low, high = ("x.item()", "x.item()") if one else ("x.min(initial=0)", "x.max(initial=0)")
    return [f"if x.ndim != 1 or {low} < 0 or {high} >= {its.input_size}: return None"]


def _reference_layer(its: LayerSignature, k: int) -> list[str]:
    """A layer by the generic step."""
    short = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if its.bias else []), *its.cell.vectors, "weight_hr"]
    weights = ", ".join(f"{name!r}: w{j}_{k}" for j, name in enumerate(short[: len(its.parameter_names[k])]))
    states = range(len(its.state_sizes))
    new = ", ".join(f"e{i}" for i in states)
    copies = [f"e{i} = e{i}.copy()" for i in states]
    return [f"{new}, = once({{{weights}}}, x, ({', '.join(f'r{i}' for i in states)},))", *copies]


_UfuncTrace = tuple[tuple[Value, ...], tuple[str, ...], int]


@lru_cache(maxsize=256)
def _cached_trace(cell: Cell) -> _UfuncTrace | None:
    """The new states, how each added gate is squashed, and how many are added; None where the cell can't be traced."""
    if cell.pregates:
        return None
    try:
        return _trace(cell, sigmoid=True) or _trace(cell, sigmoid=False)
    except Exception:  # whatever goes wrong with stand-ins, the generic step goes on, and says so if it was the cell
        return None


def _trace(cell: Cell, *, sigmoid: bool) -> _UfuncTrace | None:
    new, _, added = trace_step(cell, graph := TraceGraph(sigmoid=sigmoid))
    gates = fusable_gates(graph, new, added)
    if sigmoid and any(v.op == "sigmoid" and not any(v is g for g in gates) for v in nodes(new)):
        return None
    squash = tuple(v.op for v in gates)
    for k, gate in enumerate(gates):
        gate.op, gate.args, gate.name = "input", (), f"a{k}"
    if any(not isinstance(v, Value) for v in new):
        raise UntraceableError("a state that is a number")
    return new, squash, added


class _LayerPrinter:
    """Prints the arithmetic of one layer: x, r0, r1, ... -> e0, e1, ..."""

    def __init__(
        self, its: LayerSignature, one: bool, new: tuple[Value, ...], squash: tuple[str, ...], added: int
    ) -> None:
        self.layer, self.single_row, self.new_states, self.gate_activations, self.summed_gates = (
            its,
            one,
            new,
            squash,
            added,
        )
        self.has_sigmoid, self.all_gates_summed = "sigmoid" in squash, added == its.cell.gates

    def _gate_slice(self, a: str, first: int, last: int) -> str:
        lead, h = "" if self.single_row else ":, ", self.layer.hidden_size
        return f"{a}[{lead}{first * h}:{last * h}]"

    def _product(self, w: str, x: str) -> str:
        return f"{w}.dot({x})" if self.single_row else f"{x}.dot({w}.T)"

    def lines(self, k: int, integer: bool) -> list[str]:
        """Those of layer k; with integers, x is the numbers of one-hot classes."""
        look_up = f"w0_{k}[:, x].copy()" if self.single_row else f"columns(w0_{k}, x)"
        lines = [f"a = {look_up if integer else self._product(f'w0_{k}', 'x')}"]
        lines += [f"h = {self._product(f'w1_{k}', 'r0')}", *self._sum_lines(k)]
        if self.gate_activations:
            lines += ["multiply(t, half, t)"] * self.has_sigmoid + ["tanh(t, t)"]
            lines += ["multiply(t, half, t)", "add(t, offset, t)"] * self.has_sigmoid
        known: dict[Value, str] = {}
        first = 4 if self.layer.bias else 2
        names = [self._emit(v, k, first, known, lines) for v in self.new_states]
        for i, (name, value) in enumerate(zip(names, self.new_states, strict=True)):
            own = value.op != "input" and name not in names[:i]
            lines.append(f"e{i} = {name}" if own else f"e{i} = {name}.copy()")
        if self.layer.projection_size:
            lines.append(f"e0 = {self._product(f'w{len(self.layer.parameter_names[k]) - 1}_{k}', 'e0')}")
        return lines

    def _sum_lines(self, k: int) -> list[str]:
        """The biases, and the gates that are only added as t, a part of a."""
        lines = ["add(a, h, a)", "t = a"] if self.all_gates_summed else []
        if self.layer.bias:
            lines += [f"add(a, w2_{k}, a)", f"add(a, w3_{k}, a)" if self.all_gates_summed else f"add(h, w3_{k}, h)"]
        if self.summed_gates and not self.all_gates_summed:
            lines += [
                f"t = {self._gate_slice('a', 0, self.summed_gates)}",
                f"add(t, {self._gate_slice('h', 0, self.summed_gates)}, t)",
            ]
        return lines

    def _emit(self, value: Any, k: int, first: int, known: dict[Value, str], lines: list[str]) -> str:
        """Where a traced value is; what it needs is printed first, each value once."""
        if not isinstance(value, Value):
            return repr(float(value))
        if value not in known:
            if value.op == "input":
                letter, j = value.name[0], int(value.name[1:])
                if letter in "sp":
                    return f"r{j}" if letter == "s" else f"w{first + j}_{k}"
                text = self._gate_slice("h" if letter == "h" else "a", j, j + 1)
            else:
                text = f"{value.op}({', '.join([self._emit(v, k, first, known, lines) for v in value.args])})"
            known[value] = f"v{len(known)}"
            lines.append(f"{known[value]} = {text}")
        return known[value]
