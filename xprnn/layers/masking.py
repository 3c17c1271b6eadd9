"""Layers for padded sequences: Masking detects padding, HoldLastOutput and LastStep act on skipped steps.

A recurrent layer skips the steps that `mask` or `lengths` exclude, and its output there is 0. These layers add other
conventions: a mask computed from the data, the last valid output repeated (Keras), the last valid output of each row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np

from xprnn.arrays.namespace import (
    Array,
    InputError,
    Namespace,
    Params,
    check_shape,
    device_of,
    is_integer,
    is_numpy,
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
    """Compute a mask from the data: a step whose features all equal `value` is padding.

    The layers after it skip those steps, and y is 0 there. Integers have no features: a step that equals `value` is
    skipped, as padding before an Embedding. If the caller passes a mask too, a step is valid where both masks are True.

    Args:
        value: the number that marks padding. NaN is allowed and matches NaN.

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
        differs = xp.logical_not(xp.isnan(x)) if isnan(value) else x != value
        return xp.any(differs, axis=-1)

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None, Any]:
        """Return x with zeros at padded steps, None, and the tape. Integers are returned unchanged."""
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
        """Return dx: dy at valid steps and 0 at padded steps, or None for integers."""
        if tape is None:
            return Gradients(None, None, {})
        valid, x = tape
        xp = namespace(x)
        check_dy("Masking.backward", dy, x, tuple(x.shape))
        return Gradients(xp.where(valid, dy, xp.zeros_like(dy)), None, {})

    def transform_mask(self, x: Array, flags: dict[str, Any]) -> dict[str, Any]:
        """Return the flags for the layers after this one: the mask excludes padded steps too."""
        mask = self._valid_steps(namespace(x), x)
        caller_mask = flags.get("mask")
        if caller_mask is not None:
            resolve_namespace("Masking", {}, {"x": x, "mask": caller_mask})
            check_shape("Masking", "mask", "(as x)", caller_mask, tuple(mask.shape))
            mask = mask & caller_mask
        return flags | {"mask": mask}

    def step(self, params: Params, x: Array, state: None = None) -> tuple[Array, None]:
        """Raise InputError: `step` has no mask.

        Raises:
            InputError: always.
        """
        raise InputError("Masking.step: a step cannot be skipped: leave masked steps out of the stream")


def _check_direction(layer: Any) -> None:
    if layer.direction not in DIRECTIONS:
        raise InputError(
            f"{type(layer).__name__}: direction must be forward, reverse or both, found {layer.direction!r}"
        )


def _per_direction(xp: Namespace, direction: str, x: Array, run: Callable[[Array, bool], Array]) -> Array:
    """Return run(x, reverse); for "both", the first half of the features runs forward and the second in reverse."""
    if direction != "both":
        return run(x, direction == "reverse")
    half = x.shape[-1] // 2
    return xp.concat((run(x[..., :half], False), run(x[..., half:], True)), axis=-1)


@dataclass(frozen=True)
class HoldLastOutput(TimeLayer):
    """Repeat the last valid output at skipped steps: y[t] = x[t] if step t is valid, else y[t-1], where y[-1] = 0.

    Keras does this at masked steps. torch, ONNX and xprnn's recurrent layers give 0 there. Without mask and lengths,
    y = x.

    Args:
        batch_first: True: x is (N, T, D); False: (T, N, D).
        direction: "forward"; "reverse": y[t+1] takes the place of y[t-1]; "both": the first half of D runs forward, the
            second in reverse, as a bidirectional layer orders them.

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
        """Return y of the shape of x, None, and the tape."""
        xp, x_time_major, active = self.prepare_input(params, x, flags)
        if active is None or not x_time_major.shape[0]:
            return x, None, (x, None)

        def run(x: Array, reverse: bool) -> Array:
            rows, held = [Any] * x.shape[0], xp.zeros_like(x[0, ...])
            for t in _time_order(x.shape[0], reverse):
                held = rows[t] = xp.where(active[t, :, None], x[t, ...], held)
            return xp.stack(rows)

        return self.time_major(xp, _per_direction(xp, self.direction, x_time_major, run)), None, (x, active)

    def backward(self, tape: Any, dy: Array, dstate: None = None) -> Gradients:
        """Return dx: each valid step gets its dy plus the dy of the skipped steps that repeat it."""
        x, active = tape
        xp = namespace(x)
        check_dy("HoldLastOutput.backward", dy, x, tuple(x.shape))
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

        dx = _per_direction(xp, self.direction, self.time_major(xp, dy), run)
        return Gradients(self.time_major(xp, dx), None, {})

    def step(self, params: Params, x: Array, state: None = None) -> tuple[Array, None]:
        """Return x and None: a streamed step is always valid."""
        return x, None


def _time_order(count: int, reverse: bool) -> range:
    return range(count - 1, -1, -1) if reverse else range(count)


@dataclass(frozen=True)
class LastStep(TimeLayer):
    """Select the output of the last valid step of each row, or 0 for a row without one. The result has no time axis.

    Args:
        batch_first: True: x is (N, T, D); False: (T, N, D).
        direction: "forward"; "reverse": select the first valid step in time, the last that a reverse layer computes;
            "both": the first half of D forward, the second in reverse, as a bidirectional layer orders them.
        valid_only: False: select the last step even if it is not valid.

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

    def _selected_step(self, xp: Namespace, steps: int, active: Array | None, reverse: bool) -> int | Array:
        """Return the selected step of every row: one number for all, or (1, N), where -1 or `steps` stands for none."""
        if active is None or not self.valid_only:
            return 0 if reverse else steps - 1
        step_index = xp.arange(steps, dtype=xp.int32, device=device_of(active))[:, None]
        valid_index = xp.where(active, step_index, xp.full_like(step_index, steps if reverse else -1))
        index: Array = (xp.min if reverse else xp.max)(valid_index, axis=0, keepdims=True)
        return index

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None, Any]:
        """Return y (N, D), None, and the tape."""
        xp, x_time_major, active = self.prepare_input(params, x, flags)

        def run(x: Array, reverse: bool) -> Array:
            steps = x.shape[0]
            if not steps:
                return xp.zeros(x.shape[1:], dtype=x.dtype, device=device_of(x))
            return _take_rows(xp, x, self._selected_step(xp, steps, active, reverse))

        return _per_direction(xp, self.direction, x_time_major, run), None, (x, active)

    def backward(self, tape: Any, dy: Array, dstate: None = None) -> Gradients:
        """Return dx: dy at the selected step of each row, 0 elsewhere."""
        x, active = tape
        xp = namespace(x)
        steps, n = (x.shape[1], x.shape[0]) if self.batch_first else x.shape[:2]
        check_dy("LastStep.backward", dy, x, (n, x.shape[2]))
        if not steps:
            return Gradients(xp.zeros_like(x), None, {})

        def run(dy: Array, reverse: bool) -> Array:
            return _place_rows(xp, dy, self._selected_step(xp, steps, active, reverse), steps)

        return Gradients(self.time_major(xp, _per_direction(xp, self.direction, dy, run)), None, {})

    def transform_mask(self, x: Array, flags: dict[str, Any]) -> dict[str, Any]:
        """Return the flags without lengths, mask and reset: the layers after this one have no time axis."""
        return {k: v for k, v in flags.items() if k not in ("lengths", "mask", "reset")}

    def step(self, params: Params, x: Array, state: None = None) -> tuple[Array, None]:
        """Return x and None: in a stream, the newest step is the last."""
        return x, None


def _take_rows(xp: Namespace, x: Array, step: int | Array) -> Array:
    """Return the rows (N, D) of x (T, N, D) at one step, as in `_place_rows`; 0 for a row without a step."""
    steps, n, d = x.shape
    if isinstance(step, int):
        return x[step, ...]
    if is_numpy(xp):
        out, (step, exists) = np.zeros((n, d), x.dtype), _existing(step, steps)
        out[exists] = x[step, exists]
        return out
    step_index = xp.arange(steps, dtype=xp.int32, device=device_of(x))[:, None]
    return xp.sum(xp.where((step_index == step)[..., None], x, xp.zeros_like(x)), axis=0, dtype=x.dtype)


def _place_rows(xp: Namespace, rows: Array, step: int | Array, steps: int) -> Array:
    """Return zeros (T, N, D) with `rows` (N, D) at one step: at the same of every row, or at those of `step` (1, N)."""
    n, d = rows.shape
    if is_numpy(xp):
        out = np.zeros((steps, n, d), rows.dtype)
        if isinstance(step, int):
            out[step] = rows
        else:
            step, exists = _existing(step, steps)
            out[step, exists] = rows[exists]
        return out
    step_index = xp.arange(steps, dtype=xp.int32, device=device_of(rows))[:, None]
    every_step = xp.broadcast_to(rows[None, ...], (steps, n, d))
    return xp.where(xp.broadcast_to(step_index == step, (steps, n))[..., None], every_step, xp.zeros_like(every_step))


def _existing(step: Any, steps: int) -> tuple[Any, Any]:
    """Return the steps (1, N) that exist, and the numbers of their rows."""
    rows = np.flatnonzero((step[0] >= 0) & (step[0] < steps))
    return step[0, rows], rows
