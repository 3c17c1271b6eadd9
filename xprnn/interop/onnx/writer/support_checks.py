"""Checks of to_onnx before it writes: one error lists everything in a model that ONNX cannot express."""

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
    """Raise InputError with all reasons why a model cannot be written, if there are any."""
    if not isinstance(model, (Sequential, Recurrent, Linear, Embedding, StatelessLayer)):
        raise InputError(f"{where}: model must be a layer or Sequential, found {type(model).__name__}")
    if dtype not in ("float32", "float64"):
        raise InputError(f"{where}: dtype must be float32 or float64, found {dtype!r}")
    layers = named_layers(model, "" if isinstance(model, Sequential) else type(model).__name__)
    reasons = [f"{name}: {reason}" for name, layer in layers.items() if (reason := _layer_problem(layer))]
    reasons += _order_problems(list(layers.items()))
    recurrent = [layer for layer in layers.values() if isinstance(layer, Recurrent)]
    time_layers = [layer for layer in layers.values() if isinstance(layer, (Recurrent, TimeLayer))]
    if len({layer.batch_first for layer in time_layers}) > 1:
        reasons.append("some layers are batch_first and some are not")
    if not optional and any(layer.learned_state for layer in recurrent):
        reasons.append(
            "a learned_state is written as the default value of an input, and optional=False has no defaults"
        )
    if not recurrent:
        reasons.append("there is no recurrent layer")
    if reasons:
        raise InputError(f"{where}: ONNX's operators cannot express this model: {'; '.join(reasons)}")


def _order_problems(layers: list[tuple[str, Any]]) -> list[str]:
    """Reasons why layers cannot be written in this order."""
    out = []
    for (_, previous), (name, layer) in pairwise(layers):
        if isinstance(layer, Embedding) and not isinstance(previous, Masking):
            out.append(f"{name}: an Embedding must be the first layer, or follow a Masking")
    last_step = ""
    for name, layer in layers:
        if last_step and isinstance(layer, (Recurrent, TimeLayer)):
            out.append(f"{name}: there is no time axis after {last_step}, a LastStep")
        if isinstance(layer, LastStep):
            last_step = last_step or name
    return out


def _layer_problem(layer: Any) -> str:
    """Why one layer cannot be written; "" if it can."""
    if isinstance(layer, (Linear, Embedding, Softmax, ContextShift, ReverseTime, Masking, HoldLastOutput, LastStep)):
        return ""
    if isinstance(layer, ActivationLayer):
        f = activation(layer.f)
        reason = "" if operator_from_activation(f) else untraceable_reason(lambda xp, value: f.build(xp)[0](value()))
        return reason and f"ONNX has no operator for the activation {f.name!r}, and {reason}"
    if isinstance(layer, MergeDirections):
        return 'mode="pair" has two outputs, and a model can have one' if layer.mode == "pair" else ""
    if not isinstance(layer, Recurrent):
        return f"{type(layer).__name__} is a user-defined layer"
    cell = layer.resolved_cell
    if needs_scan(cell, layer.projection_size > 0) and (reason := untraceable_cell_reason(cell)):
        return f"the cell {cell.name!r} cannot be written: {reason}"
    return ""
