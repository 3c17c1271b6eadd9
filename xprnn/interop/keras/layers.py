"""Conversion of one Keras layer to one or more xprnn layers.

    Keras                                   xprnn, batch-first
    SimpleRNN, LSTM, GRU, RNN(cell)         RNN, LSTM, GRU; reverse=True for go_backwards
      with a mask, return_sequences         then HoldLastOutput, unless zero_output_for_mask
      go_backwards, return_sequences        then ReverseTime: Keras returns the outputs in the order of computation
      return_sequences=False                then LastStep
    Bidirectional                           bidirectional=True, then MergeDirections; outputs of masked steps are 0
    Masking, Embedding(mask_zero)           Masking, before the Embedding
    Dense, Activation, Softmax, ReLU, ...   Linear, ActivationLayer, Softmax

Source: keras.layers (the documentation, and the behaviour of the layers' `call`).
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
    """The position of a layer in the chain: has_mask if its input has a mask, is_last if it is the last layer."""

    has_mask: bool
    is_last: bool


def _activation_layers(name: str, value: Any) -> LayerList:
    """Return the layer for the `activation` of a Dense or Activation; an empty list for the identity."""
    if value in ("softmax", "log_softmax"):
        return [_stateless_layer(name, Softmax(log=value == "log_softmax"))]
    f = parse_activation(value)
    return [] if f == activation("identity") else [_stateless_layer(name, ActivationLayer(f))]


def _stateless_layer(name: str, layer: Any) -> tuple[NamedLayer, Any]:
    return NamedLayer(name, (layer,), {}), layer


class _KerasCellSpec(NamedTuple):
    """A recurrent cell in one direction: layer class (SimpleRNN, LSTM, GRU), options, and path in the weights file."""

    layer_class: str
    config: dict[str, Any]
    h5_path: str


def _cell_specs(spec: KerasLayerSpec) -> Iterator[_KerasCellSpec]:
    """Yield the cell of a recurrent layer, or each cell of an RNN(StackedRNNCells), first layer first."""
    if spec.class_name != "RNN":
        yield _KerasCellSpec(spec.class_name, spec.config, f"{spec.h5_path}/cell")
        return
    cell = parse_layer_spec(spec.config.get("cell"), f"{spec.h5_path}/cell")
    cells = [cell]
    if cell.class_name == "StackedRNNCells":
        counts: dict[str, int] = {}
        cells = []
        for entry in cell.config.get("cells") or []:
            cell_spec = parse_layer_spec(entry, "")
            index = counts[cell_spec.class_name] = counts.get(cell_spec.class_name, -1) + 1
            cells.append(
                cell_spec._replace(
                    h5_path=f"{cell.h5_path}/cells/{to_snake_case(cell_spec.class_name)}{f'_{index}' if index else ''}"
                )
            )
    for cell_spec in cells:
        if cell_spec.class_name not in ("SimpleRNNCell", "LSTMCell", "GRUCell"):
            raise InputError(f"expected a SimpleRNNCell, LSTMCell or GRUCell, found {cell_spec.class_name}")
        yield _KerasCellSpec(cell_spec.class_name.removesuffix("Cell"), cell_spec.config, cell_spec.h5_path)


def _build_recurrent(cell: _KerasCellSpec, input_size: int, **options: Any) -> tuple[Any, str]:
    """Return the xprnn layer and the name of its cell in `conventions`."""
    config = cell.config
    sizes: dict[str, Any] = {
        "input_size": input_size,
        "hidden_size": parse_positive_int(config),
        "bias": parse_bool(config, "use_bias", True),
        "batch_first": True,
    }
    f = parse_cell_activation(config, "activation", "tanh")
    if cell.layer_class == "SimpleRNN":
        return RNN(**sizes, nonlinearity=f, **options), "elman"
    gate = parse_cell_activation(config, "recurrent_activation", "sigmoid")
    has_default_activations = (gate, f) == (activation("sigmoid"), activation("tanh"))
    if cell.layer_class == "LSTM":
        return LSTM(**sizes, **options, cell=None if has_default_activations else lstm(gate, f, f)), "lstm"
    reset_after = parse_bool(config, "reset_after", True)
    make_cell, name = (gru, "gru") if reset_after else (gru_reset_before, "gru_reset_before")
    return GRU(
        **sizes, **options, reset_after=reset_after, cell=None if has_default_activations else make_cell(gate, f)
    ), name


_NUM_GATES = {"SimpleRNN": 1, "LSTM": 4, "GRU": 3}


def _cell_arrays(arrays: WeightsFile, cell: _KerasCellSpec) -> list[LazyArray]:
    """Return kernel, recurrent_kernel and, with use_bias, bias, after a check of their shapes."""
    hidden_size = parse_positive_int(cell.config)
    gate_rows = _NUM_GATES[cell.layer_class] * hidden_size
    shapes: list[tuple[int | None, ...]] = [(None, gate_rows), (hidden_size, gate_rows)]
    if parse_bool(cell.config, "use_bias", True):
        has_two_biases = cell.layer_class == "GRU" and parse_bool(cell.config, "reset_after", True)
        shapes.append((2, gate_rows) if has_two_biases else (gate_rows,))
    return arrays.variables(cell.h5_path, *shapes)


def _convert_params(keras_arrays: list[LazyArray], cell_name: str, suffix: str) -> dict[str, LazyArray]:
    """Return xprnn's parameters of one direction; Keras's arrays are read and converted on the first `read`."""

    def convert() -> Any:
        keys = ("kernel", "recurrent_kernel", "bias")
        return from_framework(
            "keras", cell_name, {k: array.read() for k, array in zip(keys, keras_arrays, strict=False)}
        )

    input_size, gate_rows = keras_arrays[0].shape
    shapes: dict[str, tuple[int, ...]] = {
        "weight_ih": (gate_rows, input_size),
        "weight_hh": (gate_rows, keras_arrays[1].shape[0]),
    }
    shapes |= {"bias_ih": (gate_rows,), "bias_hh": (gate_rows,)} if len(keras_arrays) == 3 else {}
    converted_params: dict[str, Any] = {}

    def reader(key: str) -> Callable[[], Any]:
        def read() -> Any:
            if key not in converted_params:
                converted_params.update(convert())
            return converted_params.pop(key)

        return read

    dtype = " and ".join(sorted({array.dtype for array in keras_arrays}))
    return {f"{key}{suffix}": LazyArray(shape, dtype, reader(key)) for key, shape in shapes.items()}


def _convert_recurrent(spec: KerasLayerSpec, arrays: WeightsFile, position: ChainPosition) -> tuple[LayerList, bool]:
    """Convert a layer in one direction; return its layers, and True if their output has a mask."""
    config = spec.config
    cells = list(_cell_specs(spec))
    go_backwards, return_sequences = parse_bool(config, "go_backwards"), parse_bool(config, "return_sequences")
    zero_masked, layers = parse_bool(config, "zero_output_for_mask") and position.has_mask, LayerList()
    for k, cell in enumerate(cells):
        keras_arrays = _cell_arrays(arrays, cell)
        layer, cell_name = _build_recurrent(cell, keras_arrays[0].shape[0], reverse=go_backwards)
        params = _convert_params(keras_arrays, cell_name, "_l0")
        layers.append((NamedLayer(spec.name if len(cells) == 1 else f"{spec.name}_cell_{k}", (layer,), params), layer))
    if not layers:
        raise InputError("StackedRNNCells has no cells")
    direction = "reverse" if go_backwards else "forward"
    if not return_sequences:
        layers.append(
            _stateless_layer(
                f"{spec.name}_last", LastStep(batch_first=True, direction=direction, valid_only=not zero_masked)
            )
        )
        return layers, False
    if position.has_mask and not zero_masked:
        layers.append(_stateless_layer(f"{spec.name}_hold", HoldLastOutput(batch_first=True, direction=direction)))
    if go_backwards:
        layers.append(_stateless_layer(f"{spec.name}_order", ReverseTime(batch_first=True, reverse_mask=False)))
    return layers, position.has_mask


_COMMON_OPTIONS = ("units", "activation", "recurrent_activation", "use_bias", "reset_after", "return_sequences")


def _convert_bidirectional(
    spec: KerasLayerSpec, arrays: WeightsFile, position: ChainPosition
) -> tuple[LayerList, bool]:
    """Convert a Bidirectional; return the recurrent layer with LastStep and MergeDirections as needed."""
    direction_specs = [
        parse_layer_spec(spec.config.get(option), f"{spec.h5_path}/{option.removesuffix('_layer')}_layer")
        for option in ("layer", "backward_layer")
    ]
    direction_specs[0] = direction_specs[0]._replace(h5_path=f"{spec.h5_path}/forward_layer")
    cells = []
    for direction, is_backward in zip(direction_specs, (False, True), strict=True):
        direction_cells = list(_cell_specs(direction))
        if (
            direction.class_name not in (*_NUM_GATES, "RNN")
            or len(direction_cells) != 1
            or parse_bool(direction.config, "go_backwards") != is_backward
        ):
            raise InputError(
                "expected a SimpleRNN, LSTM or GRU as layer, and the same with go_backwards as backward_layer"
            )
        cells.append(direction_cells[0])
    cell_options = [(cell.layer_class, *(cell.config.get(key) for key in _COMMON_OPTIONS[:-1])) for cell in cells]
    return_sequences = [parse_bool(direction.config, "return_sequences") for direction in direction_specs]
    if cell_options[0] != cell_options[1] or return_sequences[0] != return_sequences[1]:
        raise InputError("the two directions must have the same class and options")
    keras_arrays = [_cell_arrays(arrays, cell) for cell in cells]
    layer, cell_name = _build_recurrent(cells[0], keras_arrays[0][0].shape[0], bidirectional=True)
    params = _convert_params(keras_arrays[0], cell_name, "_l0") | _convert_params(
        keras_arrays[1], cell_name, "_l0_reverse"
    )
    layers: LayerList = [(NamedLayer(spec.name, (layer,), params), layer)]
    if not return_sequences[0]:
        layers.append(_stateless_layer(f"{spec.name}_last", LastStep(batch_first=True, direction="both")))
    mode = spec.config.get("merge_mode", "concat")
    if mode is None and not position.is_last:
        raise InputError("merge_mode=None returns two outputs, which is supported only in the last layer of a chain")
    if mode != "concat":
        layers.append(
            _stateless_layer(f"{spec.name}_merge", MergeDirections(layer.hidden_size, "pair" if mode is None else mode))
        )
    return layers, position.has_mask and return_sequences[0]


def _convert_masking(spec: KerasLayerSpec, arrays: WeightsFile, position: ChainPosition) -> tuple[LayerList, bool]:
    if position.has_mask:
        raise InputError("the input already has a mask: Keras would discard that mask")
    return [_stateless_layer(spec.name, Masking(parse_float(spec.config, "mask_value", default=0.0)))], True


def _convert_embedding(spec: KerasLayerSpec, arrays: WeightsFile, position: ChainPosition) -> tuple[LayerList, bool]:
    _reject_quantized(spec)
    layer = Embedding(parse_positive_int(spec.config, "input_dim"), parse_positive_int(spec.config, "output_dim"))
    (weight,) = arrays.variables(spec.h5_path, (layer.num_embeddings, layer.embedding_dim))
    mask_zero = parse_bool(spec.config, "mask_zero")
    masking = [_stateless_layer(f"{spec.name}_mask", Masking(0))] if mask_zero else []
    return [*masking, (NamedLayer(spec.name, (layer,), {"weight": weight}), layer)], mask_zero


def _convert_dense(spec: KerasLayerSpec, arrays: WeightsFile, position: ChainPosition) -> tuple[LayerList, bool]:
    _reject_quantized(spec)
    out_features, bias = parse_positive_int(spec.config), parse_bool(spec.config, "use_bias", True)
    kernel, *biases = arrays.variables(spec.h5_path, *[(None, out_features), (out_features,)][: 1 + bias])
    layer = Linear(kernel.shape[0], out_features, bias)

    def weight() -> Any:
        return kernel.read().T.copy()

    params = {"weight": LazyArray(kernel.shape[::-1], kernel.dtype, weight)}
    layers: LayerList = [(NamedLayer(spec.name, (layer,), params | dict(zip(["bias"], biases, strict=False))), layer)]
    return layers + _activation_layers(f"{spec.name}_activation", spec.config.get("activation")), position.has_mask


def _reject_quantized(spec: KerasLayerSpec) -> None:
    for name in ("quantization_config", "lora_rank"):
        if spec.config.get(name):
            raise InputError(f"{name} has no equivalent in xprnn")


def _convert_activation(spec: KerasLayerSpec, arrays: WeightsFile, position: ChainPosition) -> tuple[LayerList, bool]:
    if spec.class_name == "Softmax":
        if spec.config.get("axis", -1) != -1 or position.has_mask:
            raise InputError("only a softmax along the last axis without a mask has an equivalent in xprnn")
        return [_stateless_layer(spec.name, Softmax())], position.has_mask
    if spec.class_name == "Activation":
        return _activation_layers(spec.name, spec.config.get("activation")), position.has_mask
    return [_stateless_layer(spec.name, ActivationLayer(parse_activation_layer(spec)))], position.has_mask


def _convert_time_distributed(
    spec: KerasLayerSpec, arrays: WeightsFile, position: ChainPosition
) -> tuple[LayerList, bool]:
    """Convert the inner layer: it acts on the last axis only, so TimeDistributed has no effect on it."""
    inner = parse_layer_spec(spec.config.get("layer"), f"{spec.h5_path}/layer")
    if inner.class_name not in ("Dense", "Activation", "ReLU", "LeakyReLU", "ELU", *IGNORED_LAYERS):
        raise InputError(f"TimeDistributed of a {inner.class_name} has no equivalent in xprnn")
    return convert_layer(inner._replace(name=spec.name), arrays, position)


_CONVERTERS: dict[str, Callable[[KerasLayerSpec, WeightsFile, ChainPosition], tuple[LayerList, bool]]] = {
    **dict.fromkeys(("SimpleRNN", "LSTM", "GRU", "RNN"), _convert_recurrent),
    **dict.fromkeys(("Activation", "ReLU", "LeakyReLU", "ELU", "Softmax"), _convert_activation),
    **dict.fromkeys(IGNORED_LAYERS, lambda spec, arrays, position: ([], position.has_mask)),
    "Bidirectional": _convert_bidirectional,
    "Masking": _convert_masking,
    "Embedding": _convert_embedding,
    "Dense": _convert_dense,
    "TimeDistributed": _convert_time_distributed,
}


def convert_layer(spec: KerasLayerSpec, weights_file: WeightsFile, position: ChainPosition) -> tuple[LayerList, bool]:
    """Convert one Keras layer.

    Args:
        spec: the Keras layer.
        weights_file: the arrays of the model.
        position: the position of the layer in the chain.

    Returns:
        layers, has_mask: the equivalent xprnn layers in execution order, and True if their output has a mask.

    Raises:
        InputError: xprnn has no equivalent of the layer, or the layer's arrays do not fit its options.
    """
    if spec.class_name not in _CONVERTERS:
        raise InputError("has no equivalent in xprnn")
    return _CONVERTERS[spec.class_name](spec, weights_file, position)
