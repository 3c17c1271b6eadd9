"""A namespace whose functions write ONNX nodes: a cell's own step, or an activation, run once, is its graph.

What a cell computes is so written once, in its own lines, and not a second time as operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from xprnn.arrays.namespace import InputError

__all__ = ["NodeSink", "TracedValue", "make_tracing_namespace", "untraceable_reason"]


class NodeSink(Protocol):
    """Where nodes go."""

    def emit(self, op: str, *inputs: str, **attrs: Any) -> str:
        """Add a node; the name of its output."""

    def float_scalar(self, value: float) -> str:
        """The name of a constant without axes."""


class TracedValue:
    """A value of the graph to be."""

    __slots__ = ("name", "sink")

    def __init__(self, sink: NodeSink, name: str) -> None:
        self.sink, self.name = sink, name

    def __bool__(self) -> bool:
        raise InputError("it asks whether a value is true, which a graph does not know when it is written")

    def __neg__(self) -> TracedValue:
        return TracedValue(self.sink, self.sink.emit("Neg", self.name))


def _value_name(sink: NodeSink, value: Any) -> str:
    if isinstance(value, TracedValue):
        return value.name
    if isinstance(value, (bool, int, float)):
        return sink.float_scalar(float(value))
    raise InputError(f"it computes with a {type(value).__name__} of its own")


def _binary(op: str, swapped: bool = False) -> Callable[[TracedValue, Any], TracedValue]:
    def method(self: TracedValue, other: Any) -> TracedValue:
        pair = (self.name, _value_name(self.sink, other))
        return TracedValue(self.sink, self.sink.emit(op, *(pair[::-1] if swapped else pair)))

    return method


_OPERATORS = {"add": "Add", "sub": "Sub", "mul": "Mul", "truediv": "Div", "pow": "Pow"}
for _method, _op in _OPERATORS.items():
    setattr(TracedValue, f"__{_method}__", _binary(_op))
    setattr(TracedValue, f"__r{_method}__", _binary(_op, swapped=True))
for _method, _op in {"lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}.items():
    setattr(TracedValue, f"__{_method}__", _binary(_op))

# Functions of the Array API (and sigmoid and erf, which some namespaces have) that are one operator.
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
    """The functions, over one sink; what is missing here is missing there."""

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
        # exp(x) - 1 = tanh(x/2) (exp(x) + 1), which does not cancel near 0.
        return self.tanh(0.5 * x) * (self.exp(x) + 1.0)

    def log1p(self, x: Any) -> Any:
        return self.log(1.0 + x)

    def square(self, x: Any) -> Any:
        return x * x


def make_tracing_namespace(sink: NodeSink) -> Any:
    """The namespace that writes into this sink."""
    return _TracingNamespace(sink)


class _NullSink:
    """A sink that keeps nothing, to try a function."""

    def emit(self, op: str, *inputs: str, **attrs: Any) -> str:
        return "value"

    def float_scalar(self, value: float) -> str:
        return "number"


def untraceable_reason(fn: Callable[[Any, Callable[[], TracedValue]], Any]) -> str:
    """Why `run(xp, value)`, in which value() is any value, cannot be written; "" if it can.

    >>> untraceable_reason(lambda xp, value: xp.tanh(value()) + 1.0)
    ''
    >>> untraceable_reason(lambda xp, value: xp.cumulative_sum(value()))
    'it uses xp.cumulative_sum, which has no counterpart'
    """
    sink = _NullSink()
    try:
        found = fn(_TracingNamespace(sink), lambda: TracedValue(sink, "value"))
    except AttributeError as error:
        return f"it uses xp.{error.args[0]}, which has no counterpart" if error.args else "it fails"
    except Exception as error:  # a function of the user's own may raise anything
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    values = found if isinstance(found, tuple) else (found,)
    strange = [type(v).__name__ for v in values if not isinstance(v, TracedValue)]
    return f"it gives a {strange[0]}" if strange else ""
