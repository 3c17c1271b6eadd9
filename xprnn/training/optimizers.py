"""Optimisers as pure pairs: `init(params) -> state`, `update(params, grads, state) -> params, state`.

Parameters, gradients and moments are flat dicts with the same keys; nothing is changed in place. Formulas and defaults
are torch's, so a training run can move between the two. The learning rate is a number or a schedule, a function of the
step number 0, 1, 2, ... A SparseGradient counts as the dense one that it stands for: where a rule would leave the
classes that do not occur as they are, only the others are computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from numbers import Real
from typing import Any

from xprnn.arrays.namespace import Array, InputError, Params, check_dicts, is_numpy, namespace, resolve_namespace
from xprnn.arrays.sparse_gradient import SparseGradient, stored_values
from xprnn.training.clipping import clip_by_global_norm, clip_by_value

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
_BLOCK_SIZE = 1 << 15  # entries of a parameter updated at a time
OptState = dict[str, Any]  # "step": int, and moment name -> dict keyed like params


@dataclass(frozen=True)
class Optimizer:
    """A rule that turns gradients into new parameters.

    Args:
        name: how it is called.
        moments: names of what it remembers for each parameter.
        rule: (xp, p, g, moments of this parameter, rate, step number from 1) -> new p, new moments.
        rate: the learning rate, a number > 0 or a function of the step number from 0.
        sparse_rule: the rule for the rows of a SparseGradient's classes, where the other rows of the parameter and of
            its moments stay as they are; None: `rule`, on the dense gradient.

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

    def init(self, params: Params) -> OptState:
        """The state before the first step: zeros like each parameter."""
        spaces = {k: resolve_namespace(f"{self.name}.init", {k: p}) for k, p in params.items()}
        zeros = {m: {k: spaces[k].zeros_like(p) for k, p in params.items()} for m in self.moments}
        return {"step": 0, **zeros}

    def update(self, params: Params, grads: Params, state: OptState) -> tuple[Params, OptState]:
        """One step.

        Args:
            params, grads: dicts with the same keys and shapes; a gradient may be a SparseGradient.
            state: from `init` or the last `update`.

        Returns:
            new params, new state; the arguments stay as they were.

        Raises:
            InputError: keys or shapes that differ.
        """
        _check_keys(f"{self.name}.update", params, grads)
        _check_state(f"{self.name}.update", self.moments, params, state)
        # A Python number: one of NumPy's would widen float32 parameters to its own dtype.
        rate = float(self.learning_rate(state["step"]) if callable(self.learning_rate) else self.learning_rate)
        step = state["step"] + 1
        out: Params = {}
        moments: dict[str, Params] = {m: {} for m in self.moments}
        xp = namespace(next(iter(params.values()))) if params else None
        for key, p in params.items():
            old = tuple(state[m][key] for m in self.moments)
            g = grads[key]
            if isinstance(g, SparseGradient) and self.sparse_rule is not None:
                out[key], new = _update_rows(self.sparse_rule, xp, p, g, old, rate, step)
            else:
                g = g.to_dense() if isinstance(g, SparseGradient) else g
                out[key], new = _update_blocks(self.rule, xp, p, g, old, rate, step)
            for m, value in zip(self.moments, new, strict=True):
                moments[m][key] = value
        return out, {"step": step, **moments}


def _update_rows(
    rule: Callable[..., Any], xp: Any, p: Array, g: SparseGradient, old: tuple[Array, ...], rate: float, step: int
) -> tuple[Array, tuple[Array, ...]]:
    """The rule on the rows of the classes that occur."""
    some, *before = (g.take_rows(a) for a in (p, *old))
    first, more = _update_blocks(rule, xp, some, g.values, tuple(before), rate, step)
    return g.with_rows(p, first), tuple(g.with_rows(a, rows) for a, rows in zip(old, more, strict=True))


def _update_blocks(
    rule: Callable[..., Any], xp: Any, p: Array, g: Array, old: tuple[Array, ...], rate: float, step: int
) -> tuple[Array, tuple[Array, ...]]:
    """The rule, which is elementwise, block by block: what it keeps for a moment then stays in the cache."""
    if not is_numpy(xp) or p.size <= _BLOCK_SIZE:
        return rule(xp, p, g, old, rate, step)  # type: ignore[no-any-return]

    def turned(a: Any) -> Any:
        return a.T if p.flags.fnc else a  # a gradient may lie another way than its parameter

    flat = [xp.ascontiguousarray(turned(a)).reshape(-1) for a in (p, g, *old)]
    new = [xp.empty(turned(p).shape, dtype=p.dtype) for _ in range(1 + len(old))]
    rows = [a.reshape(-1) for a in new]
    for start in range(0, p.size, _BLOCK_SIZE):
        cut = slice(start, start + _BLOCK_SIZE)
        some, grad, *before = (a[cut] for a in flat)
        first, more = rule(xp, some, grad, tuple(before), rate, step)
        for row, value in zip(rows, (first, *more), strict=True):
            row[cut] = value
    return turned(new[0]), tuple(turned(a) for a in new[1:])


def _check_keys(where: str, params: Params, grads: Params) -> None:
    check_dicts(where, params=params, grads=grads)
    if params.keys() != grads.keys():
        odd = sorted(params.keys() ^ grads.keys())
        raise InputError(f"{where}: params and grads must have the same keys, found {', '.join(odd)} in only one")
    for key, p in params.items():
        g = grads[key]
        resolve_namespace(where, {f"params[{key!r}]": p, f"grads[{key!r}]": stored_values(g)})
        if tuple(p.shape) != tuple(g.shape):
            raise InputError(f"{where}: the gradient of {key} has shape {tuple(g.shape)}, expected {tuple(p.shape)}")


def _check_state(where: str, moments: tuple[str, ...], params: Params, state: Any) -> None:
    if not isinstance(state, dict) or not {"step", *moments} <= state.keys():
        found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        wanted = ", ".join(("step", *moments))
        raise InputError(f"{where}: state must come from init or update and hold {wanted}, found {found or 'nothing'}")
    for m in moments:
        if odd := sorted(params.keys() ^ state[m].keys()):
            raise InputError(f"{where}: state[{m!r}] must have the keys of params, found {', '.join(odd)} in only one")


def _check_learning_rate(where: str, rate: Any) -> None:
    if not callable(rate) and not (isinstance(rate, Real) and 0 <= float(rate) < float("inf")):
        raise InputError(f"{where}: learning_rate must be a number >= 0 or a function of the step, found {rate!r}")


def _check_unit_interval(where: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise InputError(f"{where}: {name} must be in [0, 1), found {value!r}")


def sgd(learning_rate: LearningRate, momentum: float = 0.0, *, nesterov: bool = False) -> Optimizer:
    """Gradient descent: v = mu v + g;  p -= lr v  (with nesterov: p -= lr (g + mu v)).

    >>> sgd(0.1, momentum=0.9).moments
    ('velocity',)
    """
    _check_learning_rate("sgd", learning_rate)
    _check_unit_interval("sgd", momentum=momentum)
    if nesterov and not momentum:
        raise InputError("sgd: nesterov needs a momentum > 0, found 0")

    def rule(xp: Any, p: Array, g: Array, old: Any, rate: float, step: int) -> Any:
        if not momentum:
            return p - rate * g, ()
        v = momentum * old[0] + g
        return p - rate * (g + momentum * v if nesterov else v), (v,)

    return Optimizer("sgd", ("velocity",) if momentum else (), rule, learning_rate, None if momentum else rule)


def adagrad(learning_rate: LearningRate = 0.01, eps: float = 1e-10) -> Optimizer:
    """Adagrad (Duchi et al. 2011): s += g^2;  p -= lr g / (sqrt(s) + eps).

    >>> adagrad().name
    'adagrad'
    """
    _check_learning_rate("adagrad", learning_rate)

    def rule(xp: Any, p: Array, g: Array, old: Any, rate: float, step: int) -> Any:
        s = old[0] + g * g
        return p - rate * g / (xp.sqrt(s) + eps), (s,)

    return Optimizer("adagrad", ("sum",), rule, learning_rate, rule)


def rmsprop(learning_rate: LearningRate = 0.01, decay: float = 0.99, eps: float = 1e-8) -> Optimizer:
    """RMSProp (Hinton 2012): s = a s + (1-a) g^2;  p -= lr g / (sqrt(s) + eps).

    >>> rmsprop().name
    'rmsprop'
    """
    _check_learning_rate("rmsprop", learning_rate)
    _check_unit_interval("rmsprop", decay=decay)

    def rule(xp: Any, p: Array, g: Array, old: Any, rate: float, step: int) -> Any:
        s = decay * old[0] + (1 - decay) * (g * g)
        return p - rate * g / (xp.sqrt(s) + eps), (s,)

    return Optimizer("rmsprop", ("square",), rule, learning_rate)


def _adam(
    name: str, learning_rate: LearningRate, b1: float, b2: float, eps: float, decay: float = 0.0, lazy: bool = False
) -> Optimizer:
    _check_learning_rate(name, learning_rate)
    _check_unit_interval(name, b1=b1, b2=b2)

    def rule(xp: Any, p: Array, g: Array, old: Any, rate: float, step: int, *, late: bool = False) -> Any:
        m = b1 * old[0] + (1 - b1) * g
        v = b2 * old[1] + (1 - b2) * (g * g)
        # Bias corrections are scalars of the step: on the host, no array is read. With c that of the root,
        # m / (c sqrt(v) + eps) = (m / c) / (sqrt(v) + eps / c), one pass less.
        c = 1 / (1 - b2**step) ** 0.5
        kept = p if not decay else p * (1 - rate * decay)
        return kept - (rate / (1 - b1**step) / c) * m / (xp.sqrt(v) + (eps if late else eps / c)), (m, v)

    return Optimizer(name, ("mean", "square"), rule, learning_rate, partial(rule, late=True) if lazy else None)


def adam(
    learning_rate: LearningRate = 1e-3, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, lazy: bool = False
) -> Optimizer:
    """Adam (Kingma & Ba 2015): m, v running means of g, g^2;  p -= lr m^ / (sqrt(v^) + eps), m^ and v^ bias-corrected.

    Args:
        learning_rate, b1, b2, eps: as above.
        lazy: of a SparseGradient, only the classes that occur move, and only their m and v: those of the others neither
            shrink nor push on. That is torch.optim.SparseAdam, whose root is corrected after eps has been added to it.
            Dense gradients are not touched by this.

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
    """AdamW (Loshchilov & Hutter 2019): Adam, after p has shrunk by lr * weight_decay.

    >>> adamw(1e-3).name
    'adamw'
    """
    return _adam("adamw", learning_rate, b1, b2, eps, weight_decay)


def cosine(peak: float, steps: int, *, final: float = 0.0) -> Callable[[int], float]:
    """A schedule: from `peak` at step 0 along a half cosine to `final` at `steps` and after.

    >>> cosine(1.0, 10)(5)
    0.5
    """
    return lambda step: final + (peak - final) * 0.5 * (1 + cos(pi * min(step, steps) / max(1, steps)))


def warmup(schedule: LearningRate, steps: int) -> Callable[[int], float]:
    """A schedule that rises linearly to `schedule` over the first `steps` steps.

    >>> warmup(1.0, 4)(1)
    0.5
    """

    def rate(step: int) -> float:
        full = schedule(step) if callable(schedule) else schedule
        return full * min(1.0, (step + 1) / max(1, steps))

    return rate
