"""What each part of a chain takes and gives, compared when the chain is made and not at its first call.

How many features, and which axis is time: a part that walks along the wrong one would mix rows and steps in silence.

Only what is certain is judged: parts of xprnn's own classes, whose maths is known. A part of your own, or a subclass,
may do anything: whatever it is given and whatever comes after it is left to the first call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from xprnn.arrays.namespace import InputError
from xprnn.layers.context_shift import Around
from xprnn.layers.elementwise import Apply, Softmax
from xprnn.layers.embedding import Embedding
from xprnn.layers.linear import Linear
from xprnn.layers.masking import Hold, Last, Masking
from xprnn.layers.recurrent import Recurrent
from xprnn.layers.rnn_lstm_gru import GRU, LSTM, RNN
from xprnn.layers.sequence_ops import Flip, Merge, OverTime

__all__ = ["check_widths"]

_RECURRENT = (RNN, LSTM, GRU, Recurrent)
_HALVES = (Merge, Around)
_PASSING = (Hold, Last)  # whose step gives back whatever it is given
_SAME = (Apply, Softmax, Flip, Hold, Last)  # which take and give any number of features


class _Flow(NamedTuple):
    """What stands between two parts: `kind` is "unknown", "floats" or "pair"; `width` features, 0 where not known."""

    kind: str = "unknown"
    width: int = 0
    source: str = ""  # which part made it so, for errors


class _Time(NamedTuple):
    """Where time stands between two parts: `axes` is "TN", "NT", "N" where there is none left, or "", not known."""

    axes: str = ""
    source: str = ""  # which part showed it, for errors


def check_widths(where: str, parts: Mapping[str, Any], chain: Any) -> None:
    """Raise InputError if a part is certain to refuse what the part before it gives, or to take its rows for steps.

    Args:
        where: for errors.
        parts: name -> part, in order.
        chain: the class whose `parts` run one after the other.

    Raises:
        InputError: names both parts, what the one gives and the other takes.

    >>> check_widths("Sequential", {"rnn": LSTM(3, 16), "head": Linear(8, 2)}, dict)
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: Sequential: head (Linear) has in_features=8, expected 16: rnn (LSTM) gives 16 features
    >>> check_widths("Sequential", {"low": GRU(3, 4, batch_first=True), "high": GRU(4, 2)}, dict)
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: Sequential: high (GRU) has batch_first=False, expected True: low (GRU) gives (N,T,...)
    """
    flow, time = _Flow(), _Time()
    for name, part in _flat("", parts, chain):
        if type(part) not in (*_RECURRENT, *_HALVES, *_SAME, Linear, Embedding, Masking):
            flow, time = _Flow(), _Time()
            continue
        called = f"{name} ({type(part).__name__})"
        _compare(f"{where}: {called}", part, flow)
        flow, time = _behind(called, part, flow), _later(f"{where}: {called}", called, part, time)


def _flat(prefix: str, parts: Mapping[str, Any], chain: Any) -> Iterator[tuple[str, Any]]:
    """The parts of chains inside chains, in the order in which they run."""
    for name, part in parts.items():
        if type(part) is chain:
            yield from _flat(f"{prefix}{name}.", part.parts, chain)
        else:
            yield f"{prefix}{name}", part


def _compare(what: str, part: Any, flow: _Flow) -> None:
    """Raise InputError if the part cannot take what flows into it."""
    if flow.kind == "pair" and type(part) not in _PASSING:
        raise InputError(f"{what} takes one array, but {flow.source} gives a pair: nothing can stand behind that")
    if flow.kind == "floats" and type(part) is Embedding:
        raise InputError(f"{what} takes integers, but {flow.source} gives floats: an Embedding comes first")
    option, wanted = _taken(part)
    if not flow.width or not wanted or flow.width == wanted:
        return
    value = getattr(part, option)
    if type(part) not in _HALVES:
        raise InputError(f"{what} has {option}={value}, expected {flow.width}: {flow.source} gives {_said(flow)}")
    hint = f"expected {flow.width // 2}" if flow.width % 2 == 0 else "it stands behind a bidirectional layer"
    raise InputError(
        f"{what} has {option}={value}, twice that in features, but {flow.source} gives {_said(flow)}: {hint}"
    )


def _said(flow: _Flow) -> str:
    return f"{flow.width} feature{'s' if flow.width > 1 else ''}"


def _taken(part: Any) -> tuple[str, int]:
    """The option that says how many features a part takes, and how many; 0 for any number."""
    if type(part) is Linear:
        return "in_features", part.in_features
    if type(part) in _RECURRENT:
        return "input_size", part.input_size
    if type(part) in _HALVES:
        return "hidden_size", 2 * part.hidden_size
    return "", 0


def _behind(called: str, part: Any, flow: _Flow) -> _Flow:
    """What flows out of a part that takes what flows in."""
    if type(part) in _PASSING or type(part) is Masking:  # integers pass a Masking
        return flow
    if type(part) is Embedding:
        return _Flow("floats", part.embedding_dim, called)
    if type(part) is Linear:
        return _Flow("floats", part.out_features, called)
    if type(part) in _RECURRENT:
        ways = f"{called}, both directions side by side," if part.bidirectional else called
        return _Flow("floats", part.output_size, ways)
    if type(part) is Merge:
        return _Flow("pair", 0, called) if part.mode == "pair" else _Flow("floats", part.hidden_size, called)
    width = flow.width or (2 * part.hidden_size if type(part) is Around else 0)
    return _Flow("floats", width, flow.source if flow.width else called)


def _later(what: str, called: str, part: Any, time: _Time) -> _Time:
    """Where time stands behind a part; InputError if it walks along another axis. The others act on features alone."""
    if type(part) not in _RECURRENT and not isinstance(part, (OverTime, Around)):
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
        if type(part) is Around:
            raise InputError(f"{what} takes (T,N,...), but {gives}: give that part batch_first=False")
        raise InputError(f"{what} has batch_first={first}, expected {not first}: {gives}")
    return _Time("N" if type(part) is Last else axes, called)
