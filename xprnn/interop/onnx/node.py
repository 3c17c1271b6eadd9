"""What the operators of a graph are given: a node, and the values that flow between nodes.

A value is an array of the caller's library, a list of them, or `HostValue`: a NumPy array of a shape, an axis, an index or
a constant.
An operator whose inputs are all on the host stays there, so that shapes never wait for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays.namespace import Array, InputError, Namespace, from_numpy, namespace, to_numpy

__all__ = ["FLOAT_TYPES", "Context", "HostValue", "Node", "Op", "check_size_limit", "host_context"]

FLOAT_TYPES = (1, 10, 11)  # the standard's numbers for float32, float16 and float64


@dataclass(frozen=True)
class HostValue:
    """A NumPy array that is not data: it never leaves the host unless data meets it."""

    array: Any


@dataclass(frozen=True)
class Node:
    """One node: names of what it reads ("" for what is left out) and writes, attributes decoded."""

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
    """Where an operator works: the namespace, and an array that shows library, device and the dtype of floats."""

    xp: Namespace
    like: Array
    on_host: bool = False

    def as_array(self, value: Any) -> Array:
        """A value among the data: floats in the dtype of `like`, as all floats of a graph are."""
        if not isinstance(value, HostValue):
            return value
        a = value.array
        # Widened here: torch refuses to do it for an array of no axes.
        return from_numpy(a.astype(np.int64) if a.dtype.kind == "i" else a, self.like)


def host_context(dtype: Any) -> Context:
    """The context of operators whose inputs are all on the host."""
    like = np.zeros(0, dtype)
    return Context(namespace(like), like, on_host=True)


class Op(NamedTuple):
    """An operator: run(context, node, *inputs) -> its outputs.

    The inputs at `host` are given as NumPy arrays, wherever they are; those at `raw` as they are, Host or array.
    `check` says what is unsupported about a node, or ""; `attrs` are those that `run` knows.
    """

    run: Callable[..., Any]
    attrs: tuple[str, ...] = ()
    host_inputs: tuple[int, ...] = ()
    raw_inputs: tuple[int, ...] = ()
    unsupported_reason: Callable[[Node], str] = lambda node: ""
    runs_on_host: bool = True  # stays on the host when all its inputs are there

    def __call__(self, context: Context, node: Node, inputs: list[Any]) -> tuple[Any, ...]:
        """The outputs, each a Host or an array."""
        stays = self.runs_on_host and all(v is None or isinstance(v, HostValue) for v in inputs)
        at = host_context(_float_dtype(inputs)) if stays else context
        args = [self._argument(at, k, v, stays) for k, v in enumerate(inputs)]
        result = self.run(at, node, *args)
        outputs = result if isinstance(result, tuple) else (result,)
        return tuple(HostValue(np.asarray(o)) if stays and not isinstance(o, HostValue) else o for o in outputs)

    def _argument(self, at: Context, k: int, value: Any, stays: bool) -> Any:
        if value is None or k in self.raw_inputs:
            return value
        if k in self.host_inputs or (stays and isinstance(value, HostValue)):
            return value.array if isinstance(value, HostValue) else to_numpy(value)
        return at.as_array(value)


def _float_dtype(inputs: list[Any]) -> Any:
    kinds = [v.array.dtype for v in inputs if v is not None and v.array.dtype.kind == "f"]
    return kinds[0] if kinds else np.float32


def check_size_limit(node: Node, shape: Any) -> tuple[int, ...]:
    """`shape` as a tuple; InputError if an array of it cannot be wanted."""
    out = tuple(int(d) for d in shape)
    if any(d < 0 for d in out) or math.prod(out) > 1 << 28:
        raise InputError(f"{node}: makes an array of shape {out}: at most 2^28 elements")
    return out
