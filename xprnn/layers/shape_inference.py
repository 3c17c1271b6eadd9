"""What each part of a chain takes and gives, compared when the chain is made and not at its first call.

How many features, and which axis is time: a part that walks along the wrong one would mix rows and steps in silence.

Only what is certain is judged: parts of xprnn's own classes, whose maths is known. A part of your own, or a subclass,
may do anything: whatever it is given and whatever comes after it is left to the first call.
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
_IDENTITY = (HoldLastOutput, LastStep)  # whose step gives back whatever it is given
_WIDTH_PRESERVING = (
    ActivationLayer,
    Softmax,
    ReverseTime,
    HoldLastOutput,
    LastStep,
)  # which take and give any number of features


class _FeatureSpec(NamedTuple):
    """What stands between two parts: `kind` is "unknown", "floats" or "pair"; `width` features, 0 where not known."""

    kind: str = "unknown"
    width: int = 0
    source: str = ""  # which part made it so, for errors


class _TimeAxis(NamedTuple):
    """Where time stands between two parts: `axes` is "TN", "NT", "N" where there is none left, or "", not known."""

    axes: str = ""
    source: str = ""  # which part showed it, for errors


def check_compatible(where: str, layers: Mapping[str, Any], sequential_class: Any) -> None:
    """Raise InputError if a part is certain to refuse what the part before it gives, or to take its rows for steps.

    Args:
        where: for errors.
        parts: name -> part, in order.
        chain: the class whose `parts` run one after the other.

    Raises:
        InputError: names both parts, what the one gives and the other takes.

    >>> check_compatible("Sequential", {"rnn": LSTM(3, 16), "head": Linear(8, 2)}, dict)
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: Sequential: head (Linear) has in_features=8, expected 16: rnn (LSTM) gives 16 features
    >>> check_compatible("Sequential", {"low": GRU(3, 4, batch_first=True), "high": GRU(4, 2)}, dict)
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: Sequential: high (GRU) has batch_first=False, expected True: low (GRU) gives (N,T,...)
    """
    flow, time = _FeatureSpec(), _TimeAxis()
    for name, part in _flatten("", layers, sequential_class):
        if type(part) not in (*_RECURRENT, *_DIRECTION_PAIRS, *_WIDTH_PRESERVING, Linear, Embedding, Masking):
            flow, time = _FeatureSpec(), _TimeAxis()
            continue
        called = f"{name} ({type(part).__name__})"
        _check_input(f"{where}: {called}", part, flow)
        flow, time = _output_spec(called, part, flow), _output_time_axis(f"{where}: {called}", called, part, time)


def _flatten(prefix: str, parts: Mapping[str, Any], chain: Any) -> Iterator[tuple[str, Any]]:
    """The parts of chains inside chains, in the order in which they run."""
    for name, part in parts.items():
        if type(part) is chain:
            yield from _flatten(f"{prefix}{name}.", part.layers, chain)
        else:
            yield f"{prefix}{name}", part


def _check_input(what: str, part: Any, flow: _FeatureSpec) -> None:
    """Raise InputError if the part cannot take what flows into it."""
    if flow.kind == "pair" and type(part) not in _IDENTITY:
        raise InputError(f"{what} takes one array, but {flow.source} gives a pair: nothing can stand behind that")
    if flow.kind == "floats" and type(part) is Embedding:
        raise InputError(f"{what} takes integers, but {flow.source} gives floats: an Embedding comes first")
    option, wanted = _input_spec(part)
    if not flow.width or not wanted or flow.width == wanted:
        return
    value = getattr(part, option)
    if type(part) not in _DIRECTION_PAIRS:
        raise InputError(
            f"{what} has {option}={value}, expected {flow.width}: {flow.source} gives {_format_width(flow)}"
        )
    hint = f"expected {flow.width // 2}" if flow.width % 2 == 0 else "it stands behind a bidirectional layer"
    raise InputError(
        f"{what} has {option}={value}, twice that in features, but {flow.source} gives {_format_width(flow)}: {hint}"
    )


def _format_width(flow: _FeatureSpec) -> str:
    return f"{flow.width} feature{'s' if flow.width > 1 else ''}"


def _input_spec(part: Any) -> tuple[str, int]:
    """The option that says how many features a part takes, and how many; 0 for any number."""
    if type(part) is Linear:
        return "in_features", part.in_features
    if type(part) in _RECURRENT:
        return "input_size", part.input_size
    if type(part) in _DIRECTION_PAIRS:
        return "hidden_size", 2 * part.hidden_size
    return "", 0


def _output_spec(called: str, part: Any, flow: _FeatureSpec) -> _FeatureSpec:
    """What flows out of a part that takes what flows in."""
    if type(part) in _IDENTITY or type(part) is Masking:  # integers pass a Masking
        return flow
    if type(part) is Embedding:
        return _FeatureSpec("floats", part.embedding_dim, called)
    if type(part) is Linear:
        return _FeatureSpec("floats", part.out_features, called)
    if type(part) in _RECURRENT:
        ways = f"{called}, both directions side by side," if part.bidirectional else called
        return _FeatureSpec("floats", part.output_size, ways)
    if type(part) is MergeDirections:
        return (
            _FeatureSpec("pair", 0, called) if part.mode == "pair" else _FeatureSpec("floats", part.hidden_size, called)
        )
    width = flow.width or (2 * part.hidden_size if type(part) is ContextShift else 0)
    return _FeatureSpec("floats", width, flow.source if flow.width else called)


def _output_time_axis(what: str, called: str, part: Any, time: _TimeAxis) -> _TimeAxis:
    """Where time stands behind a part; InputError if it walks along another axis. The others act on features alone."""
    if type(part) not in _RECURRENT and not isinstance(part, (TimeLayer, ContextShift)):
        return time
    if time.axes == "N":
        raise InputError(
            f"{what} walks along time, (T,N,...), but {time.source} leaves one output of each row, (N,...): "
            "what walks stands before it"
        )
    first = getattr(part, "batch_first", False)  # Around is always time first
    axes = "NT" if first else "TN"
    if time.axes and time.axes != axes:
        gives = f"{time.source} gives ({','.join(time.axes)},...)"
        if type(part) is ContextShift:
            raise InputError(f"{what} takes (T,N,...), but {gives}: give that part batch_first=False")
        raise InputError(f"{what} has batch_first={first}, expected {not first}: {gives}")
    return _TimeAxis("N" if type(part) is LastStep else axes, called)
