"""What to_onnx refuses, and why: all of it said at once, before anything is written."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from xprnn.arrays.namespace import InputError
from xprnn.cells.activations import activation
from xprnn.interop.onnx.layer_specs import named_layers
from xprnn.interop.onnx.recurrent_attributes import operator_from_activation
from xprnn.interop.onnx.writer.scan import needs_scan, untraceable_cell_reason
from xprnn.interop.onnx.writer.tracing_namespace import untraceable_reason
from xprnn.layers.base import StatelessLayer
from xprnn.layers.context_shift import ContextShift
from xprnn.layers.elementwise import ActivationLayer, Softmax
from xprnn.layers.embedding import Embedding
from xprnn.layers.linear import Linear
from xprnn.layers.masking import HoldLastOutput, LastStep, Masking
from xprnn.layers.recurrent import Recurrent
from xprnn.layers.sequence_ops import MergeDirections, ReverseTime, TimeLayer
from xprnn.layers.sequential import Sequential

__all__ = ["check_supported"]


def check_supported(where: str, model: Any, dtype: str, lengths: bool, optional: bool) -> None:
    """Raise InputError for what cannot be written, with all reasons."""
    if not isinstance(model, (Sequential, Recurrent, Linear, Embedding, StatelessLayer)):
        raise InputError(f"{where}: model must be a layer or Sequential, found {type(model).__name__}")
    if dtype not in ("float32", "float64"):
        raise InputError(f"{where}: dtype must be float32 or float64, found {dtype!r}")
    parts = named_layers(model, "" if isinstance(model, Sequential) else type(model).__name__)
    reasons = [f"{name}: {reason}" for name, part in parts.items() if (reason := _layer_problem(part))]
    reasons += _order_problems(list(parts.items()))
    recurrent = [p for p in parts.values() if isinstance(p, Recurrent)]
    timed = [p for p in parts.values() if isinstance(p, (Recurrent, TimeLayer))]
    if len({p.batch_first for p in timed}) > 1:
        reasons.append("some parts are batch_first and some are not")
    if not optional and any(p.learned_state for p in recurrent):
        reasons.append("a learned_state is the value of an input that may be left out: optional=False has none")
    if not recurrent:
        reasons.append("there is no recurrent layer")
    if reasons:
        raise InputError(f"{where}: ONNX's operators cannot express this model: {'; '.join(reasons)}")


def _order_problems(parts: list[tuple[str, Any]]) -> list[str]:
    """What is said against the places of parts."""
    out = []
    for (_, before), (name, part) in pairwise(parts):
        if isinstance(part, Embedding) and not isinstance(before, Masking):
            out.append(f"{name}: an Embedding must come first, or behind a Masking alone")
    timeless = ""
    for name, part in parts:
        if timeless and isinstance(part, (Recurrent, TimeLayer)):
            out.append(f"{name}: behind {timeless}, a Last, there is no time to walk in")
        if isinstance(part, LastStep):
            timeless = timeless or name
    return out


def _layer_problem(part: Any) -> str:
    if isinstance(part, (Linear, Embedding, Softmax, ContextShift, ReverseTime, Masking, HoldLastOutput, LastStep)):
        return ""
    if isinstance(part, ActivationLayer):
        f = activation(part.f)
        reason = "" if operator_from_activation(f) else untraceable_reason(lambda xp, value: f.build(xp)[0](value()))
        return reason and f"{f.name!r} is no operator of its own, and {reason}"
    if isinstance(part, MergeDirections):
        return "a pair is two outputs, and a model has one" if part.mode == "pair" else ""
    if not isinstance(part, Recurrent):
        return f"{type(part).__name__} is a part of your own, whose maths is not known"
    if needs_scan(part.resolved_cell, part.projection_size > 0) and (
        reason := untraceable_cell_reason(part.resolved_cell)
    ):
        return f"the cell {part.resolved_cell.name!r} cannot be written: {reason}"
    return ""
