"""What layers a state_dict is of, from its names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from xprnn.arrays.namespace import InputError
from xprnn.interop.assemble import Entry, Part, refuse
from xprnn.layers.embedding import Embedding
from xprnn.layers.linear import Linear
from xprnn.layers.rnn_lstm_gru import GRU, LSTM, RNN

__all__ = ["compare", "parts_of"]

_RECURRENT = re.compile(
    r"(?:(?P<part>.*)\.)?(?P<name>weight_ih|weight_hh|bias_ih|bias_hh|weight_hr)(?P<end>_l(\d{1,6})(_reverse)?)?",
    re.DOTALL,
)
_PLAIN = re.compile(r"(?:(?P<part>.*)\.)?(?P<name>weight|bias)", re.DOTALL)
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_KINDS: dict[int, Any] = {1: RNN, 3: GRU, 4: LSTM}

Entries = dict[str, Entry]


def parts_of(where: str, entries: Mapping[str, Entry], *, nonlinearity: str = "tanh", batch_first: bool = False) -> Any:
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
    groups: dict[str, Entries] = {}
    problems = []
    for key, entry in entries.items():
        match = _RECURRENT.fullmatch(key) or _PLAIN.fullmatch(key)
        if match is None or entry.dtype not in _FLOATS:
            problems.append(f"{key[:200]} {entry.shape} {entry.dtype} belongs to no layer known here")
            continue
        kind = match["name"] + (match.groupdict().get("end") or "")
        groups.setdefault(match["part"] or "", {})[kind] = entry
    parts = []
    for name, group in groups.items():
        try:
            parts.append(_part(name, group, nonlinearity, batch_first))
        except InputError as error:
            problems.append(f"{name}: {error}" if name else str(error))
    refuse(where, problems)
    if not parts:
        raise InputError(f"{where}: expected the parameters of a network, found no array")
    return parts


def _part(name: str, group: Entries, nonlinearity: str, batch_first: bool) -> Part:
    if any(key.startswith(("weight_", "bias_")) for key in group):
        bare = [key for key in group if "_l" not in key]
        if len(bare) == len(group):  # RNNCell, LSTMCell, GRUCell
            group = {f"{key}_l0": entry for key, entry in group.items()}
        elif bare:
            raise InputError(f"{', '.join(bare)} stand beside {next(key for key in group if key not in bare)}")
        return Part(name, (_recurrent(group, nonlinearity, batch_first),), group)
    if "weight" not in group or len(group["weight"].shape) != 2:
        raise InputError(f"a weight of two axes is needed beside {', '.join(group)}")
    rows, columns = group["weight"].shape
    layers: tuple[Any, ...] = (Embedding(rows, columns), Linear(columns, rows, bias="bias" in group))
    if "bias" in group:
        layers = layers[1:]
    elif "emb" in name.lower():
        layers = layers[:1]
    for layer in layers:
        compare(group, layer)
    return Part(name, layers, group)


def _recurrent(group: Entries, nonlinearity: str, batch_first: bool) -> Any:
    for key in ("weight_ih_l0", "weight_hh_l0", "weight_hr_l0"):
        if key not in group and key != "weight_hr_l0":
            raise InputError(f"{key} is missing beside {', '.join(group)}"[:300])
        if key in group and len(group[key].shape) != 2:
            raise InputError(f"{key} must have two axes, found shape {group[key].shape}")
    rows, columns = group["weight_hh_l0"].shape
    projected = "weight_hr_l0" in group
    hidden = group["weight_hr_l0"].shape[1] if projected else columns
    gates = rows // hidden if hidden else 0
    if gates * hidden != rows or gates not in ((4,) if projected else _KINDS):
        raise InputError(f"weight_hh_l0 {(rows, columns)} is that of no RNN (H, H), GRU (3H, H) or LSTM (4H, H)")
    extra: dict[str, Any] = {1: {"nonlinearity": nonlinearity}}.get(gates, {})
    layers = 1 + max(int(key.partition("_l")[2].partition("_")[0]) for key in group)
    if layers > len(group):
        raise InputError(f"layers are missing: there is a layer {layers - 1} but only {len(group)} arrays")
    layer = _KINDS[gates](
        group["weight_ih_l0"].shape[1],
        hidden,
        layers,
        bias=any(key.startswith("bias") for key in group),
        batch_first=batch_first,
        bidirectional=any(key.endswith("_reverse") for key in group),
        **extra,
        **({"proj_size": columns} if projected else {}),
    )
    compare(group, layer)
    return layer


def compare(group: Entries, layer: Any) -> None:
    """Raise InputError unless the arrays are those of the layer, in names and shapes; says all that is wrong."""
    shapes = layer.shapes()
    problems = [f"{key} is missing" for key in shapes if key not in group]
    problems += [f"{key} has no place in it" for key in group if key not in shapes]
    problems += [
        f"{key} must have shape {shape}, found {group[key].shape}"
        for key, shape in shapes.items()
        if key in group and group[key].shape != shape
    ]
    refuse(f"taken for {layer!r}", problems)
