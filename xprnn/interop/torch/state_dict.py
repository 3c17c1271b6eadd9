"""Inference of layers from the parameter names and shapes of a state_dict."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from xprnn.arrays.namespace import InputError
from xprnn.interop.assemble import LazyArray, NamedLayer, raise_all
from xprnn.layers.embedding import Embedding
from xprnn.layers.linear import Linear
from xprnn.layers.rnn_lstm_gru import GRU, LSTM, RNN

__all__ = ["check_numbering", "check_shapes", "layers_from_state_dict"]

_RECURRENT_KEY = re.compile(
    r"(?:(?P<part>.*)\.)?(?P<name>weight_ih|weight_hh|bias_ih|bias_hh|weight_hr)(?P<end>_l(\d{1,6})(_reverse)?)?",
    re.DOTALL,
)
_WEIGHT_OR_BIAS_KEY = re.compile(r"(?:(?P<part>.*)\.)?(?P<name>weight|bias)", re.DOTALL)
_FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
_LAYER_BY_GATE_COUNT: dict[int, Any] = {1: RNN, 3: GRU, 4: LSTM}

LazyArrays = dict[str, LazyArray]


def layers_from_state_dict(
    where: str, arrays: Mapping[str, LazyArray], *, nonlinearity: str = "tanh", batch_first: bool = False
) -> Any:
    """Infer the layers of a state_dict, in the order of its keys.

    Args:
        where: prefix of error messages.
        arrays: torch's parameter name -> array; the name may have the path of the module as a prefix.
        nonlinearity: of RNN layers; the names and shapes do not determine it.
        batch_first: of recurrent layers; the names and shapes do not determine it.

    Returns:
        A list of NamedLayer. A matrix without bias may be an Embedding or a Linear: it has both as candidates.

    Raises:
        InputError: names, shapes or dtypes that fit no supported layer; the message lists them.
    """
    groups: dict[str, LazyArrays] = {}
    problems = []
    for key, array in arrays.items():
        match = _RECURRENT_KEY.fullmatch(key) or _WEIGHT_OR_BIAS_KEY.fullmatch(key)
        if match is None or array.dtype not in _FLOAT_DTYPES:
            problems.append(f"{key[:200]} {array.shape} {array.dtype} belongs to no supported layer")
            continue
        parameter = match["name"] + (match.groupdict().get("end") or "")
        groups.setdefault(match["part"] or "", {})[parameter] = array
    layers = []
    for name, group in groups.items():
        try:
            layers.append(_named_layer(name, group, nonlinearity, batch_first))
        except InputError as error:
            problems.append(f"{name}: {error}" if name else str(error))
    raise_all(where, problems)
    if not layers:
        raise InputError(f"{where}: expected the parameters of a network, found no array")
    return layers


def check_numbering(where: str, names: Sequence[str]) -> None:
    """Raise InputError if layers are numbered, as in nn.Sequential, and a number is missing.

    A layer without parameters has the missing number, perhaps an activation, and the state_dict does not show it.
    """
    numbers: dict[tuple[str, ...], set[int]] = {}
    for name in names:
        parts = name.split(".")
        for k, part in enumerate(parts):
            if part.isdecimal() and len(part) < 7:
                numbers.setdefault(tuple(parts[:k]), set()).add(int(part))
    for prefix, present in numbers.items():
        missing = next((k for k in range(min(max(present), len(present) + 1)) if k not in present), None)
        if missing is not None:
            gap = ".".join((*prefix, str(missing)))
            raise InputError(
                f"{where}: {gap} has no parameters, found layers {', '.join(names)[:200]}: if it is an activation, the"
                " source does not show which; pass the module, or order=[names in execution order] if it has no effect"
            )


def _named_layer(name: str, arrays: LazyArrays, nonlinearity: str, batch_first: bool) -> NamedLayer:
    if any(key.startswith(("weight_", "bias_")) for key in arrays):
        cell_keys = [key for key in arrays if "_l" not in key]
        if len(cell_keys) == len(arrays):  # RNNCell, LSTMCell, GRUCell
            arrays = {f"{key}_l0": array for key, array in arrays.items()}
        elif cell_keys:
            layer_key = next(key for key in arrays if key not in cell_keys)
            raise InputError(f"found {', '.join(cell_keys)} (of a cell) and {layer_key} (of a layer)")
        return NamedLayer(name, (_recurrent_layer(arrays, nonlinearity, batch_first),), arrays)
    if "weight" not in arrays or len(arrays["weight"].shape) != 2:
        raise InputError(f"expected a weight with two axes, found {', '.join(arrays)}")
    rows, columns = arrays["weight"].shape
    candidates: tuple[Any, ...] = (Embedding(rows, columns), Linear(columns, rows, bias="bias" in arrays))
    if "bias" in arrays:
        candidates = candidates[1:]
    elif "emb" in name.lower():
        candidates = candidates[:1]
    for layer in candidates:
        check_shapes(arrays, layer)
    return NamedLayer(name, candidates, arrays)


def _recurrent_layer(arrays: LazyArrays, nonlinearity: str, batch_first: bool) -> Any:
    for key in ("weight_ih_l0", "weight_hh_l0", "weight_hr_l0"):
        if key not in arrays and key != "weight_hr_l0":
            raise InputError(f"{key} is missing, found {', '.join(arrays)}"[:300])
        if key in arrays and len(arrays[key].shape) != 2:
            raise InputError(f"{key} must have two axes, found shape {arrays[key].shape}")
    rows, columns = arrays["weight_hh_l0"].shape
    has_projection = "weight_hr_l0" in arrays
    hidden = arrays["weight_hr_l0"].shape[1] if has_projection else columns
    gate_count = rows // hidden if hidden else 0
    if gate_count * hidden != rows or gate_count not in ((4,) if has_projection else _LAYER_BY_GATE_COUNT):
        raise InputError(f"weight_hh_l0 {(rows, columns)} fits no RNN (H, H), GRU (3H, H) or LSTM (4H, H)")
    options: dict[str, Any] = {1: {"nonlinearity": nonlinearity}}.get(gate_count, {})
    num_layers = 1 + max(int(key.partition("_l")[2].partition("_")[0]) for key in arrays)
    if num_layers > len(arrays):
        raise InputError(f"layers are missing: there is a layer {num_layers - 1} but only {len(arrays)} arrays")
    layer = _LAYER_BY_GATE_COUNT[gate_count](
        arrays["weight_ih_l0"].shape[1],
        hidden,
        num_layers,
        bias=any(key.startswith("bias") for key in arrays),
        batch_first=batch_first,
        bidirectional=any(key.endswith("_reverse") for key in arrays),
        **options,
        **({"proj_size": columns} if has_projection else {}),
    )
    check_shapes(arrays, layer)
    return layer


def check_shapes(arrays: LazyArrays, layer: Any) -> None:
    """Raise one InputError that lists every array whose name or shape differs from the layer's parameters."""
    shapes = layer.shapes()
    problems = [f"{key} is missing" for key in shapes if key not in arrays]
    problems += [f"{key} is not a parameter of the layer" for key in arrays if key not in shapes]
    problems += [
        f"{key} must have shape {shape}, found {arrays[key].shape}"
        for key, shape in shapes.items()
        if key in arrays and arrays[key].shape != shape
    ]
    raise_all(f"inferred {layer!r}", problems)
