"""A network as a row of pieces: a look-up, single recurrent layers, matrix products. Export and import meet here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Params
from xprnn.cells.activations import activation
from xprnn.cells.standard import elman, gru, gru_reset_before, lstm
from xprnn.layers.base import StatelessLayer
from xprnn.layers.context_shift import ContextShift
from xprnn.layers.embedding import Embedding
from xprnn.layers.linear import Linear
from xprnn.layers.recurrent import Recurrent
from xprnn.layers.rnn_lstm_gru import GRU, LSTM, RNN
from xprnn.layers.sequence_ops import MergeDirections
from xprnn.layers.sequential import Sequential

__all__ = ["LayerSpec", "from_specs", "named_layers", "params_for", "specs_equal", "to_specs"]


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a network.

    Args:
        name: of the part that it belongs to, "" where the network has but one.
        kind: "embedding", "linear", "rnn" or "part".
        inputs, outputs: V and D, H and V, or D and H (P where h is projected); 0 of a part that takes any number of
            features.
        bias: whether there is one.
        cell: the Cell of a recurrent layer.
        ways: its directions: for each, whether it walks from the end.
        learned: whether its initial state is learned.
        batch_first: whether x and y are (N, T, .).
        projected: whether h is.
        own: a recurrent layer's arrays by the names of a layer of its own ("weight_ih_l0", "weight_ih_l0_reverse",
            "initial_h" (directions, H)...), else weight and bias.
        part: one without parameters: Apply, Softmax, Last...
    """

    name: str
    kind: str
    input_size: int
    output_size: int
    bias: bool
    params: Params
    cell: Any = None
    reverse: tuple[bool, ...] = ()
    learned_state: bool = False
    batch_first: bool = False
    projected: bool = False
    layer: Any = None

    def output_width(self, input_width: int) -> int:
        """How many features it puts out, given that many."""
        if self.kind == "part":
            return input_width // 2 if isinstance(self.layer, MergeDirections) else input_width
        return self.output_size * max(1, len(self.reverse))

    def state_width(self, state: str) -> int:
        """Features of a recurrent layer's state; h alone may be projected."""
        if state == self.cell.states[0]:
            return self.output_size
        return int(self.params["weight_hh_l0"].shape[0]) // int(self.cell.gates)


def specs_equal(a: Sequence[LayerSpec], b: Sequence[LayerSpec]) -> bool:
    """Whether two rows compute the same, whatever their parts are called and whatever their arrays hold."""
    return [_semantics(p) for p in a] == [_semantics(p) for p in b]


def _semantics(piece: LayerSpec) -> tuple[Any, ...]:
    """What a piece computes; the constants of its cell as a file holds them, in float32."""
    cell: Any = piece.cell
    if cell is not None and cell.options is not None:
        cell = (cell.name, _round_to_float32(dict(cell.options)))
    part = None if piece.layer is None else _round_to_float32(piece.layer.config())
    return (replace(piece, name="", params={}, cell=None, layer=None), cell, part)


def _round_to_float32(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _round_to_float32(v) for k, v in value.items()}
    return float(np.float32(value)) if isinstance(value, float) else value


def named_layers(model: Any, name: str = "") -> dict[str, Any]:
    """Name -> part; those of chains inside are "outer.inner", as their parameters' names have it.

    >>> list(named_layers(Sequential(low=Sequential(rnn=RNN(2, 3)), head=Linear(3, 1))))
    ['low.rnn', 'head']
    """
    if not isinstance(model, Sequential):
        return {name: model}
    prefix = f"{name}." if name else ""
    return {k: p for n, part in model.layers.items() for k, p in named_layers(part, prefix + n).items()}


def to_specs(model: Any, params: Params) -> list[LayerSpec]:
    """The pieces of a layer or Sequential."""
    out = []
    for name, part in named_layers(model).items():
        prefix = f"{name}." if name else ""
        own = {k: params[prefix + k] for k in part.shapes()}
        if isinstance(part, Embedding):
            out.append(LayerSpec(name, "embedding", part.num_embeddings, part.embedding_dim, False, own))
        elif isinstance(part, Linear):
            out.append(LayerSpec(name, "linear", part.in_features, part.out_features, part.bias, own))
        elif isinstance(part, (StatelessLayer, ContextShift)):
            out.append(LayerSpec(name, "part", 0, 0, False, {}, layer=part))
        else:
            out += _recurrent_specs(name, part, own)
    return out


def _recurrent_specs(name: str, part: Recurrent, own: Params) -> list[LayerSpec]:
    """A stack, layer by layer."""
    ways = (False, True) if part.bidirectional else (part.reverse,)
    out, width, d = [], part.input_size, part.num_directions
    for k, h in enumerate(part.hidden_sizes):
        mine = {_with_layer_index(n, k, 0): a for n, a in own.items() if _is_layer_param(n, k)}
        for state in part.resolved_cell.states if part.learned_state else ():
            whole = own[f"initial_{state}"] if isinstance(part.hidden_size, int) else own[f"initial_{state}_l{k}"]
            at = k * d if isinstance(part.hidden_size, int) else 0
            mine[f"initial_{state}"] = whole[at : at + d, ...]
        learned, first = part.learned_state, part.batch_first
        wide, projected = part.projection_size or h, part.projection_size > 0
        out.append(
            LayerSpec(name, "rnn", width, wide, part.bias, mine, part.resolved_cell, ways, learned, first, projected)
        )
        width = d * wide
    return out


def _is_layer_param(name: str, k: int) -> bool:
    return not name.startswith("initial_") and name.removesuffix("_reverse").endswith(f"_l{k}")


def _with_layer_index(name: str, k: int, to: int) -> str:
    end = "_reverse" if name.endswith("_reverse") else ""
    return f"{name.removesuffix('_reverse').removesuffix(f'_l{k}')}_l{to}{end}"


def from_specs(specs: Sequence[LayerSpec]) -> tuple[Any, Params]:
    """The model that these pieces are, like ones in a row as one stack; one part alone is itself."""
    groups: list[list[LayerSpec]] = []
    for piece in specs:
        alike = groups and specs_equal(
            [replace(groups[-1][-1], input_size=0, output_size=0)], [replace(piece, input_size=0, output_size=0)]
        )
        if alike and piece.kind == "rnn":
            groups[-1].append(piece)
        else:
            groups.append([piece])
    parts: dict[str, Any] = {}
    params: Params = {}
    for group in groups:
        name = _unique_name(
            group[0].name or _DEFAULT_NAMES.get(group[0].kind) or type(group[0].layer).__name__.lower(), parts
        )
        parts[name] = _build_layer(group)
        params |= {f"{name}.{k}": a for k, a in _group_params(parts[name], group).items()}
    if len(parts) == 1 and groups[0][0].kind == "rnn":
        (name,) = parts
        return parts[name], {k.removeprefix(f"{name}."): a for k, a in params.items()}
    return Sequential(**parts), params


_DEFAULT_NAMES = {"embedding": "embed", "rnn": "rnn", "linear": "head"}


def _unique_name(name: str, taken: dict[str, Any]) -> str:
    return name if name not in taken else next(n for k in range(2, 1000) if (n := f"{name}{k}") not in taken)


def params_for(model: Any, specs: Sequence[LayerSpec]) -> Params:
    """The parameters of `model`, which has these pieces, from their arrays."""
    if not isinstance(model, Sequential):
        return _group_params(model, specs)
    params: Params = {}
    at = 0
    for name, part in named_layers(model).items():
        count = getattr(part, "num_layers", 1)
        params |= {f"{name}.{k}": a for k, a in _group_params(part, specs[at : at + count]).items()}
        at += count
    return {name: params[name] for name in model.shapes()}


def _group_params(part: Any, group: Sequence[LayerSpec]) -> Params:
    if group[0].kind != "rnn":
        return dict(group[0].params)
    out: Params = {}
    for k, piece in enumerate(group):
        out |= {_with_layer_index(n, 0, k): a for n, a in piece.params.items() if not n.startswith("initial_")}
    for state in part.resolved_cell.states if part.learned_state else ():
        rows = [piece.params[f"initial_{state}"] for piece in group]
        if isinstance(part.hidden_size, int):
            out[f"initial_{state}"] = np.concatenate(rows, axis=0)
        else:
            out |= {f"initial_{state}_l{k}": row for k, row in enumerate(rows)}
    return {name: out[name] for name in part.shapes()}


def _build_layer(group: Sequence[LayerSpec]) -> Any:
    first = group[0]
    if first.kind == "part":
        return first.layer
    if first.kind == "embedding":
        return Embedding(first.input_size, first.output_size)
    if first.kind == "linear":
        return Linear(first.input_size, first.output_size, first.bias)
    sizes = tuple(p.output_size for p in group)
    options: dict[str, Any] = {
        "num_layers": len(group),
        "bias": first.bias,
        "batch_first": first.batch_first,
        "bidirectional": len(first.reverse) == 2,
        "reverse": first.reverse == (True,),
        "learned_state": first.learned_state,
    }
    make, special = _layer_class_and_options(first.cell)
    return make(first.input_size, sizes[0] if len(set(sizes)) == 1 else sizes, **options, **special)


def _layer_class_and_options(cell: Any) -> tuple[Any, dict[str, Any]]:
    """The class whose cell this is, and how to ask it for it."""
    if cell.name == "elman":
        chosen = dict(cell.options or ())
        f = chosen.get("f")
        if f is not None and chosen.get("clip") is None:
            f = f if isinstance(f, str) else activation(**f)
            return RNN, {"nonlinearity": f}
        return RNN, {"cell": cell} if cell != elman() else {}
    if cell.name == "lstm":
        return LSTM, {} if cell == lstm() else {"cell": cell}
    if cell in (gru(), gru_reset_before()):
        return GRU, {"reset_after": cell == gru()}
    return GRU, {"cell": cell}
