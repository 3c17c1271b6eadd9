"""A network as a row of pieces: a look-up, single recurrent layers, matrix products. Export and import meet here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Params
from xprnn.cells.activations import activation
from xprnn.cells.standard import elman, gru, gru_reset_before, lstm
from xprnn.layers.base import Part
from xprnn.layers.context_shift import Around
from xprnn.layers.embedding import Embedding
from xprnn.layers.linear import Linear
from xprnn.layers.recurrent import Recurrent
from xprnn.layers.rnn_lstm_gru import GRU, LSTM, RNN
from xprnn.layers.sequence_ops import Merge
from xprnn.layers.sequential import Sequential

__all__ = ["Piece", "flat_parts", "from_pieces", "pieces_of", "same", "with_structure"]


@dataclass(frozen=True)
class Piece:
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
    inputs: int
    outputs: int
    bias: bool
    own: Params
    cell: Any = None
    ways: tuple[bool, ...] = ()
    learned: bool = False
    batch_first: bool = False
    projected: bool = False
    part: Any = None

    def width(self, before: int) -> int:
        """How many features it puts out, given that many."""
        if self.kind == "part":
            return before // 2 if isinstance(self.part, Merge) else before
        return self.outputs * max(1, len(self.ways))

    def state_width(self, state: str) -> int:
        """Features of a recurrent layer's state; h alone may be projected."""
        if state == self.cell.states[0]:
            return self.outputs
        return int(self.own["weight_hh_l0"].shape[0]) // int(self.cell.gates)


def same(a: Sequence[Piece], b: Sequence[Piece]) -> bool:
    """Whether two rows compute the same, whatever their parts are called and whatever their arrays hold."""
    return [_sense(p) for p in a] == [_sense(p) for p in b]


def _sense(piece: Piece) -> tuple[Any, ...]:
    """What a piece computes; the constants of its cell as a file holds them, in float32."""
    cell: Any = piece.cell
    if cell is not None and cell.options is not None:
        cell = (cell.name, _rounded(dict(cell.options)))
    part = None if piece.part is None else _rounded(piece.part.config())
    return (replace(piece, name="", own={}, cell=None, part=None), cell, part)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(np.float32(value)) if isinstance(value, float) else value


def flat_parts(model: Any, name: str = "") -> dict[str, Any]:
    """Name -> part; those of chains inside are "outer.inner", as their parameters' names have it.

    >>> list(flat_parts(Sequential(low=Sequential(rnn=RNN(2, 3)), head=Linear(3, 1))))
    ['low.rnn', 'head']
    """
    if not isinstance(model, Sequential):
        return {name: model}
    prefix = f"{name}." if name else ""
    return {k: p for n, part in model.parts.items() for k, p in flat_parts(part, prefix + n).items()}


def pieces_of(model: Any, params: Params) -> list[Piece]:
    """The pieces of a layer or Sequential."""
    out = []
    for name, part in flat_parts(model).items():
        prefix = f"{name}." if name else ""
        own = {k: params[prefix + k] for k in part.shapes()}
        if isinstance(part, Embedding):
            out.append(Piece(name, "embedding", part.num_embeddings, part.embedding_dim, False, own))
        elif isinstance(part, Linear):
            out.append(Piece(name, "linear", part.in_features, part.out_features, part.bias, own))
        elif isinstance(part, (Part, Around)):
            out.append(Piece(name, "part", 0, 0, False, {}, part=part))
        else:
            out += _layers(name, part, own)
    return out


def _layers(name: str, part: Recurrent, own: Params) -> list[Piece]:
    """A stack, layer by layer."""
    ways = (False, True) if part.bidirectional else (part.reverse,)
    out, width, d = [], part.input_size, part.directions
    for k, h in enumerate(part.sizes):
        mine = {_renamed(n, k, 0): a for n, a in own.items() if _of_layer(n, k)}
        for state in part.core.states if part.learned_state else ():
            whole = own[f"initial_{state}"] if isinstance(part.hidden_size, int) else own[f"initial_{state}_l{k}"]
            at = k * d if isinstance(part.hidden_size, int) else 0
            mine[f"initial_{state}"] = whole[at : at + d, ...]
        learned, first = part.learned_state, part.batch_first
        wide, projected = part.projection or h, part.projection > 0
        out.append(Piece(name, "rnn", width, wide, part.bias, mine, part.core, ways, learned, first, projected))
        width = d * wide
    return out


def _of_layer(name: str, k: int) -> bool:
    return not name.startswith("initial_") and name.removesuffix("_reverse").endswith(f"_l{k}")


def _renamed(name: str, k: int, to: int) -> str:
    end = "_reverse" if name.endswith("_reverse") else ""
    return f"{name.removesuffix('_reverse').removesuffix(f'_l{k}')}_l{to}{end}"


def from_pieces(pieces: Sequence[Piece]) -> tuple[Any, Params]:
    """The model that these pieces are, like ones in a row as one stack; one part alone is itself."""
    groups: list[list[Piece]] = []
    for piece in pieces:
        alike = groups and same([replace(groups[-1][-1], inputs=0, outputs=0)], [replace(piece, inputs=0, outputs=0)])
        if alike and piece.kind == "rnn":
            groups[-1].append(piece)
        else:
            groups.append([piece])
    parts: dict[str, Any] = {}
    params: Params = {}
    for group in groups:
        name = _free(group[0].name or _NAMES.get(group[0].kind) or type(group[0].part).__name__.lower(), parts)
        parts[name] = _part(group)
        params |= {f"{name}.{k}": a for k, a in _own(parts[name], group).items()}
    if len(parts) == 1 and groups[0][0].kind == "rnn":
        (name,) = parts
        return parts[name], {k.removeprefix(f"{name}."): a for k, a in params.items()}
    return Sequential(**parts), params


_NAMES = {"embedding": "embed", "rnn": "rnn", "linear": "head"}


def _free(name: str, taken: dict[str, Any]) -> str:
    return name if name not in taken else next(n for k in range(2, 1000) if (n := f"{name}{k}") not in taken)


def with_structure(model: Any, pieces: Sequence[Piece]) -> Params:
    """The parameters of `model`, which has these pieces, from their arrays."""
    if not isinstance(model, Sequential):
        return _own(model, pieces)
    params: Params = {}
    at = 0
    for name, part in flat_parts(model).items():
        count = getattr(part, "num_layers", 1)
        params |= {f"{name}.{k}": a for k, a in _own(part, pieces[at : at + count]).items()}
        at += count
    return {name: params[name] for name in model.shapes()}


def _own(part: Any, group: Sequence[Piece]) -> Params:
    if group[0].kind != "rnn":
        return dict(group[0].own)
    out: Params = {}
    for k, piece in enumerate(group):
        out |= {_renamed(n, 0, k): a for n, a in piece.own.items() if not n.startswith("initial_")}
    for state in part.core.states if part.learned_state else ():
        rows = [piece.own[f"initial_{state}"] for piece in group]
        if isinstance(part.hidden_size, int):
            out[f"initial_{state}"] = np.concatenate(rows, axis=0)
        else:
            out |= {f"initial_{state}_l{k}": row for k, row in enumerate(rows)}
    return {name: out[name] for name in part.shapes()}


def _part(group: Sequence[Piece]) -> Any:
    first = group[0]
    if first.kind == "part":
        return first.part
    if first.kind == "embedding":
        return Embedding(first.inputs, first.outputs)
    if first.kind == "linear":
        return Linear(first.inputs, first.outputs, first.bias)
    sizes = tuple(p.outputs for p in group)
    options: dict[str, Any] = {
        "num_layers": len(group),
        "bias": first.bias,
        "batch_first": first.batch_first,
        "bidirectional": len(first.ways) == 2,
        "reverse": first.ways == (True,),
        "learned_state": first.learned,
    }
    make, special = _kind(first.cell)
    return make(first.inputs, sizes[0] if len(set(sizes)) == 1 else sizes, **options, **special)


def _kind(cell: Any) -> tuple[Any, dict[str, Any]]:
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
