"""One time step of a stack of layers on NumPy arrays, printed as straight-line NumPy code.

For one row the printed code works on arrays without a row axis, which halves the time of a NumPy call.
"""

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
    "is_traceable",
    "numpy_step",
]


class _GateScales(dict[Any, Any]):
    """dtype -> (scale, offset) of all summed gates, whose tanh or sigmoid is scale * tanh(scale * x) + offset."""

    def __init__(self, gate_activations: tuple[str, ...], hidden_size: int) -> None:
        self.gate_activations, self.hidden_size = gate_activations, hidden_size

    def __missing__(self, dtype: Any) -> Any:
        scales = np.asarray([0.5 if op == "sigmoid" else 1.0 for op in self.gate_activations], dtype)
        scale = np.repeat(scales, self.hidden_size)
        self[dtype] = scale, 1 - scale
        return self[dtype]


def is_traceable(cell: Cell) -> bool:
    """True if `numpy_step` prints the operations of this cell, False if it calls `reference_step` for each layer."""
    return _cached_trace(cell) is not None


def numpy_step(layer: LayerSignature, integer: bool, single_row: bool, reference_step: Callable[..., Any]) -> StepFn:
    """Print and compile the NumPy step of a layer. The result returns None for arguments that do not fit.

    Args:
        layer: the signature of the layer.
        integer: True for integer x (N,), False for x (N, D).
        single_row: True for N = 1, False for any N.
        reference_step: computes the step of one layer whose cell cannot be traced: params, x, states -> next states.
    """
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
    lines += ["scale, offset = gate_scales[dtype]"] if print_layer and print_layer.has_sigmoid else []
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
    gate_scales = _GateScales(traced[1] if traced else (), layer.hidden_size)
    scope = {"where": np.where, "inf": np.inf, "nan": np.nan, "gather_columns": partial(gather_columns, np)}
    return compile_python(lines, {**UFUNCS, **scope, "reference_step": reference_step, "gate_scales": gate_scales})


def _input_checks(layer: LayerSignature, integer: bool, single_row: bool) -> list[str]:
    """Print the check that x is (n, D), or (n,) integers in 0..D-1."""
    if not integer:
        return [f"if x.shape != (n, {layer.input_size}): return None"]
    low, high = ("x.item()", "x.item()") if single_row else ("x.min(initial=0)", "x.max(initial=0)")
    return [f"if x.ndim != 1 or {low} < 0 or {high} >= {layer.input_size}: return None"]


def _reference_layer(layer: LayerSignature, k: int) -> list[str]:
    """Print the call of `reference_step` for layer k: x, r0, r1, ... -> e0, e1, ..."""
    biases = ["bias_ih", "bias_hh"] if layer.bias else []
    names = ["weight_ih", "weight_hh", *biases, *layer.cell.vectors, "weight_hr"]
    params = ", ".join(f"{name!r}: w{j}_{k}" for j, name in enumerate(names[: len(layer.parameter_names[k])]))
    states = range(len(layer.state_sizes))
    new = ", ".join(f"e{i}" for i in states)
    copies = [f"e{i} = e{i}.copy()" for i in states]
    return [f"{new}, = reference_step({{{params}}}, x, ({', '.join(f'r{i}' for i in states)},))", *copies]


_UfuncTrace = tuple[tuple[Value, ...], tuple[str, ...], int]


@lru_cache(maxsize=256)
def _cached_trace(cell: Cell) -> _UfuncTrace | None:
    """The new states, the activation of each summed gate, and the number of summed gates; None if not traceable."""
    if cell.pregates:
        return None
    try:
        return _trace(cell, sigmoid=True) or _trace(cell, sigmoid=False)
    except UntraceableError:
        return None


def _trace(cell: Cell, *, sigmoid: bool) -> _UfuncTrace | None:
    """Trace a cell; with `sigmoid`, None if a sigmoid is not a fusable gate, because NumPy has no sigmoid."""
    new, _, summed_gates = trace_step(cell, graph := TraceGraph(sigmoid=sigmoid))
    gates = fusable_gates(graph, new, summed_gates)
    if sigmoid and any(v.op == "sigmoid" and not any(v is g for g in gates) for v in nodes(new)):
        return None
    gate_activations = tuple(v.op for v in gates)
    for k, gate in enumerate(gates):
        gate.op, gate.args, gate.name = "input", (), f"a{k}"
    if any(not isinstance(v, Value) for v in new):
        raise UntraceableError("a state that is a number")
    return new, gate_activations, summed_gates


class _LayerPrinter:
    """Prints the arithmetic of one layer: x, r0, r1, ... -> e0, e1, ...

    The printed variables are: r the states before the step and e those after it; w<j>_<k> parameter j of layer k; a the
    input projection and h the recurrent product of all gates; t the summed gates, a view of a; v the other operations.
    """

    def __init__(
        self,
        layer: LayerSignature,
        single_row: bool,
        new_states: tuple[Value, ...],
        gate_activations: tuple[str, ...],
        summed_gates: int,
    ) -> None:
        self.layer, self.single_row, self.new_states = layer, single_row, new_states
        self.gate_activations, self.summed_gates = gate_activations, summed_gates
        self.has_sigmoid, self.all_gates_summed = "sigmoid" in gate_activations, summed_gates == layer.cell.gates

    def _gate_slice(self, a: str, first: int, last: int) -> str:
        lead, h = "" if self.single_row else ":, ", self.layer.hidden_size
        return f"{a}[{lead}{first * h}:{last * h}]"

    def _product(self, w: str, x: str) -> str:
        return f"{w}.dot({x})" if self.single_row else f"{x}.dot({w}.T)"

    def lines(self, k: int, integer: bool) -> list[str]:
        """Print the lines of layer k; if `integer`, x holds the numbers of one-hot classes."""
        gather = f"w0_{k}[:, x].copy()" if self.single_row else f"gather_columns(w0_{k}, x)"
        lines = [f"a = {gather if integer else self._product(f'w0_{k}', 'x')}"]
        lines += [f"h = {self._product(f'w1_{k}', 'r0')}", *self._sum_lines(k)]
        if self.gate_activations:
            lines += ["multiply(t, scale, t)"] * self.has_sigmoid + ["tanh(t, t)"]
            lines += ["multiply(t, scale, t)", "add(t, offset, t)"] * self.has_sigmoid
        variables: dict[Value, str] = {}
        first_vector = 4 if self.layer.bias else 2
        names = [self._emit(v, k, first_vector, variables, lines) for v in self.new_states]
        for i, (name, value) in enumerate(zip(names, self.new_states, strict=True)):
            is_new_array = value.op != "input" and name not in names[:i]
            lines.append(f"e{i} = {name}" if is_new_array else f"e{i} = {name}.copy()")
        if self.layer.projection_size:
            lines.append(f"e0 = {self._product(f'w{len(self.layer.parameter_names[k]) - 1}_{k}', 'e0')}")
        return lines

    def _sum_lines(self, k: int) -> list[str]:
        """Print the addition of the biases and of the two halves of the summed gates."""
        lines = ["add(a, h, a)", "t = a"] if self.all_gates_summed else []
        if self.layer.bias:
            lines += [f"add(a, w2_{k}, a)", f"add(a, w3_{k}, a)" if self.all_gates_summed else f"add(h, w3_{k}, h)"]
        if self.summed_gates and not self.all_gates_summed:
            lines += [
                f"t = {self._gate_slice('a', 0, self.summed_gates)}",
                f"add(t, {self._gate_slice('h', 0, self.summed_gates)}, t)",
            ]
        return lines

    def _emit(self, value: Any, k: int, first_vector: int, variables: dict[Value, str], lines: list[str]) -> str:
        """Print the operations that a value needs, each once; return the variable that holds it, or a constant."""
        if not isinstance(value, Value):
            return repr(float(value))
        if value not in variables:
            if value.op == "input":
                letter, j = value.name[0], int(value.name[1:])
                if letter in "sp":
                    return f"r{j}" if letter == "s" else f"w{first_vector + j}_{k}"
                text = self._gate_slice("h" if letter == "h" else "a", j, j + 1)
            else:
                args = [self._emit(v, k, first_vector, variables, lines) for v in value.args]
                text = f"{value.op}({', '.join(args)})"
            variables[value] = f"v{len(variables)}"
            lines.append(f"{variables[value]} = {text}")
        return variables[value]
