"""What stands around each character: the past as one direction left it, the future as the other did.

A two-directional network cannot simply be trained to predict: at step t its reverse direction has read what comes
after t, the answer included. `Around` makes the honest question of it, "what stands at t, between all this and all
that?": it pairs the forward direction just before t with the reverse direction just after t. Neither has read x[t].
"""

from dataclasses import dataclass
from typing import Any

from numpy.random import Generator

from xprnn.arrays.namespace import Array, InputError, Params, check_shape, resolve_namespace
from xprnn.arrays.validation import check_params, validate_positive
from xprnn.kernels.tape import Gradients

__all__ = ["ContextShift", "is_noncausal", "next_window_state"]


@dataclass(frozen=True)
class ContextShift:
    """The outputs of two directions, moved apart: y[t] = (forward[t-1], reverse[t+1]), zero outside the sequence.

    It stands behind a bidirectional layer, time-major, of one layer: in a stack, the upper forward direction would
    have read x[t] by way of the lower reverse one. Without parameters, without a state.

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
        """No parameters."""
        return {}

    def init(self, rng: Generator, like: Array) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None]:
        """y (T, ..., 2H) for x (T, ..., 2H)."""
        y, _, _ = self.forward(params, x)
        return y, None

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None, Any]:
        """y (T, ..., 2H), None, and the tape, for x (T, ..., 2H).

        Raises:
            InputError: x that is not the outputs of two directions.
        """
        check_params("ContextShift.forward", params, {})
        resolve_namespace("ContextShift.forward", {"x": x})
        if x.ndim < 2 or x.shape[-1] != 2 * self.hidden_size:
            raise InputError(
                f"ContextShift.forward: x (T,...,2H) must end in {2 * self.hidden_size} features, those of two directions, "
                f"found shape {tuple(x.shape)}"
            )
        return self._shift(x, 1), None, x

    def backward(self, tape: Any, dy: Array, dstate: None = None) -> Gradients:
        """The adjoint of forward: each half moved back to where it came from."""
        resolve_namespace("ContextShift.backward", {"x": tape, "dy": dy})
        check_shape("ContextShift.backward", "dy", "(the shape of y)", dy, tuple(tape.shape))
        return Gradients(self._shift(dy, -1), None, {})

    def _shift(self, x: Array, by: int) -> Array:
        """The first half `by` steps later, the second as many earlier; by = 1 or -1."""
        if not x.shape[0]:
            return x
        xp = resolve_namespace("ContextShift", {"x": x})
        halves = x[..., : self.hidden_size], x[..., self.hidden_size :]
        later, earlier = halves if by == 1 else halves[::-1]
        later = xp.concat((xp.zeros_like(later[:1, ...]), later[:-1, ...]))
        earlier = xp.concat((earlier[1:, ...], xp.zeros_like(earlier[:1, ...])))
        return xp.concat((later, earlier) if by == 1 else (earlier, later), axis=-1)

    def step(self, params: Params, x: Array, state: None = None) -> tuple[Array, None]:
        """Refused: what comes after is not there yet.

        Raises:
            InputError: always.
        """
        raise InputError(
            "ContextShift.step: the outputs after this step are needed too: give the whole sequence to forward"
        )

    def config(self) -> dict[str, Any]:
        """The configuration as JSON-able data."""
        return {"type": "ContextShift", "hidden_size": self.hidden_size}


def is_noncausal(model: Any) -> bool:
    """Whether the model, or a part of it, has a direction that starts at the end.

    >>> import xprnn
    >>> [is_noncausal(xprnn.RNN(2, 3, bidirectional=both)) for both in (False, True)]
    [False, True]
    """
    parts = getattr(model, "layers", {"": model}).values()
    return any(getattr(part, "bidirectional", False) for part in parts)


def next_window_state(state: Any) -> Any:
    """The state in which a two-directional layer starts the next window: the reverse direction's is zero again.

    Its final state belongs to the start of this window, and the next one follows its end.

    Args:
        state: (2, N, H), or several in a tuple, as one bidirectional layer returns it.

    >>> import numpy as np
    >>> next_window_state(np.ones((2, 1, 3)))[:, 0, 0].tolist()
    [1.0, 0.0]
    """
    if isinstance(state, tuple):
        return tuple(next_window_state(part) for part in state)
    xp = resolve_namespace("carry", {"state": state})
    return xp.concat((state[:1, ...], xp.zeros_like(state[1:, ...])))
