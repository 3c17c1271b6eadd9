"""Gate orders and weight layouts of torch, Keras and ONNX in one table, and conversion of arrays between them.

xprnn uses torch's conventions. The arrays of one layer in one direction are

    weight_ih (G*H, D)   weight_hh (G*H, H)   bias_ih, bias_hh (G*H)   weight_pi, weight_pf, weight_po (H)

with gates in the order i,f,g,o (LSTM) and r,z,n (GRU). The names of the cells are elman, lstm, gru, gru_reset_before.
Parameters are converted as NumPy arrays, once, on the host. States and sequences may be arrays of any library.

Sources: the documentation of torch.nn.RNN, LSTM, GRU; of keras.layers.SimpleRNN, LSTM, GRU (kernel, recurrent_kernel,
bias); of the ONNX operators RNN, LSTM, GRU.
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
    """Array names, gate orders and layouts of one framework, for one layer in one direction.

    Gates have torch's letters: the candidate gates that ONNX and Keras call c (LSTM) and h (GRU) are g and n here.

    Args:
        names: the framework's names of the input weights, recurrent weights, biases and peepholes.
        gate_orders: cell -> its gates, in the order of their blocks.
        bias_layouts: cell -> "two" (b_ih and b_hh are two arrays), "joined" (concatenated), "rows" (two rows of one
            array) or "summed" (only b_ih + b_hh is stored).
        transposed_weights: True if weights are (D, G*H), used as x @ K; False if they are (G*H, D).
        peephole_order: the gates with peephole weights, in the order of their blocks; "" if the framework has none.
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
    """Return, for each gate block of framework `target`, the index of that block in framework `source`.

    >>> gate_order("lstm", "torch", "onnx"), gate_order("lstm", "onnx", "torch"), gate_order("gru", "keras", "torch")
    ([0, 3, 1, 2], [0, 2, 3, 1], [1, 0, 2])
    """
    source_order = CONVENTIONS[source].gate_orders[cell]
    return [source_order.index(gate) for gate in CONVENTIONS[target].gate_orders[cell]]


def reorder(array: Any, order: Sequence[int], axis: int = 0) -> Any:
    """Split `array` into blocks of equal size along `axis`, and concatenate them in the order of the given indices.

    >>> reorder(np.arange(6), [1, 0, 2])
    array([2, 3, 0, 1, 4, 5])
    """
    if array.shape[axis] % len(order):
        raise InputError(f"gates: axis {axis} of shape {tuple(array.shape)} is not {len(order)} blocks of equal size")
    blocks = np.split(array, len(order), axis)
    return np.concatenate([blocks[k] for k in order], axis)


def to_framework(framework: str, cell: str, params: Params) -> dict[str, Any]:
    """Convert the parameters of one layer in one direction to the arrays of `framework`.

    Args:
        framework: "torch", "keras" or "onnx".
        cell: elman, lstm, gru or gru_reset_before.
        params: NumPy arrays weight_ih (G*H, D), weight_hh (G*H, H) and, if the layer has them, bias_ih, bias_hh (G*H)
            and weight_pi, weight_pf, weight_po (H).

    Returns:
        keras: kernel (D, G*H), recurrent_kernel (H, G*H), bias (G*H) or (2, G*H). onnx: W (G*H, D), R (G*H, H),
        B (2*G*H), P (3*H), each without ONNX's leading axis of directions. Biases and peepholes are returned only if
        `params` has them.

    Raises:
        InputError: `params` has an array that the framework cannot represent.

    >>> params = {"weight_ih": np.ones((3, 2)), "weight_hh": np.ones((3, 1)), "bias_ih": np.arange(3.0),
    ...           "bias_hh": np.zeros(3)}
    >>> to_framework("keras", "gru", params)["bias"][0]
    array([1., 0., 2.])
    """
    if framework == "torch":
        return dict(params)
    convention, order = CONVENTIONS[framework], gate_order(cell, "torch", framework)
    accepted = {
        "weight_ih",
        "weight_hh",
        "bias_ih",
        "bias_hh",
        *(f"weight_p{gate}" for gate in convention.peephole_order),
    }
    if unknown := sorted(params.keys() - accepted):
        raise InputError(f"{framework}: {cell} cannot have {', '.join(unknown)}")
    arrays = {}
    for array_name, key in zip(convention.names, ("weight_ih", "weight_hh"), strict=False):
        weight = reorder(params[key], order)
        arrays[array_name] = np.ascontiguousarray(weight.T) if convention.transposed_weights else weight
    if "bias_ih" in params:
        biases = [reorder(params[key], order) for key in ("bias_ih", "bias_hh")]
        arrays[convention.names[2]] = _JOIN_BIASES[convention.bias_layouts[cell]](biases)
    if any(key.startswith("weight_p") for key in params):
        arrays[convention.names[3]] = np.concatenate([params[f"weight_p{gate}"] for gate in convention.peephole_order])
    return arrays


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
    """Convert the arrays of `framework` to xprnn's parameters: the inverse of `to_framework`.

    If the framework stores only the sum of both biases, the sum becomes bias_ih, and bias_hh is zero.

    Raises:
        InputError: `arrays` has a name that the framework does not use.

    >>> params = from_framework("onnx", "lstm", {"W": np.asarray([[0.0], [1.0], [2.0], [3.0]]), "R": np.zeros((4, 1))})
    >>> params["weight_ih"].ravel()
    array([0., 2., 3., 1.])
    """
    if framework == "torch":
        return dict(arrays)
    convention, order = CONVENTIONS[framework], gate_order(cell, framework, "torch")
    if unknown := sorted(arrays.keys() - set(convention.names)):
        raise InputError(f"{framework}: {cell} has no {', '.join(unknown)}")
    params = {}
    for array_name, key in zip(convention.names, ("weight_ih", "weight_hh"), strict=False):
        params[key] = reorder(arrays[array_name].T if convention.transposed_weights else arrays[array_name], order)
    if convention.names[2] in arrays:
        biases = _SPLIT_BIASES[convention.bias_layouts[cell]](arrays[convention.names[2]])
        params |= {key: reorder(bias, order) for key, bias in zip(("bias_ih", "bias_hh"), biases, strict=True)}
    if convention.peephole_order and convention.names[3] in arrays:
        blocks = np.split(arrays[convention.names[3]], len(convention.peephole_order))
        by_gate = dict(zip(convention.peephole_order, blocks, strict=True))
        params |= {f"weight_p{gate}": by_gate[gate] for gate in CONVENTIONS["torch"].peephole_order}
    return params


def split_directions(xp: Namespace, y: Array, num_directions: int) -> Array:
    """Return ONNX's Y of layout 0, (T, directions, N, H), for xprnn's y (T, N, directions*H).

    >>> split_directions(np, np.zeros((5, 2, 6)), 2).shape
    (5, 2, 2, 3)
    """
    time, batch, width = y.shape
    return xp.permute_dims(xp.reshape(y, (time, batch, num_directions, width // num_directions)), (0, 2, 1, 3))


def merge_directions(xp: Namespace, y: Array) -> Array:
    """Return xprnn's y (T, N, directions*H) for ONNX's Y of layout 0, (T, directions, N, H).

    >>> merge_directions(np, np.zeros((5, 2, 7, 3))).shape
    (5, 7, 6)
    """
    time, directions, batch, width = y.shape
    return xp.reshape(xp.permute_dims(y, (0, 2, 1, 3)), (time, batch, directions * width))


def swap_leading_axes(xp: Namespace, a: Array) -> Array:
    """Swap the first two axes: time and batch of a sequence (Keras; ONNX's layout 1), directions and batch of a state.

    >>> swap_leading_axes(np, np.zeros((5, 2, 3))).shape
    (2, 5, 3)
    """
    return xp.permute_dims(a, (1, 0, *range(2, a.ndim)))


def flatten_states(state: Any) -> list[Array]:
    """Return Keras's list of states for xprnn's state.

    Args:
        state: (L*directions, N, H), or for an LSTM a pair (h, c) of such arrays.

    Returns:
        For each layer and direction h, and for an LSTM then c: arrays (N, H).

    >>> [a.shape for a in flatten_states((np.zeros((2, 5, 3)), np.zeros((2, 5, 3))))]
    [(5, 3), (5, 3), (5, 3), (5, 3)]
    """
    states = state if isinstance(state, (tuple, list)) else (state,)
    return [s[k, ...] for k in range(states[0].shape[0]) for s in states]


def unflatten_states(xp: Namespace, states: Sequence[Array], states_per_cell: int) -> Any:
    """Return xprnn's state for Keras's list of states: the inverse of `flatten_states`.

    Args:
        xp: namespace of the arrays.
        states: arrays (N, H), for each layer and direction `states_per_cell` of them.
        states_per_cell: 2 for an LSTM (h and c), else 1.

    >>> [a.shape for a in unflatten_states(np, [np.zeros((5, 3))] * 4, 2)]
    [(2, 5, 3), (2, 5, 3)]
    """
    stacked = tuple(xp.stack(states[i::states_per_cell]) for i in range(states_per_cell))
    return stacked[0] if states_per_cell == 1 else stacked
