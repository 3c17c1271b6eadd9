"""Recurrent layers written as a Scan: projections, and cells that RNN, LSTM and GRU cannot express.

The body of the Scan is one time step: the recurrent product, the cell, the projection, and the unchanged state at
masked steps. The functions of the cell are run once in a tracing namespace to write its nodes (tracing_namespace).
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

_ACTIVATION_OPTIONS = ("f", "gate", "candidate", "output")  # options of a standard cell that are activations
_BOOL = 9  # TensorProto.BOOL


def needs_scan(cell: Cell, projected: bool) -> bool:
    """True if none of the operators RNN, LSTM and GRU computes a layer of this cell.

    >>> from xprnn.cells import lstm
    >>> needs_scan(lstm(), False), needs_scan(lstm(), True)
    (False, True)
    """
    if projected or cell.options is None:
        return True
    return not all(
        is_supported_activation(activation_from_config(config))
        for name, config in cell.options
        if name in _ACTIVATION_OPTIONS
    )


def untraceable_cell_reason(cell: Cell) -> str:
    """Why the step of a cell cannot be written as nodes; "" if it can."""

    def trace(xp: Any, value: Any) -> Any:
        gates, vectors = [value() for _ in range(cell.gates)], tuple(value() for _ in cell.vectors)
        state, e = tuple(value() for _ in cell.states), cell.pregates
        fns, x = cell.bind(xp), gates
        if fns.pregate is not None:
            pregates, _ = fns.pregate(gates[:e], gates[:e], state, vectors)
            x = [*pregates[:e], *gates[e:]]
        new_state, _ = fns.step(tuple(x), tuple(gates[e:]), state, vectors)
        return tuple(new_state)

    return untraceable_reason(trace)


def emit_scan(writer: MaskedTimeWriter, name: str, spec: LayerSpec, x: str, states: list[str]) -> tuple[str, list[str]]:
    """Write one layer; return the names of y and of the final states.

    Args:
        writer: the graph.
        name: prefix of the names of initializers.
        spec: the layer.
        x: the name of the time-major input.
        states: the names of the initial states (directions,N,.).
    """
    valid = writer.get_valid_mask(x)
    mask = [writer.emit("Unsqueeze", valid, writer.int64_vector(2))] if valid else []
    ys, finals = [], []
    for k, reverse in enumerate(spec.reverse):
        label, suffix = f"{name}.{'backward' if reverse else 'forward'}", "_l0_reverse" if k else "_l0"
        params = {n.removesuffix(suffix): a for n, a in spec.params.items() if n.endswith(suffix)}
        xg = writer.emit("MatMul", x, writer.add_initializer(f"{label}.weight_ih", params["weight_ih"].T))
        if "bias_ih" in params:
            xg = writer.emit("Add", xg, writer.add_initializer(f"{label}.bias_ih", params["bias_ih"]))
        initial = [writer.emit("Gather", s, writer.int64_scalar(k), axis=0) for s in states]
        attrs = {
            "num_scan_inputs": 1 + len(mask),
            "scan_input_directions": [int(reverse)] * (1 + len(mask)),
            "scan_output_directions": [int(reverse)],
        }
        body = _scan_body(writer, label, spec.cell, params, bool(mask))
        *final, y = writer.emit_multi_output(len(states) + 1, "Scan", *initial, xg, *mask, body=body, **attrs)
        ys.append(y)
        finals.append([writer.emit("Unsqueeze", f, writer.int64_vector(0)) for f in final])
    y = ys[0] if len(ys) == 1 else writer.emit("Concat", *ys, axis=-1)
    by_state = [e[0] if len(e) == 1 else writer.emit("Concat", *e, axis=0) for e in zip(*finals, strict=True)]
    return y, by_state


def _scan_body(writer: MaskedTimeWriter, label: str, cell: Cell, params: dict[str, Any], masked: bool) -> Any:
    """The body of the Scan: (states, projected input[, valid]) -> (new states, y)."""
    state = [f"{label}.{s}" for s in cell.states]
    inputs = [*state, f"{label}.xg", *([f"{label}.valid"] if masked else [])]
    with writer.subgraph_scope() as nodes:
        new_state = _emit_step(writer, label, cell, params, state, f"{label}.xg")
        y = new_state[0]
        if masked:
            y = writer.emit("Where", inputs[-1], new_state[0], writer.float_scalar(0.0))
            new_state = [writer.emit("Where", inputs[-1], a, b) for a, b in zip(new_state, state, strict=True)]
        outputs = [writer.emit("Identity", a) for a in (*new_state, y)]
    elem_types = [*[writer.elem_type] * (len(state) + 1), *([_BOOL] if masked else [])]
    return writer.make_subgraph(label, nodes, inputs, outputs, elem_types)


def _emit_step(
    writer: MaskedTimeWriter, label: str, cell: Cell, params: dict[str, Any], state: list[str], xg: str
) -> list[str]:
    """Write one time step; return the names of the new states."""
    e, g, hidden = cell.pregates, cell.gates, params["weight_hh"].shape[0] // cell.gates
    vectors = tuple(TracedValue(writer, writer.add_initializer(f"{label}.{v}", params[v])) for v in cell.vectors)

    def recurrent_product(h: str, first: int, last: int) -> tuple[TracedValue, ...]:
        rows, suffix = slice(first * hidden, last * hidden), f".{first}" if first else ""
        weight = writer.add_initializer(f"{label}.weight_hh{suffix}", params["weight_hh"][rows].T)
        hg = writer.emit("MatMul", h, weight)
        if "bias_hh" in params:
            hg = writer.emit("Add", hg, writer.add_initializer(f"{label}.bias_hh{suffix}", params["bias_hh"][rows]))
        return split_gates(hg, last - first)

    def split_gates(a: str, count: int) -> tuple[TracedValue, ...]:
        if count == 1:
            return (TracedValue(writer, a),)
        sizes = writer.int64_vector(*[hidden] * count)
        return tuple(TracedValue(writer, n) for n in writer.emit_multi_output(count, "Split", a, sizes, axis=-1))

    fns, x = cell.bind(make_tracing_namespace(writer)), split_gates(xg, g)
    old_state = tuple(TracedValue(writer, s) for s in state)
    if fns.pregate is None:
        new_state, _ = fns.step(x, recurrent_product(state[0], 0, g), old_state, vectors)
    else:
        pregates, q = fns.pregate(x[:e], recurrent_product(state[0], 0, e), old_state, vectors)
        new_state, _ = fns.step((*pregates[:e], *x[e:]), recurrent_product(q.name, e, g), old_state, vectors)
    names = [a.name for a in new_state]
    if "weight_hr" in params:
        names[0] = writer.emit("MatMul", names[0], writer.add_initializer(f"{label}.weight_hr", params["weight_hr"].T))
    return names


def read_scan_weights(name: str, spec: LayerSpec, read: Callable[[str], Any]) -> Params:
    """The parameters of a layer that `emit_scan` wrote; read(name) returns an initializer as a NumPy array."""
    out: Params = {}
    first_gates = [0, spec.cell.pregates] if spec.cell.pregates else [0]
    for k, reverse in enumerate(spec.reverse):
        label, suffix = f"{name}.{'backward' if reverse else 'forward'}", "_l0_reverse" if k else "_l0"
        for key in (n.removesuffix(suffix) for n in spec.params if n.endswith(suffix) and not n.startswith("initial_")):
            block_suffixes = [f".{first}" if first and key.endswith("_hh") else "" for first in first_gates]
            blocks = [read(f"{label}.{key}{b}") for b in dict.fromkeys(block_suffixes)]
            blocks = [a.T if key.startswith(("weight_ih", "weight_hh", "weight_hr")) else a for a in blocks]
            out[key + suffix] = np.concatenate(blocks)
    return out
