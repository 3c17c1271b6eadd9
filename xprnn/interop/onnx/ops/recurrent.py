"""The operators RNN, LSTM and GRU of ONNX, with all their attributes, computed by layers of xprnn.

A node is computed by one layer, or by two if its two directions have different activations.

Source: the ONNX standard's text of RNN, LSTM and GRU (opsets 7, 14, 22).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Array, InputError, Namespace, Params
from xprnn.cells.cell import Cell
from xprnn.interop.conventions import CONVENTIONS, from_framework, gate_order, split_directions, swap_leading_axes
from xprnn.interop.onnx.node import Context, HostValue, Node, Op
from xprnn.interop.onnx.recurrent_attributes import GATE_COUNTS, cells_from_attributes
from xprnn.layers.recurrent import Recurrent

__all__ = ["RECURRENT_OPS", "RecurrentSpec", "params_from_weights", "run_layers", "spec_from_node"]

_DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
_COMMON_ATTRIBUTES = (
    "activations",
    "activation_alpha",
    "activation_beta",
    "clip",
    "direction",
    "hidden_size",
    "layout",
)
_ATTRIBUTES = {
    "RNN": _COMMON_ATTRIBUTES,
    "LSTM": (*_COMMON_ATTRIBUTES, "input_forget"),
    "GRU": (*_COMMON_ATTRIBUTES, "linear_before_reset"),
}


@dataclass(frozen=True)
class RecurrentSpec:
    """The function that a recurrent node computes.

    Args:
        op: RNN, LSTM or GRU.
        cells: the cell of each direction.
        reverse: for each direction, True if it starts at the last step.
        batch_first: True for layout=1.
        hidden_size: the attribute hidden_size; None if it is missing, and the shape of R determines it.
    """

    op: str
    cells: tuple[Cell, ...]
    reverse: tuple[bool, ...]
    batch_first: bool
    hidden_size: int | None

    def build_layers(self, input_size: int, hidden_size: int, bias: bool) -> list[Recurrent]:
        """Make one layer for all directions, or one for each direction if their cells differ."""
        if len(set(self.cells)) == 1 and len(self.cells) == 2:
            return [Recurrent(input_size, hidden_size, bias=bias, bidirectional=True, cell=self.cells[0])]
        pairs = zip(self.cells, self.reverse, strict=True)
        return [Recurrent(input_size, hidden_size, bias=bias, reverse=r, cell=cell) for cell, r in pairs]


def spec_from_node(node: Node) -> RecurrentSpec:
    """Convert the attributes of a node.

    Raises:
        InputError: the value of an attribute is not supported; the message names it.
    """
    get = node.attrs.get
    if node.attrs.get("direction", "forward") not in _DIRECTIONS:
        raise InputError(f"direction={get('direction')!r}")
    reverse = _DIRECTIONS[get("direction", "forward")]
    peepholes = len(node.inputs) > 7 and node.inputs[7] != ""
    cells = cells_from_attributes(node.op, node.attrs, peepholes, len(reverse))
    return RecurrentSpec(node.op, cells, reverse, bool(get("layout", 0)), get("hidden_size"))


def _unsupported_reason(node: Node) -> str:
    try:
        spec_from_node(node)
    except InputError as error:
        return str(error)
    return ""


def params_from_weights(spec: RecurrentSpec, weights: dict[str, Any]) -> list[Params]:
    """Convert the NumPy arrays W, R, B and P of a node to the parameters of each layer of `spec.build_layers`.

    Raises:
        InputError: the shapes do not fit each other.
    """
    check_weights(spec, weights)
    directions = [
        from_framework("onnx", c.name, {k: a[d] for k, a in weights.items()}) for d, c in enumerate(spec.cells)
    ]
    return _params_of_layers(spec, directions)


def _params_of_layers(spec: RecurrentSpec, directions: list[Params]) -> list[Params]:
    """The parameters of each layer of `spec.build_layers`, from those of each direction."""
    if len(set(spec.cells)) == 1 and len(directions) == 2:
        suffixes = ("_l0", "_l0_reverse")
        return [{f"{k}{end}": a for arrays, end in zip(directions, suffixes, strict=True) for k, a in arrays.items()}]
    return [{f"{k}_l0": a for k, a in arrays.items()} for arrays in directions]


def check_weights(spec: RecurrentSpec, weights: dict[str, Any]) -> None:
    """Raise InputError unless the shapes fit each other.

    W (directions,G*H,D), R (directions,G*H,H), B (directions,2*G*H), P (directions,3*H).
    """
    gates, d = GATE_COUNTS[spec.op], len(spec.cells)
    shapes = {k: tuple(a.shape) for k, a in weights.items()}
    hidden = shapes["R"][-1] if len(shapes["R"]) == 3 else 0
    if spec.hidden_size is not None and hidden != spec.hidden_size:
        raise InputError(f"R has shape {shapes['R']}, hidden_size is {spec.hidden_size}")
    width = shapes["W"][-1] if len(shapes["W"]) == 3 else 0
    expected: dict[str, tuple[int, ...]] = {"W": (d, gates * hidden, width), "R": (d, gates * hidden, hidden)}
    expected |= {"B": (d, 2 * gates * hidden), "P": (d, 3 * hidden)}
    for name, shape in shapes.items():
        if shape != expected[name] or 0 in shape:
            raise InputError(f"{name} must have shape {expected[name]}, found {shape}")


def _reorder_weights(xp: Namespace, cell: Cell, weights: dict[str, Array], d: int) -> Params:
    """The parameters of direction d from weights of any array library, which are computed while the graph runs."""
    order, convention = gate_order(cell.name, "onnx", "torch"), CONVENTIONS["onnx"]

    def reorder(a: Array) -> Array:
        size = a.shape[0] // len(order)
        return xp.concat([a[k * size : (k + 1) * size, ...] for k in order], axis=0)

    params = {"weight_ih": reorder(weights["W"][d, ...]), "weight_hh": reorder(weights["R"][d, ...])}
    if "B" in weights:
        b, half = weights["B"][d, ...], weights["B"].shape[1] // 2
        params |= {"bias_ih": reorder(b[:half]), "bias_hh": reorder(b[half:])}
    if "P" in weights:
        p, size = weights["P"][d, ...], weights["P"].shape[1] // 3
        params |= {f"weight_p{gate}": p[k * size : (k + 1) * size] for k, gate in enumerate(convention.peephole_order)}
    return params


def run_layers(
    xp: Namespace, spec: RecurrentSpec, params: list[Params], x: Array, lengths: Any, states: list[Array | None]
) -> tuple[Array, ...]:
    """Compute Y, Y_h and, for an LSTM, Y_c.

    Args:
        xp: the array namespace.
        spec: the function of the node.
        params: the parameters of each layer of `spec.build_layers`.
        x: X, in the node's layout.
        lengths: sequence_lens (N,), or None.
        states: [initial_h, initial_c] in the node's layout; None for a zero state.
    """
    bias = "bias_ih_l0" in params[0]
    weight = params[0]["weight_hh_l0"]
    layers = spec.build_layers(params[0]["weight_ih_l0"].shape[1], weight.shape[1], bias)
    x = swap_leading_axes(xp, x) if spec.batch_first else x
    states = [swap_leading_axes(xp, s) if spec.batch_first and s is not None else s for s in states]
    num_states, outputs, finals = len(spec.cells[0].states), [], []
    initial = _fill_missing_states(xp, states, num_states, (len(spec.cells), x.shape[1], weight.shape[1]))
    start = 0
    for layer, arrays in zip(layers, params, strict=True):
        stop = start + layer.num_directions
        state = None if initial is None else tuple(s[start:stop, ...] for s in initial)
        start = stop
        layer_params = {name: arrays[name] for name in layer.shapes()}
        y, final = layer(layer_params, x, state if state is None or num_states > 1 else state[0], lengths=lengths)
        outputs.append(split_directions(xp, y, layer.num_directions))
        finals.append(final if num_states > 1 else (final,))
    by_output = [outputs, *zip(*finals, strict=True)]
    axes = (1, 0, 0)
    out = [a[0] if len(a) == 1 else xp.concat(list(a), axis=k) for a, k in zip(by_output, axes, strict=False)]
    if spec.batch_first:
        out = [xp.permute_dims(out[0], (2, 0, 1, 3)), *(swap_leading_axes(xp, s) for s in out[1:])]
    return tuple(out)


def _fill_missing_states(xp: Namespace, states: list[Any], count: int, shape: tuple[int, ...]) -> list[Array] | None:
    """The first `count` initial states, zeros for a missing one; None if all are missing."""
    states = states[:count]
    if all(s is None for s in states):
        return None
    for name, s in zip(("initial_h", "initial_c"), states, strict=False):
        if s is not None and tuple(s.shape) != shape:
            raise InputError(f"{name} must have shape {shape} (directions,N,H), found {tuple(s.shape)}")
    zeros = xp.zeros_like(next(s for s in states if s is not None))
    return [zeros if s is None else s for s in states]


def _run_node(context: Context, node: Node, x: Array, *inputs: Any) -> tuple[Array, ...]:
    """Run a node whose weights are inputs of the graph or outputs of other nodes, not parameters."""
    named = dict(zip(("W", "R", "B", "lengths", "h", "c", "P"), inputs, strict=False))
    weights = {k: named[k] for k in "WRBP" if named.get(k) is not None}
    spec = spec_from_node(node)
    check_weights(spec, weights)
    directions = [_reorder_weights(context.xp, cell, weights, d) for d, cell in enumerate(spec.cells)]
    lengths, states = _lengths_to_array(named.get("lengths")), [named.get("h"), named.get("c")]
    return run_layers(context.xp, spec, _params_of_layers(spec, directions), x, lengths, states)


def _lengths_to_array(value: Any) -> Any:
    return np.asarray(value.array) if isinstance(value, HostValue) else value


RECURRENT_OPS = {
    op: Op(_run_node, _ATTRIBUTES[op], raw_inputs=(4,), unsupported_reason=_unsupported_reason, runs_on_host=False)
    for op in GATE_COUNTS
}
