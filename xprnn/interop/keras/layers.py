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
from xprnn.interop.assemble import LazyArray, NamedLayer
from xprnn.interop.conventions import from_framework
from xprnn.interop.keras.files import WeightsFile
from xprnn.interop.keras.options import (
    parse_activation,
    parse_activation_layer,
    parse_bool,
    parse_cell_activation,
    parse_float,
    parse_positive_int,
)
from xprnn.interop.keras.topology import KerasLayerSpec, parse_layer_spec, to_snake_case
from xprnn.layers.elementwise import ActivationLayer, Softmax
from xprnn.layers.embedding import Embedding
from xprnn.layers.linear import Linear
from xprnn.layers.masking import HoldLastOutput, LastStep, Masking
from xprnn.layers.rnn_lstm_gru import GRU, LSTM, RNN
from xprnn.layers.sequence_ops import MergeDirections, ReverseTime

__all__ = ["ChainPosition", "convert_layer"]

LayerList = list[tuple[NamedLayer, Any]]
IGNORED_LAYERS = (
    "ActivityRegularization",
    "Dropout",
    "GaussianDropout",
    "GaussianNoise",
    "Identity",
    "SpatialDropout1D",
)


class ChainPosition(NamedTuple):
    """What a layer finds at its place in the chain: whether a mask comes with its input, and whether it is the last."""

    has_mask: bool
    is_last: bool


def _activation_layers(name: str, value: Any) -> LayerList:
    """The part that an activation behind a Dense is, or none."""
    if value in ("softmax", "log_softmax"):
        return [_stateless_layer(name, Softmax(log=value == "log_softmax"))]
    found = parse_activation(value)
    return [] if found == activation("identity") else [_stateless_layer(name, ActivationLayer(found))]


def _stateless_layer(name: str, layer: Any) -> tuple[NamedLayer, Any]:
    return NamedLayer(name, (layer,), {}), layer


class _KerasCellSpec(NamedTuple):
    """A recurrent cell of one direction: its kind (SimpleRNN, LSTM, GRU), its options, where its arrays stand."""

    layer_class: str
    config: dict[str, Any]
    h5_path: str


def _cell_specs(spec: KerasLayerSpec) -> Iterator[_KerasCellSpec]:
    """The cell of a recurrent layer, or those of an RNN(StackedRNNCells), from below."""
    if spec.class_name != "RNN":
        yield _KerasCellSpec(spec.class_name, spec.config, f"{spec.h5_path}/cell")
        return
    inner = parse_layer_spec(spec.config.get("cell"), f"{spec.h5_path}/cell")
    cells = [inner]
    if inner.class_name == "StackedRNNCells":
        counts: dict[str, int] = {}
        cells = []
        for entry in inner.config.get("cells") or []:
            one = parse_layer_spec(entry, "")
            number = counts[one.class_name] = counts.get(one.class_name, -1) + 1
            cells.append(
                one._replace(
                    h5_path=f"{inner.h5_path}/cells/{to_snake_case(one.class_name)}{f'_{number}' if number else ''}"
                )
            )
    for one in cells:
        if one.class_name not in ("SimpleRNNCell", "LSTMCell", "GRUCell"):
            raise InputError(f"its cell is a {one.class_name}, not a SimpleRNNCell, LSTMCell or GRUCell")
        yield _KerasCellSpec(one.class_name.removesuffix("Cell"), one.config, one.h5_path)


def _build_recurrent(cell: _KerasCellSpec, width: int, **how: Any) -> tuple[Any, str]:
    """The layer and its cell's name."""
    o = cell.config
    sizes: dict[str, Any] = {
        "input_size": width,
        "hidden_size": parse_positive_int(o),
        "bias": parse_bool(o, "use_bias", True),
        "batch_first": True,
    }
    f = parse_cell_activation(o, "activation", "tanh")
    if cell.layer_class == "SimpleRNN":
        return RNN(**sizes, nonlinearity=f, **how), "elman"
    gate = parse_cell_activation(o, "recurrent_activation", "sigmoid")
    usual = (gate, f) == (activation("sigmoid"), activation("tanh"))
    if cell.layer_class == "LSTM":
        return LSTM(**sizes, **how, cell=None if usual else lstm(gate, f, f)), "lstm"
    after = parse_bool(o, "reset_after", True)
    make, name = (gru, "gru") if after else (gru_reset_before, "gru_reset_before")
    return GRU(**sizes, **how, reset_after=after, cell=None if usual else make(gate, f)), name


_NUM_GATES = {"SimpleRNN": 1, "LSTM": 4, "GRU": 3}


def _cell_arrays(arrays: WeightsFile, cell: _KerasCellSpec) -> list[LazyArray]:
    """kernel, recurrent_kernel and bias, their shapes checked."""
    h = parse_positive_int(cell.config)
    wide = _NUM_GATES[cell.layer_class] * h
    shapes: list[tuple[int | None, ...]] = [(None, wide), (h, wide)]
    if parse_bool(cell.config, "use_bias", True):
        rows = cell.layer_class == "GRU" and parse_bool(cell.config, "reset_after", True)
        shapes.append((2, wide) if rows else (wide,))
    return arrays.variables(cell.h5_path, *shapes)


def _convert_params(entries: list[LazyArray], name: str, end: str) -> dict[str, LazyArray]:
    """Our parameters of one direction, made of Keras's when they are read."""

    def converted() -> Any:
        keys = ("kernel", "recurrent_kernel", "bias")
        return from_framework("keras", name, {k: e.read() for k, e in zip(keys, entries, strict=False)})

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
    return {f"{key}{end}": LazyArray(shape, dtype, reader(key)) for key, shape in shapes.items()}


def _convert_recurrent(spec: KerasLayerSpec, arrays: WeightsFile, flow: ChainPosition) -> tuple[LayerList, bool]:
    """A layer in one direction, and what stands behind it."""
    o = spec.config
    cells = list(_cell_specs(spec))
    back, sequences = parse_bool(o, "go_backwards"), parse_bool(o, "return_sequences")
    zero, made = parse_bool(o, "zero_output_for_mask") and flow.has_mask, LayerList()
    for k, cell in enumerate(cells):
        entries = _cell_arrays(arrays, cell)
        layer, name = _build_recurrent(cell, entries[0].shape[0], reverse=back)
        own = _convert_params(entries, name, "_l0")
        made.append((NamedLayer(spec.name if len(cells) == 1 else f"{spec.name}_cell_{k}", (layer,), own), layer))
    if not made:
        raise InputError("it has no cells")
    walk = "reverse" if back else "forward"
    if not sequences:
        made.append(
            _stateless_layer(f"{spec.name}_last", LastStep(batch_first=True, direction=walk, valid_only=not zero))
        )
        return made, False
    if flow.has_mask and not zero:
        made.append(_stateless_layer(f"{spec.name}_hold", HoldLastOutput(batch_first=True, direction=walk)))
    if back:
        made.append(_stateless_layer(f"{spec.name}_order", ReverseTime(batch_first=True, reverse_mask=False)))
    return made, flow.has_mask


_COMMON_OPTIONS = ("units", "activation", "recurrent_activation", "use_bias", "reset_after", "return_sequences")


def _convert_bidirectional(spec: KerasLayerSpec, arrays: WeightsFile, flow: ChainPosition) -> tuple[LayerList, bool]:
    """Both directions of one layer, and how they are put into one."""
    ways = [
        parse_layer_spec(spec.config.get(option), f"{spec.h5_path}/{option.removesuffix('_layer')}_layer")
        for option in ("layer", "backward_layer")
    ]
    ways[0] = ways[0]._replace(h5_path=f"{spec.h5_path}/forward_layer")
    cells = []
    for way, back in zip(ways, (False, True), strict=True):
        found = list(_cell_specs(way))
        if (
            way.class_name not in (*_NUM_GATES, "RNN")
            or len(found) != 1
            or parse_bool(way.config, "go_backwards") != back
        ):
            raise InputError("expected a SimpleRNN, LSTM or GRU forward and the same backward")
        cells.append(found[0])
    both = [(cell.layer_class, *(cell.config.get(key) for key in _COMMON_OPTIONS[:-1])) for cell in cells]
    sequences = [parse_bool(way.config, "return_sequences") for way in ways]
    if both[0] != both[1] or sequences[0] != sequences[1]:
        raise InputError("its two directions are of different kinds")
    entries = [_cell_arrays(arrays, cell) for cell in cells]
    layer, name = _build_recurrent(cells[0], entries[0][0].shape[0], bidirectional=True)
    own = _convert_params(entries[0], name, "_l0") | _convert_params(entries[1], name, "_l0_reverse")
    made: LayerList = [(NamedLayer(spec.name, (layer,), own), layer)]
    if not sequences[0]:
        made.append(_stateless_layer(f"{spec.name}_last", LastStep(batch_first=True, direction="both")))
    mode = spec.config.get("merge_mode", "concat")
    if mode is None and not flow.is_last:
        raise InputError("merge_mode=None gives two outputs, which only the last layer of a chain can")
    if mode != "concat":
        made.append(
            _stateless_layer(f"{spec.name}_merge", MergeDirections(layer.hidden_size, "pair" if mode is None else mode))
        )
    return made, flow.has_mask and sequences[0]


def _convert_masking(spec: KerasLayerSpec, arrays: WeightsFile, flow: ChainPosition) -> tuple[LayerList, bool]:
    if flow.has_mask:
        raise InputError("a mask over a mask: Keras would forget the first one")
    return [_stateless_layer(spec.name, Masking(parse_float(spec.config, "mask_value", default=0.0)))], True


def _convert_embedding(spec: KerasLayerSpec, arrays: WeightsFile, flow: ChainPosition) -> tuple[LayerList, bool]:
    _reject_quantized(spec)
    layer = Embedding(parse_positive_int(spec.config, "input_dim"), parse_positive_int(spec.config, "output_dim"))
    (entry,) = arrays.variables(spec.h5_path, (layer.num_embeddings, layer.embedding_dim))
    zero = parse_bool(spec.config, "mask_zero")
    made = [_stateless_layer(f"{spec.name}_mask", Masking(0))] if zero else []
    return [*made, (NamedLayer(spec.name, (layer,), {"weight": entry}), layer)], zero


def _convert_dense(spec: KerasLayerSpec, arrays: WeightsFile, flow: ChainPosition) -> tuple[LayerList, bool]:
    _reject_quantized(spec)
    out, bias = parse_positive_int(spec.config), parse_bool(spec.config, "use_bias", True)
    kernel, *others = arrays.variables(spec.h5_path, *[(None, out), (out,)][: 1 + bias])
    layer = Linear(kernel.shape[0], out, bias)

    def weight() -> Any:
        return kernel.read().T.copy()

    own = {"weight": LazyArray(kernel.shape[::-1], kernel.dtype, weight)}
    made: LayerList = [(NamedLayer(spec.name, (layer,), own | dict(zip(["bias"], others, strict=False))), layer)]
    return made + _activation_layers(f"{spec.name}_activation", spec.config.get("activation")), flow.has_mask


def _reject_quantized(spec: KerasLayerSpec) -> None:
    for name in ("quantization_config", "lora_rank"):
        if spec.config.get(name):
            raise InputError(f"{name} has no counterpart here")


def _convert_activation(spec: KerasLayerSpec, arrays: WeightsFile, flow: ChainPosition) -> tuple[LayerList, bool]:
    if spec.class_name == "Softmax":
        if spec.config.get("axis", -1) != -1 or flow.has_mask:
            raise InputError("only softmax along the last axis without a mask has a counterpart here")
        return [_stateless_layer(spec.name, Softmax())], flow.has_mask
    if spec.class_name == "Activation":
        return _activation_layers(spec.name, spec.config.get("activation")), flow.has_mask
    return [_stateless_layer(spec.name, ActivationLayer(parse_activation_layer(spec)))], flow.has_mask


def _convert_time_distributed(spec: KerasLayerSpec, arrays: WeightsFile, flow: ChainPosition) -> tuple[LayerList, bool]:
    """TimeDistributed: of layers that act on the last axis alone it changes nothing."""
    inner = parse_layer_spec(spec.config.get("layer"), f"{spec.h5_path}/layer")
    if inner.class_name not in ("Dense", "Activation", "ReLU", "LeakyReLU", "ELU", *IGNORED_LAYERS):
        raise InputError(f"TimeDistributed of a {inner.class_name} has no counterpart here")
    return convert_layer(inner._replace(name=spec.name), arrays, flow)


_CONVERTERS: dict[str, Callable[[KerasLayerSpec, WeightsFile, ChainPosition], tuple[LayerList, bool]]] = {
    **dict.fromkeys(("SimpleRNN", "LSTM", "GRU", "RNN"), _convert_recurrent),
    **dict.fromkeys(("Activation", "ReLU", "LeakyReLU", "ELU", "Softmax"), _convert_activation),
    **dict.fromkeys(IGNORED_LAYERS, lambda spec, arrays, flow: ([], flow.has_mask)),
    "Bidirectional": _convert_bidirectional,
    "Masking": _convert_masking,
    "Embedding": _convert_embedding,
    "Dense": _convert_dense,
    "TimeDistributed": _convert_time_distributed,
}


def convert_layer(spec: KerasLayerSpec, weights_file: WeightsFile, position: ChainPosition) -> tuple[LayerList, bool]:
    """The parts that a layer is, and whether a mask goes on behind it.

    Raises:
        InputError: a layer without a counterpart here, or arrays that are not its own.
    """
    if spec.class_name not in _CONVERTERS:
        raise InputError("has no counterpart here")
    return _CONVERTERS[spec.class_name](spec, weights_file, position)
