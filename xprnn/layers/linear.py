"""Linear: y = x W' + b on the last axis of x."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from xprnn.arrays.linear import linear, linear_backward
from xprnn.arrays.namespace import Array, InputError, Params, check_shape, from_numpy, is_numpy, resolve_namespace
from xprnn.arrays.validation import check_init, check_param_shapes, check_params, require_array, validate_positive
from xprnn.engine.fast_steps import make_linear_step
from xprnn.engine.layer import FastStep, Steppable
from xprnn.kernels.tape import Gradients
from xprnn.layers.base import check_tape

__all__ = [
    "Linear",
]


@dataclass(frozen=True)
class Linear(Steppable):
    """Affine map of the last axis, for all time steps in one matrix product: y = x W' + b.

    Args:
        in_features: H >= 1, features of x.
        out_features: V >= 1, features of y.
        bias: True: there is a parameter b; False: y = x W'.

    >>> import numpy as np
    >>> head = Linear(3, 2)
    >>> params = head.init(np.random.default_rng(0), like=np.zeros(0))
    >>> head(params, np.ones((5, 4, 3)))[0].shape
    (5, 4, 2)
    """

    in_features: int
    out_features: int
    bias: bool = True

    def __post_init__(self) -> None:
        validate_positive(self, "in_features", "out_features")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter by name."""
        return {"weight": (self.out_features, self.in_features)} | ({"bias": (self.out_features,)} if self.bias else {})

    def init(self, rng: Generator, like: Array) -> Params:
        """Draw W and b from U(-1/sqrt(H), 1/sqrt(H)), as torch does; H is in_features."""
        check_init("Linear.init", rng, like)
        bound = 1 / np.sqrt(self.in_features)
        return {name: from_numpy(rng.uniform(-bound, bound, shape), like) for name, shape in self.shapes().items()}

    def __call__(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None]:
        """Return y (..., V) for x (..., H), and None."""
        y, _, _ = self.forward(params, x)
        return y, None

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None, Any]:
        """Return y (..., V), None, and the tape, for x (..., H)."""
        where = "Linear.forward"
        shapes = self.shapes()
        check_params(where, params, shapes)
        require_array(where, "x", x)
        xp = resolve_namespace(where, {"x": x, **params})
        check_param_shapes(where, params, shapes)
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise InputError(
                f"{where}: x (...,H) must end in {self.in_features} features, found shape {tuple(x.shape)}"
            )
        w, b, tape = params["weight"], params.get("bias"), (xp, params, x)
        if b is None or not is_numpy(xp):
            return linear(xp, x, w, b), None, tape
        y = linear(xp, x, w, None)
        return np.add(y, b, out=y), None, tape

    def backward(self, tape: Any, dy: Array, dstate: None = None) -> Gradients:
        """Return dx, dW and db for the cotangent dy (..., V)."""
        xp, params, x = check_tape("Linear.backward", tape)
        require_array("Linear.backward", "dy", dy)
        resolve_namespace("Linear.backward", {"params": params["weight"], "dy": dy})
        check_shape("Linear.backward", "dy", "(the shape of y)", dy, (*x.shape[:-1], self.out_features))
        dx, dw, db = linear_backward(xp, dy, x, params["weight"])
        return Gradients(dx, None, {"weight": dw, "bias": db} if self.bias else {"weight": dw})

    def step(self, params: Params, x: Array, state: None = None) -> tuple[Array, None]:
        """Compute one time step: y (N, V) for x (N, H)."""
        result = self._fast_step(params, x, state)
        return self(params, x) if result is None else result

    def make_fast_step(self, prefix: str, count: int) -> FastStep:
        """Return the fast path of `step` for parameters named `prefix` + name in a dict of `count` parameters."""
        return make_linear_step(self, prefix, count)

    def config(self) -> dict[str, Any]:
        """Return the configuration as data that JSON can hold."""
        return {"type": "Linear", "in_features": self.in_features, "out_features": self.out_features, "bias": self.bias}
