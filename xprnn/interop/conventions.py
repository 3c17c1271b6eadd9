"""Gate orders and layouts of every system, in one table, and the functions that go from one to another and back.

Inside, everything is torch's: the arrays of one layer in one direction are

    weight_ih (G*H, D)   weight_hh (G*H, H)   bias_ih, bias_hh (G*H)   weight_pi, weight_pf, weight_po (H)

with gates in the order i,f,g,o (LSTM) and r,z,n (GRU). Cells go by their own names: elman, lstm, gru, gru_reset_before.
Arrays here are NumPy's: parameters are converted on the host, once. States and sequences are of any library.

Sources: torch.nn's documentation; keras.layers' (kernel, recurrent_kernel, bias); the ONNX operators RNN, LSTM, GRU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays.namespace import Array, InputError, Namespace, Params

__all__ = [
    "CONVENTIONS",
    "Convention",
    "flatten_states",
    "from_framework",
    "gate_order",
    "merge_directions",
    "reorder",
    "split_directions",
    "swap_leading_axes",
    "to_framework",
    "unflatten_states",
]


class Convention(NamedTuple):
    """How one system writes the arrays of one layer in one direction, gates in torch's letters (ONNX's and Keras's
    c and h of the candidates are g and n here).

    Args:
        names: what the system calls the input weights, recurrent weights, biases and peepholes.
        gates: cell -> its order of gates.
        biases: cell -> "two" (one for each product), "joined" (b_ih and b_hh in one vector), "rows" (in two rows) or
            "summed" (b_ih + b_hh, which no one can tell apart again).
        columns: weights are (D, G*H), used as x K, instead of (G*H, D).
        peepholes: the order of the gates that look at the cell, "" where the system has none.
    """

    names: tuple[str, str, str, str]
    gate_orders: Mapping[str, str]
    bias_layouts: Mapping[str, str]
    transposed_weights: bool
    peephole_order: str


_CELLS = ("elman", "lstm", "gru", "gru_reset_before")


def _by_cell(*values: str) -> dict[str, str]:
    return dict(zip(_CELLS, values, strict=True))


CONVENTIONS = {
    "torch": Convention(
        names=("weight_ih", "weight_hh", "bias", "weight_p"),
        gate_orders=_by_cell("h", "ifgo", "rzn", "rzn"),
        bias_layouts=_by_cell("two", "two", "two", "two"),
        transposed_weights=False,
        peephole_order="ifo",  # torch itself has none; this is xprnn's order
    ),
    "keras": Convention(
        names=("kernel", "recurrent_kernel", "bias", ""),
        gate_orders=_by_cell("h", "ifgo", "zrn", "zrn"),
        bias_layouts=_by_cell("summed", "summed", "rows", "summed"),  # a GRU with reset_after has two rows
        transposed_weights=True,
        peephole_order="",
    ),
    "onnx": Convention(
        names=("W", "R", "B", "P"),
        gate_orders=_by_cell("h", "iofg", "zrn", "zrn"),
        bias_layouts=_by_cell("joined", "joined", "joined", "joined"),
        transposed_weights=False,
        peephole_order="iof",
    ),
}


def gate_order(cell: str, source: str, target: str) -> list[int]:
    """Which block of `source` stands at each place of `target`.

    >>> gate_order("lstm", "torch", "onnx"), gate_order("lstm", "onnx", "torch"), gate_order("gru", "keras", "torch")
    ([0, 3, 1, 2], [0, 2, 3, 1], [1, 0, 2])
    """
    have = CONVENTIONS[source].gate_orders[cell]
    return [have.index(gate) for gate in CONVENTIONS[target].gate_orders[cell]]


def reorder(array: Any, order: Sequence[int], axis: int = 0) -> Any:
    """The equal blocks of `array` along `axis`, in another order.

    >>> reorder(np.arange(6), [1, 0, 2])
    array([2, 3, 0, 1, 4, 5])
    """
    if array.shape[axis] % len(order):
        raise InputError(f"gates: axis {axis} of shape {tuple(array.shape)} is not {len(order)} blocks of one size")
    blocks = np.split(array, len(order), axis)
    return np.concatenate([blocks[k] for k in order], axis)


def to_framework(framework: str, cell: str, params: Params) -> dict[str, Any]:
    """The arrays of one layer in one direction as `system` has them.

    Args:
        system: "torch", "keras" or "onnx".
        cell: its name: elman, lstm, gru, gru_reset_before.
        own: weight_ih (G*H, D), weight_hh (G*H, H), and, where they exist, bias_ih, bias_hh (G*H) and weight_pi,
            weight_pf, weight_po (H): NumPy arrays.

    Returns:
        keras: kernel (D, G*H), recurrent_kernel (H, G*H), bias (G*H) or (2, G*H). onnx: W (G*H, D), R (G*H, H),
        B (2*G*H), P (3*H), to be stacked for the directions. Biases and peepholes only where `own` has them.

    Raises:
        InputError: something the system has no place for.

    >>> own = {"weight_ih": np.ones((3, 2)), "weight_hh": np.ones((3, 1)), "bias_ih": np.arange(3.0),
    ...        "bias_hh": np.zeros(3)}
    >>> to_framework("keras", "gru", own)["bias"][0]
    array([1., 0., 2.])
    """
    if framework == "torch":
        return dict(params)
    there, order = CONVENTIONS[framework], gate_order(cell, "torch", framework)
    known = {"weight_ih", "weight_hh", "bias_ih", "bias_hh", *(f"weight_p{gate}" for gate in there.peephole_order)}
    if strangers := sorted(params.keys() - known):
        raise InputError(f"{framework}: its {cell} has no place for {', '.join(strangers)}")
    out = {}
    for name, key in zip(there.names, ("weight_ih", "weight_hh"), strict=False):
        weight = reorder(params[key], order)
        out[name] = np.ascontiguousarray(weight.T) if there.transposed_weights else weight
    if "bias_ih" in params:
        pair = [reorder(params[key], order) for key in ("bias_ih", "bias_hh")]
        out[there.names[2]] = _JOIN_BIASES[there.bias_layouts[cell]](pair)
    if any(key.startswith("weight_p") for key in params):
        out[there.names[3]] = np.concatenate([params[f"weight_p{gate}"] for gate in there.peephole_order])
    return out


_JOIN_BIASES: dict[str, Callable[[Any], Any]] = {
    "summed": lambda pair: pair[0] + pair[1],
    "rows": np.stack,
    "joined": np.concatenate,
}
_SPLIT_BIASES: dict[str, Callable[[Any], Any]] = {
    "summed": lambda bias: (bias, np.zeros_like(bias)),
    "rows": tuple,
    "joined": lambda bias: np.split(bias, 2),
}


def from_framework(framework: str, cell: str, arrays: Mapping[str, Any]) -> Params:
    """The inverse of `to_framework`; a summed bias becomes bias_ih, beside a bias_hh of zeros.

    >>> own = from_framework("onnx", "lstm", {"W": np.asarray([[0.0], [1.0], [2.0], [3.0]]), "R": np.zeros((4, 1))})
    >>> own["weight_ih"].ravel()
    array([0., 2., 3., 1.])
    """
    if framework == "torch":
        return dict(arrays)
    there, order = CONVENTIONS[framework], gate_order(cell, framework, "torch")
    if strangers := sorted(arrays.keys() - set(there.names)):
        raise InputError(f"{framework}: a {cell} has no {', '.join(strangers)}")
    own = {}
    for name, key in zip(there.names, ("weight_ih", "weight_hh"), strict=False):
        own[key] = reorder(arrays[name].T if there.transposed_weights else arrays[name], order)
    if there.names[2] in arrays:
        pair = _SPLIT_BIASES[there.bias_layouts[cell]](arrays[there.names[2]])
        own |= {key: reorder(bias, order) for key, bias in zip(("bias_ih", "bias_hh"), pair, strict=True)}
    if there.peephole_order and there.names[3] in arrays:
        parts = np.split(arrays[there.names[3]], len(there.peephole_order))
        found = dict(zip(there.peephole_order, parts, strict=True))
        own |= {f"weight_p{gate}": found[gate] for gate in CONVENTIONS["torch"].peephole_order}
    return own


def split_directions(xp: Namespace, y: Array, num_directions: int) -> Array:
    """ONNX's Y of layout 0, (T, directions, N, H), for our y (T, N, directions*H).

    >>> split_directions(np, np.zeros((5, 2, 6)), 2).shape
    (5, 2, 2, 3)
    """
    steps, n, width = y.shape
    return xp.permute_dims(xp.reshape(y, (steps, n, num_directions, width // num_directions)), (0, 2, 1, 3))


def merge_directions(xp: Namespace, y: Array) -> Array:
    """Our y (T, N, directions*H) for ONNX's Y of layout 0.

    >>> merge_directions(np, np.zeros((5, 2, 7, 3))).shape
    (5, 7, 6)
    """
    steps, directions, n, width = y.shape
    return xp.reshape(xp.permute_dims(y, (0, 2, 1, 3)), (steps, n, directions * width))


def swap_leading_axes(xp: Namespace, a: Array) -> Array:
    """Swap the first two axes: time and batch of a sequence (Keras; ONNX's layout 1), directions and batch of a state.

    >>> swap_leading_axes(np, np.zeros((5, 2, 3))).shape
    (2, 5, 3)
    """
    return xp.permute_dims(a, (1, 0, *range(2, a.ndim)))


def flatten_states(state: Any) -> list[Array]:
    """Keras's states, h and then c of each layer and direction, each (N, H), for ours: (L*directions, N, H) or a pair.

    >>> [a.shape for a in flatten_states((np.zeros((2, 5, 3)), np.zeros((2, 5, 3))))]
    [(5, 3), (5, 3), (5, 3), (5, 3)]
    """
    parts = state if isinstance(state, (tuple, list)) else (state,)
    return [part[k, ...] for k in range(parts[0].shape[0]) for part in parts]


def unflatten_states(xp: Namespace, states: Sequence[Array], states_per_cell: int) -> Any:
    """The inverse of `flatten_states`; `count` is the number of the cell's states: 2 for the LSTM, else 1.

    >>> [a.shape for a in unflatten_states(np, [np.zeros((5, 3))] * 4, 2)]
    [(2, 5, 3), (2, 5, 3)]
    """
    parts = tuple(xp.stack(states[i::states_per_cell]) for i in range(states_per_cell))
    return parts[0] if states_per_cell == 1 else parts
