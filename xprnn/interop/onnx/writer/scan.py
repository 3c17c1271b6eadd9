"""A recurrent layer as ONNX's Scan: for cells that are none of its three operators, and for projections.

The body is one step, written by the cell's own lines (`onnx_trace`): the recurrent product, the cell, the projection,
and at skipped steps the state as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Params
from xprnn.cells.cell import Cell
from xprnn.cells.serialization import activation_from_config
from xprnn.interop.onnx.layer_specs import LayerSpec
from xprnn.interop.onnx.recurrent_attributes import is_supported_activation
from xprnn.interop.onnx.writer.masking import MaskedTimeWriter
from xprnn.interop.onnx.writer.tracing_namespace import TracedValue, make_tracing_namespace, untraceable_reason

__all__ = ["emit_scan", "needs_scan", "read_scan_weights", "untraceable_cell_reason"]

_ACTIVATION_OPTIONS = ("f", "gate", "candidate", "output")


def needs_scan(cell: Cell, projected: bool) -> bool:
    """Whether a layer of this cell has no operator of its own.

    >>> from xprnn.cells import lstm
    >>> needs_scan(lstm(), False), needs_scan(lstm(), True)
    (False, True)
    """
    if projected or cell.options is None:
        return True
    return not all(
        is_supported_activation(activation_from_config(form))
        for place, form in cell.options
        if place in _ACTIVATION_OPTIONS
    )


def untraceable_cell_reason(cell: Cell) -> str:
    """Why a cell's step cannot be written; "" if it can."""

    def run(xp: Any, value: Any) -> Any:
        gates, vectors = [value() for _ in range(cell.gates)], tuple(value() for _ in cell.vectors)
        state, e = tuple(value() for _ in cell.states), cell.pregates
        fns, late = cell.bind(xp), gates
        if fns.pregate is not None:
            early, _ = fns.pregate(gates[:e], gates[:e], state, vectors)
            late = [*early[:e], *gates[e:]]
        new, _ = fns.step(tuple(late), tuple(gates[e:]), state, vectors)
        return tuple(new)

    return untraceable_reason(run)


def emit_scan(writer: MaskedTimeWriter, name: str, spec: LayerSpec, x: str, states: list[str]) -> tuple[str, list[str]]:
    """The nodes of one layer: y and the final states, from a time-major x and initial states (directions, N, .)."""
    valid = writer.get_valid_mask(x)
    extra = [writer.emit("Unsqueeze", valid, writer.int64_vector(2))] if valid else []
    ys, ends = [], []
    for k, back in enumerate(spec.reverse):
        label, end = f"{name}.{'backward' if back else 'forward'}", "_l0_reverse" if k else "_l0"
        own = {n.removesuffix(end): a for n, a in spec.params.items() if n.endswith(end)}
        xg = writer.emit("MatMul", x, writer.add_initializer(f"{label}.weight_ih", own["weight_ih"].T))
        if "bias_ih" in own:
            xg = writer.emit("Add", xg, writer.add_initializer(f"{label}.bias_ih", own["bias_ih"]))
        starts = [writer.emit("Gather", s, writer.int64_scalar(k), axis=0) for s in states]
        ways = {f"scan_{what}_directions": [int(back)] * n for what, n in (("input", 1 + len(extra)), ("output", 1))}
        body = _scan_body(writer, label, spec.cell, own, bool(extra))
        *final, y = writer.emit_multi_output(
            len(states) + 1, "Scan", *starts, xg, *extra, body=body, num_scan_inputs=1 + len(extra), **ways
        )
        ys.append(y)
        ends.append([writer.emit("Unsqueeze", f, writer.int64_vector(0)) for f in final])
    y = ys[0] if len(ys) == 1 else writer.emit("Concat", *ys, axis=-1)
    joined = [e[0] if len(e) == 1 else writer.emit("Concat", *e, axis=0) for e in zip(*ends, strict=True)]
    return y, joined


def _scan_body(w: MaskedTimeWriter, label: str, cell: Cell, own: dict[str, Any], skips: bool) -> Any:
    """One step as a graph: states, the projected input and whether the step is valid -> states, y."""
    state = [f"{label}.{s}" for s in cell.states]
    inputs = [*state, f"{label}.xg", *([f"{label}.valid"] if skips else [])]
    with w.subgraph_scope() as made:
        new = _emit_step(w, label, cell, own, state, f"{label}.xg")
        y = new[0]
        if skips:
            y = w.emit("Where", inputs[-1], new[0], w.float_scalar(0.0))
            new = [w.emit("Where", inputs[-1], a, b) for a, b in zip(new, state, strict=True)]
        outputs = [w.emit("Identity", a) for a in (*new, y)]
    return w.make_subgraph(label, made, inputs, outputs, [*[w.elem_type] * (len(state) + 1), *([9] if skips else [])])


def _emit_step(
    w: MaskedTimeWriter, label: str, cell: Cell, own: dict[str, Any], state: list[str], xg: str
) -> list[str]:
    """The names of the new states."""
    e, g, hidden = cell.pregates, cell.gates, own["weight_hh"].shape[0] // cell.gates
    vectors = tuple(TracedValue(w, w.add_initializer(f"{label}.{v}", own[v])) for v in cell.vectors)

    def product(h: str, first: int, last: int) -> tuple[TracedValue, ...]:
        rows, part = slice(first * hidden, last * hidden), f".{first}" if first else ""
        hg = w.emit("MatMul", h, w.add_initializer(f"{label}.weight_hh{part}", own["weight_hh"][rows].T))
        if "bias_hh" in own:
            hg = w.emit("Add", hg, w.add_initializer(f"{label}.bias_hh{part}", own["bias_hh"][rows]))
        return gates(hg, last - first)

    def gates(a: str, count: int) -> tuple[TracedValue, ...]:
        if count == 1:
            return (TracedValue(w, a),)
        return tuple(
            TracedValue(w, n)
            for n in w.emit_multi_output(count, "Split", a, w.int64_vector(*[hidden] * count), axis=-1)
        )

    fns, x, before = cell.bind(make_tracing_namespace(w)), gates(xg, g), tuple(TracedValue(w, s) for s in state)
    if fns.pregate is None:
        new, _ = fns.step(x, product(state[0], 0, g), before, vectors)
    else:
        early, q = fns.pregate(x[:e], product(state[0], 0, e), before, vectors)
        new, _ = fns.step((*early[:e], *x[e:]), product(q.name, e, g), before, vectors)
    names = [a.name for a in new]
    if "weight_hr" in own:
        names[0] = w.emit("MatMul", names[0], w.add_initializer(f"{label}.weight_hr", own["weight_hr"].T))
    return names


def read_scan_weights(name: str, spec: LayerSpec, read: Callable[[str], Any]) -> Params:
    """The arrays of a layer that `scanned` wrote, as `read` finds them by name."""
    out: Params = {}
    cut = [0, spec.cell.pregates] if spec.cell.pregates else [0]
    for k, back in enumerate(spec.reverse):
        label, end = f"{name}.{'backward' if back else 'forward'}", "_l0_reverse" if k else "_l0"
        for key in (n.removesuffix(end) for n in spec.params if n.endswith(end) and not n.startswith("initial_")):
            ends = [f".{first}" if first and key.endswith("_hh") else "" for first in cut]
            parts = [read(f"{label}.{key}{e}") for e in dict.fromkeys(ends)]
            parts = [a.T if key.startswith(("weight_ih", "weight_hh", "weight_hr")) else a for a in parts]
            out[key + end] = np.concatenate(parts)
    return out
