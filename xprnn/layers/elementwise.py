"""Activation and softmax as layers without parameters."""

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
    """An elementwise activation as a layer: y = f(x).

    Args:
        f: any name that xprnn.activation accepts, or an Activation.

    >>> import numpy as np
    >>> ActivationLayer("relu")({}, np.asarray([-1.0, 2.0]))[0]
    array([0., 2.])
    """

    f: Any

    def __post_init__(self) -> None:
        resolved = activation(self.f)
        config = activation_to_config(resolved)
        object.__setattr__(self, "f", config if isinstance(config, str) else resolved)

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None, Any]:
        """Return y of the shape of x, None, and the tape."""
        xp = resolve_input("ActivationLayer.forward", params, x)
        resolved = activation(self.f)
        f, _ = resolved.build(xp)
        y = f(x)
        return y, None, x if resolved.from_input else y

    def backward(self, tape: Any, dy: Array, dstate: None = None) -> Gradients:
        """Return dx = dy * f'(x); the derivative is computed from y, or from x if y does not determine it."""
        xp = resolve_namespace("ActivationLayer.backward", {"x": tape})
        check_dy("ActivationLayer.backward", dy, tape, tuple(tape.shape))
        _, derivative = activation(self.f).build(xp)
        return Gradients(dy * derivative(tape), None, {})

    def config(self) -> dict[str, Any]:
        """Return the configuration as data that JSON can hold.

        Raises:
            InputError: the activation is user-defined; a file cannot hold its code.
        """
        config = activation_to_config(activation(self.f)) if isinstance(self.f, (str, Activation)) else None
        if config is None:
            raise InputError("ActivationLayer: a user-defined activation has no file form: keep its code")
        return {"type": "ActivationLayer", "f": config}


@dataclass(frozen=True)
class Softmax(StatelessLayer):
    """Softmax along the last axis, or its logarithm: y_i = exp(x_i - m) / sum_j exp(x_j - m), where m = max_j x_j.

    Args:
        log: y = log softmax(x), which does not underflow.

    >>> import numpy as np
    >>> Softmax()({}, np.asarray([0.0, 1e4]))[0]
    array([0., 1.])
    """

    log: bool = False

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None, Any]:
        """Return y of the shape of x, None, and the tape."""
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
        """Return dx = p * (dy - sum dy*p) for y = p, or dx = dy - p * sum dy for y = log p."""
        p, xp = tape, resolve_namespace("Softmax.backward", {"x": tape})
        check_dy("Softmax.backward", dy, p, tuple(p.shape))
        if self.log:
            return Gradients(dy - p * xp.sum(dy, axis=-1, keepdims=True, dtype=dy.dtype), None, {})
        weighted_sum = xp.sum(dy * p, axis=-1, keepdims=True, dtype=dy.dtype)
        return Gradients(p * (dy - weighted_sum), None, {})
