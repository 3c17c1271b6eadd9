"""Prints the pointwise functions of a cell: its traced mathematics, in a loop over the rows and units of a step.

A cell has two or, with pregates, four functions f(record address, first row, last row + 1, steps):

    forward_rows            gate sums, recurrent products and states before a step -> states after it, saved values
    pregate_rows            gate sums of the pregates -> their values (in place of the sums) and the gated state
    backward_rows           cotangents of the states after a step -> dgates_x, dgates_h, those before the step
    pregate_backward_rows   cotangents of the pregates' values and of the gated state, added to those of backward_rows

The drivers set the pointers of a step in the record (record.py), and handle masks and resets. With steps > 1,
forward_rows and backward_rows run so many steps of a scan without masks: they also call the recurrent product of each
step, and move the pointers to the next one. For one row of a small layer, a call by the driver at each step would take
as long as the step.

A row has H units, which LLVM processes in vectors. The units beyond the last whole vector are computed with a second,
overlapping vector. A function that adds to an array in place processes them one by one instead.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from xprnn.cells.cell import Cell
from xprnn.kernels.tracing.cell_trace import (
    assign_buffers,
    trace_backward,
    trace_pregates,
    trace_pregates_backward,
    trace_step,
)
from xprnn.kernels.tracing.graph import TraceGraph, UntraceableError, input_names
from xprnn.kernels.tracing.scalar_code import ScalarCode
from xprnn.kernels.tracing.value_names import backward_names, forward_names, saved_names

__all__ = [
    "GATED_STATE",
    "MAX_EXTRA",
    "MAX_STATES",
    "MAX_VECTORS",
    "UNPROJECTED",
    "PointwiseSources",
    "pointwise_sources",
]

GATED_STATE, UNPROJECTED = "gated_state", "unprojected"
MAX_STATES, MAX_VECTORS, MAX_EXTRA = 6, 8, 24  # entries of the indexed fields in record.py


class PointwiseSources(NamedTuple):
    """Printed pointwise functions of a cell, and what the drivers must know about them."""

    forward_rows: str
    backward_rows: str
    pregate_rows: str  # "" without pregates, as the next
    pregate_backward_rows: str
    first_gates: int  # number of gates in the first group
    separate: tuple[bool, bool]  # per group: the recurrent product is stored apart from x W'
    num_extra: int
    saves_gates: bool  # True if a saved value is stored in `gates`
    dx_is_dh: bool
    has_direct_path: bool


class _RowFunction:
    """Text of one function: the arrays it uses, each with an alias scope, and the statements for one unit.

    Args:
        bits: 32 or 64, of a float.
        in_place: the function adds to arrays in place, so that no unit may be computed twice.
    """

    def __init__(self, bits: int, *, in_place: bool = False) -> None:
        self.bits, self.in_place = bits, in_place
        self.arrays: dict[str, tuple[str, str]] = {}  # variable -> (record field, stride of a row or "")
        self.scalars: list[str] = []  # record fields that the statements use
        self.statements: list[str] = []
        self.step_lines: list[str] = []  # printed before the rows of a step
        self.next_lines: list[str] = []  # printed after them: the product of an adjoint, and the pointers' next step

    def array(self, name: str, field: str, row_stride: str) -> str:
        """Declare an array of the record; return its name."""
        self.arrays.setdefault(name, (field, row_stride))
        if len(self.arrays) > 60:
            raise UntraceableError("a cell with more than 60 arrays")
        return name

    def load(self, name: str, index: str) -> str:
        """Return the expression that reads one element of a declared array."""
        return f"load({name}_row, {index}, {name.upper()})"

    def store(self, name: str, index: str, value: str) -> None:
        """Add the statement that writes one element of a declared array."""
        self.statements.append(f"store({name}_row, {index}, {name.upper()}, {value})")

    def advance(self, strides: Mapping[str, str]) -> None:
        """Print how the pointers of arrays move to the next step: by the stride of their record field."""
        for name, (field, _) in self.arrays.items():
            stride = next((stride for prefix, stride in strides.items() if field.startswith(prefix)), "")
            if stride:
                self.scalars.append(stride)
                self.next_lines.append(f"{name}_p = offset({name}_p, {stride})")

    def source(self, cell_name: str, title: str) -> str:
        """Return the module that defines `kernel`."""
        scopes = [f"{name.upper()} = {scope}" for scope, name in enumerate(self.arrays)]
        lines = [f"{name}_p = float_pointer(args.{field})" for name, (field, _) in self.arrays.items()]
        strides = dict.fromkeys(stride for _, stride in self.arrays.values() if stride not in ("", "H"))
        # Read before the loops: LLVM must assume that a store to an array may change the record.
        lines += [f"{name} = args.{name}" for name in dict.fromkeys((*strides, *self.scalars))]
        lines += [] if self.in_place else ["whole_units, last_units = args.whole_units, args.last_units"]
        if self.step_lines or self.next_lines:
            lines += ["num_rows, last_argument = last - first, edge if recurrent_strategy == 0 else packed_hh_stride"]
        lines += ["for step in range(steps):", *(f"    {line}" for line in self.step_lines)]
        rows = [
            f"{name}_row = " + (f"offset({name}_p, row * {stride})" if stride else f"{name}_p")
            for name, (_, stride) in self.arrays.items()
        ]
        if self.in_place:
            rows += ["for j in range(H):", *(f"    {line}" for line in self.statements)]
        else:
            rows += ["for part in range(2):"]
            rows += ["    start, stop = (0, whole_units) if part == 0 else (last_units, H)"]
            rows += ["    for j in range(start, stop):", *(f"        {line}" for line in self.statements)]
        lines += ["    for row in range(first, last):", *(f"        {line}" for line in rows)]
        lines += ["    if steps > 1:", *(f"        {line}" for line in self.next_lines or ["pass"])]
        text = "\n    ".join(lines)
        return _MODULE.format(title=title, cell=cell_name, bits=self.bits, scopes="\n".join(scopes), body=text)


_MODULE = '''"""{title} of the cell {cell!r}, printed by xprnn (a cache entry, safe to delete)"""
import math
import numpy as np
from xprnn.kernels.jit.record import scan_record
from xprnn.kernels.jit.simd import call_address, element_address, exp64, float{bits}_pointer as float_pointer, load
from xprnn.kernels.jit.simd import offset, prefer_widest_vectors, store, tanh{bits} as tanh

F = np.float{bits}
# alias scopes: LLVM may assume that arrays of different scopes do not overlap
{scopes}


def kernel(address, first, last, steps):
    prefer_widest_vectors()
    args = scan_record(address)
    H = args.H
    {body}
    return 0
'''


@lru_cache(maxsize=256)
def pointwise_sources(cell: Cell, bits: int, projected: bool = False) -> PointwiseSources:
    """Print the pointwise functions of a cell.

    Args:
        cell: the cell.
        bits: 32 or 64, of a float.
        projected: h is projected by weight_hr.

    Raises:
        UntraceableError: the cell cannot be traced.
    """
    return _Printer(cell, bits, projected).print()


class _Printer:
    """The traces of a cell, and the places of its values in the record."""

    def __init__(self, cell: Cell, bits: int, projected: bool) -> None:
        self.cell, self.bits, self.projected = cell, bits, projected
        self.graph = TraceGraph()
        self.new, self.saved, self.summed_gates = trace_step(cell, self.graph)
        self.pregate_buffers: tuple[str, ...] = ()
        self.first_gates, self.separate = self.summed_gates, (False, True)
        if cell.pregates:
            self._trace_pregates()
        used = set().union(*(input_names(v) for v in (*self.new, *self.saved)))
        if projected and (cell.pregates or "s0" in used):
            raise UntraceableError("an element of a projected h")
        first = UNPROJECTED if projected else "M0"
        self.buffers, self.new_buffers = assign_buffers(
            cell, self.graph, self.new, self.saved, self.pregate_buffers, first
        )
        extra = dict.fromkeys(b for b in (*self.pregate_buffers, *self.buffers) if b[0] == "V")
        self.extra_index = {buffer: index for index, buffer in enumerate(extra)}
        for count, limit, what in (
            (len(cell.states), MAX_STATES, "states"),
            (len(cell.vectors), MAX_VECTORS, "vectors"),
            (len(extra), MAX_EXTRA, "saved values besides those of its gates"),
        ):
            if count > limit:
                raise UntraceableError(f"a cell with {count} {what}, of at most {limit}")
        self.used = set().union(*(input_names(v) for v in (*self.new, *self.new_buffers.values())))

    def _trace_pregates(self) -> None:
        graph = TraceGraph()
        self.pregate_values, self.gated_state, is_summed = trace_pregates(self.cell, graph)
        self.pregate_buffers, self.pregate_new_buffers = assign_buffers(self.cell, graph, (), self.pregate_values)
        self.first_gates, self.separate = self.cell.pregates, (not is_summed, self.summed_gates < self.cell.gates)

    def print(self) -> PointwiseSources:
        """Print all functions."""
        cell = self.cell
        num_pregate_values = len(self.pregate_buffers)
        saved = (*(self.pregate_values if cell.pregates else ()), *self.saved)
        self.saved_names = saved_names(cell, saved)
        outputs, dx_is_dh, has_direct_path = trace_backward(cell, len(self.buffers), num_pregate_values)
        if self.projected and has_direct_path:
            raise UntraceableError("an element of a projected h")
        pregate, pregate_backward = "", ""
        if cell.pregates:
            pregate = self._pregate()
            traced = trace_pregates_backward(cell, num_pregate_values, {name for name, _ in outputs})
            pregate_backward = self._pregate_backward(traced, dx_is_dh)
            has_direct_path = has_direct_path or any(name == "r0" for name, _ in traced)
        gates = any(b[0] == "X" for b in (*self.pregate_buffers, *self.buffers))
        texts = self._forward(), self._backward(outputs, zero_direct=has_direct_path), pregate, pregate_backward
        return PointwiseSources(
            *texts, self.first_gates, self.separate, len(self.extra_index), gates, dx_is_dh, has_direct_path
        )

    # --- forward

    def _column(self, out: _RowFunction, k: int) -> str:
        """Return the index of unit j of gate k in a row of gate sums."""
        if k < self.first_gates:
            return f"{k} * H + j"
        out.scalars.append("first_padded")
        return f"first_padded + {k - self.first_gates} * H + j"

    def _recurrent_column(self, out: _RowFunction, k: int) -> str:
        if k < self.first_gates or not self.separate[0]:
            return f"{k - self.first_gates * (k >= self.first_gates)} * H + j"
        return self._column(out, k)

    def _forward_reader(self, out: _RowFunction) -> Callable[[str], str]:
        """Return the function that prints how a forward function reads an input of the trace."""

        def read(name: str) -> str:
            letter, k = name[0], int(name[1:])
            if letter in "gx":
                sums = f"sums{k}" if self.cell.pregates else "sums"
                return out.load(out.array(sums, "step_sums", "padded_width"), self._column(out, k))
            if letter == "h":
                return out.load(out.array("recurrent", "recurrent", "recurrent_width"), self._recurrent_column(out, k))
            if letter == "s":
                return out.load(out.array(f"before{k}", f"before_{k}", "H"), "j")
            return out.load(out.array(f"vector{k}", f"vectors_{k}", ""), "j")

        return read

    def _save(self, out: _RowFunction, buffer: str, value: str) -> None:
        """Store a value in its buffer of the tape."""
        if buffer[0] == "X":
            out.store(out.array(f"gate{buffer[1:]}", "step_gates", "W"), f"{buffer[1:]} * H + j", value)
        elif buffer == UNPROJECTED:
            out.store(out.array(UNPROJECTED, "step_unprojected", "H"), "j", value)
        else:
            k = self.extra_index[buffer]
            out.store(out.array(f"extra{k}", f"step_extra_{k}", "H"), "j", value)

    def _forward(self) -> str:
        out = _RowFunction(self.bits)
        body = ScalarCode(self._forward_reader(out), forward_names(self.cell, self.new, self.saved))
        saved = [(buffer, body.emit(value)) for buffer, value in self.new_buffers.items()]
        after = body.emit_all(self.new)
        out.statements += body.lines
        for buffer, value in saved:
            self._save(out, buffer, value)
        for k, value in enumerate(after):
            if k == 0 and self.projected:
                self._save(out, UNPROJECTED, value)
            else:
                out.store(out.array(f"after{k}", f"after_{k}", "H"), "j", value)
        if not self.cell.pregates and not self.projected:
            self._forward_steps(out)
        return out.source(self.cell.name, "The forward steps")

    def _forward_steps(self, out: _RowFunction) -> None:
        """Print the recurrent products before a step, and the move to the next step."""
        out.array("sums", "step_sums", "padded_width")
        for k in range(len(self.cell.states)):
            out.array(f"before{k}", f"before_{k}", "H")
            out.array(f"after{k}", f"after_{k}", "H")
            out.scalars += [f"after_stride_{k}", f"after_flip_{k}"]
        out.scalars += [
            "gemm",
            "recurrent_strategy",
            "P",
            "packed_hh_stride",
            "edge",
            "padded_width",
            "recurrent_width",
        ]
        out.step_lines += [
            "if steps > 1:",
            "    h_address, sums_address = element_address(before0_p, 0), element_address(sums_p, 0)",
        ]
        for group in range(1 if self.first_gates == self.cell.gates else 2):
            fields = [f"product_{name}_{group}" for name in ("weight", "columns", "start", "out")]
            out.scalars += fields
            weight, columns, start, target = fields
            width = "recurrent_width" if self.separate[group] else "padded_width"
            where = (
                f"{start}, 0, num_rows" if self.separate[group] else f"sums_address + {target}, padded_width, num_rows"
            )
            target = target if self.separate[group] else f"sums_address + {target}"
            out.step_lines += [
                f"    call_address(gemm, (recurrent_strategy, h_address, P, {weight}, {target}, {width}, {where},",
                f"                        P, {columns}, last_argument))",
            ]
        strides = {"step_sums": "sums_stride", "step_gates": "gates_stride", "step_extra": "units_stride"}
        out.advance(strides)
        for k in range(len(self.cell.states)):
            out.next_lines += [
                f"before{k}_p, after{k}_p = after{k}_p, offset(after{k}_p, after_stride_{k})",
                f"after_stride_{k} *= after_flip_{k}",
            ]

    def _pregate(self) -> str:
        out = _RowFunction(self.bits, in_place=True)
        body = ScalarCode(self._forward_reader(out), forward_names(self.cell, (), self.pregate_values))
        step_inputs = [(k, body.emit(self.pregate_values[k])) for k in range(self.first_gates) if f"x{k}" in self.used]
        gated_state = body.emit(self.gated_state)
        saved = [(buffer, body.emit(value)) for buffer, value in self.pregate_new_buffers.items()]
        out.statements += body.lines
        for buffer, value in saved:
            self._save(out, buffer, value)
        out.store(out.array(GATED_STATE, "step_gated", "H"), "j", gated_state)
        for k, value in step_inputs:
            out.store(out.array(f"sums{k}", "step_sums", "padded_width"), self._column(out, k), value)
        return out.source(self.cell.name, "The pregates of a forward step")

    # --- backward

    def _backward_reader(self, out: _RowFunction) -> Callable[[str], str]:
        """Return the function that prints how a backward function reads an input of the trace."""
        buffers = (*self.pregate_buffers, *self.buffers)

        def read(name: str) -> str:
            letter, k = name[0], int(name[1:])
            if letter == "d":
                carried = out.array(f"dstate{k}", f"dstate_in_{k}", "H" if k else "h_padded")
                injected = out.array(f"injected{k}", f"step_injected_{k}", f"step_injected_row_{k}")
                return f"{out.load(carried, 'j')} + {out.load(injected, 'j')}"
            if letter == "p":
                return out.load(out.array(f"vector{k}", f"vectors_{k}", ""), "j")
            if letter == "q":
                return out.load(out.array("dgated", "dgated", "h_padded"), "j")
            if letter == "X":
                return out.load(out.array(f"dx{k}", "step_dgates_x", "x_stride"), f"{k} * H + j")
            buffer = f"S{k}" if letter == "s" else buffers[k]
            return self._read_buffer(out, buffer)

        return read

    def _read_buffer(self, out: _RowFunction, buffer: str) -> str:
        """Return the expression that reads a saved value."""
        if buffer[0] == "X":
            return out.load(out.array("gates", "step_gates", "W"), f"{buffer[1:]} * H + j")
        if buffer == UNPROJECTED:
            return out.load(out.array(UNPROJECTED, "step_unprojected", "H"), "j")
        k = str(self.extra_index[buffer]) if buffer[0] == "V" else buffer[1:]
        name, field = {
            "S": (f"before{k}", f"before_{k}"),
            "M": (f"after{k}", f"after_{k}"),
            "V": (f"extra{k}", f"step_extra_{k}"),
        }[buffer[0]]
        return out.load(out.array(name, field, "H"), "j")

    def _backward(self, outputs: list[tuple[str, Any]], *, zero_direct: bool) -> str:
        out = _RowFunction(self.bits, in_place=any(name[0] == "P" for name, _ in outputs))
        body = ScalarCode(self._backward_reader(out), backward_names(self.cell, outputs, self.saved_names))
        emitted = [(name, body.emit(value)) for name, value in outputs]
        if zero_direct and not any(name == "r0" for name, _ in outputs):
            emitted.append(("r0", body.format_constant(0.0)))
        out.statements += body.lines
        self._store_outputs(out, emitted, add=False)
        if not self.cell.pregates and not self.projected:
            self._backward_steps(out, add=zero_direct)
        return out.source(self.cell.name, "The backward steps")

    def _backward_steps(self, out: _RowFunction, *, add: bool) -> None:
        """Print the product that follows a step, and the move to the step before it.

        Args:
            out: the function.
            add: the product is added to the cotangent of h that bypasses it.
        """
        out.array("dh0", "step_dgates_h", "x_stride")
        states = range(len(self.cell.states))
        for k in states:
            out.array(f"dstate{k}", f"dstate_in_{k}", "H" if k else "h_padded")
            out.array(f"dbefore{k}", f"dstate_out_{k}", "H" if k else "h_padded")
        out.scalars += ["gemm", "recurrent_strategy", "packed_hh_stride", "edge", "packed_hh", "zeros", "h_padded"]
        out.scalars += ["x_stride", "W"]
        out.next_lines += [
            "dh_address, dprevious_address = element_address(dh0_p, 0), element_address(dbefore0_p, 0)",
            f"start_address, start_stride = {'dprevious_address, h_padded' if add else 'zeros, 0'}",
            "call_address(gemm, (recurrent_strategy, dh_address, x_stride, packed_hh, dprevious_address, h_padded,",
            "                    start_address, start_stride, num_rows, W, packed_hh_stride, last_argument))",
            *(f"dstate{k}_p, dbefore{k}_p = dbefore{k}_p, dstate{k}_p" for k in states),
        ]
        strides = {"step_dgates": "sums_stride", "step_gates": "gates_stride", "step_extra": "units_stride"}
        strides |= {f"before_{k}": f"after_stride_{k}" for k in states} | {
            f"after_{k}": f"after_stride_{k}" for k in states
        }
        out.advance(strides | {f"step_injected_{k}": f"injected_stride_{k}" for k in states})

    def _pregate_backward(self, outputs: list[tuple[str, Any]], dx_is_dh: bool) -> str:
        out = _RowFunction(self.bits, in_place=True)
        body = ScalarCode(self._backward_reader(out), backward_names(self.cell, outputs, self.saved_names))
        emitted = [(name, body.emit(value)) for name, value in outputs]
        out.statements += body.lines
        self._store_outputs(out, emitted, add=True)
        if not dx_is_dh:
            self._store_outputs(out, [(f"U{n[1:]}", v) for n, v in emitted if n[0] == "X"], add=False)
        return out.source(self.cell.name, "The pregates of a backward step")

    def _store_outputs(self, out: _RowFunction, emitted: Iterable[tuple[str, str]], *, add: bool) -> None:
        """Store the outputs of an adjoint; with `add`, all but the cotangents of gates are added to the array."""
        for name, value in emitted:
            letter, k = name[0], int(name[1:])
            if letter in "XU":
                array, field = (f"dx{k}", "step_dgates_x") if letter == "X" else (f"dh{k}", "step_dgates_h")
                out.store(out.array(array, field, "x_stride"), f"{k} * H + j", value)
                continue
            if letter == "P":
                target = out.array(f"dvector{k}", f"dvectors_{k}", "H")
            else:
                target = out.array(f"dbefore{k}", f"dstate_out_{k}", "h_padded" if letter == "r" else "H")
            out.store(target, "j", f"{out.load(target, 'j')} + {value}" if add or letter == "P" else value)
