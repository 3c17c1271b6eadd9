"""Elementwise layers without parameters: activations and softmax."""

from dataclasses import dataclass
from typing import Any

from xprnn.arrays.namespace import Array, InputError, Params, resolve_namespace
from xprnn.cells.activations import Activation, activation
from xprnn.cells.serialization import activation_to_config
from xprnn.kernels.tape import Gradients
from xprnn.layers.base import StatelessLayer, check_dy, resolve_input

__all__ = [
    "ActivationLayer",
    "Softmax",
]


@dataclass(frozen=True)
class ActivationLayer(StatelessLayer):
    """An activation on every number: y = f(x).

    Args:
        f: any name of xprnn.activation, or an Activation.

    >>> import numpy as np
    >>> ActivationLayer("relu")({}, np.asarray([-1.0, 2.0]))[0]
    array([0., 2.])
    """

    f: Any

    def __post_init__(self) -> None:
        found = activation(self.f)
        form = activation_to_config(found)
        object.__setattr__(self, "f", form if isinstance(form, str) else found)

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None, Any]:
        """y like x, None, and the tape."""
        xp = resolve_input("ActivationLayer.forward", params, x)
        found = activation(self.f)
        f, _ = found.build(xp)
        y = f(x)
        return y, None, x if found.from_input else y

    def backward(self, tape: Any, dy: Array, dstate: None = None) -> Gradients:
        """dx = dy * f'(x), in terms of y, or of x where y does not tell."""
        xp = resolve_namespace("ActivationLayer.backward", {"x": tape})
        check_dy("ActivationLayer.backward", xp, dy, tape, tuple(tape.shape))
        _, slope = activation(self.f).build(xp)
        return Gradients(dy * slope(tape), None, {})

    def config(self) -> dict[str, Any]:
        """The configuration as JSON-able data.

        Raises:
            InputError: an activation of your own: files hold no code.
        """
        form = activation_to_config(activation(self.f)) if isinstance(self.f, (str, Activation)) else None
        if form is None:
            raise InputError("ActivationLayer: an activation of your own has no file form: keep its code")
        return {"type": "ActivationLayer", "f": form}


@dataclass(frozen=True)
class Softmax(StatelessLayer):
    """Softmax along the last axis: y = exp(x - max x) / sum of it, or its logarithm.

    Args:
        log: y = log softmax(x), which doesn't underflow.

    >>> import numpy as np
    >>> Softmax()({}, np.asarray([0.0, 1e4]))[0]
    array([0., 1.])
    """

    log: bool = False

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None, Any]:
        """y like x, None, and the tape."""
        xp = resolve_input("Softmax.forward", params, x)
        if not x.ndim or not x.shape[-1]:
            raise InputError(f"Softmax.forward: x must end in at least one feature, found shape {tuple(x.shape)}")
        shifted = x - xp.max(x, axis=-1, keepdims=True)
        e = xp.exp(shifted)
        total = xp.sum(e, axis=-1, keepdims=True, dtype=e.dtype)
        p = e / total
        y = shifted - xp.log(total) if self.log else p
        return y, None, p

    def backward(self, tape: Any, dy: Array, dstate: None = None) -> Gradients:
        """dx = p * (dy - sum dy*p) for y = p; dx = dy - p * sum dy for y = log p."""
        p, xp = tape, resolve_namespace("Softmax.backward", {"x": tape})
        check_dy("Softmax.backward", xp, dy, p, tuple(p.shape))
        if self.log:
            return Gradients(dy - p * xp.sum(dy, axis=-1, keepdims=True, dtype=dy.dtype), None, {})
        along = xp.sum(dy * p, axis=-1, keepdims=True, dtype=dy.dtype)
        return Gradients(p * (dy - along), None, {})
