"""Base class of layers without parameters, and the checks that they share."""

from dataclasses import fields
from typing import Any

from numpy.random import Generator

from xprnn.arrays.namespace import Array, InputError, Namespace, Params, check_shape, resolve_namespace
from xprnn.arrays.validation import check_init, check_params
from xprnn.kernels.tape import Gradients

__all__ = [
    "StatelessLayer",
    "check_dy",
    "resolve_input",
]


class StatelessLayer:
    """The verbs of a layer for a part that has neither parameters nor a state.

    A subclass is a frozen dataclass with `forward(params, x, state, **flags) -> y, None, tape` and
    `backward(tape, dy) -> Gradients`. Where the parts after it shall see other flags (lengths, mask, reset) than it
    got itself, it has `transform_mask(x, flags) -> flags` too.
    """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """No parameters."""
        return {}

    def init(self, rng: Generator, like: Array) -> Params:
        """No parameters."""
        check_init(f"{type(self).__name__}.init", rng, like)
        return {}

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Any, None, Any]:
        """y, None, and the tape."""
        raise NotImplementedError

    def backward(self, tape: Any, dy: Any, dstate: None = None) -> Gradients:
        """The adjoint of forward."""
        raise NotImplementedError

    def __call__(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Any, None]:
        """y of `forward`."""
        y, _, _ = self.forward(params, x, state, **flags)
        return y, None

    def step(self, params: Params, x: Array, state: None = None) -> tuple[Any, None]:
        """One time step: what `forward` does to each."""
        y, _, _ = self.forward(params, x)
        return y, None

    def config(self) -> dict[str, Any]:
        """The configuration as JSON-able data."""
        own: Any = self
        return {"type": type(self).__name__} | {f.name: getattr(self, f.name) for f in fields(own)}


def resolve_input(where: str, params: Params, x: Any) -> Namespace:
    """The namespace of a part's input of a real floating dtype; a part has no parameters."""
    check_params(where, params, {})
    return resolve_namespace(where, {"x": x})


def check_dy(where: str, xp: Namespace, dy: Any, like: Array, shape: tuple[int, ...]) -> None:
    """Raise InputError unless dy is an adjoint of an output of this shape, of the kind of `like`."""
    if dy is None:
        raise InputError(f"{where}: dy must be an array, found None")
    resolve_namespace(where, {"x": like, "dy": dy})
    check_shape(where, "dy", "(the shape of y)", dy, shape)
