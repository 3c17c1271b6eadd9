"""What each Keras layer is here: a recurrent layer, a Linear, an Embedding, and the small parts for Keras's customs.

    Keras                                   here, batch-first
    SimpleRNN, LSTM, GRU, RNN(cell)         RNN, LSTM, GRU; reverse=True for go_backwards
      masked, return_sequences              Hold behind it, unless zero_output_for_mask
      go_backwards, return_sequences        Flip behind it: Keras gives outputs in the order of the walk
      return_sequences=False                Last behind it
    Bidirectional                           bidirectional=True; Merge behind it; masked steps are 0, as there
    Masking, Embedding(mask_zero)           Masking before what it masks
    Dense, Activation, Softmax, ReLU, ...   Linear, Apply, Softmax

Source: keras.layers (documentation and the behaviour of their own calls).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from xprnn.arrays.namespace import InputError
from xprnn.cells.activations import activation
from xprnn.cells.standard import gru, gru_reset_before, lstm
from xprnn.interop.assemble import Entry, Part
from xprnn.interop.conventions import from_system
from xprnn.interop.keras.files import Arrays
from xprnn.interop.keras.options import activation_layer, activation_named, cell_activation, flag, number, units
from xprnn.interop.keras.topology import Spec, inner_spec, snake
from xprnn.layers.elementwise import Apply, Softmax
from xprnn.layers.embedding import Embedding
from xprnn.layers.linear import Linear
from xprnn.layers.masking import Hold, Last, Masking
from xprnn.layers.rnn_lstm_gru import GRU, LSTM, RNN
from xprnn.layers.sequence_ops import Flip, Merge

__all__ = ["Flow", "parts_of_layer"]

Made = list[tuple[Part, Any]]
NOTHING = ("ActivityRegularization", "Dropout", "GaussianDropout", "GaussianNoise", "Identity", "SpatialDropout1D")


class Flow(NamedTuple):
    """What a layer finds at its place in the chain: whether a mask comes with its input, and whether it is the last."""

    masked: bool
    final: bool


def _applied(name: str, value: Any) -> Made:
    """The part that an activation behind a Dense is, or none."""
    if value in ("softmax", "log_softmax"):
        return [_plain(name, Softmax(log=value == "log_softmax"))]
    found = activation_named(value)
    return [] if found == activation("identity") else [_plain(name, Apply(found))]


def _plain(name: str, layer: Any) -> tuple[Part, Any]:
    return Part(name, (layer,), {}), layer


class _CellSpec(NamedTuple):
    """A recurrent cell of one direction: its kind (SimpleRNN, LSTM, GRU), its options, where its arrays stand."""

    kind: str
    options: dict[str, Any]
    path: str


def _cells_of(spec: Spec) -> Iterator[_CellSpec]:
    """The cell of a recurrent layer, or those of an RNN(StackedRNNCells), from below."""
    if spec.kind != "RNN":
        yield _CellSpec(spec.kind, spec.options, f"{spec.path}/cell")
        return
    inner = inner_spec(spec.options.get("cell"), f"{spec.path}/cell")
    cells = [inner]
    if inner.kind == "StackedRNNCells":
        counts: dict[str, int] = {}
        cells = []
        for entry in inner.options.get("cells") or []:
            one = inner_spec(entry, "")
            number = counts[one.kind] = counts.get(one.kind, -1) + 1
            cells.append(one._replace(path=f"{inner.path}/cells/{snake(one.kind)}{f'_{number}' if number else ''}"))
    for one in cells:
        if one.kind not in ("SimpleRNNCell", "LSTMCell", "GRUCell"):
            raise InputError(f"its cell is a {one.kind}, not a SimpleRNNCell, LSTMCell or GRUCell")
        yield _CellSpec(one.kind.removesuffix("Cell"), one.options, one.path)


def _make(cell: _CellSpec, width: int, **how: Any) -> tuple[Any, str]:
    """The layer and its cell's name."""
    o = cell.options
    sizes: dict[str, Any] = {
        "input_size": width,
        "hidden_size": units(o),
        "bias": flag(o, "use_bias", True),
        "batch_first": True,
    }
    f = cell_activation(o, "activation", "tanh")
    if cell.kind == "SimpleRNN":
        return RNN(**sizes, nonlinearity=f, **how), "elman"
    gate = cell_activation(o, "recurrent_activation", "sigmoid")
    usual = (gate, f) == (activation("sigmoid"), activation("tanh"))
    if cell.kind == "LSTM":
        return LSTM(**sizes, **how, cell=None if usual else lstm(gate, f, f)), "lstm"
    after = flag(o, "reset_after", True)
    make, name = (gru, "gru") if after else (gru_reset_before, "gru_reset_before")
    return GRU(**sizes, **how, reset_after=after, cell=None if usual else make(gate, f)), name


_GATES = {"SimpleRNN": 1, "LSTM": 4, "GRU": 3}


def _entries(arrays: Arrays, cell: _CellSpec) -> list[Entry]:
    """kernel, recurrent_kernel and bias, their shapes checked."""
    h = units(cell.options)
    wide = _GATES[cell.kind] * h
    shapes: list[tuple[int | None, ...]] = [(None, wide), (h, wide)]
    if flag(cell.options, "use_bias", True):
        rows = cell.kind == "GRU" and flag(cell.options, "reset_after", True)
        shapes.append((2, wide) if rows else (wide,))
    return arrays.of(cell.path, *shapes)


def _own(entries: list[Entry], name: str, end: str) -> dict[str, Entry]:
    """Our parameters of one direction, made of Keras's when they are read."""

    def converted() -> Any:
        keys = ("kernel", "recurrent_kernel", "bias")
        return from_system("keras", name, {k: e.read() for k, e in zip(keys, entries, strict=False)})

    d, wide = entries[0].shape
    shapes: dict[str, tuple[int, ...]] = {"weight_ih": (wide, d), "weight_hh": (wide, entries[1].shape[0])}
    shapes |= {"bias_ih": (wide,), "bias_hh": (wide,)} if len(entries) == 3 else {}
    made: dict[str, Any] = {}

    def reader(key: str) -> Callable[[], Any]:
        def read() -> Any:
            if key not in made:
                made.update(converted())
            return made.pop(key)

        return read

    dtype = " and ".join(sorted({e.dtype for e in entries}))
    return {f"{key}{end}": Entry(shape, dtype, reader(key)) for key, shape in shapes.items()}


def _recurrent(spec: Spec, arrays: Arrays, flow: Flow) -> tuple[Made, bool]:
    """A layer in one direction, and what stands behind it."""
    o = spec.options
    cells = list(_cells_of(spec))
    back, sequences = flag(o, "go_backwards"), flag(o, "return_sequences")
    zero, made = flag(o, "zero_output_for_mask") and flow.masked, Made()
    for k, cell in enumerate(cells):
        entries = _entries(arrays, cell)
        layer, name = _make(cell, entries[0].shape[0], reverse=back)
        own = _own(entries, name, "_l0")
        made.append((Part(spec.name if len(cells) == 1 else f"{spec.name}_cell_{k}", (layer,), own), layer))
    if not made:
        raise InputError("it has no cells")
    walk = "reverse" if back else "forward"
    if not sequences:
        made.append(_plain(f"{spec.name}_last", Last(batch_first=True, walk=walk, valid=not zero)))
        return made, False
    if flow.masked and not zero:
        made.append(_plain(f"{spec.name}_hold", Hold(batch_first=True, walk=walk)))
    if back:
        made.append(_plain(f"{spec.name}_order", Flip(batch_first=True, flags=False)))
    return made, flow.masked


_SAME = ("units", "activation", "recurrent_activation", "use_bias", "reset_after", "return_sequences")


def _bidirectional(spec: Spec, arrays: Arrays, flow: Flow) -> tuple[Made, bool]:
    """Both directions of one layer, and how they are put into one."""
    ways = [
        inner_spec(spec.options.get(option), f"{spec.path}/{option.removesuffix('_layer')}_layer")
        for option in ("layer", "backward_layer")
    ]
    ways[0] = ways[0]._replace(path=f"{spec.path}/forward_layer")
    cells = []
    for way, back in zip(ways, (False, True), strict=True):
        found = list(_cells_of(way))
        if way.kind not in (*_GATES, "RNN") or len(found) != 1 or flag(way.options, "go_backwards") != back:
            raise InputError("expected a SimpleRNN, LSTM or GRU forward and the same backward")
        cells.append(found[0])
    both = [(cell.kind, *(cell.options.get(key) for key in _SAME[:-1])) for cell in cells]
    sequences = [flag(way.options, "return_sequences") for way in ways]
    if both[0] != both[1] or sequences[0] != sequences[1]:
        raise InputError("its two directions are of different kinds")
    entries = [_entries(arrays, cell) for cell in cells]
    layer, name = _make(cells[0], entries[0][0].shape[0], bidirectional=True)
    own = _own(entries[0], name, "_l0") | _own(entries[1], name, "_l0_reverse")
    made: Made = [(Part(spec.name, (layer,), own), layer)]
    if not sequences[0]:
        made.append(_plain(f"{spec.name}_last", Last(batch_first=True, walk="both")))
    mode = spec.options.get("merge_mode", "concat")
    if mode is None and not flow.final:
        raise InputError("merge_mode=None gives two outputs, which only the last layer of a chain can")
    if mode != "concat":
        made.append(_plain(f"{spec.name}_merge", Merge(layer.hidden_size, "pair" if mode is None else mode)))
    return made, flow.masked and sequences[0]


def _masking(spec: Spec, arrays: Arrays, flow: Flow) -> tuple[Made, bool]:
    if flow.masked:
        raise InputError("a mask over a mask: Keras would forget the first one")
    return [_plain(spec.name, Masking(number(spec.options, "mask_value", default=0.0)))], True


def _embedding(spec: Spec, arrays: Arrays, flow: Flow) -> tuple[Made, bool]:
    _unquantized(spec)
    layer = Embedding(units(spec.options, "input_dim"), units(spec.options, "output_dim"))
    (entry,) = arrays.of(spec.path, (layer.num_embeddings, layer.embedding_dim))
    zero = flag(spec.options, "mask_zero")
    made = [_plain(f"{spec.name}_mask", Masking(0))] if zero else []
    return [*made, (Part(spec.name, (layer,), {"weight": entry}), layer)], zero


def _dense(spec: Spec, arrays: Arrays, flow: Flow) -> tuple[Made, bool]:
    _unquantized(spec)
    out, bias = units(spec.options), flag(spec.options, "use_bias", True)
    kernel, *others = arrays.of(spec.path, *[(None, out), (out,)][: 1 + bias])
    layer = Linear(kernel.shape[0], out, bias)

    def weight() -> Any:
        return kernel.read().T.copy()

    own = {"weight": Entry(kernel.shape[::-1], kernel.dtype, weight)}
    made: Made = [(Part(spec.name, (layer,), own | dict(zip(["bias"], others, strict=False))), layer)]
    return made + _applied(f"{spec.name}_activation", spec.options.get("activation")), flow.masked


def _unquantized(spec: Spec) -> None:
    for name in ("quantization_config", "lora_rank"):
        if spec.options.get(name):
            raise InputError(f"{name} has no counterpart here")


def _pointwise(spec: Spec, arrays: Arrays, flow: Flow) -> tuple[Made, bool]:
    if spec.kind == "Softmax":
        if spec.options.get("axis", -1) != -1 or flow.masked:
            raise InputError("only softmax along the last axis without a mask has a counterpart here")
        return [_plain(spec.name, Softmax())], flow.masked
    if spec.kind == "Activation":
        return _applied(spec.name, spec.options.get("activation")), flow.masked
    return [_plain(spec.name, Apply(activation_layer(spec)))], flow.masked


def _distributed(spec: Spec, arrays: Arrays, flow: Flow) -> tuple[Made, bool]:
    """TimeDistributed: of layers that act on the last axis alone it changes nothing."""
    inner = inner_spec(spec.options.get("layer"), f"{spec.path}/layer")
    if inner.kind not in ("Dense", "Activation", "ReLU", "LeakyReLU", "ELU", *NOTHING):
        raise InputError(f"TimeDistributed of a {inner.kind} has no counterpart here")
    return parts_of_layer(inner._replace(name=spec.name), arrays, flow)


_LAYERS: dict[str, Callable[[Spec, Arrays, Flow], tuple[Made, bool]]] = {
    **dict.fromkeys(("SimpleRNN", "LSTM", "GRU", "RNN"), _recurrent),
    **dict.fromkeys(("Activation", "ReLU", "LeakyReLU", "ELU", "Softmax"), _pointwise),
    **dict.fromkeys(NOTHING, lambda spec, arrays, flow: ([], flow.masked)),
    "Bidirectional": _bidirectional,
    "Masking": _masking,
    "Embedding": _embedding,
    "Dense": _dense,
    "TimeDistributed": _distributed,
}


def parts_of_layer(spec: Spec, arrays: Arrays, flow: Flow) -> tuple[Made, bool]:
    """The parts that a layer is, and whether a mask goes on behind it.

    Raises:
        InputError: a layer without a counterpart here, or arrays that are not its own.
    """
    if spec.kind not in _LAYERS:
        raise InputError("has no counterpart here")
    return _LAYERS[spec.kind](spec, arrays, flow)
