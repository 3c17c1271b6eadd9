"""Parts without parameters and without a state: an activation, softmax, two directions put into one, time turned.

They stand in a Sequential like any layer. `Part` is what they and the parts of `masks` share; a part of your own that
learns nothing needs `forward` and `backward` alone.
"""

from dataclasses import dataclass
from typing import Any

from xprnn.arrays.namespace import Array, InputError, Namespace, Params, namespace, resolve_namespace
from xprnn.arrays.validation import check_bool, validate_positive
from xprnn.engine.arguments import make_step_mask
from xprnn.kernels.tape import Gradients, StepMask
from xprnn.layers.base import StatelessLayer, check_dy, resolve_input

__all__ = [
    "MergeDirections",
    "ReverseTime",
    "TimeLayer",
]


@dataclass(frozen=True)
class MergeDirections(StatelessLayer):
    """Two directions put into one: with a and b the halves of the last axis, y = a + b, a * b or (a + b) / 2.

    It stands behind a bidirectional layer, whose output is the two side by side.

    Args:
        hidden_size: H >= 1, features of one direction.
        mode: "sum", "mul", "ave", or "pair": y is the tuple (a, b), and dy one of the same kind.

    >>> import numpy as np
    >>> MergeDirections(2, "mul")({}, np.asarray([1.0, 2.0, 3.0, 4.0]))[0]
    array([3., 8.])
    """

    hidden_size: int
    mode: str = "sum"

    def __post_init__(self) -> None:
        validate_positive(self, "hidden_size")
        if self.mode not in ("sum", "mul", "ave", "pair"):
            raise InputError(f"MergeDirections: mode must be sum, mul, ave or pair, found {self.mode!r}")

    def _split_directions(self, x: Array) -> tuple[Array, Array]:
        return x[..., : self.hidden_size], x[..., self.hidden_size :]

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Any, None, Any]:
        """y (..., H), or a pair of them, None, and the tape, for x (..., 2H)."""
        resolve_input("MergeDirections.forward", params, x)
        if not x.ndim or x.shape[-1] != 2 * self.hidden_size:
            raise InputError(
                f"MergeDirections.forward: x (...,2H) must end in {2 * self.hidden_size} features, those of two directions, "
                f"found shape {tuple(x.shape)}"
            )
        a, b = self._split_directions(x)
        if self.mode == "pair":
            return (a, b), None, x
        return (a * b if self.mode == "mul" else a + b if self.mode == "sum" else 0.5 * (a + b)), None, x

    def backward(self, tape: Any, dy: Any, dstate: None = None) -> Gradients:
        """Both halves get dy; of a product, each gets dy times the other."""
        xp = resolve_namespace("MergeDirections.backward", {"x": tape})
        shape = (*tape.shape[:-1], self.hidden_size)
        if self.mode == "pair":
            da, db = _check_pair(dy)
            given = [d for d in (da, db) if d is not None]
            for d in given:
                check_dy("MergeDirections.backward", xp, d, tape, shape)
            parts = [xp.zeros_like(tape[..., : self.hidden_size]) if d is None else d for d in (da, db)]
            return Gradients(xp.concat(parts, axis=-1), None, {})
        check_dy("MergeDirections.backward", xp, dy, tape, shape)
        if self.mode == "mul":
            a, b = self._split_directions(tape)
            return Gradients(xp.concat((dy * b, dy * a), axis=-1), None, {})
        each = dy if self.mode == "sum" else 0.5 * dy
        return Gradients(xp.concat((each, each), axis=-1), None, {})


def _check_pair(dy: Any) -> tuple[Any, Any]:
    if not isinstance(dy, (tuple, list)) or len(dy) != 2:
        raise InputError(
            f"MergeDirections.backward: dy must be a pair, one for each direction, found {type(dy).__name__}"
        )
    return dy[0], dy[1]


@dataclass(frozen=True)
class TimeLayer(StatelessLayer):
    """A part that acts along time: where the time axis is, and time-major arrays inside."""

    batch_first: bool = False

    def __post_init__(self) -> None:
        check_bool(type(self).__name__, "batch_first", self.batch_first)

    def time_major(self, xp: Namespace, a: Array) -> Array:
        """Time-major from the caller's layout, and back."""
        return xp.permute_dims(a, (1, 0, *range(2, a.ndim))) if self.batch_first else a

    def prepare_input(self, params: Params, x: Array, flags: dict[str, Any]) -> tuple[Namespace, Array, Array | None]:
        """The namespace, x time-major, and which steps are valid (T, N), or None for all."""
        where = f"{type(self).__name__}.forward"
        xp = resolve_input(where, params, x)
        if x.ndim != 3:
            axes = "(N,T,D)" if self.batch_first else "(T,N,D)"
            raise InputError(f"{where}: x must be {axes}, 3 axes, found shape {tuple(x.shape)}")
        x = self.time_major(xp, x)
        return xp, x, self.step_mask(where, xp, x, flags).active

    def step_mask(self, where: str, xp: Namespace, x: Array, flags: dict[str, Any]) -> StepMask:
        """Which rows take part in which step of the time-major x."""
        return make_step_mask(where, self, xp, x, flags.get("lengths"), flags.get("mask"), flags.get("reset"))


@dataclass(frozen=True)
class ReverseTime(TimeLayer):
    """Time turned around: y[t] = x[T-1-t], and lengths, mask and reset with it.

    Args:
        batch_first: x is (N, T, D) instead of (T, N, D).
        flags: False leaves lengths, mask and reset as they are, which is what Keras does after go_backwards.

    >>> import numpy as np
    >>> ReverseTime()({}, np.asarray([[[1.0]], [[2.0]]]))[0].ravel()
    array([2., 1.])
    """

    reverse_mask: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool("ReverseTime", "reverse_mask", self.reverse_mask)

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None, Any]:
        """y like x, None, and the tape."""
        xp, _, _ = self.prepare_input(params, x, {})
        return xp.flip(x, axis=int(self.batch_first)), None, x

    def backward(self, tape: Any, dy: Array, dstate: None = None) -> Gradients:
        """dx is dy, turned back."""
        xp = namespace(tape)
        check_dy("ReverseTime.backward", xp, dy, tape, tuple(tape.shape))
        return Gradients(xp.flip(dy, axis=int(self.batch_first)), None, {})

    def transform_mask(self, x: Array, flags: dict[str, Any]) -> dict[str, Any]:
        """The flags of the parts after it: a mask that says what lengths said, as rows now end at the start."""
        if not self.reverse_mask:
            return flags
        xp = namespace(x)
        steps = self.step_mask("ReverseTime", xp, self.time_major(xp, x), flags)
        mask, reset = (
            None if a is None else self.time_major(xp, xp.flip(a, axis=0)) for a in (steps.active, steps.reset)
        )
        return flags | {"lengths": None, "mask": mask, "reset": reset}

    def step(self, params: Params, x: Array, state: None = None) -> tuple[Array, None]:
        """Refused: the first output is that of the last step.

        Raises:
            InputError: always.
        """
        raise InputError("ReverseTime.step: the last step comes first: give the whole sequence to forward")
