"""Parts that know which steps are valid: Masking says which, Hold and Last act on them.

Steps are skipped by `mask` and `lengths`, as in a recurrent layer, and a layer's output there is 0. These parts give a
model the other customs: a mask found in the data, the last output held (Keras), the last valid output of each row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isnan
from typing import Any

from xprnn.arrays.namespace import (
    Array,
    InputError,
    Namespace,
    Params,
    check_shape,
    device_of,
    is_integer,
    namespace,
    resolve_namespace,
)
from xprnn.arrays.validation import check_bool, check_params
from xprnn.kernels.tape import Gradients
from xprnn.layers.base import StatelessLayer, check_dy
from xprnn.layers.sequence_ops import TimeLayer

__all__ = ["HoldLastOutput", "LastStep", "Masking"]

DIRECTIONS = ("forward", "reverse", "both")


@dataclass(frozen=True)
class Masking(StatelessLayer):
    """A mask found in the data: a step whose features all equal `value` is skipped by the parts after it, and is 0.

    Of integers, which have no features, a step that equals `value` is skipped: padding before an Embedding. A mask
    that the caller gives holds as well: a step is valid where both say so.

    Args:
        value: the number that marks padding; NaN too, which here equals itself.

    >>> import numpy as np, xprnn
    >>> model = xprnn.Sequential(mask=Masking(), rnn=xprnn.RNN(1, 2))
    >>> params = model.init(np.random.default_rng(0), like=np.zeros(0))
    >>> y, _ = model(params, np.asarray([[[1.0]], [[0.0]], [[2.0]]]))
    >>> (y == 0).all(axis=-1).ravel()
    array([False,  True, False])
    """

    value: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise InputError(f"Masking: value must be a number, found {self.value!r}")

    def _valid_steps(self, xp: Namespace, x: Array) -> Array:
        value = float(self.value)
        if is_integer(xp, x):
            # A fraction equals no integer, and some libraries would not compare the two.
            return x != int(self.value) if value.is_integer() else xp.ones_like(x, dtype=xp.bool)
        other = xp.logical_not(xp.isnan(x)) if isnan(value) else x != value
        return xp.any(other, axis=-1)

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None, Any]:
        """x with zeros at skipped steps, None, and the tape; integers as they are."""
        check_params("Masking.forward", params, {})
        xp = resolve_namespace("Masking.forward", {}, {"x": x})
        if is_integer(xp, x):
            return x, None, None
        resolve_namespace("Masking.forward", {"x": x})
        if not x.ndim:
            raise InputError("Masking.forward: x must end in features, found a number")
        valid = self._valid_steps(xp, x)[..., None]
        return xp.where(valid, x, xp.zeros_like(x)), None, (valid, x)

    def backward(self, tape: Any, dy: Array, dstate: None = None) -> Gradients:
        """dx = dy at valid steps, else 0; None for integers."""
        if tape is None:
            return Gradients(None, None, {})
        valid, x = tape
        xp = namespace(x)
        check_dy("Masking.backward", xp, dy, x, tuple(x.shape))
        return Gradients(xp.where(valid, dy, xp.zeros_like(dy)), None, {})

    def transform_mask(self, x: Array, flags: dict[str, Any]) -> dict[str, Any]:
        """The flags of the parts after it: a step is valid where x and the mask so far say so."""
        mask = self._valid_steps(namespace(x), x)
        given = flags.get("mask")
        if given is not None:
            resolve_namespace("Masking", {}, {"x": x, "mask": given})
            check_shape("Masking", "mask", "(as x)", given, tuple(mask.shape))
            mask = mask & given
        return flags | {"mask": mask}

    def step(self, params: Params, x: Array, state: None = None) -> tuple[Array, None]:
        """Refused: a single step has no mask.

        Raises:
            InputError: always.
        """
        raise InputError("Masking.step: a step cannot be skipped: leave masked steps out of the stream")


def _check_direction(part: Any) -> None:
    if part.direction not in DIRECTIONS:
        raise InputError(f"{type(part).__name__}: direction must be forward, reverse or both, found {part.direction!r}")


def _per_direction(xp: Namespace, walk: str, x: Array, run: Callable[[Array, bool], Array]) -> Array:
    """`run(x, reverse)`; where both directions stand side by side, on each half with its own."""
    if walk != "both":
        return run(x, walk == "reverse")
    half = x.shape[-1] // 2
    return xp.concat((run(x[..., :half], False), run(x[..., half:], True)), axis=-1)


@dataclass(frozen=True)
class HoldLastOutput(TimeLayer):
    """The last valid output held: y[t] = x[t] at a valid step, else y of the step before it; 0 where none was valid.

    Keras's custom for masked steps, where torch, ONNX and xprnn have 0. Without mask and lengths, y = x.

    Args:
        batch_first: x is (N, T, D) instead of (T, N, D).
        walk: "forward"; "reverse": the step before t is t + 1; "both": the two halves of D, each in its direction.

    >>> import numpy as np
    >>> x = np.asarray([[[1.0]], [[0.0]], [[3.0]]])
    >>> HoldLastOutput()({}, x, mask=np.asarray([[True], [False], [True]]))[0].ravel()
    array([1., 1., 3.])
    """

    direction: str = "forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_direction(self)

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None, Any]:
        """y like x, None, and the tape."""
        xp, inner, active = self.prepare_input(params, x, flags)
        if active is None or not inner.shape[0]:
            return x, None, (x, None)

        def run(x: Array, reverse: bool) -> Array:
            rows, held = [Any] * x.shape[0], xp.zeros_like(x[0, ...])
            for t in _time_order(x.shape[0], reverse):
                held = rows[t] = xp.where(active[t, :, None], x[t, ...], held)
            return xp.stack(rows)

        return self.time_major(xp, _per_direction(xp, self.direction, inner, run)), None, (x, active)

    def backward(self, tape: Any, dy: Array, dstate: None = None) -> Gradients:
        """What a held output is given goes to the step that it was held from."""
        x, active = tape
        xp = namespace(x)
        check_dy("HoldLastOutput.backward", xp, dy, x, tuple(x.shape))
        if active is None:
            return Gradients(dy, None, {})

        def run(dy: Array, reverse: bool) -> Array:
            rows, zero = [Any] * dy.shape[0], xp.zeros_like(dy[0, ...])
            dheld = zero
            for t in reversed(_time_order(dy.shape[0], reverse)):
                dheld = dheld + dy[t, ...]
                rows[t] = xp.where(active[t, :, None], dheld, zero)
                dheld = xp.where(active[t, :, None], zero, dheld)
            return xp.stack(rows)

        return Gradients(
            self.time_major(xp, _per_direction(xp, self.direction, self.time_major(xp, dy), run)), None, {}
        )

    def step(self, params: Params, x: Array, state: None = None) -> tuple[Array, None]:
        """One time step, which is valid."""
        return x, None


def _time_order(count: int, reverse: bool) -> range:
    return range(count - 1, -1, -1) if reverse else range(count)


@dataclass(frozen=True)
class LastStep(TimeLayer):
    """One output of each row: that of its last valid step, 0 where it has none. The parts after it have no time.

    Args:
        batch_first: x is (N, T, D) instead of (T, N, D).
        walk: "forward"; "reverse": the last step of the walk is the first in time; "both": the two halves of D, each
            in its direction, as a bidirectional layer gives them.
        valid: False takes the last step itself, whether it is valid or not.

    >>> import numpy as np
    >>> x = np.asarray([[[1.0], [4.0]], [[2.0], [5.0]], [[3.0], [6.0]]])
    >>> LastStep()({}, x, lengths=[2, 3])[0].ravel()
    array([2., 6.])
    """

    direction: str = "forward"
    valid_only: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_direction(self)
        check_bool("LastStep", "valid_only", self.valid_only)

    def _selected_step(self, xp: Namespace, x: Array, active: Array | None, reverse: bool) -> Array:
        """(T, N): where each row's output is taken from."""
        steps, n = x.shape[:2]
        count = xp.arange(steps, dtype=xp.int32, device=device_of(x))[:, None]
        if active is None or not self.valid_only:
            return xp.broadcast_to(count == (0 if reverse else steps - 1), (steps, n))
        none = xp.full_like(count, steps if reverse else -1)
        found = xp.where(active, count, none)
        return count == (xp.min if reverse else xp.max)(found, axis=0, keepdims=True)

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None, Any]:
        """y (N, D), None, and the tape."""
        xp, inner, active = self.prepare_input(params, x, flags)

        def run(x: Array, reverse: bool) -> Array:
            if not x.shape[0]:
                return xp.zeros(x.shape[1:], dtype=x.dtype, device=device_of(x))
            if active is None or not self.valid_only:
                return x[0 if reverse else -1, ...]
            here = self._selected_step(xp, x, active, reverse)[..., None]
            return xp.sum(xp.where(here, x, xp.zeros_like(x)), axis=0, dtype=x.dtype)

        return _per_direction(xp, self.direction, inner, run), None, (x, active)

    def backward(self, tape: Any, dy: Array, dstate: None = None) -> Gradients:
        """dx = dy at the step taken, else 0."""
        x, active = tape
        xp = namespace(x)
        steps, n = (x.shape[1], x.shape[0]) if self.batch_first else x.shape[:2]
        check_dy("LastStep.backward", xp, dy, x, (n, x.shape[2]))
        if not steps:
            return Gradients(xp.zeros_like(x), None, {})
        inner = xp.broadcast_to(dy[None, ...], (steps, *dy.shape))

        def run(d: Array, reverse: bool) -> Array:
            here = self._selected_step(xp, d, active, reverse)[..., None]
            return xp.where(here, d, xp.zeros_like(d))

        return Gradients(self.time_major(xp, _per_direction(xp, self.direction, inner, run)), None, {})

    def transform_mask(self, x: Array, flags: dict[str, Any]) -> dict[str, Any]:
        """No flags: the parts after it have no time."""
        return {k: v for k, v in flags.items() if k not in ("lengths", "mask", "reset")}

    def step(self, params: Params, x: Array, state: None = None) -> tuple[Array, None]:
        """One time step: the last so far."""
        return x, None
