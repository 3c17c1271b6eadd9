"""One time step of a stack on NumPy arrays, printed as straight-line NumPy code."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from xprnn.arrays.linear import columns
from xprnn.cells.cell import Cell
from xprnn.kernels.step_plan import Step, Stepped, _fit, _head, _made, _result, _unless
from xprnn.kernels.tracing.cell_trace import squashed, trace_step
from xprnn.kernels.tracing.graph import FUNCTIONS, Graph, UntraceableError, Value, nodes

__all__ = [
    "numpy_step",
]


class _Squash(dict[Any, Any]):
    """dtype -> how the added gates become tanh or sigmoid in one call: sigmoid(x) = tanh(x/2)/2 + 1/2."""

    def __init__(self, squash: tuple[str, ...], hidden: int) -> None:
        self.squash, self.hidden = squash, hidden

    def __missing__(self, dtype: Any) -> Any:
        half = np.repeat(np.asarray([0.5 if op == "sigmoid" else 1.0 for op in self.squash], dtype), self.hidden)
        self[dtype] = half, 1 - half
        return self[dtype]


def numpy_step(its: Stepped, integer: bool, one: bool, once: Callable[..., Any]) -> Step:
    """The step in NumPy, of one row or of any number; by `once` for each layer where the cell can't be traced."""
    traced = _traced(its.cell)
    print_layer = None if traced is None else _Layer(its, one, *traced)
    row = "[0]" if one and print_layer else ""
    lines, count = [*_head(its, integer), "if dtype not in bits: return None"], len(its.names)
    lines += _input_fits(its, integer, one)
    lines += [_unless(f"s{k}", f"({count}, n, {w})") for k, w in enumerate(its.widths)]
    lines += _fit(its)
    for k, names in enumerate(its.names):
        for j, name in enumerate(names):
            lines += [f"w{j}_{k} = params[{name!r}]", _unless(f"w{j}_{k}", str(its.shapes[name]))]
    lines += ["half, offset = squash[dtype]"] if print_layer and print_layer.mixed else []
    lines += [f"x = x{row}"]
    if count > 1:
        lines += [f"n{k} = empty(({count}, n, {w}), dtype)" for k, w in enumerate(its.widths)]
    for k in range(count):
        lines += [f"r{i} = s{i}[{k}]{row}" for i in range(len(its.widths))]
        lines += print_layer.lines(k, integer and k == 0) if print_layer else _unprinted(its, k)
        lines += [f"n{i}[{k}] = e{i}" for i in range(len(its.widths))] if count > 1 else []
        lines += ["x = e0"]
    if count == 1:
        lines += ["x = e0.copy()", *(f"n{i} = e{i}.reshape(1, n, {w})" for i, w in enumerate(its.widths))]
    lines += [f"return x.reshape(n, {its.widths[0]}), {_result(its)}"]
    squash = _Squash(traced[1] if traced else (), its.hidden)
    scope = {"where": np.where, "inf": np.inf, "nan": np.nan, "columns": partial(columns, np)}
    return _made(lines, {**FUNCTIONS, **scope, "once": once, "squash": squash})


def _input_fits(its: Stepped, integer: bool, one: bool) -> list[str]:
    """x is (n, D) of the parameters' dtype, or (n,) integers below D."""
    if not integer:
        return [f"if x.shape != (n, {its.inputs}): return None"]
    low, high = ("x.item()", "x.item()") if one else ("x.min(initial=0)", "x.max(initial=0)")
    return [f"if x.ndim != 1 or {low} < 0 or {high} >= {its.inputs}: return None"]


def _unprinted(its: Stepped, k: int) -> list[str]:
    """A layer by the generic step."""
    short = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if its.bias else []), *its.cell.vectors, "weight_hr"]
    weights = ", ".join(f"{name!r}: w{j}_{k}" for j, name in enumerate(short[: len(its.names[k])]))
    states = range(len(its.widths))
    new = ", ".join(f"e{i}" for i in states)
    copies = [f"e{i} = e{i}.copy()" for i in states]
    return [f"{new}, = once({{{weights}}}, x, ({', '.join(f'r{i}' for i in states)},))", *copies]


_Traced = tuple[tuple[Value, ...], tuple[str, ...], int]


@lru_cache(maxsize=256)
def _traced(cell: Cell) -> _Traced | None:
    """The new states, how each added gate is squashed, and how many are added; None where the cell can't be traced."""
    if cell.early:
        return None
    try:
        return _trace(cell, sigmoid=True) or _trace(cell, sigmoid=False)
    except Exception:  # whatever goes wrong with stand-ins, the generic step goes on, and says so if it was the cell
        return None


def _trace(cell: Cell, *, sigmoid: bool) -> _Traced | None:
    new, _, added = trace_step(cell, graph := Graph(sigmoid=sigmoid))
    gates = squashed(graph, new, added)
    if sigmoid and any(v.op == "sigmoid" and not any(v is g for g in gates) for v in nodes(new)):
        return None
    squash = tuple(v.op for v in gates)
    for k, gate in enumerate(gates):
        gate.op, gate.args, gate.name = "input", (), f"a{k}"
    if any(not isinstance(v, Value) for v in new):
        raise UntraceableError("a state that is a number")
    return new, squash, added


class _Layer:
    """Prints the arithmetic of one layer: x, r0, r1, ... -> e0, e1, ..."""

    def __init__(self, its: Stepped, one: bool, new: tuple[Value, ...], squash: tuple[str, ...], added: int) -> None:
        self.its, self.one, self.new, self.squash, self.added = its, one, new, squash, added
        self.mixed, self.whole = "sigmoid" in squash, added == its.cell.gates

    def _cut(self, a: str, first: int, last: int) -> str:
        lead, h = "" if self.one else ":, ", self.its.hidden
        return f"{a}[{lead}{first * h}:{last * h}]"

    def _product(self, w: str, x: str) -> str:
        return f"{w}.dot({x})" if self.one else f"{x}.dot({w}.T)"

    def lines(self, k: int, integer: bool) -> list[str]:
        """Those of layer k; with integers, x is the numbers of one-hot classes."""
        look_up = f"w0_{k}[:, x].copy()" if self.one else f"columns(w0_{k}, x)"
        lines = [f"a = {look_up if integer else self._product(f'w0_{k}', 'x')}"]
        lines += [f"h = {self._product(f'w1_{k}', 'r0')}", *self._sums(k)]
        if self.squash:
            lines += ["multiply(t, half, t)"] * self.mixed + ["tanh(t, t)"]
            lines += ["multiply(t, half, t)", "add(t, offset, t)"] * self.mixed
        known: dict[Value, str] = {}
        first = 4 if self.its.bias else 2
        names = [self._name(v, k, first, known, lines) for v in self.new]
        for i, (name, value) in enumerate(zip(names, self.new, strict=True)):
            own = value.op != "input" and name not in names[:i]
            lines.append(f"e{i} = {name}" if own else f"e{i} = {name}.copy()")
        if self.its.projection:
            lines.append(f"e0 = {self._product(f'w{len(self.its.names[k]) - 1}_{k}', 'e0')}")
        return lines

    def _sums(self, k: int) -> list[str]:
        """The biases, and the gates that are only added as t, a part of a."""
        lines = ["add(a, h, a)", "t = a"] if self.whole else []
        if self.its.bias:
            lines += [f"add(a, w2_{k}, a)", f"add(a, w3_{k}, a)" if self.whole else f"add(h, w3_{k}, h)"]
        if self.added and not self.whole:
            lines += [f"t = {self._cut('a', 0, self.added)}", f"add(t, {self._cut('h', 0, self.added)}, t)"]
        return lines

    def _name(self, value: Any, k: int, first: int, known: dict[Value, str], lines: list[str]) -> str:
        """Where a traced value is; what it needs is printed first, each value once."""
        if not isinstance(value, Value):
            return repr(float(value))
        if value not in known:
            if value.op == "input":
                letter, j = value.name[0], int(value.name[1:])
                if letter in "sp":
                    return f"r{j}" if letter == "s" else f"w{first + j}_{k}"
                text = self._cut("h" if letter == "h" else "a", j, j + 1)
            else:
                text = f"{value.op}({', '.join([self._name(v, k, first, known, lines) for v in value.args])})"
            known[value] = f"v{len(known)}"
            lines.append(f"{known[value]} = {text}")
        return known[value]
