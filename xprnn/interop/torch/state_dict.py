"""What layers a state_dict is of, from its names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from xprnn.arrays.namespace import InputError
from xprnn.interop.assemble import LazyArray, NamedLayer, raise_all
from xprnn.layers.embedding import Embedding
from xprnn.layers.linear import Linear
from xprnn.layers.rnn_lstm_gru import GRU, LSTM, RNN

__all__ = ["check_shapes", "layers_from_state_dict"]

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
    """The parts of a state_dict, in its order.

    Args:
        where: for errors.
        entries: state_dict name -> array; torch's names, with or without the path of the module before them.
        nonlinearity, batch_first: what names and shapes do not tell.

    Returns:
        A list of Part. One that may be an Embedding or a Linear without bias names both.

    Raises:
        InputError: names, shapes or dtypes that belong to no layer, all of them.
    """
    groups: dict[str, LazyArrays] = {}
    problems = []
    for key, entry in arrays.items():
        match = _RECURRENT_KEY.fullmatch(key) or _WEIGHT_OR_BIAS_KEY.fullmatch(key)
        if match is None or entry.dtype not in _FLOAT_DTYPES:
            problems.append(f"{key[:200]} {entry.shape} {entry.dtype} belongs to no layer known here")
            continue
        kind = match["name"] + (match.groupdict().get("end") or "")
        groups.setdefault(match["part"] or "", {})[kind] = entry
    parts = []
    for name, group in groups.items():
        try:
            parts.append(_named_layer(name, group, nonlinearity, batch_first))
        except InputError as error:
            problems.append(f"{name}: {error}" if name else str(error))
    raise_all(where, problems)
    if not parts:
        raise InputError(f"{where}: expected the parameters of a network, found no array")
    return parts


def _named_layer(name: str, group: LazyArrays, nonlinearity: str, batch_first: bool) -> NamedLayer:
    if any(key.startswith(("weight_", "bias_")) for key in group):
        bare = [key for key in group if "_l" not in key]
        if len(bare) == len(group):  # RNNCell, LSTMCell, GRUCell
            group = {f"{key}_l0": entry for key, entry in group.items()}
        elif bare:
            raise InputError(f"{', '.join(bare)} stand beside {next(key for key in group if key not in bare)}")
        return NamedLayer(name, (_recurrent_layer(group, nonlinearity, batch_first),), group)
    if "weight" not in group or len(group["weight"].shape) != 2:
        raise InputError(f"a weight of two axes is needed beside {', '.join(group)}")
    rows, columns = group["weight"].shape
    layers: tuple[Any, ...] = (Embedding(rows, columns), Linear(columns, rows, bias="bias" in group))
    if "bias" in group:
        layers = layers[1:]
    elif "emb" in name.lower():
        layers = layers[:1]
    for layer in layers:
        check_shapes(group, layer)
    return NamedLayer(name, layers, group)


def _recurrent_layer(group: LazyArrays, nonlinearity: str, batch_first: bool) -> Any:
    for key in ("weight_ih_l0", "weight_hh_l0", "weight_hr_l0"):
        if key not in group and key != "weight_hr_l0":
            raise InputError(f"{key} is missing beside {', '.join(group)}"[:300])
        if key in group and len(group[key].shape) != 2:
            raise InputError(f"{key} must have two axes, found shape {group[key].shape}")
    rows, columns = group["weight_hh_l0"].shape
    projected = "weight_hr_l0" in group
    hidden = group["weight_hr_l0"].shape[1] if projected else columns
    gates = rows // hidden if hidden else 0
    if gates * hidden != rows or gates not in ((4,) if projected else _LAYER_BY_GATE_COUNT):
        raise InputError(f"weight_hh_l0 {(rows, columns)} is that of no RNN (H, H), GRU (3H, H) or LSTM (4H, H)")
    extra: dict[str, Any] = {1: {"nonlinearity": nonlinearity}}.get(gates, {})
    layers = 1 + max(int(key.partition("_l")[2].partition("_")[0]) for key in group)
    if layers > len(group):
        raise InputError(f"layers are missing: there is a layer {layers - 1} but only {len(group)} arrays")
    layer = _LAYER_BY_GATE_COUNT[gates](
        group["weight_ih_l0"].shape[1],
        hidden,
        layers,
        bias=any(key.startswith("bias") for key in group),
        batch_first=batch_first,
        bidirectional=any(key.endswith("_reverse") for key in group),
        **extra,
        **({"proj_size": columns} if projected else {}),
    )
    check_shapes(group, layer)
    return layer


def check_shapes(arrays: LazyArrays, layer: Any) -> None:
    """Raise InputError unless the arrays are those of the layer, in names and shapes; says all that is wrong."""
    shapes = layer.shapes()
    problems = [f"{key} is missing" for key in shapes if key not in arrays]
    problems += [f"{key} has no place in it" for key in arrays if key not in shapes]
    problems += [
        f"{key} must have shape {shape}, found {arrays[key].shape}"
        for key, shape in shapes.items()
        if key in arrays and arrays[key].shape != shape
    ]
    raise_all(f"taken for {layer!r}", problems)
