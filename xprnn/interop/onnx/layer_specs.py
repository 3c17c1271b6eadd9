"""A network as a list of layer specs: look-ups, single recurrent layers, linear and stateless layers.

Export converts a model to specs and writes them; import finds specs in a graph and builds a model from them.
"""

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
        name: the name of the layer in its Sequential; "" if the network is that layer alone.
        kind: "embedding", "linear", "rnn" or "stateless".
        input_size: V of an embedding, H of a linear layer, D of a recurrent layer; 0 for a stateless layer, which
            accepts any number of features.
        output_size: D of an embedding, V of a linear layer, H of a recurrent layer (P if h is projected); 0 for a
            stateless layer.
        bias: True if the layer has biases.
        params: the arrays. Those of a recurrent layer have the names of a layer with num_layers=1 ("weight_ih_l0",
            "weight_ih_l0_reverse", "initial_h" of shape (directions, H), ...); others are "weight" and "bias".
        cell: the Cell of a recurrent layer.
        reverse: for each direction of a recurrent layer, True if it starts at the last step.
        learned_state: True if the initial state is learned.
        batch_first: True if x and y are (N, T, .).
        projected: True if h is projected.
        layer: the layer itself, of kind "stateless".
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
        """The number of output features for an input of `input_width` features."""
        if self.kind == "stateless":
            return input_width // 2 if isinstance(self.layer, MergeDirections) else input_width
        return self.output_size * max(1, len(self.reverse))

    def state_width(self, state: str) -> int:
        """The number of features of a state of a recurrent layer: P for a projected h, else H."""
        if state == self.cell.states[0]:
            return self.output_size
        return int(self.params["weight_hh_l0"].shape[0]) // int(self.cell.gates)


def specs_equal(a: Sequence[LayerSpec], b: Sequence[LayerSpec]) -> bool:
    """True if two networks compute the same function of their parameters; names and array values are not compared."""
    return [_semantics(spec) for spec in a] == [_semantics(spec) for spec in b]


def _semantics(spec: LayerSpec) -> tuple[Any, ...]:
    """A comparable description of the function of a layer. Constants are rounded to float32, as in a file."""
    cell: Any = spec.cell
    if cell is not None and cell.options is not None:
        cell = (cell.name, _round_to_float32(dict(cell.options)))
    layer = None if spec.layer is None else _round_to_float32(spec.layer.config())
    return (replace(spec, name="", params={}, cell=None, layer=None), cell, layer)


def _round_to_float32(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _round_to_float32(v) for k, v in value.items()}
    return float(np.float32(value)) if isinstance(value, float) else value


def named_layers(model: Any, name: str = "") -> dict[str, Any]:
    """Name -> layer. A layer of a nested Sequential is named "outer.inner", as in the names of its parameters.

    >>> list(named_layers(Sequential(low=Sequential(rnn=RNN(2, 3)), head=Linear(3, 1))))
    ['low.rnn', 'head']
    """
    if not isinstance(model, Sequential):
        return {name: model}
    prefix = f"{name}." if name else ""
    return {k: p for n, layer in model.layers.items() for k, p in named_layers(layer, prefix + n).items()}


def to_specs(model: Any, params: Params) -> list[LayerSpec]:
    """Convert a layer or Sequential to specs."""
    out = []
    for name, layer in named_layers(model).items():
        prefix = f"{name}." if name else ""
        arrays = {k: params[prefix + k] for k in layer.shapes()}
        if isinstance(layer, Embedding):
            out.append(LayerSpec(name, "embedding", layer.num_embeddings, layer.embedding_dim, False, arrays))
        elif isinstance(layer, Linear):
            out.append(LayerSpec(name, "linear", layer.in_features, layer.out_features, layer.bias, arrays))
        elif isinstance(layer, (StatelessLayer, ContextShift)):
            out.append(LayerSpec(name, "stateless", 0, 0, False, {}, layer=layer))
        else:
            out += _recurrent_specs(name, layer, arrays)
    return out


def _recurrent_specs(name: str, layer: Recurrent, params: Params) -> list[LayerSpec]:
    """One spec for each layer of a recurrent stack."""
    reverse = (False, True) if layer.bidirectional else (layer.reverse,)
    out, input_size, d = [], layer.input_size, layer.num_directions
    for k, hidden in enumerate(layer.hidden_sizes):
        arrays = {_with_layer_index(n, k, 0): a for n, a in params.items() if _is_layer_param(n, k)}
        for state in layer.resolved_cell.states if layer.learned_state else ():
            one_size = isinstance(layer.hidden_size, int)
            rows = params[f"initial_{state}"] if one_size else params[f"initial_{state}_l{k}"]
            start = k * d if one_size else 0
            arrays[f"initial_{state}"] = rows[start : start + d, ...]
        output_size = layer.projection_size or hidden
        out.append(
            LayerSpec(
                name, "rnn", input_size, output_size, layer.bias, arrays, layer.resolved_cell, reverse,
                layer.learned_state, layer.batch_first, projected=layer.projection_size > 0,
            )
        )  # fmt: skip
        input_size = d * output_size
    return out


def _is_layer_param(name: str, k: int) -> bool:
    return not name.startswith("initial_") and name.removesuffix("_reverse").endswith(f"_l{k}")


def _with_layer_index(name: str, k: int, to: int) -> str:
    """Replace _l{k} in a parameter's name by _l{to}."""
    suffix = "_reverse" if name.endswith("_reverse") else ""
    return f"{name.removesuffix('_reverse').removesuffix(f'_l{k}')}_l{to}{suffix}"


def from_specs(specs: Sequence[LayerSpec]) -> tuple[Any, Params]:
    """Build (model, params). Adjacent recurrent layers with equal options become one stack.

    If the network is one stack alone, the model is that layer; otherwise it is a Sequential.
    """
    groups: list[list[LayerSpec]] = []
    for spec in specs:
        same_kind = groups and specs_equal(
            [replace(groups[-1][-1], input_size=0, output_size=0)], [replace(spec, input_size=0, output_size=0)]
        )
        if same_kind and spec.kind == "rnn":
            groups[-1].append(spec)
        else:
            groups.append([spec])
    layers: dict[str, Any] = {}
    params: Params = {}
    for group in groups:
        default = _DEFAULT_NAMES.get(group[0].kind) or type(group[0].layer).__name__.lower()
        name = _unique_name(group[0].name or default, layers)
        layers[name] = _build_layer(group)
        params |= {f"{name}.{k}": a for k, a in _group_params(layers[name], group).items()}
    if len(layers) == 1 and groups[0][0].kind == "rnn":
        (name,) = layers
        return layers[name], {k.removeprefix(f"{name}."): a for k, a in params.items()}
    return Sequential(**layers), params


_DEFAULT_NAMES = {"embedding": "embed", "rnn": "rnn", "linear": "head"}


def _unique_name(name: str, used: dict[str, Any]) -> str:
    return name if name not in used else next(n for k in range(2, 1000) if (n := f"{name}{k}") not in used)


def params_for(model: Any, specs: Sequence[LayerSpec]) -> Params:
    """The parameters of `model` from the arrays of its specs."""
    if not isinstance(model, Sequential):
        return _group_params(model, specs)
    params: Params = {}
    start = 0
    for name, layer in named_layers(model).items():
        stop = start + getattr(layer, "num_layers", 1)
        params |= {f"{name}.{k}": a for k, a in _group_params(layer, specs[start:stop]).items()}
        start = stop
    return {name: params[name] for name in model.shapes()}


def _group_params(layer: Any, group: Sequence[LayerSpec]) -> Params:
    """The parameters of one layer or stack, by their names in it."""
    if group[0].kind != "rnn":
        return dict(group[0].params)
    out: Params = {}
    for k, spec in enumerate(group):
        out |= {_with_layer_index(n, 0, k): a for n, a in spec.params.items() if not n.startswith("initial_")}
    for state in layer.resolved_cell.states if layer.learned_state else ():
        rows = [spec.params[f"initial_{state}"] for spec in group]
        if isinstance(layer.hidden_size, int):
            out[f"initial_{state}"] = np.concatenate(rows, axis=0)
        else:
            out |= {f"initial_{state}_l{k}": row for k, row in enumerate(rows)}
    return {name: out[name] for name in layer.shapes()}


def _build_layer(group: Sequence[LayerSpec]) -> Any:
    first = group[0]
    if first.kind == "stateless":
        return first.layer
    if first.kind == "embedding":
        return Embedding(first.input_size, first.output_size)
    if first.kind == "linear":
        return Linear(first.input_size, first.output_size, first.bias)
    sizes = tuple(spec.output_size for spec in group)
    options: dict[str, Any] = {
        "num_layers": len(group),
        "bias": first.bias,
        "batch_first": first.batch_first,
        "bidirectional": len(first.reverse) == 2,
        "reverse": first.reverse == (True,),
        "learned_state": first.learned_state,
    }
    layer_class, cell_options = _layer_class_and_options(first.cell)
    hidden_size = sizes[0] if len(set(sizes)) == 1 else sizes
    return layer_class(first.input_size, hidden_size, **options, **cell_options)


def _layer_class_and_options(cell: Any) -> tuple[Any, dict[str, Any]]:
    """The layer class for a cell, and the arguments with which that class makes this cell."""
    if cell.name == "elman":
        options = dict(cell.options or ())
        f = options.get("f")
        if f is not None and options.get("clip") is None:
            f = f if isinstance(f, str) else activation(**f)
            return RNN, {"nonlinearity": f}
        return RNN, {"cell": cell} if cell != elman() else {}
    if cell.name == "lstm":
        return LSTM, {} if cell == lstm() else {"cell": cell}
    if cell in (gru(), gru_reset_before()):
        return GRU, {"reset_after": cell == gru()}
    return GRU, {"cell": cell}
