"""What the operators of a graph are given: a node, and the values that flow between nodes.

A value is an array of the caller's library, a list of them, or `Host`: a NumPy array of a shape, an axis, an index or
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

__all__ = ["FLOATS", "Context", "Host", "Node", "Op", "affordable", "host_context"]

FLOATS = (1, 10, 11)  # the standard's numbers for float32, float16 and float64


@dataclass(frozen=True)
class Host:
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

    def put(self, value: Any) -> Array:
        """A value among the data: floats in the dtype of `like`, as all floats of a graph are."""
        if not isinstance(value, Host):
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
    host: tuple[int, ...] = ()
    raw: tuple[int, ...] = ()
    check: Callable[[Node], str] = lambda node: ""
    from_host: bool = True  # stays on the host when all its inputs are there

    def __call__(self, home: Context, node: Node, inputs: list[Any]) -> tuple[Any, ...]:
        """The outputs, each a Host or an array."""
        stays = self.from_host and all(v is None or isinstance(v, Host) for v in inputs)
        at = host_context(_float_of(inputs)) if stays else home
        args = [self._argument(at, k, v, stays) for k, v in enumerate(inputs)]
        result = self.run(at, node, *args)
        outputs = result if isinstance(result, tuple) else (result,)
        return tuple(Host(np.asarray(o)) if stays and not isinstance(o, Host) else o for o in outputs)

    def _argument(self, at: Context, k: int, value: Any, stays: bool) -> Any:
        if value is None or k in self.raw:
            return value
        if k in self.host or (stays and isinstance(value, Host)):
            return value.array if isinstance(value, Host) else to_numpy(value)
        return at.put(value)


def _float_of(inputs: list[Any]) -> Any:
    kinds = [v.array.dtype for v in inputs if v is not None and v.array.dtype.kind == "f"]
    return kinds[0] if kinds else np.float32


def affordable(node: Node, shape: Any) -> tuple[int, ...]:
    """`shape` as a tuple; InputError if an array of it cannot be wanted."""
    out = tuple(int(d) for d in shape)
    if any(d < 0 for d in out) or math.prod(out) > 1 << 28:
        raise InputError(f"{node}: makes an array of shape {out}: at most 2^28 elements")
    return out
