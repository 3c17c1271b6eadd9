"""Gradient check: compares a backward pass with central differences in float64, along random directions.

For outputs y = f(a, b, ...) and a random cotangent u, the gradient da satisfies <v, da> = <u, df/da v> for every
direction v. The right side needs no derivative code: it is approximated by (f(a + h v) - f(a - h v)) / 2h at two steps
h, combined so that the h^2 error cancels (Richardson extrapolation). One argument is varied at a time, so that an error
names it. The cotangent is random, because a cotangent of ones (the gradient of `y.sum()`) would not detect a backward
pass that reverses time. A random one detects every wrong linear map with probability 1.
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
    """A backward pass disagrees with the central differences of its forward pass."""


class NotDifferentiableError(ValueError):
    """The function has no gradient at the arguments: it has a kink or jump, or is not finite or not deterministic."""


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
    """Check that `backward` is the adjoint of `forward` at `args`, for random directions v and cotangents u.

        <v, backward(u)> = <u, d forward(args + t v) / dt>  at t = 0

    Args:
        forward: forward(*args) -> (outputs, tape). The outputs are an array, or arrays in tuples, lists and dicts;
            integer arrays and None are ignored.
        backward: backward(tape, cotangents) -> gradients. The cotangents have the structure of the outputs. The result
            is a tuple with a gradient for each argument, in the structure of the argument; for a single argument it
            may be the gradient itself. None means that the argument has no influence, and is checked as zero.
        args: list or tuple of arguments: arrays, or arrays in tuples, lists and dicts. Floats are converted to float64,
            integers are held constant.
        names: name of each argument in errors; None: args[0], args[1], ...
        rng: source of the directions and cotangents; None: a fixed seed.
        directions: number of random directions for each array, at least 1.
        rtol: allowed difference, relative to the sum of the absolute values of the products compared.

    Returns:
        array name -> largest relative difference.

    Raises:
        GradientError: a gradient is wrong, has the wrong shape or is missing. The message names the array and gives
            both values.
        NotDifferentiableError: `forward` has a kink or jump at `args`, returns nan or infinity, or returns different
            outputs for the same arguments.
        InputError: no argument has a floating dtype, the library or device has no float64, `args` is not a list or
            tuple, `names` has another length, or `forward` does not return a pair.

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
    (outputs, tape), (repeated, _) = _check_pair(forward(*args)), _check_pair(forward(*args))
    for (path, a), (_, b) in zip(_tree_leaves(outputs), _tree_leaves(repeated), strict=True):
        if not np.array_equal(to_numpy(a), to_numpy(b), equal_nan=True):
            raise NotDifferentiableError(
                f"forward returns different outputs for the same arguments (output {_leaf_name('', path)})"
            )
        if not np.isfinite(to_numpy(a)).all():
            raise NotDifferentiableError(f"forward returns nan or infinity (output {_leaf_name('', path)})")
    floats = [(i, path, leaf) for i, a in enumerate(args) for path, leaf in _tree_leaves(a)]
    if not floats:
        raise InputError("check_gradients: no argument of a floating dtype, nothing to check")
    worst: dict[str, float] = {}
    for _ in range(directions):
        cotangents = _tree_map(lambda y: from_numpy(rng.standard_normal(tuple(y.shape)), y), outputs)
        gradients = backward(tape, cotangents)
        gradients = (gradients,) if len(args) == 1 and not _is_wrapped_single(gradients, args) else gradients
        _check_gradient_count(gradients, len(args))
        weighted = _WeightedOutput(forward, args, outputs, cotangents)
        for i, path, leaf in floats:
            name = _leaf_name(names[i], path)
            gradient = _leaf_gradient(name, gradients[i], path, leaf)
            error = _check_leaf(weighted, name, i, path, leaf, gradient, rng, rtol)
            worst[name] = max(worst.get(name, 0.0), error)
    return worst


def _argument_names(args: Any, names: Any) -> list[str]:
    """Return a name for each argument, or raise InputError."""
    if not isinstance(args, (tuple, list)):
        raise InputError(f"check_gradients: args must be a list or tuple of arguments, found {type(args).__name__}")
    names = [f"args[{i}]" for i in range(len(args))] if names is None else names
    if isinstance(names, str) or len(names) != len(args):
        raise InputError(f"check_gradients: names must be {len(args)}, one for each of args, found {names!r}")
    return list(names)


def _check_pair(result: Any) -> Any:
    """Return the result of `forward`, or raise InputError unless it is a pair."""
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        found = f"{len(result)} results" if isinstance(result, (tuple, list)) else type(result).__name__
        raise InputError(f"check_gradients: forward must return a pair (outputs, tape), found {found}")
    return result


def _check_gradient_count(gradients: Any, count: int) -> None:
    if not isinstance(gradients, (tuple, list)):
        raise GradientError(f"backward must return {count} gradients in a tuple, found {type(gradients).__name__}")
    if len(gradients) != count:
        raise GradientError(f"backward returns {len(gradients)} gradients for {count} arguments")


def check_layer(
    layer: Any, params: Any, x: Any, state: Any = None, *, rng: Generator | None = None, **flags: Any
) -> dict[str, float]:
    """Check the gradients of a layer or model: y and the final state with respect to params, x and the initial state.

    Args:
        layer: a layer or model with the methods `forward` and `backward` of xprnn's layers.
        params: dict of arrays, as `layer.forward` takes it.
        x: (T, N, D) floats, or integers, which are held constant.
        state: the initial state; None: the default state, which is not varied.
        rng: source of the directions and cotangents; None: a fixed seed.
        flags: further keyword arguments of `layer.forward`: lengths, mask, reset and others.

    Returns:
        array name -> largest relative difference, with names such as "params['weight_ih_l0']", "x" and "state".

    Raises:
        GradientError, NotDifferentiableError, InputError: as in `check_gradients`.

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
    """The function t -> cotangents * forward(args with t v added to one array), elementwise and flattened."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    outputs: Any
    cotangents: Any

    def evaluate_at(self, i: int, path: KeyPath, leaf: Any, direction: Any, t: float) -> Any:
        perturbed = leaf + from_numpy(t * direction, like=leaf)
        args = [*self.args]
        args[i] = _replace_leaf(args[i], path, perturbed)
        outputs, _ = self.forward(*args)
        return self.elementwise_products(outputs)

    def elementwise_products(self, outputs: Any) -> Any:
        pairs = zip(_tree_leaves(outputs), _tree_leaves(self.cotangents), strict=True)
        return np.concatenate([(to_numpy(y) * to_numpy(u)).ravel() for (_, y), (_, u) in pairs] or [np.zeros(0)])


def _check_leaf(
    weighted: _WeightedOutput, name: str, i: int, path: KeyPath, leaf: Any, gradient: Any, rng: Generator, rtol: float
) -> float:
    """Return the relative difference for one array along one random direction, or raise if it exceeds `rtol`."""
    direction = rng.standard_normal(tuple(leaf.shape))
    direction /= max(float(np.linalg.norm(direction)), 1e-300)
    products = to_numpy(gradient) * direction
    analytic, magnitude = float(products.sum()), float(np.abs(products).sum())
    base = weighted.elementwise_products(weighted.outputs)
    noise = 1e-15 * float(np.abs(base).sum())

    def f(t: float) -> Any:
        return weighted.evaluate_at(i, path, leaf, direction, t)

    _check_smooth(name, f, base, 1e-6 * (magnitude + 1e-3) + 100 * noise / 1e-5)
    smallest_error, numeric = np.inf, 0.0
    for h in (1e-3, 1e-4, 1e-5):  # a kink near the arguments may lie within the larger steps only
        slopes = (4 * (f(h / 2) - f(-h / 2)) / h - (f(h) - f(-h)) / (2 * h)) / 3
        total, size = float(slopes.sum()), max(float(np.abs(slopes).sum()), magnitude)
        roundoff = 10 * noise / h  # bound on the rounding error of the differences
        error = abs(total - analytic) / max(size, roundoff, 1e-300)
        if error < smallest_error:
            smallest_error, numeric = error, total
        if abs(total - analytic) <= rtol * size + roundoff:
            return error
    raise GradientError(
        f"{name}: backward says {analytic:.10g}, central differences say {numeric:.10g} "
        f"(relative difference {smallest_error:.3g}, allowed {rtol:.3g})"
    )


def _check_smooth(name: str, f: Callable[[float], Any], base: Any, rounding: float) -> None:
    """Raise NotDifferentiableError if the differences of f at 0 do not shrink with the step, as at a kink or jump."""

    def differences(h: float) -> tuple[float, float]:
        forward_value, backward_value = f(h), f(-h)
        second = np.abs(forward_value - 2 * base + backward_value).sum()
        first = np.abs(forward_value - backward_value).sum()
        return float(second) / h, float(first) / h

    (wide_curvature, wide_slope), (curvature, slope) = differences(1e-4), differences(1e-5)
    reason = ""
    if curvature > 0.5 * wide_curvature and curvature > rounding:  # at a kink it is the same for every step
        reason = f"one-sided slopes differ by {curvature:.3g}"
    elif slope > 5 * wide_slope and slope > rounding:  # across a jump it grows as 1/h
        reason = f"it jumps by {slope * 1e-5:.3g}"
    if reason:
        raise NotDifferentiableError(f"{name}: forward is not differentiable here: {reason}")


def _leaf_gradient(name: str, gradients: Any, path: KeyPath, leaf: Any) -> Any:
    """Return the dense gradient of one array, or raise GradientError if it is missing or of another shape or dtype."""
    gradient = gradients
    for key in path:
        if gradient is None:
            break
        try:
            gradient = gradient[key]
        except (KeyError, IndexError, TypeError):
            raise GradientError(f"{name}: backward returns no gradient for it") from None
    if gradient is None:
        return namespace(leaf).zeros_like(leaf)
    if isinstance(gradient, SparseGradient):
        gradient = gradient.to_dense()
    if not _is_array(gradient):
        raise GradientError(f"{name}: its gradient must be an array, found {type(gradient).__name__}")
    if tuple(gradient.shape) != tuple(leaf.shape) or gradient.dtype != leaf.dtype:
        raise GradientError(
            f"{name}: its gradient must have shape {tuple(leaf.shape)} and dtype {leaf.dtype}, "
            f"found {tuple(gradient.shape)} and {gradient.dtype}"
        )
    return gradient


def _is_wrapped_single(gradients: Any, args: Sequence[Any]) -> bool:
    """Return True if `backward` returned the gradient of a single argument in a tuple."""
    return isinstance(gradients, (tuple, list)) and len(gradients) == 1 and not isinstance(args[0], (tuple, list))


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_float(value: Any) -> bool:
    return _is_array(value) and not is_integer(namespace(value), value) and "float" in str(value.dtype)


def _tree_leaves(tree: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield (path, array) for every floating array of nested tuples, lists and dicts."""
    if _is_float(tree):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _tree_leaves(value, (*path, key))
    elif isinstance(tree, (tuple, list)):
        for key, value in enumerate(tree):
            yield from _tree_leaves(value, (*path, key))


def _tree_map(f: Callable[[Any], Any], tree: Any) -> Any:
    """Return the tree with f applied to every floating array; lists become tuples."""
    if isinstance(tree, dict):
        return {key: _tree_map(f, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(_tree_map(f, value) for value in tree)
    return f(tree) if _is_float(tree) else tree


def _replace_leaf(tree: Any, path: KeyPath, leaf: Any) -> Any:
    """Return a copy of the tree with the array at `path` replaced."""
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
        raise InputError(f"check_gradients: float64 is not available on this device ({error})") from None


def _leaf_name(argument: str, path: KeyPath) -> str:
    return argument + "".join(f"[{key!r}]" for key in path)
