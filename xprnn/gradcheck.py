"""Proof of a gradient: random directions, random cotangents, central differences in float64.

For outputs y = f(a, b, ...) and a random cotangent u, the adjoint promises <v, da> = <u, df/da v> for every direction
v. The right side needs no derivative code: (f(a + h v) - f(a - h v)) / 2h, here at two steps h, combined so that the
h^2 error cancels (Richardson). Each argument is moved by itself, so a failure names it. A cotangent of ones, the usual
`y.sum()`, would miss an adjoint that has time reversed; a random one misses nothing with probability 1.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator

from xprnn.arrays.namespace import InputError, from_numpy, is_integer, namespace, to_numpy
from xprnn.arrays.sparse_gradient import SparseGradient

__all__ = ["GradientError", "NotDifferentiableError", "check_gradients", "check_layer"]

KeyPath = tuple[Any, ...]


class GradientError(AssertionError):
    """A backward disagrees with the differences of its forward."""


class NotDifferentiableError(ValueError):
    """The function has a kink or a jump where its gradient was to be checked: no number would be right."""


def check_gradients(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    args: Sequence[Any],
    *,
    names: Sequence[str] | None = None,
    rng: Generator | None = None,
    directions: int = 2,
    rtol: float = 1e-6,
) -> dict[str, float]:
    """Prove that `backward` is the adjoint of `forward` at `args`: <v, backward(u)> = <u, d forward(args + t v)/dt>.

    Args:
        forward: forward(*args) -> (outputs, tape). Outputs: an array, or arrays in tuples, lists and dicts; integers
            and None are passed over.
        backward: backward(tape, cotangents) -> gradients, one for each argument and in its structure (the bare gradient
            where there is one argument). Cotangents come in the structure of the outputs. A gradient of None says that
            the argument has no influence, and is checked as zero.
        args: arrays, or arrays in tuples, lists and dicts; floats are converted to float64, integers are held fixed.
        names: what to call the arguments in errors.
        rng: where the directions come from; None: a fixed seed.
        directions: random directions tried for each array, at least 1.
        rtol: allowed difference, relative to the size of the sums compared.

    Returns:
        array name -> largest relative difference found.

    Raises:
        GradientError: a gradient is wrong, has the wrong shape or is missing; says which, the analytic and the numeric
            value.
        NotDifferentiableError: the function has a kink or jump at `args`, or gives two answers to one question.
        InputError: no floating argument, an array library without float64, args that are no list or tuple, names for
            some of them only, or a forward that returns no pair.

    >>> import numpy as np
    >>> square = lambda x: (x * x, x)
    >>> check_gradients(square, lambda x, dy: dy * 2 * x, [np.ones(3)], names=["x"])["x"] < 1e-9
    True
    >>> check_gradients(square, lambda x, dy: dy * x, [np.ones(3)], names=["x"])
    Traceback (most recent call last):
    xprnn.gradcheck.GradientError: x: backward says 0.48190..., central differences say 0.96381... (relative ...)
    """
    rng = np.random.default_rng(0) if rng is None else rng
    names = _argument_names(args, names)
    args = tuple(_tree_map(_to_float64, a) for a in args)
    (outputs, tape), (again, _) = _check_pair(forward(*args)), _check_pair(forward(*args))
    for (path, a), (_, b) in zip(_tree_leaves(outputs), _tree_leaves(again), strict=True):
        if not np.array_equal(to_numpy(a), to_numpy(b), equal_nan=True):
            raise NotDifferentiableError(
                f"forward gives two answers for the same arguments (output {_leaf_name('', path)})"
            )
        if not np.isfinite(to_numpy(a)).all():
            raise NotDifferentiableError(f"forward gives nan or infinity (output {_leaf_name('', path)})")
    floats = [(i, path, leaf) for i, a in enumerate(args) for path, leaf in _tree_leaves(a)]
    if not floats:
        raise InputError("check_gradients: no argument of a floating dtype, nothing to check")
    worst: dict[str, float] = {}
    for _ in range(directions):
        cotangents = _tree_map(lambda y: from_numpy(rng.standard_normal(tuple(y.shape)), y), outputs)
        gradients = backward(tape, cotangents)
        gradients = (gradients,) if len(args) == 1 and not _is_wrapped_single(gradients, args) else gradients
        _check_gradient_count(gradients, len(args))
        pairing = _WeightedOutput(forward, args, outputs, cotangents)
        for i, path, leaf in floats:
            name = _leaf_name(names[i], path)
            error = _check_leaf(pairing, name, i, path, leaf, _leaf_gradient(name, gradients[i], path, leaf), rng, rtol)
            worst[name] = max(worst.get(name, 0.0), error)
    return worst


def _argument_names(args: Any, names: Any) -> list[str]:
    if not isinstance(args, (tuple, list)):
        raise InputError(f"check_gradients: args must be a list or tuple of arguments, found {type(args).__name__}")
    names = [f"args[{i}]" for i in range(len(args))] if names is None else names
    if isinstance(names, str) or len(names) != len(args):
        raise InputError(f"check_gradients: names must be {len(args)}, one for each of args, found {names!r}")
    return list(names)


def _check_pair(found: Any) -> Any:
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        what = f"{len(found)} results" if isinstance(found, (tuple, list)) else type(found).__name__
        raise InputError(f"check_gradients: forward must return a pair (outputs, tape), found {what}")
    return found


def _check_gradient_count(gradients: Any, count: int) -> None:
    if not isinstance(gradients, (tuple, list)):
        raise GradientError(f"backward must return {count} gradients in a tuple, found {type(gradients).__name__}")
    if len(gradients) != count:
        raise GradientError(f"backward returns {len(gradients)} gradients for {count} arguments")


def check_layer(
    layer: Any, params: Any, x: Any, state: Any = None, *, rng: Generator | None = None, **flags: Any
) -> dict[str, float]:
    """`check_gradients` for a layer or model: y and the final state against params, x and the initial state.

    Args:
        layer: anything with a layer's forward and backward.
        params, x, state: as forward takes them; state None is left out of the check.
        rng: where the directions come from.
        flags: lengths, mask, reset and what else forward takes.

    Returns, Raises:
        as check_gradients.

    >>> import numpy as np, xprnn
    >>> layer, rng = xprnn.RNN(2, 3), np.random.default_rng(0)
    >>> params = layer.init(rng, like=np.zeros(0))
    >>> max(check_layer(layer, params, rng.standard_normal((4, 2, 2))).values()) < 1e-7
    True
    """

    def forward(params: Any, x: Any, state: Any) -> Any:
        y, final, tape = layer.forward(params, x, state, **flags)
        return (y, final), tape

    def backward(tape: Any, cotangents: Any) -> Any:
        dx, dstate, dparams = layer.backward(tape, *cotangents)
        return dparams, dx, None if state is None else dstate

    return check_gradients(forward, backward, (params, x, state), names=("params", "x", "state"), rng=rng)


class _WeightedOutput(NamedTuple):
    """t -> <cotangents, forward(args with one array moved by t v)>, element by element."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    outputs: Any
    cotangents: Any

    def evaluate_at(self, i: int, path: KeyPath, leaf: Any, direction: Any, t: float) -> Any:
        moved = leaf + from_numpy(t * direction, like=leaf)
        args = [*self.args]
        args[i] = _replace_leaf(args[i], path, moved)
        outputs, _ = self.forward(*args)
        return self.elementwise_products(outputs)

    def elementwise_products(self, outputs: Any) -> Any:
        pairs = zip(_tree_leaves(outputs), _tree_leaves(self.cotangents), strict=True)
        return np.concatenate([(to_numpy(y) * to_numpy(u)).ravel() for (_, y), (_, u) in pairs] or [np.zeros(0)])


def _check_leaf(
    pairing: _WeightedOutput, name: str, i: int, path: KeyPath, leaf: Any, gradient: Any, rng: Generator, rtol: float
) -> float:
    direction = rng.standard_normal(tuple(leaf.shape))
    direction /= max(float(np.linalg.norm(direction)), 1e-300)
    products = to_numpy(gradient) * direction
    analytic, own = float(products.sum()), float(np.abs(products).sum())
    base = pairing.elementwise_products(pairing.outputs)
    noise = 1e-15 * float(np.abs(base).sum())

    def f(t: float) -> Any:
        return pairing.evaluate_at(i, path, leaf, direction, t)

    _check_smooth(name, f, base, 1e-6 * (own + 1e-3) + 100 * noise / 1e-5)
    error, numeric = np.inf, 0.0
    for h in (1e-3, 1e-4, 1e-5):  # a kink close by, but not here, may spoil the larger steps
        slopes = (4 * (f(h / 2) - f(-h / 2)) / h - (f(h) - f(-h)) / (2 * h)) / 3
        total, size = float(slopes.sum()), max(float(np.abs(slopes).sum()), own)
        blur = 10 * noise / h  # what rounding alone can make of the differences
        here = abs(total - analytic) / max(size, blur, 1e-300)
        if here < error:
            error, numeric = here, total
        if abs(total - analytic) <= rtol * size + blur:
            return here
    raise GradientError(
        f"{name}: backward says {analytic:.10g}, central differences say {numeric:.10g} "
        f"(relative difference {error:.3g}, allowed {rtol:.3g})"
    )


def _check_smooth(name: str, f: Callable[[float], Any], base: Any, rounding: float) -> None:
    """Raise unless f bends and leaps less as the step shrinks, as a function with a derivative at 0 does."""

    def gaps(h: float) -> tuple[float, float]:
        ahead, behind = f(h), f(-h)
        bend, leap = np.abs(ahead - 2 * base + behind).sum(), np.abs(ahead - behind).sum()
        return float(bend) / h, float(leap) / h

    (wide_bend, wide_leap), (bend, leap) = gaps(1e-4), gaps(1e-5)
    why = ""
    if bend > 0.5 * wide_bend and bend > rounding:  # a kink's one-sided slopes differ by the same amount at every step
        why = f"one-sided slopes differ by {bend:.3g}"
    elif leap > 5 * wide_leap and leap > rounding:  # across a jump the slope grows as the step shrinks
        why = f"it jumps by {leap * 1e-5:.3g}"
    if why:
        raise NotDifferentiableError(f"{name}: forward is not differentiable here: {why}")


def _leaf_gradient(name: str, gradients: Any, path: KeyPath, leaf: Any) -> Any:
    """The gradient of one array, its shape and dtype checked."""
    found = gradients
    for key in path:
        if found is None:
            break
        try:
            found = found[key]
        except (KeyError, IndexError, TypeError):
            raise GradientError(f"{name}: backward returns no gradient for it") from None
    if found is None:
        return namespace(leaf).zeros_like(leaf)
    if isinstance(found, SparseGradient):
        found = found.to_dense()
    if not _is_array(found):
        raise GradientError(f"{name}: its gradient must be an array, found {type(found).__name__}")
    if tuple(found.shape) != tuple(leaf.shape) or found.dtype != leaf.dtype:
        raise GradientError(
            f"{name}: its gradient must have shape {tuple(leaf.shape)} and dtype {leaf.dtype}, "
            f"found {tuple(found.shape)} and {found.dtype}"
        )
    return found


def _is_wrapped_single(gradients: Any, args: Sequence[Any]) -> bool:
    """Whether backward wrapped the gradient of a single argument in a tuple."""
    return isinstance(gradients, (tuple, list)) and len(gradients) == 1 and not isinstance(args[0], (tuple, list))


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_float(value: Any) -> bool:
    return _is_array(value) and not is_integer(namespace(value), value) and "float" in str(value.dtype)


def _tree_leaves(tree: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every floating array of the tree with the keys that lead to it."""
    if _is_float(tree):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _tree_leaves(value, (*path, key))
    elif isinstance(tree, (tuple, list)):
        for key, value in enumerate(tree):
            yield from _tree_leaves(value, (*path, key))


def _tree_map(f: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _tree_map(f, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(_tree_map(f, value) for value in tree)
    return f(tree) if _is_float(tree) else tree


def _replace_leaf(tree: Any, path: KeyPath, leaf: Any) -> Any:
    if not path:
        return leaf
    if isinstance(tree, dict):
        return {k: _replace_leaf(v, path[1:], leaf) if k == path[0] else v for k, v in tree.items()}
    return tuple(_replace_leaf(v, path[1:], leaf) if k == path[0] else v for k, v in enumerate(tree))


def _to_float64(array: Any) -> Any:
    xp = namespace(array)
    try:
        return xp.astype(array, xp.float64)
    except Exception as error:
        raise InputError(f"check_gradients: float64 is not to be had on this device ({error})") from None


def _leaf_name(argument: str, path: KeyPath) -> str:
    return argument + "".join(f"[{key!r}]" for key in path)
