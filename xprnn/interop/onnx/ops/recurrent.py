"""The operators RNN, LSTM and GRU of ONNX with all their attributes, as xprnn layers.

A node becomes one layer, or two where its directions have activations of their own. What it computes is then what the
layer computes: the scan, its kernels and its checks are not written again here.

Source: the standard's text of RNN, LSTM and GRU (opsets 7, 14, 22).
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
    """What a node computes: the cell of each direction, and the directions it walks in.

    Args:
        op: RNN, LSTM or GRU.
        cells: one for each direction.
        reverse: for each direction, whether it walks from the end.
        batch_first: layout 1.
        hidden: hidden_size, or None where it is left to the shape of R.
    """

    op: str
    cells: tuple[Cell, ...]
    reverse: tuple[bool, ...]
    batch_first: bool
    hidden_size: int | None

    def build_layers(self, input_size: int, hidden_size: int, bias: bool) -> list[Recurrent]:
        """One layer for all directions; one for each where they differ."""
        if len(set(self.cells)) == 1 and len(self.cells) == 2:
            return [Recurrent(input_size, hidden_size, bias=bias, bidirectional=True, cell=self.cells[0])]
        pairs = zip(self.cells, self.reverse, strict=True)
        return [Recurrent(input_size, hidden_size, bias=bias, reverse=r, cell=cell) for cell, r in pairs]


def spec_from_node(node: Node) -> RecurrentSpec:
    """What a node computes.

    Raises:
        InputError: an attribute that nothing here can do; says which.
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
    """W, R, B and P of a node, NumPy arrays, as the parameters of each of `spec.layers`: in torch's order and names.

    Raises:
        InputError: shapes that do not fit each other.
    """
    check_weights(spec, weights)
    each = [from_framework("onnx", c.name, {k: a[d] for k, a in weights.items()}) for d, c in enumerate(spec.cells)]
    ends = ("_l0", "_l0_reverse")
    if len(set(spec.cells)) == 1 and len(each) == 2:
        return [{f"{k}{end}": a for own, end in zip(each, ends, strict=True) for k, a in own.items()}]
    return [{f"{k}_l0": a for k, a in own.items()} for own in each]


def check_weights(spec: RecurrentSpec, weights: dict[str, Any]) -> None:
    """Raise InputError unless W (D,G*H,I), R (D,G*H,H), B (D,2*G*H) and P (D,3*H) fit each other."""
    gates, d = GATE_COUNTS[spec.op], len(spec.cells)
    shapes = {k: tuple(a.shape) for k, a in weights.items()}
    hidden = shapes["R"][-1] if len(shapes["R"]) == 3 else 0
    if spec.hidden_size is not None and hidden != spec.hidden_size:
        raise InputError(f"R has shape {shapes['R']}, but hidden_size is {spec.hidden_size}")
    width = shapes["W"][-1] if len(shapes["W"]) == 3 else 0
    wanted: dict[str, tuple[int, ...]] = {"W": (d, gates * hidden, width), "R": (d, gates * hidden, hidden)}
    wanted |= {"B": (d, 2 * gates * hidden), "P": (d, 3 * hidden)}
    for name, shape in shapes.items():
        if shape != wanted[name] or 0 in shape:
            raise InputError(f"{name} must have shape {wanted[name]}, found {shape}")


def _reorder_weights(xp: Namespace, cell: Cell, given: dict[str, Array], d: int) -> Params:
    """One direction's parameters from weights that are only known when the graph runs, of any array library."""
    order, there = gate_order(cell.name, "onnx", "torch"), CONVENTIONS["onnx"]

    def sorted_(a: Array) -> Array:
        size = a.shape[0] // len(order)
        return xp.concat([a[k * size : (k + 1) * size, ...] for k in order], axis=0)

    own = {"weight_ih": sorted_(given["W"][d, ...]), "weight_hh": sorted_(given["R"][d, ...])}
    if "B" in given:
        both, half = given["B"][d, ...], given["B"].shape[1] // 2
        own |= {"bias_ih": sorted_(both[:half]), "bias_hh": sorted_(both[half:])}
    if "P" in given:
        p, size = given["P"][d, ...], given["P"].shape[1] // 3
        own |= {f"weight_p{gate}": p[k * size : (k + 1) * size] for k, gate in enumerate(there.peephole_order)}
    return own


def run_layers(
    xp: Namespace, spec: RecurrentSpec, params: list[Params], x: Array, lengths: Any, states: list[Array | None]
) -> tuple[Array, ...]:
    """Y, Y_h and, for the LSTM, Y_c, from the parameters of each of `spec.layers`."""
    bias = "bias_ih_l0" in params[0]
    weight = params[0]["weight_hh_l0"]
    layers = spec.build_layers(params[0]["weight_ih_l0"].shape[1], weight.shape[1], bias)
    x = swap_leading_axes(xp, x) if spec.batch_first else x
    states = [swap_leading_axes(xp, s) if spec.batch_first and s is not None else s for s in states]
    count, outputs, finals = len(spec.cells[0].states), [], []
    start = _fill_missing_states(xp, states, count, (len(spec.cells), x.shape[1], weight.shape[1]), weight)
    at = 0
    for layer, own in zip(layers, params, strict=True):
        part = None if start is None else tuple(s[at : at + layer.num_directions, ...] for s in start)
        at += layer.num_directions
        mine = {name: own[name] for name in layer.shapes()}
        y, final = layer(mine, x, part if part is None or count > 1 else part[0], lengths=lengths)
        outputs.append(split_directions(xp, y, layer.num_directions))
        finals.append(final if count > 1 else (final,))
    joined = [outputs, *zip(*finals, strict=True)]
    axes = (1, 0, 0)
    out = [a[0] if len(a) == 1 else xp.concat(list(a), axis=k) for a, k in zip(joined, axes, strict=False)]
    if spec.batch_first:
        out = [xp.permute_dims(out[0], (2, 0, 1, 3)), *(swap_leading_axes(xp, s) for s in out[1:])]
    return tuple(out)


def _fill_missing_states(
    xp: Namespace, states: list[Any], count: int, shape: tuple[int, ...], like: Array
) -> list[Array] | None:
    """The initial states, zeros for the one that is left out beside another; None where all are."""
    given = states[:count]
    if all(s is None for s in given):
        return None
    for name, s in zip(("initial_h", "initial_c"), given, strict=False):
        if s is not None and tuple(s.shape) != shape:
            raise InputError(f"{name} must have shape {shape} (directions, N, H), found {tuple(s.shape)}")
    zero = xp.zeros_like(next(s for s in given if s is not None))
    return [zero if s is None else s for s in given]


def _run_node(at: Context, node: Node, x: Array, *rest: Any) -> tuple[Array, ...]:
    """A node whose weights are values like any other: graph inputs, or computed."""
    named = dict(zip(("W", "R", "B", "lengths", "h", "c", "P"), rest, strict=False))
    given = {k: named[k] for k in "WRBP" if named.get(k) is not None}
    spec = spec_from_node(node)
    check_weights(spec, given)
    ends = ("_l0", "_l0_reverse")
    each = [_reorder_weights(at.xp, cell, given, d) for d, cell in enumerate(spec.cells)]
    if len(set(spec.cells)) == 1 and len(each) == 2:
        params = [{f"{k}{end}": a for own, end in zip(each, ends, strict=True) for k, a in own.items()}]
    else:
        params = [{f"{k}_l0": a for k, a in own.items()} for own in each]
    return run_layers(at.xp, spec, params, x, _lengths_to_array(named.get("lengths")), [named.get("h"), named.get("c")])


def _lengths_to_array(value: Any) -> Any:
    return np.asarray(value.array) if isinstance(value, HostValue) else value


RECURRENT_OPS = {
    op: Op(_run_node, _ATTRIBUTES[op], raw_inputs=(4,), unsupported_reason=_unsupported_reason, runs_on_host=False)
    for op in GATE_COUNTS
}
