"""An array namespace whose functions write ONNX nodes.

The step of a cell, or an activation, is run once with traced values. The nodes that it appends compute the same
function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from xprnn.arrays.namespace import InputError

__all__ = ["NodeSink", "TracedValue", "make_tracing_namespace", "untraceable_reason"]


class NodeSink(Protocol):
    """The interface of a graph to which nodes are appended."""

    def emit(self, op: str, *inputs: str, **attrs: Any) -> str:
        """Append a node; return the name of its output."""

    def float_scalar(self, value: float) -> str:
        """Add a 0-d constant; return its name."""


class TracedValue:
    """A value of the graph under construction; operators on it append nodes."""

    __slots__ = ("name", "sink")

    def __init__(self, sink: NodeSink, name: str) -> None:
        self.sink, self.name = sink, name

    def __bool__(self) -> bool:
        raise InputError("it branches on the value of an array, which is not known when the graph is written")

    def __neg__(self) -> TracedValue:
        return TracedValue(self.sink, self.sink.emit("Neg", self.name))


def _value_name(sink: NodeSink, value: Any) -> str:
    if isinstance(value, TracedValue):
        return value.name
    if isinstance(value, (bool, int, float)):
        return sink.float_scalar(float(value))
    raise InputError(f"it computes with a constant of type {type(value).__name__}")


def _binary(op: str, swapped: bool = False) -> Callable[[TracedValue, Any], TracedValue]:
    def method(self: TracedValue, other: Any) -> TracedValue:
        operands = (self.name, _value_name(self.sink, other))
        return TracedValue(self.sink, self.sink.emit(op, *(operands[::-1] if swapped else operands)))

    return method


_OPERATORS = {"add": "Add", "sub": "Sub", "mul": "Mul", "truediv": "Div", "pow": "Pow"}
for _method, _op in _OPERATORS.items():
    setattr(TracedValue, f"__{_method}__", _binary(_op))
    setattr(TracedValue, f"__r{_method}__", _binary(_op, swapped=True))
for _method, _op in {"lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}.items():
    setattr(TracedValue, f"__{_method}__", _binary(_op))

# Array functions that are one operator: of the Array API, and sigmoid and erf, which some namespaces have.
_FUNCTIONS = {
    "abs": "Abs",
    "erf": "Erf",
    "exp": "Exp",
    "log": "Log",
    "sigmoid": "Sigmoid",
    "sign": "Sign",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
    "maximum": "Max",
    "minimum": "Min",
    "where": "Where",
    "negative": "Neg",
    "logical_and": "And",
    "logical_or": "Or",
    "logical_not": "Not",
}


class _TracingNamespace:
    """Array functions that append nodes to a sink. A function without an ONNX counterpart raises AttributeError."""

    def __init__(self, sink: NodeSink) -> None:
        self.sink = sink

    def __getattr__(self, name: str) -> Any:
        if name not in _FUNCTIONS:
            raise AttributeError(name)

        def function(*values: Any) -> TracedValue:
            return TracedValue(
                self.sink, self.sink.emit(_FUNCTIONS[name], *(_value_name(self.sink, v) for v in values))
            )

        return function

    def expm1(self, x: Any) -> Any:
        # exp(x) - 1 = tanh(x/2) * (exp(x) + 1), without cancellation near 0.
        return self.tanh(0.5 * x) * (self.exp(x) + 1.0)

    def log1p(self, x: Any) -> Any:
        return self.log(1.0 + x)

    def square(self, x: Any) -> Any:
        return x * x


def make_tracing_namespace(sink: NodeSink) -> Any:
    """Make a namespace that appends nodes to `sink`."""
    return _TracingNamespace(sink)


class _NullSink:
    """A sink that discards the nodes, to test whether a function can be traced."""

    def emit(self, op: str, *inputs: str, **attrs: Any) -> str:
        return "value"

    def float_scalar(self, value: float) -> str:
        return "number"


def untraceable_reason(fn: Callable[[Any, Callable[[], TracedValue]], Any]) -> str:
    """Why a function cannot be written as nodes; "" if it can.

    Args:
        fn: fn(xp, value), where value() returns a traced value.

    >>> untraceable_reason(lambda xp, value: xp.tanh(value()) + 1.0)
    ''
    >>> untraceable_reason(lambda xp, value: xp.cumulative_sum(value()))
    'it uses xp.cumulative_sum, which has no ONNX counterpart'
    """
    sink = _NullSink()
    try:
        result = fn(_TracingNamespace(sink), lambda: TracedValue(sink, "value"))
    except AttributeError as error:
        return f"it uses xp.{error.args[0]}, which has no ONNX counterpart" if error.args else "it fails"
    except Exception as error:  # a user-defined function may raise any exception
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    values = result if isinstance(result, tuple) else (result,)
    untraced = [type(v).__name__ for v in values if not isinstance(v, TracedValue)]
    return f"it returns a value of type {untraced[0]}" if untraced else ""
