"""Check at construction that adjacent layers of a Sequential fit: features, integers or floats, time axis.

A layer that runs along the wrong axis would treat batch rows as time steps without any error, so the order of axes is
checked too. Only layers of xprnn's own classes are checked. A user-defined class or subclass may have any output, so
neither it nor the layers after it are checked until their first call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from xprnn.arrays.namespace import InputError
from xprnn.layers.context_shift import ContextShift
from xprnn.layers.elementwise import ActivationLayer, Softmax
from xprnn.layers.embedding import Embedding
from xprnn.layers.linear import Linear
from xprnn.layers.masking import HoldLastOutput, LastStep, Masking
from xprnn.layers.recurrent import Recurrent
from xprnn.layers.rnn_lstm_gru import GRU, LSTM, RNN
from xprnn.layers.sequence_ops import MergeDirections, ReverseTime, TimeLayer

__all__ = ["check_compatible"]

_RECURRENT = (RNN, LSTM, GRU, Recurrent)
_DIRECTION_PAIRS = (MergeDirections, ContextShift)
_IDENTITY = (HoldLastOutput, LastStep)  # their `step` returns its input, a pair of arrays included
_WIDTH_PRESERVING = (ActivationLayer, Softmax, ReverseTime, HoldLastOutput, LastStep)  # accept any number of features


class _FeatureSpec(NamedTuple):
    """Kind and number of features between two layers."""

    kind: str = "unknown"  # "unknown", "floats" or "pair" (two arrays)
    width: int = 0  # number of features, 0 if unknown
    source: str = ""  # the layer that determined the width, for errors


class _TimeAxis(NamedTuple):
    """Order of the leading axes between two layers."""

    axes: str = ""  # "TN", "NT", "N" (no time axis), or "" if unknown
    source: str = ""  # the layer that determined the order, for errors


def check_compatible(where: str, layers: Mapping[str, Any], sequential_class: type[Any]) -> None:
    """Raise InputError if a layer is certain to reject the output of the layer before it, or to read rows as steps.

    Args:
        where: name of the caller, for errors.
        layers: name -> layer, in order.
        sequential_class: the class of nested models, whose `layers` are checked like layers of this model.

    Raises:
        InputError: two layers do not fit; the message names both, the output of one and the input of the other.

    >>> check_compatible("Sequential", {"rnn": LSTM(3, 16), "head": Linear(8, 2)}, dict)
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: Sequential: head (Linear) has in_features=8, expected 16: rnn (LSTM) gives...
    >>> check_compatible("Sequential", {"low": GRU(3, 4, batch_first=True), "high": GRU(4, 2)}, dict)
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: Sequential: high (GRU) has batch_first=False, expected True: low (GRU) gives...
    """
    features, time = _FeatureSpec(), _TimeAxis()
    for name, layer in _flatten("", layers, sequential_class):
        if type(layer) not in (*_RECURRENT, *_DIRECTION_PAIRS, *_WIDTH_PRESERVING, Linear, Embedding, Masking):
            features, time = _FeatureSpec(), _TimeAxis()
            continue
        label = f"{name} ({type(layer).__name__})"
        _check_input(f"{where}: {label}", layer, features)
        features = _output_spec(label, layer, features)
        time = _output_time_axis(f"{where}: {label}", label, layer, time)


def _flatten(prefix: str, layers: Mapping[str, Any], sequential_class: type[Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) in order of execution, with the layers of nested Sequentials in place of these."""
    for name, layer in layers.items():
        if type(layer) is sequential_class:
            yield from _flatten(f"{prefix}{name}.", layer.layers, sequential_class)
        else:
            yield f"{prefix}{name}", layer


def _check_input(where: str, layer: Any, features: _FeatureSpec) -> None:
    """Raise InputError if the layer rejects the features of its input."""
    if features.kind == "pair" and type(layer) not in _IDENTITY:
        raise InputError(f"{where} takes one array, but {features.source} gives a pair: make that the last layer")
    if features.kind == "floats" and type(layer) is Embedding:
        raise InputError(f"{where} takes integers, but {features.source} gives floats: put the Embedding first")
    option, expected = _input_spec(layer)
    if not features.width or not expected or features.width == expected:
        return
    value, width = getattr(layer, option), features.width
    output = f"{features.source} gives {width} feature{'s' if width > 1 else ''}"
    if type(layer) not in _DIRECTION_PAIRS:
        raise InputError(f"{where} has {option}={value}, expected {width}: {output}")
    hint = f"expected {width // 2}" if width % 2 == 0 else "put it after a bidirectional layer"
    raise InputError(f"{where} has {option}={value}, twice that in features, but {output}: {hint}")


def _input_spec(layer: Any) -> tuple[str, int]:
    """Return the option that sets the number of input features, and that number, or 0 if any number is accepted."""
    if type(layer) is Linear:
        return "in_features", layer.in_features
    if type(layer) in _RECURRENT:
        return "input_size", layer.input_size
    if type(layer) in _DIRECTION_PAIRS:
        return "hidden_size", 2 * layer.hidden_size
    return "", 0


def _output_spec(label: str, layer: Any, features: _FeatureSpec) -> _FeatureSpec:
    """Return the features of the layer's output for the features of its input."""
    if type(layer) in _IDENTITY or type(layer) is Masking:  # Masking returns integers unchanged
        return features
    if type(layer) is Embedding:
        return _FeatureSpec("floats", layer.embedding_dim, label)
    if type(layer) is Linear:
        return _FeatureSpec("floats", layer.out_features, label)
    if type(layer) in _RECURRENT:
        source = f"{label}, both directions side by side," if layer.bidirectional else label
        return _FeatureSpec("floats", layer.output_size, source)
    if type(layer) is MergeDirections:
        is_pair = layer.mode == "pair"
        return _FeatureSpec("pair", 0, label) if is_pair else _FeatureSpec("floats", layer.hidden_size, label)
    width = features.width or (2 * layer.hidden_size if type(layer) is ContextShift else 0)
    return _FeatureSpec("floats", width, features.source if features.width else label)


def _output_time_axis(where: str, label: str, layer: Any, time: _TimeAxis) -> _TimeAxis:
    """Return the order of axes after a layer; raise InputError if its time axis is missing or is the batch axis."""
    if type(layer) not in _RECURRENT and not isinstance(layer, (TimeLayer, ContextShift)):
        return time  # a layer that acts on features alone
    if time.axes == "N":
        raise InputError(
            f"{where} runs along time, (T,N,...), but {time.source} gives one output for each row, (N,...): "
            "put it before that layer"
        )
    batch_first = getattr(layer, "batch_first", False)  # ContextShift is always time-major
    axes = "NT" if batch_first else "TN"
    if time.axes and time.axes != axes:
        found = f"{time.source} gives ({','.join(time.axes)},...)"
        if type(layer) is ContextShift:
            raise InputError(f"{where} takes (T,N,...), but {found}: give that layer batch_first=False")
        raise InputError(f"{where} has batch_first={batch_first}, expected {not batch_first}: {found}")
    return _TimeAxis("N" if type(layer) is LastStep else axes, label)
