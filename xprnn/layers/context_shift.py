"""ContextShift: pairs the forward output before each step with the reverse output after it.

A bidirectional layer cannot be trained to predict x[t] from its output at t, because its reverse direction has already
read x[t]. ContextShift pairs the forward output of step t-1 with the reverse output of step t+1. Neither has read x[t].
"""

from dataclasses import dataclass
from typing import Any

from numpy.random import Generator

from xprnn.arrays.namespace import Array, InputError, Params, check_shape, resolve_namespace
from xprnn.arrays.validation import check_params, validate_positive
from xprnn.kernels.tape import Gradients
from xprnn.layers.base import Layer

__all__ = ["ContextShift", "is_noncausal", "next_window_state"]


@dataclass(frozen=True)
class ContextShift:
    """Shift the outputs of two directions apart: y[t] = (forward[t-1], reverse[t+1]), zero outside the sequence.

    The layer before it must be bidirectional, time-major and have num_layers=1. In a stack of two layers the upper
    forward direction reads the lower reverse direction, and with it x[t]. There are no parameters and no state.

    Args:
        hidden_size: H >= 1, features of one direction.

    >>> import numpy as np
    >>> y, _ = ContextShift(1)({}, np.asarray([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]))
    >>> y.tolist()
    [[0.0, 20.0], [1.0, 30.0], [2.0, 0.0]]
    """

    hidden_size: int

    def __post_init__(self) -> None:
        validate_positive(self, "hidden_size")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return an empty dict: the layer has no parameters."""
        return {}

    def init(self, rng: Generator, like: Array) -> Params:
        """Return an empty dict: the layer has no parameters."""
        return {}

    def __call__(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None]:
        """Return y (T, ..., 2H) for x (T, ..., 2H), and None."""
        y, _, _ = self.forward(params, x)
        return y, None

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None, Any]:
        """Return y (T, ..., 2H), None, and the tape, for x (T, ..., 2H).

        Raises:
            InputError: x does not end in 2H features.
        """
        check_params("ContextShift.forward", params, {})
        resolve_namespace("ContextShift.forward", {"x": x})
        if x.ndim < 2 or x.shape[-1] != 2 * self.hidden_size:
            raise InputError(
                f"ContextShift.forward: x (T,...,2H) must end in {2 * self.hidden_size} features, "
                f"those of two directions, found shape {tuple(x.shape)}"
            )
        return self._shift(x, 1), None, x

    def backward(self, tape: Any, dy: Array, dstate: None = None) -> Gradients:
        """Return dx: dy with both halves shifted back."""
        resolve_namespace("ContextShift.backward", {"x": tape, "dy": dy})
        check_shape("ContextShift.backward", "dy", "(the shape of y)", dy, tuple(tape.shape))
        return Gradients(self._shift(dy, -1), None, {})

    def _shift(self, x: Array, offset: int) -> Array:
        """Delay the first half of the features by `offset` steps and advance the second; offset is 1 or -1."""
        if not x.shape[0]:
            return x
        xp = resolve_namespace("ContextShift", {"x": x})
        halves = x[..., : self.hidden_size], x[..., self.hidden_size :]
        delayed, advanced = halves if offset == 1 else halves[::-1]
        delayed = xp.concat((xp.zeros_like(delayed[:1, ...]), delayed[:-1, ...]))
        advanced = xp.concat((advanced[1:, ...], xp.zeros_like(advanced[:1, ...])))
        return xp.concat((delayed, advanced) if offset == 1 else (advanced, delayed), axis=-1)

    def step(self, params: Params, x: Array, state: None = None) -> tuple[Array, None]:
        """Raise InputError: y needs the outputs of later steps.

        Raises:
            InputError: always.
        """
        raise InputError(
            "ContextShift.step: the outputs after this step are needed too: give the whole sequence to forward"
        )

    def config(self) -> dict[str, Any]:
        """Return the configuration as data that JSON can hold."""
        return {"type": "ContextShift", "hidden_size": self.hidden_size}


def is_noncausal(model: Layer) -> bool:
    """Return True if the model, or a layer of it, is bidirectional.

    >>> import xprnn
    >>> [is_noncausal(xprnn.RNN(2, 3, bidirectional=both)) for both in (False, True)]
    [False, True]
    """
    layers = getattr(model, "layers", {"": model}).values()
    return any(getattr(layer, "bidirectional", False) for layer in layers)


def next_window_state(state: Any) -> Any:
    """Return the initial state of the next window: the final forward state, and zero for the reverse direction.

    The final reverse state is the one at the start of this window. The next window starts at the end of this one, so
    the reverse direction cannot continue from it.

    Args:
        state: (2, N, H), or a tuple of several, as a bidirectional layer with num_layers=1 returns it.

    >>> import numpy as np
    >>> next_window_state(np.ones((2, 1, 3)))[:, 0, 0].tolist()
    [1.0, 0.0]
    """
    if isinstance(state, tuple):
        return tuple(next_window_state(array) for array in state)
    xp = resolve_namespace("next_window_state", {"state": state})
    return xp.concat((state[:1, ...], xp.zeros_like(state[1:, ...])))
