"""Traces of a cell's functions: step, backward and, if the cell has pregates, those of the pregates.

The inputs and outputs of the graphs are named by a letter and a number:

    x, h, g    gate k of the input projection, of the recurrent product, and their sum
    s          a state before the step
    p          one of the cell's vectors
    v          a saved value
    d          the cotangent of a state after the step
    q          the cotangent of the q that the pregates return
    X, U       output of an adjoint: the cotangent of x, of h
    r          output of an adjoint: the cotangent of the h before the step, without the recurrent product
    e          output of an adjoint: the cotangent of another state before the step
    P          output of an adjoint: the cotangent of one of the cell's vectors
"""

from collections.abc import Sequence
from typing import Any

from xprnn.cells.cell import Cell
from xprnn.kernels.tracing.graph import TraceGraph, UntraceableError, Value, input_names, nodes

__all__ = [
    "assign_buffers",
    "fusable_gates",
    "trace_backward",
    "trace_pregates",
    "trace_pregates_backward",
    "trace_step",
]


def _call(cell: Cell, graph: TraceGraph, name: str, *args: Any) -> Any:
    """Call one of the cell's functions on traced values.

    Raises:
        UntraceableError: for every exception of a user-defined function, which may raise any. The reference scan calls
            the function on arrays, and raises the exception again if it is an error of the cell.
    """
    try:
        return getattr(cell.bind(graph), name)(*args)
    except UntraceableError:
        raise
    except Exception as error:
        raise UntraceableError(f"{type(error).__name__}: {error}") from error


def trace_step(cell: Cell, graph: TraceGraph) -> tuple[tuple[Any, ...], tuple[Any, ...], int]:
    """Trace the cell's step.

    Gates have the same numbers with and without pregates. With E pregates, x0 to x<E-1> are the pregates' values.

    Returns:
        The new states, the saved values, and the number of summed gates: up to this gate, only the sum x + h is used.
        With pregates it is E or G, because a kernel treats the other gates alike.
    """
    s, p, e = graph.inputs("s", len(cell.states)), graph.inputs("p", len(cell.vectors)), cell.pregates
    new, saved = _call(cell, graph, "step", graph.inputs("x", cell.gates), graph.inputs("h", cell.gates)[e:], s, p)
    used = _used_inputs((*new, *saved))
    summed_gates = next((k for k in range(e, cell.gates) if {f"x{k}", f"h{k}"} & used), cell.gates)
    if e and summed_gates < cell.gates:
        summed_gates = e
    _expand_gate_sums(graph, range(summed_gates, cell.gates), used)
    return tuple(new), tuple(saved), summed_gates


def trace_pregates(cell: Cell, graph: TraceGraph) -> tuple[tuple[Any, ...], Any, bool]:
    """Trace the cell's pregates.

    Returns:
        Their values, q, and True if only the sum x + h of each pregate is used.
    """
    s, p, gates = graph.inputs("s", len(cell.states)), graph.inputs("p", len(cell.vectors)), range(cell.pregates)
    values, q = _call(cell, graph, "pregate", graph.inputs("x", len(gates)), graph.inputs("h", len(gates)), s, p)
    used = _used_inputs((*values, q))
    all_summed = not any({f"x{k}", f"h{k}"} & used for k in gates)
    if not all_summed:
        _expand_gate_sums(graph, gates, used)
    return tuple(values), q, all_summed


def _used_inputs(values: Sequence[Any]) -> set[str]:
    """The names of all inputs that the values depend on."""
    if any(isinstance(v, Value) and v.is_boolean for v in values):
        raise UntraceableError("a state or saved value that is true or false")
    return set().union(*(input_names(v) for v in values))


def _expand_gate_sums(graph: TraceGraph, gates: range, used: set[str]) -> None:
    """Turn the inputs g<k> of these gates, for which a kernel has no buffer, into operations x<k> + h<k>."""
    for k in gates:
        g = graph.input(f"g{k}")
        if f"g{k}" in used:
            g.op, g.args, g.name = "add", (graph.input(f"x{k}"), graph.input(f"h{k}")), ""


def trace_backward(cell: Cell, num_saved: int, num_pregate_values: int = 0) -> tuple[list[tuple[str, Any]], bool, bool]:
    """Trace the adjoint of the cell's step.

    With pregates, X0 to X<E-1> are the cotangents of the pregates' values, as far as there are any. The inputs v0, v1,
    ... are then the pregates' values, followed by the values that the step saved.

    Returns:
        (name, value) of each output, True if dh is dx, and True if h has a direct path, beside the recurrent product.
    """
    graph, e = TraceGraph(), cell.pregates
    d, s = graph.inputs("d", len(cell.states)), graph.inputs("s", len(cell.states))
    p, v = graph.inputs("p", len(cell.vectors)), graph.inputs("v", num_pregate_values + num_saved)
    dx, dh, dprevious, dvectors = _call(cell, graph, "backward", d, v[num_pregate_values:], s, p)
    outputs = [(f"X{k}", 0.0 if a is None else a) for k, a in enumerate(dx) if k >= e or a is not None]
    dx_is_dh = all(a is b for a, b in zip(dx[e:], dh, strict=True))
    if not dx_is_dh:
        outputs += [(f"U{k}", a) for k, a in enumerate(dh, e)]
    outputs += [(f"P{k}", a) for k, a in enumerate(dvectors) if not e or a is not None]
    if dprevious[0] is not None:
        outputs.append(("r0", dprevious[0]))
    outputs += [(f"e{k}", 0.0 if a is None else a) for k, a in enumerate(dprevious) if k]
    return outputs, dx_is_dh, dprevious[0] is not None


def trace_pregates_backward(cell: Cell, num_pregate_values: int, cotangent_names: set[str]) -> list[tuple[str, Any]]:
    """Trace the adjoint of the cell's pregates.

    Args:
        cell: a cell with pregates.
        num_pregate_values: how many values the pregates return.
        cotangent_names: the names of the outputs of `trace_backward`.

    Returns:
        (name, value) of each output. A kernel assigns the outputs X and adds the others to those of `trace_backward`.
    """
    graph, gates = TraceGraph(), range(cell.pregates)
    s, p = graph.inputs("s", len(cell.states)), graph.inputs("p", len(cell.vectors))
    v = graph.inputs("v", num_pregate_values)
    dvalues = tuple(graph.input(f"X{k}") if f"X{k}" in cotangent_names else None for k in gates)
    dx, dprevious, dvectors = _call(cell, graph, "pregate_backward", dvalues, graph.input("q0"), v, s, p)
    outputs = [(f"X{k}", 0.0 if a is None else a) for k, a in enumerate(dx)]
    outputs += [(f"P{k}", a) for k, a in enumerate(dvectors) if a is not None]
    return outputs + [(f"{'e' if k else 'r'}{k}", a) for k, a in enumerate(dprevious) if a is not None]


def assign_buffers(
    cell: Cell,
    graph: TraceGraph,
    new: tuple[Any, ...],
    saved: tuple[Any, ...],
    pregate_buffers: tuple[str, ...] = (),
    first_state_buffer: str = "M0",
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Assign a buffer to each saved value of a step.

    A saved value that is a state or a pregate's value is already in a buffer: S<k> holds the states before the step,
    M<k> those after it. For the others there are X<k>, columns of the gate buffer, and after these V<k>.

    Args:
        cell: the cell.
        graph: the graph of the step.
        new: its new states.
        saved: its saved values.
        pregate_buffers: the buffers of the pregates' values, which the step reads as x0, x1, ...
        first_state_buffer: the buffer of the first new state.

    Returns:
        The buffer of each saved value, and a dict from each buffer that the step must write to its value.
    """
    known = {id(graph.input(f"x{k}")): buffer for k, buffer in enumerate(pregate_buffers[: cell.pregates])}
    known |= {id(graph.input(f"s{k}")): f"S{k}" for k in range(len(cell.states))}
    known |= {id(v): f"M{k}" if k else first_state_buffer for k, v in enumerate(new)}
    num_used = len({buffer for buffer in pregate_buffers if buffer[0] in "XV"})
    written: dict[str, Any] = {}
    buffers = []
    for value in saved:
        buffer = known.get(id(value))
        if buffer is None:
            k = num_used + len(written)
            buffer = f"X{k}" if k < cell.gates else f"V{k}"
            written[buffer] = value
        buffers.append(buffer)
    return tuple(buffers), written


def fusable_gates(graph: TraceGraph, outputs: Sequence[Any], summed_gates: int) -> list[Value]:
    """Return the one tanh or sigmoid to which each summed gate is passed; an empty list if any gate is used otherwise.

    A kernel can then compute the activations of all summed gates in one call.
    """
    activations = []
    all_nodes = nodes(outputs)
    for k in range(summed_gates):
        g = graph.input(f"g{k}")
        users = [v for v in all_nodes if any(a is g for a in v.args)]
        if len(users) != 1 or users[0].op not in ("tanh", "sigmoid") or any(v is g for v in outputs):
            return []
        activations.append(users[0])
    return activations
