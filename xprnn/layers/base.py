"""Interface of a layer, base class of layers without parameters, and argument checks that layers share."""

from dataclasses import fields
from typing import Any, Protocol

from numpy.random import Generator

from xprnn.arrays.namespace import Array, InputError, Namespace, Params, check_shape, resolve_namespace
from xprnn.arrays.validation import check_init, check_params
from xprnn.kernels.tape import Gradients

__all__ = [
    "Layer",
    "StatelessLayer",
    "check_dy",
    "check_tape",
    "resolve_input",
]


class Layer(Protocol):
    """Interface of a layer: an immutable configuration, called with its parameters and its state.

    RNN, LSTM, GRU, Recurrent, Linear, Embedding, Sequential and every StatelessLayer implement it. A user-defined class
    that implements it can be a layer of a Sequential.
    """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter by name."""
        ...

    def init(self, rng: Generator, like: Array, *args: Any, **options: Any) -> Params:
        """Draw initial parameters, in the library, dtype and device of `like`."""
        ...

    def __call__(self, params: Params, x: Array, *args: Any, **flags: Any) -> tuple[Any, Any]:
        """Return the output y and the final state; no tape is recorded."""
        ...

    def forward(self, params: Params, x: Array, *args: Any, **flags: Any) -> tuple[Any, Any, Any]:
        """Return the output y, the final state, and the tape for `backward`."""
        ...

    def backward(self, tape: Any, dy: Any, *args: Any, **options: Any) -> Gradients:
        """Return the gradients of x, the initial state and the parameters for the cotangent dy of y."""
        ...

    def step(self, params: Params, x: Array, *args: Any, **flags: Any) -> tuple[Any, Any]:
        """Compute one time step: return y and the next state."""
        ...

    def config(self) -> dict[str, Any]:
        """Return the configuration as data that JSON can hold."""
        ...


class StatelessLayer:
    """Base class of layers without parameters and without a state.

    A subclass is a frozen dataclass that defines `forward(params, x, state=None, **flags) -> y, None, tape` and
    `backward(tape, dy, dstate=None) -> Gradients(dx, None, {})`. It also defines `transform_mask(x, flags) -> flags` if
    the layers after it need other flags (lengths, mask, reset) than it received.

    >>> class Double(StatelessLayer):
    ...     def forward(self, params, x, state=None, **flags):
    ...         return 2 * x, None, None
    ...
    ...     def backward(self, tape, dy, dstate=None):
    ...         return Gradients(2 * dy, None, {})
    >>> Double().step({}, 3.0)
    (6.0, None)
    """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return an empty dict: the layer has no parameters."""
        return {}

    def init(self, rng: Generator, like: Array) -> Params:
        """Return an empty dict: the layer has no parameters."""
        check_init(f"{type(self).__name__}.init", rng, like)
        return {}

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Any, None, Any]:
        """Return y, None, and the tape."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def backward(self, tape: Any, dy: Any, dstate: None = None) -> Gradients:
        """Return the gradient of x for the cotangent dy of y."""
        raise NotImplementedError(f"{type(self).__name__} does not define backward")

    def __call__(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Any, None]:
        """Return y of `forward`, and None."""
        y, _, _ = self.forward(params, x, state, **flags)
        return y, None

    def step(self, params: Params, x: Array, state: None = None) -> tuple[Any, None]:
        """Apply `forward` to one time step."""
        y, _, _ = self.forward(params, x)
        return y, None

    def config(self) -> dict[str, Any]:
        """Return the configuration as data that JSON can hold."""
        subclass: Any = self  # a dataclass, which this base class is not
        return {"type": type(self).__name__} | {f.name: getattr(self, f.name) for f in fields(subclass)}


def resolve_input(where: str, params: Params, x: Any) -> Namespace:
    """Return the namespace of x, which must have a real floating dtype; params must be empty."""
    check_params(where, params, {})
    return resolve_namespace(where, {"x": x})


def check_dy(where: str, dy: Any, like: Array, shape: tuple[int, ...]) -> None:
    """Raise InputError unless dy has this shape and the library, dtype and device of `like`."""
    if dy is None:
        raise InputError(f"{where}: dy must be an array, found None")
    resolve_namespace(where, {"x": like, "dy": dy})
    check_shape(where, "dy", "(the shape of y)", dy, shape)


def check_tape(where: str, tape: Any) -> tuple[Any, Any, Any]:
    """Raise InputError unless `tape` has the form that Linear and Embedding return."""
    if not isinstance(tape, tuple) or len(tape) != 3:
        raise InputError(f"{where}: tape must be what forward returned, found {type(tape).__name__}")
    return tape
