"""Nodes, operators, and the values between them.

A value is an array of the caller's library, a list of such arrays, or a `HostValue`. An operator whose inputs are all
HostValues is computed with NumPy on the host, so that the computation of shapes never waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays.namespace import Array, InputError, Namespace, from_numpy, namespace, to_numpy

__all__ = ["FLOAT_TYPES", "Context", "HostValue", "Node", "Op", "check_size_limit", "host_context"]

FLOAT_TYPES = (1, 10, 11)  # TensorProto data types float32, float16 and float64


@dataclass(frozen=True)
class HostValue:
    """A NumPy array: a shape, an axis, an index or a constant. It is copied to the device only to be used with data."""

    array: Any


@dataclass(frozen=True)
class Node:
    """One node.

    Args:
        name: the name, unique in its graph.
        op: the operator, for example "Gemm".
        inputs: names of the inputs; "" for an omitted one.
        outputs: names of the outputs; "" for an omitted one.
        attrs: the attributes, decoded.
        opset: the opset version.
        bodies: the compiled graphs in the attributes, by attribute name.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: dict[str, Any]
    opset: int
    bodies: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op} {self.name!r}"


@dataclass(frozen=True)
class Context:
    """Where an operator is computed.

    Args:
        xp: the array namespace.
        like: an array that sets the device and the dtype of floats.
        on_host: True if the operator is computed with NumPy on HostValues.
    """

    xp: Namespace
    like: Array
    on_host: bool = False

    def as_array(self, value: Any) -> Array:
        """Convert a HostValue to an array on the device, floats to the dtype of `like`; return an array unchanged."""
        if not isinstance(value, HostValue):
            return value
        a = value.array
        # Converted to int64 here, because torch cannot convert a 0-d array.
        return from_numpy(a.astype(np.int64) if a.dtype.kind == "i" else a, self.like)


def host_context(dtype: Any) -> Context:
    """The context of operators whose inputs are all HostValues."""
    like = np.zeros(0, dtype)
    return Context(namespace(like), like, on_host=True)


class Op(NamedTuple):
    """An operator.

    Args:
        run: run(context, node, *inputs) -> one output, or a tuple of outputs.
        attrs: names of the attributes that `run` supports.
        host_inputs: numbers of the inputs that are passed as NumPy arrays.
        raw_inputs: numbers of the inputs that are passed unconverted, as a HostValue or an array.
        unsupported_reason: for a node, what about it is not supported; "" if all is.
        runs_on_host: True if the operator is computed on the host when all its inputs are HostValues.
    """

    run: Callable[..., Any]
    attrs: tuple[str, ...] = ()
    host_inputs: tuple[int, ...] = ()
    raw_inputs: tuple[int, ...] = ()
    unsupported_reason: Callable[[Node], str] = lambda node: ""
    runs_on_host: bool = True

    def __call__(self, context: Context, node: Node, inputs: list[Any]) -> tuple[Any, ...]:
        """Compute the outputs, each a HostValue or an array."""
        on_host = self.runs_on_host and all(v is None or isinstance(v, HostValue) for v in inputs)
        context = host_context(_float_dtype(inputs)) if on_host else context
        args = [self._argument(context, k, v, on_host) for k, v in enumerate(inputs)]
        result = self.run(context, node, *args)
        outputs = result if isinstance(result, tuple) else (result,)
        return tuple(HostValue(np.asarray(o)) if on_host and not isinstance(o, HostValue) else o for o in outputs)

    def _argument(self, context: Context, k: int, value: Any, on_host: bool) -> Any:
        if value is None or k in self.raw_inputs:
            return value
        if k in self.host_inputs or (on_host and isinstance(value, HostValue)):
            return value.array if isinstance(value, HostValue) else to_numpy(value)
        return context.as_array(value)


def _float_dtype(inputs: list[Any]) -> Any:
    kinds = [v.array.dtype for v in inputs if v is not None and v.array.dtype.kind == "f"]
    return kinds[0] if kinds else np.float32


def check_size_limit(node: Node, shape: Any) -> tuple[int, ...]:
    """Return `shape` as a tuple; raise InputError if it has a negative size or more than 2^28 elements."""
    out = tuple(int(d) for d in shape)
    if any(d < 0 for d in out) or math.prod(out) > 1 << 28:
        raise InputError(f"{node}: the output would have shape {out}, expected at most 2^28 elements")
    return out
