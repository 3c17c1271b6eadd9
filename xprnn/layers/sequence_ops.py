"""Layers without parameters that combine directions or reverse time, and the base class of layers along time."""

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
    """Combine the two directions of a bidirectional layer: with x = (a, b), y = a + b, a * b or (a + b) / 2.

    a and b are the halves of the last axis of x, as a bidirectional layer returns them.

    Args:
        hidden_size: H >= 1, features of one direction.
        mode: "sum"; "mul" (product); "ave" (mean); "pair": y is the tuple (a, b), and dy must be a pair too.

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
        """Return y (..., H) or a pair of such arrays, None, and the tape, for x (..., 2H)."""
        resolve_input("MergeDirections.forward", params, x)
        if not x.ndim or x.shape[-1] != 2 * self.hidden_size:
            raise InputError(
                f"MergeDirections.forward: x (...,2H) must end in {2 * self.hidden_size} features, "
                f"those of two directions, found shape {tuple(x.shape)}"
            )
        a, b = self._split_directions(x)
        if self.mode == "pair":
            return (a, b), None, x
        return (a * b if self.mode == "mul" else a + b if self.mode == "sum" else 0.5 * (a + b)), None, x

    def backward(self, tape: Any, dy: Any, dstate: None = None) -> Gradients:
        """Return dx (..., 2H): (dy, dy) for "sum", (dy * b, dy * a) for "mul", (dy / 2, dy / 2) for "ave"."""
        xp = resolve_namespace("MergeDirections.backward", {"x": tape})
        shape = (*tape.shape[:-1], self.hidden_size)
        if self.mode == "pair":
            pair = _check_pair(dy)
            for half in pair:
                if half is not None:
                    check_dy("MergeDirections.backward", half, tape, shape)
            halves = [xp.zeros_like(tape[..., : self.hidden_size]) if half is None else half for half in pair]
            return Gradients(xp.concat(halves, axis=-1), None, {})
        check_dy("MergeDirections.backward", dy, tape, shape)
        if self.mode == "mul":
            a, b = self._split_directions(tape)
            return Gradients(xp.concat((dy * b, dy * a), axis=-1), None, {})
        half = dy if self.mode == "sum" else 0.5 * dy
        return Gradients(xp.concat((half, half), axis=-1), None, {})


def _check_pair(dy: Any) -> tuple[Any, Any]:
    if not isinstance(dy, (tuple, list)) or len(dy) != 2:
        raise InputError(
            f"MergeDirections.backward: dy must be a pair, one for each direction, found {type(dy).__name__}"
        )
    return dy[0], dy[1]


@dataclass(frozen=True)
class TimeLayer(StatelessLayer):
    """Base class of layers along time: it converts between batch-major and time-major arrays.

    Args:
        batch_first: True: x is (N, T, D); False: (T, N, D).
    """

    batch_first: bool = False

    def __post_init__(self) -> None:
        check_bool(type(self).__name__, "batch_first", self.batch_first)

    def time_major(self, xp: Namespace, a: Array) -> Array:
        """Swap the first two axes if `batch_first`: from the caller's layout to time-major, or back."""
        return xp.permute_dims(a, (1, 0, *range(2, a.ndim))) if self.batch_first else a

    def prepare_input(self, params: Params, x: Array, flags: dict[str, Any]) -> tuple[Namespace, Array, Array | None]:
        """Return the namespace, x time-major, and a (T, N) mask of the valid steps or None if all are valid."""
        where = f"{type(self).__name__}.forward"
        xp = resolve_input(where, params, x)
        if x.ndim != 3:
            axes = "(N,T,D)" if self.batch_first else "(T,N,D)"
            raise InputError(f"{where}: x must be {axes}, 3 axes, found shape {tuple(x.shape)}")
        x = self.time_major(xp, x)
        return xp, x, self.step_mask(where, xp, x, flags).active

    def step_mask(self, where: str, xp: Namespace, x: Array, flags: dict[str, Any]) -> StepMask:
        """Combine lengths, mask and reset of `flags` into a StepMask for the time-major x."""
        return make_step_mask(where, self, xp, x, flags.get("lengths"), flags.get("mask"), flags.get("reset"))


@dataclass(frozen=True)
class ReverseTime(TimeLayer):
    """Reverse the time axis: y[t] = x[T-1-t].

    Args:
        batch_first: True: x is (N, T, D); False: (T, N, D).
        reverse_mask: True: lengths, mask and reset are reversed too; False: they stay as they are, which is what Keras
            does after go_backwards.

    >>> import numpy as np
    >>> ReverseTime()({}, np.asarray([[[1.0]], [[2.0]]]))[0].ravel()
    array([2., 1.])
    """

    reverse_mask: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool("ReverseTime", "reverse_mask", self.reverse_mask)

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None, Any]:
        """Return y of the shape of x, None, and the tape."""
        xp, _, _ = self.prepare_input(params, x, {})
        return xp.flip(x, axis=int(self.batch_first)), None, x

    def backward(self, tape: Any, dy: Array, dstate: None = None) -> Gradients:
        """Return dx: dy with the time axis reversed."""
        xp = namespace(tape)
        check_dy("ReverseTime.backward", dy, tape, tuple(tape.shape))
        return Gradients(xp.flip(dy, axis=int(self.batch_first)), None, {})

    def transform_mask(self, x: Array, flags: dict[str, Any]) -> dict[str, Any]:
        """Return the flags for the layers after this one: mask and reset reversed, lengths expressed as a mask.

        Lengths must become a mask because the padding is at the start of the reversed rows.
        """
        if not self.reverse_mask:
            return flags
        xp = namespace(x)
        steps = self.step_mask("ReverseTime", xp, self.time_major(xp, x), flags)
        mask, reset = (
            None if a is None else self.time_major(xp, xp.flip(a, axis=0)) for a in (steps.active, steps.reset)
        )
        return flags | {"lengths": None, "mask": mask, "reset": reset}

    def step(self, params: Params, x: Array, state: None = None) -> tuple[Array, None]:
        """Raise InputError: the first output needs the last input.

        Raises:
            InputError: always.
        """
        raise InputError("ReverseTime.step: the last step comes first: give the whole sequence to forward")
