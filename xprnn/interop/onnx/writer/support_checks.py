"""What to_onnx refuses, and why: all of it said at once, before anything is written."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from xprnn.arrays.namespace import InputError
from xprnn.cells.activations import activation
from xprnn.interop.onnx.layer_specs import flat_parts
from xprnn.interop.onnx.recurrent_attributes import operator_of
from xprnn.interop.onnx.writer.scan import by_scan, untraceable
from xprnn.interop.onnx.writer.tracing_namespace import trouble
from xprnn.layers.base import Part
from xprnn.layers.context_shift import Around
from xprnn.layers.elementwise import Apply, Softmax
from xprnn.layers.embedding import Embedding
from xprnn.layers.linear import Linear
from xprnn.layers.masking import Hold, Last, Masking
from xprnn.layers.recurrent import Recurrent
from xprnn.layers.sequence_ops import Flip, Merge, OverTime
from xprnn.layers.sequential import Sequential

__all__ = ["refuse"]


def refuse(where: str, model: Any, dtype: str, lengths: bool, optional: bool) -> None:
    """Raise InputError for what cannot be written, with all reasons."""
    if not isinstance(model, (Sequential, Recurrent, Linear, Embedding, Part)):
        raise InputError(f"{where}: model must be a layer or Sequential, found {type(model).__name__}")
    if dtype not in ("float32", "float64"):
        raise InputError(f"{where}: dtype must be float32 or float64, found {dtype!r}")
    parts = flat_parts(model, "" if isinstance(model, Sequential) else type(model).__name__)
    reasons = [f"{name}: {reason}" for name, part in parts.items() if (reason := _reason(part))]
    reasons += _order(list(parts.items()))
    recurrent = [p for p in parts.values() if isinstance(p, Recurrent)]
    timed = [p for p in parts.values() if isinstance(p, (Recurrent, OverTime))]
    if len({p.batch_first for p in timed}) > 1:
        reasons.append("some parts are batch_first and some are not")
    if not optional and any(p.learned_state for p in recurrent):
        reasons.append("a learned_state is the value of an input that may be left out: optional=False has none")
    if not recurrent:
        reasons.append("there is no recurrent layer")
    if reasons:
        raise InputError(f"{where}: ONNX's operators cannot express this model: {'; '.join(reasons)}")


def _order(parts: list[tuple[str, Any]]) -> list[str]:
    """What is said against the places of parts."""
    out = []
    for (_, before), (name, part) in pairwise(parts):
        if isinstance(part, Embedding) and not isinstance(before, Masking):
            out.append(f"{name}: an Embedding must come first, or behind a Masking alone")
    timeless = ""
    for name, part in parts:
        if timeless and isinstance(part, (Recurrent, OverTime)):
            out.append(f"{name}: behind {timeless}, a Last, there is no time to walk in")
        if isinstance(part, Last):
            timeless = timeless or name
    return out


def _reason(part: Any) -> str:
    if isinstance(part, (Linear, Embedding, Softmax, Around, Flip, Masking, Hold, Last)):
        return ""
    if isinstance(part, Apply):
        f = activation(part.f)
        reason = "" if operator_of(f) else trouble(lambda xp, value: f.build(xp)[0](value()))
        return reason and f"{f.name!r} is no operator of its own, and {reason}"
    if isinstance(part, Merge):
        return "a pair is two outputs, and a model has one" if part.mode == "pair" else ""
    if not isinstance(part, Recurrent):
        return f"{type(part).__name__} is a part of your own, whose maths is not known"
    if by_scan(part.core, part.projection > 0) and (reason := untraceable(part.core)):
        return f"the cell {part.core.name!r} cannot be written: {reason}"
    return ""
