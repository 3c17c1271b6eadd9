"""Optimisers as pairs of pure functions: `init(params) -> state`, `update(params, grads, state) -> params, state`.

Parameters, gradients and moments are flat dicts with the same keys. No argument is changed in place. Formulas and
defaults are those of torch.optim, so a training run can move between the two libraries. The learning rate is a number,
or a schedule: a function of the step number 0, 1, 2, ...

A SparseGradient gives the same update as the equivalent dense gradient. Rules that leave a row unchanged if its
gradient is zero (sgd without momentum, adagrad, lazy adam) compute only the rows that the gradient stores.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays.namespace import (
    Array,
    InputError,
    Namespace,
    Params,
    check_dicts,
    is_numpy,
    resolve_namespace,
)
from xprnn.arrays.sparse_gradient import SparseGradient, stored_values
from xprnn.kernels.step_plan import DTYPE_BITS
from xprnn.training.clipping import clip_by_global_norm, clip_by_value
from xprnn.training.compiled import compiled_passes

__all__ = [
    "Optimizer",
    "adagrad",
    "adam",
    "adamw",
    "clip_by_global_norm",
    "clip_by_value",
    "cosine",
    "rmsprop",
    "sgd",
    "warmup",
]

LearningRate = float | Callable[[int], float]
_BLOCK_SIZE = 1 << 15  # entries of a parameter that are updated at a time, so that temporaries stay in the cache
OptState = dict[str, Any]  # "step": int, and moment name -> dict keyed like params
_DenseUpdate = Callable[[Array, Array, tuple[Array, ...]], tuple[Array, tuple[Array, ...]]]


class CompiledRule(NamedTuple):
    """A rule that xprnn.kernels.jit.training has a compiled pass for.

    name: of the pass.
    constants: (learning rate, step number from 1) -> its constants.
    """

    name: str
    constants: Callable[[float, int], tuple[float, ...]]


@dataclass(frozen=True)
class Optimizer:
    """An optimiser: an elementwise update rule, its moments and its learning rate.

    Args:
        name: name used in error messages.
        moments: names of the arrays that the rule keeps for each parameter.
        rule: (xp, p, g, moments of this parameter, learning rate, step number from 1) -> new p, new moments.
        learning_rate: a number >= 0, or a function of the step number from 0.
        sparse_rule: rule for the stored rows of a SparseGradient; all other rows of the parameter and of its moments
            stay unchanged. None: a SparseGradient is converted to a dense one, and `rule` is used.
        compiled_rule: the same rule as a compiled pass for NumPy arrays, or None.

    >>> import numpy as np
    >>> opt = sgd(0.1)
    >>> params, state = {"w": np.ones(2)}, opt.init({"w": np.ones(2)})
    >>> params, state = opt.update(params, {"w": np.ones(2)}, state)
    >>> params["w"], state["step"]
    (array([0.9, 0.9]), 1)
    """

    name: str
    moments: tuple[str, ...]
    rule: Callable[..., Any]
    learning_rate: LearningRate
    sparse_rule: Callable[..., Any] | None = None
    compiled_rule: CompiledRule | None = None

    def init(self, params: Params) -> OptState:
        """Return the state before the first step: step 0, and zeros like each parameter for every moment."""
        spaces = {k: resolve_namespace(f"{self.name}.init", {k: p}) for k, p in params.items()}
        zeros = {m: {k: spaces[k].zeros_like(p) for k, p in params.items()} for m in self.moments}
        return {"step": 0, **zeros}

    def update(self, params: Params, grads: Params, state: OptState) -> tuple[Params, OptState]:
        """Apply one optimiser step.

        Args:
            params, grads: dicts with the same keys and shapes; a gradient may be a SparseGradient.
            state: from `init` or from the last `update`.

        Returns:
            The new parameters and the new state; the arguments are not changed.

        Raises:
            InputError: params, grads and state differ in keys, shapes or dtypes.
        """
        _check_keys(f"{self.name}.update", params, grads)
        _check_state(f"{self.name}.update", self.moments, params, state)
        # float() because a NumPy float64 scalar would promote float32 parameters.
        lr = float(self.learning_rate(state["step"]) if callable(self.learning_rate) else self.learning_rate)
        step = state["step"] + 1
        new_params: Params = {}
        new_state: dict[str, Params] = {m: {} for m in self.moments}
        xp = resolve_namespace(self.name, {"params": next(iter(params.values()))}) if params else None
        update_dense = self._dense_update(xp, lr, step)
        for key, p in params.items():
            moments = tuple(state[m][key] for m in self.moments)
            g = grads[key]
            if isinstance(g, SparseGradient) and self.sparse_rule is not None:
                new_params[key], new_moments = _update_rows(self.sparse_rule, xp, p, g, moments, lr, step)
            else:
                g = g.to_dense() if isinstance(g, SparseGradient) else g
                new_params[key], new_moments = update_dense(p, g, moments)
            for m, value in zip(self.moments, new_moments, strict=True):
                new_state[m][key] = value
        return new_params, {"step": step, **new_state}

    def _dense_update(self, xp: Namespace, lr: float, step: int) -> _DenseUpdate:
        """Return the update of one parameter: the compiled pass for each array that it applies to, else the rule."""

        def by_rule(p: Array, g: Array, moments: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
            return _update_blocks(self.rule, xp, p, g, moments, lr, step)

        if self.compiled_rule is None or xp is None or not is_numpy(xp):
            return by_rule
        name, constants = self.compiled_rule.name, np.asarray(self.compiled_rule.constants(lr, step))
        kernels = dict[Any, Callable[..., None] | None]()  # by dtype

        def compiled(p: Array, g: Array, moments: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
            dtype, flags = p.dtype, p.flags
            if dtype not in kernels:
                passes = compiled_passes(dtype)
                kernels[dtype] = passes.update_kernel(name, dtype.itemsize) if passes is not None else None
            kernel = kernels[dtype]
            if kernel is None or not flags.forc or not _are_alike(p, g, *moments):
                return by_rule(p, g, moments)
            outputs = [np.empty_like(p) for _ in range(1 + len(moments))]
            # The memory order of p decides; that of g and the moments may differ.
            if flags.c_contiguous:
                kernel(constants, p.ravel(), g.ravel(), *[a.ravel() for a in (*moments, *outputs)])
            else:
                kernel(constants, p.T.ravel(), g.T.ravel(), *[a.T.ravel() for a in (*moments, *outputs)])
            return outputs[0], tuple(outputs[1:])

        return compiled


def _update_rows(
    rule: Callable[..., Any], xp: Any, p: Array, g: SparseGradient, moments: tuple[Array, ...], lr: float, step: int
) -> tuple[Array, tuple[Array, ...]]:
    """Apply the rule to the rows that the sparse gradient stores."""
    p_rows, *moment_rows = (g.take_rows(a) for a in (p, *moments))
    new_p_rows, new_moment_rows = _update_blocks(rule, xp, p_rows, g.values, tuple(moment_rows), lr, step)
    new_moments = (g.with_rows(m, rows) for m, rows in zip(moments, new_moment_rows, strict=True))
    return g.with_rows(p, new_p_rows), tuple(new_moments)


def _update_blocks(
    rule: Callable[..., Any], xp: Any, p: Array, g: Array, moments: tuple[Array, ...], lr: float, step: int
) -> tuple[Array, tuple[Array, ...]]:
    """Apply the elementwise rule block by block, so that its temporaries stay in the cache."""
    if not is_numpy(xp) or p.size <= _BLOCK_SIZE:
        return rule(xp, p, g, moments, lr, step)  # type: ignore[no-any-return]

    def in_memory_order(a: Any) -> Any:
        return a.T if p.flags.fnc else a  # the memory order of p decides; that of g and the moments may differ

    flat = [xp.ascontiguousarray(in_memory_order(a)).reshape(-1) for a in (p, g, *moments)]
    outputs = [xp.empty(in_memory_order(p).shape, dtype=p.dtype) for _ in range(1 + len(moments))]
    flat_outputs = [a.reshape(-1) for a in outputs]
    for start in range(0, p.size, _BLOCK_SIZE):
        block = slice(start, start + _BLOCK_SIZE)
        p_block, g_block, *moment_blocks = (a[block] for a in flat)
        new_p, new_moments = rule(xp, p_block, g_block, tuple(moment_blocks), lr, step)
        for output, value in zip(flat_outputs, (new_p, *new_moments), strict=True):
            output[block] = value
    return in_memory_order(outputs[0]), tuple(in_memory_order(a) for a in outputs[1:])


def _are_alike(p: Array, *others: Array) -> bool:
    """Return True if all are NumPy arrays of one shape and dtype, float32 or float64."""
    if p.__class__ is not np.ndarray or p.dtype not in DTYPE_BITS:
        return False
    dtype, shape = p.dtype, p.shape
    return all(a.__class__ is np.ndarray and a.dtype is dtype and a.shape == shape for a in others)


def _check_keys(where: str, params: Params, grads: Params) -> None:
    check_dicts(where, params=params, grads=grads)
    if params.keys() == grads.keys() and all(_are_alike(p, grads[key]) for key, p in params.items()):
        return
    if params.keys() != grads.keys():
        unmatched = sorted(params.keys() ^ grads.keys())
        raise InputError(f"{where}: params and grads must have the same keys, found {', '.join(unmatched)} in only one")
    for key, p in params.items():
        g = grads[key]
        resolve_namespace(where, {f"params[{key!r}]": p, f"grads[{key!r}]": stored_values(g)})
        if tuple(p.shape) != tuple(g.shape):
            raise InputError(f"{where}: the gradient of {key} has shape {tuple(g.shape)}, expected {tuple(p.shape)}")


def _check_state(where: str, moments: tuple[str, ...], params: Params, state: Any) -> None:
    if not isinstance(state, dict) or not {"step", *moments} <= state.keys():
        found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        expected = ", ".join(("step", *moments))
        raise InputError(
            f"{where}: state must come from init or update and hold {expected}, found {found or 'nothing'}"
        )
    for m in moments:
        if params.keys() != state[m].keys():
            unmatched = sorted(params.keys() ^ state[m].keys())
            raise InputError(
                f"{where}: state[{m!r}] must have the keys of params, found {', '.join(unmatched)} in only one"
            )


def _check_learning_rate(where: str, learning_rate: Any) -> None:
    if not callable(learning_rate) and not (
        isinstance(learning_rate, Real) and 0 <= float(learning_rate) < float("inf")
    ):
        raise InputError(
            f"{where}: learning_rate must be a number >= 0 or a function of the step, found {learning_rate!r}"
        )


def _check_unit_interval(where: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise InputError(f"{where}: {name} must be in [0, 1), found {value!r}")


def sgd(learning_rate: LearningRate, momentum: float = 0.0, *, nesterov: bool = False) -> Optimizer:
    """Return stochastic gradient descent: v = momentum v + g;  p -= lr v  (nesterov: p -= lr (g + momentum v)).

    Args:
        learning_rate: lr, a number >= 0 or a function of the step number from 0.
        momentum: in [0, 1); 0 keeps no moment.
        nesterov: True uses Nesterov's momentum, which needs momentum > 0.

    Returns:
        An Optimizer.

    Raises:
        InputError: an argument is out of range.

    >>> sgd(0.1, momentum=0.9).moments
    ('velocity',)
    """
    _check_learning_rate("sgd", learning_rate)
    _check_unit_interval("sgd", momentum=momentum)
    if nesterov and not momentum:
        raise InputError("sgd: nesterov needs a momentum > 0, found 0")

    def rule(xp: Any, p: Array, g: Array, moments: Any, lr: float, step: int) -> Any:
        if not momentum:
            return p - lr * g, ()
        v = momentum * moments[0] + g
        return p - lr * (g + momentum * v if nesterov else v), (v,)

    if not momentum:
        return Optimizer("sgd", (), rule, learning_rate, rule, CompiledRule("sgd", lambda lr, step: (lr,)))
    compiled_rule = CompiledRule("momentum", lambda lr, step: (lr, momentum, float(nesterov)))
    return Optimizer("sgd", ("velocity",), rule, learning_rate, compiled_rule=compiled_rule)


def adagrad(learning_rate: LearningRate = 0.01, eps: float = 1e-10) -> Optimizer:
    """Return Adagrad: s += g^2;  p -= lr g / (sqrt(s) + eps). Source: Duchi et al. 2011.

    Args:
        learning_rate: lr, a number >= 0 or a function of the step number from 0.
        eps: added to the square root, > 0.

    Returns:
        An Optimizer.

    Raises:
        InputError: learning_rate is negative or not finite.

    >>> adagrad().name
    'adagrad'
    """
    _check_learning_rate("adagrad", learning_rate)

    def rule(xp: Any, p: Array, g: Array, moments: Any, lr: float, step: int) -> Any:
        s = moments[0] + g * g
        return p - lr * g / (xp.sqrt(s) + eps), (s,)

    compiled_rule = CompiledRule("scaled", lambda lr, step: (lr, 1.0, 1.0, eps))
    return Optimizer("adagrad", ("sum",), rule, learning_rate, rule, compiled_rule)


def rmsprop(learning_rate: LearningRate = 0.01, decay: float = 0.99, eps: float = 1e-8) -> Optimizer:
    """Return RMSProp: s = decay s + (1 - decay) g^2;  p -= lr g / (sqrt(s) + eps). Source: Hinton 2012 (lecture 6e).

    Args:
        learning_rate: lr, a number >= 0 or a function of the step number from 0.
        decay: in [0, 1).
        eps: added to the square root, > 0.

    Returns:
        An Optimizer.

    Raises:
        InputError: learning_rate or decay is out of range.

    >>> rmsprop().name
    'rmsprop'
    """
    _check_learning_rate("rmsprop", learning_rate)
    _check_unit_interval("rmsprop", decay=decay)

    def rule(xp: Any, p: Array, g: Array, moments: Any, lr: float, step: int) -> Any:
        s = decay * moments[0] + (1 - decay) * (g * g)
        return p - lr * g / (xp.sqrt(s) + eps), (s,)

    compiled_rule = CompiledRule("scaled", lambda lr, step: (lr, decay, 1 - decay, eps))
    return Optimizer("rmsprop", ("square",), rule, learning_rate, compiled_rule=compiled_rule)


def _adam(
    name: str, learning_rate: LearningRate, b1: float, b2: float, eps: float, decay: float = 0.0, lazy: bool = False
) -> Optimizer:
    _check_learning_rate(name, learning_rate)
    _check_unit_interval(name, b1=b1, b2=b2)

    def constants(lr: float, step: int, eps_after_correction: bool = True) -> tuple[float, ...]:
        # The bias corrections are Python floats of the step number, so no array is read on the host. With c the
        # correction of sqrt(v), m / (c sqrt(v) + eps) = (m / c) / (sqrt(v) + eps / c) saves one pass over the array.
        c = 1 / (1 - b2**step) ** 0.5
        scaled_eps = eps / c if eps_after_correction else eps
        return lr / (1 - b1**step) / c, b1, 1 - b1, b2, 1 - b2, scaled_eps, 1 - lr * decay

    def rule(
        xp: Any, p: Array, g: Array, moments: Any, lr: float, step: int, *, eps_after_correction: bool = True
    ) -> Any:
        step_size, b1, a1, b2, a2, eps, keep = constants(lr, step, eps_after_correction)
        m = b1 * moments[0] + a1 * g
        v = b2 * moments[1] + a2 * (g * g)
        p = p if not decay else p * keep
        return p - step_size * m / (xp.sqrt(v) + eps), (m, v)

    sparse_rule = partial(rule, eps_after_correction=False) if lazy else None
    compiled_rule = CompiledRule("adam", constants)
    return Optimizer(name, ("mean", "square"), rule, learning_rate, sparse_rule, compiled_rule)


def adam(
    learning_rate: LearningRate = 1e-3, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, lazy: bool = False
) -> Optimizer:
    """Return Adam: m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p -= lr m^ / (sqrt(v^) + eps).

    m^ = m / (1 - b1^t) and v^ = v / (1 - b2^t) are the bias-corrected moments of step t = 1, 2, ... Source: Kingma and
    Ba 2015.

    Args:
        learning_rate: lr, a number >= 0 or a function of the step number from 0.
        b1, b2: decay rates of the moments, in [0, 1).
        eps: added to the square root, > 0.
        lazy: True updates only the stored rows of a SparseGradient; the parameters and moments of all other rows stay
            unchanged. This is torch.optim.SparseAdam, which adds eps before the bias correction of the square root.
            Dense gradients are not affected.

    Returns:
        An Optimizer.

    Raises:
        InputError: learning_rate, b1 or b2 is out of range.

    >>> adam(1e-3).moments
    ('mean', 'square')
    """
    return _adam("adam", learning_rate, b1, b2, eps, lazy=lazy)


def adamw(
    learning_rate: LearningRate = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Optimizer:
    """Return AdamW: Adam with decoupled weight decay, p *= 1 - lr weight_decay before Adam's step.

    Source: Loshchilov and Hutter 2019.

    Args:
        learning_rate, b1, b2, eps: as for `adam`.
        weight_decay: >= 0.

    Returns:
        An Optimizer.

    Raises:
        InputError: learning_rate, b1 or b2 is out of range.

    >>> adamw(1e-3).name
    'adamw'
    """
    return _adam("adamw", learning_rate, b1, b2, eps, weight_decay)


def cosine(peak: float, steps: int, *, final: float = 0.0) -> Callable[[int], float]:
    """Return a schedule that falls from `peak` at step 0 along a half cosine to `final` at step `steps` and later.

    Args:
        peak: learning rate at step 0.
        steps: length of the schedule.
        final: learning rate at the end.

    Returns:
        A function of the step number from 0.

    >>> cosine(1.0, 10)(5)
    0.5
    """
    return lambda step: final + (peak - final) * 0.5 * (1 + cos(pi * min(step, steps) / max(1, steps)))


def warmup(schedule: LearningRate, steps: int) -> Callable[[int], float]:
    """Return a schedule that rises linearly to `schedule` during the first `steps` steps and then follows it.

    Args:
        schedule: a learning rate, or a function of the step number from 0.
        steps: length of the warm-up; 0 for none.

    Returns:
        A function of the step number from 0.

    >>> warmup(1.0, 4)(1)
    0.5
    """

    def warmed_up(step: int) -> float:
        full = schedule(step) if callable(schedule) else schedule
        return full * min(1.0, (step + 1) / max(1, steps))

    return warmed_up
