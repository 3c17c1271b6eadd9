"""The outputs of a graph that are final states of its recurrent nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from xprnn.arrays.namespace import Array
from xprnn.interop.onnx.node import Node
from xprnn.interop.onnx.program import CompiledGraph
from xprnn.interop.onnx.recurrent_attributes import GATE_COUNTS

__all__ = ["OutputRoles", "find_output_roles"]

_PASS_THROUGH = ("Cast", "Identity", "Squeeze", "Unsqueeze")


class OutputRoles(NamedTuple):
    """The outputs of a graph, divided into y and final states.

    Args:
        y: names of the outputs that are not final states.
        states: names of the final states.
        one_source: True if all final states come from the same recurrent node or the same stack of nodes; `states` are
            then in the order h, c.
    """

    y: tuple[str, ...]
    states: tuple[str, ...]
    one_source: bool

    def pack(self, arrays: Mapping[str, Array]) -> tuple[Any, Any]:
        """Return (y, state) as a GraphModel does, from the arrays of all outputs."""
        y: Any = {name: arrays[name] for name in self.y}
        y = y[self.y[0]] if len(y) == 1 else y
        if not self.states:
            return y, None
        if not self.one_source:
            return y, {name: arrays[name] for name in self.states}
        state = tuple(arrays[name] for name in self.states)
        return y, state[0] if len(state) == 1 else state


class _FinalState(NamedTuple):
    """A final state of one recurrent node, or the concatenation of those of several nodes.

    Args:
        nodes: the numbers of the nodes in the graph.
        state: 0 for h (Y_h), 1 for c (Y_c); for a Scan, the number of the state.
    """

    nodes: frozenset[int]
    state: int


def find_output_roles(graph: CompiledGraph) -> OutputRoles:
    """Find the outputs of a graph that are final states of RNN, LSTM, GRU or Scan nodes.

    If two outputs are the same final state, as in exports of Keras layers with return_state=True, only the later one
    counts as a state. If all outputs are final states, all count as y.
    """
    found: dict[str, _FinalState] = {}
    for k, node in enumerate(graph.nodes):
        found |= _final_states_of_node(k, node, found)
    names = {found[name]: name for name in graph.outputs if name in found}
    y = tuple(name for name in graph.outputs if name not in names.values())
    if not y:
        return OutputRoles(graph.outputs, (), one_source=False)
    if len({s.nodes for s in names}) == 1:
        return OutputRoles(y, tuple(names[s] for s in sorted(names, key=lambda s: s.state)), one_source=True)
    return OutputRoles(y, tuple(name for name in graph.outputs if name not in y), one_source=False)


def _final_states_of_node(k: int, node: Node, found: Mapping[str, _FinalState]) -> dict[str, _FinalState]:
    """The outputs of node number k that are final states, by name."""
    if node.op in GATE_COUNTS or node.op == "Scan":
        names = node.outputs[1:] if node.op in GATE_COUNTS else node.outputs[: _scan_state_count(node)]
        return {name: _FinalState(frozenset([k]), i) for i, name in enumerate(names) if name}
    inputs = [found.get(name) for name in node.inputs]
    out = None
    if node.op in _PASS_THROUGH:
        out = inputs[0]
    elif node.op == "Where":  # to_onnx: a row without a valid step keeps its initial state
        out = inputs[1]
    elif node.op == "Concat":  # of layers or directions
        states = [s for s in inputs if s is not None]
        if len(states) == len(inputs) and len({s.state for s in states}) == 1:
            out = _FinalState(frozenset().union(*(s.nodes for s in states)), states[0].state)
    return {} if out is None else {node.outputs[0]: out}


def _scan_state_count(scan: Node) -> int:
    return len(scan.inputs) - int(scan.attrs["num_scan_inputs"])
