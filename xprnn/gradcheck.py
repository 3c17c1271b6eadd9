"""Gradient check: compares a backward pass with central differences in float64, along random directions.

For outputs y = f(a, b, ...) and a random cotangent u, the gradient da satisfies <v, da> = <u, df/da v> for every
direction v. The right side needs no derivative code: it is approximated by (f(a + h v) - f(a - h v)) / 2h at two steps
h, combined so that the h^2 error cancels (Richardson extrapolation). One argument is varied at a time, so that an error
names it. The cotangent is random, because a cotangent of ones (the gradient of `y.sum()`) would not detect a backward
pass that reverses time. A random one detects every wrong linear map with probability 1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
        forward: forward(*args) -> (outputs, tape). The outputs are arrays or floats (Python's or NumPy's), alone or in
            tuples, lists and dicts; integers and None are ignored.
        backward: backward(tape, cotangents) -> gradients. The cotangents have the structure of the outputs, with an
            array for an array and a float for a float. The result is a tuple with a gradient for each argument, in the
            structure of the argument; for a single argument it may be the gradient itself. None means that the argument
            has no influence, and is checked as zero.
        args: list or tuple of arguments: arrays or floats, alone or in tuples, lists and dicts. Floats are converted to
            float64; integers and objects of other types are held constant.
        names: name of each argument in errors; None: args[0], args[1], ...
        rng: source of the directions and cotangents; None: a fixed seed.
        directions: number of random directions for each array, at least 1.
        rtol: allowed difference, relative to the sum of the absolute values of the products compared; above 0, below 1.

    Returns:
        array name -> largest relative difference.

    Raises:
        GradientError: a gradient is wrong, has the wrong shape or is missing. The message names the array and gives
            both values.
        NotDifferentiableError: `forward` has a kink or jump at `args`, returns nan or infinity, or returns different
            outputs for the same arguments.
        InputError: nothing can be compared, because no argument or no output is a float, `directions` is 0, or the
            outputs are so large that their rounding exceeds their change; an output has a type that cannot be checked,
            such as complex; the library or device has no float64; `args` is not a list or tuple, `names` has another
            length, `rtol` is out of range, or `forward` does not return a pair.

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
    _check_limits(directions, rtol)
    for name, argument in zip(names, args, strict=True):
        _check_types(f"argument {name}", argument, others_allowed=True)
    args = tuple(_tree_map(_to_float64, a) for a in args)
    floats = [(i, path, leaf) for i, a in enumerate(args) for path, leaf in _tree_leaves(a)]
    if not floats:
        raise InputError("check_gradients: no argument of a floating dtype, nothing to check")
    outputs, tape = _check_pair(forward(*args))
    _check_outputs(outputs, _check_pair(forward(*args))[0])
    worst: dict[str, float] = {}
    for k in range(directions):
        cotangents = _tree_map(lambda y: _like(rng.standard_normal(_shape(y)), y), outputs)
        weights = [np.array(_to_host(u)) for _, u in _tree_leaves(cotangents)]  # backward may overwrite its cotangents
        gradients = backward(tape, cotangents)
        gradients = (gradients,) if len(args) == 1 and not _is_wrapped_single(gradients, args) else gradients
        _check_gradient_count(gradients, len(args))
        weighted = _WeightedOutput(forward, args, outputs, weights)
        for i, path, leaf in floats:
            name = _leaf_name(names[i], path)
            gradient = _leaf_gradient(name, gradients[i], path, leaf)
            error = _check_leaf(weighted, name, i, path, leaf, gradient, rng, rtol, check_kinks=not k)
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


def _check_limits(directions: Any, rtol: Any) -> None:
    """Raise InputError for numbers with which the check would accept every gradient."""
    if not directions >= 1:
        raise InputError(f"check_gradients: directions must be at least 1, found {directions}")
    if not 0 < rtol < 1:
        raise InputError(f"check_gradients: rtol must be above 0 and below 1, found {rtol}")


def _check_types(name: str, tree: Any, others_allowed: bool) -> None:
    """Raise InputError for numbers that are neither floats nor integers, and for other types unless they are allowed.

    Without this check they would be left out of the comparison, and a wrong gradient would pass.
    """
    for path, value in _all_leaves(tree):
        if value is None or isinstance(value, (bool, int)) or _is_float(value):
            continue
        if _is_array(value) or isinstance(value, complex):
            if any(kind in str(getattr(value, "dtype", "")) for kind in ("int", "bool")):
                continue
            found = f"dtype {value.dtype}" if _is_array(value) else "a complex number"
        elif others_allowed:
            continue
        else:
            found = type(value).__name__
        raise InputError(
            f"check_gradients: {name}{_leaf_name('', path)}: expected real floats or integers in arrays, tuples, lists"
            f" and dicts, found {found}"
        )


def _check_outputs(outputs: Any, repeated: Any) -> None:
    """Raise unless the outputs have finite floats to compare, and are the same for the same arguments."""
    _check_types("output ", outputs, others_allowed=False)
    floats = dict(_tree_leaves(outputs))
    if not floats:
        raise InputError("check_gradients: forward returns no array or number of a floating dtype, nothing to compare")
    again = dict(_tree_leaves(repeated))
    for path in floats.keys() | again.keys():
        name = _leaf_name("", path)
        if path not in floats or path not in again or not _same_numbers(floats[path], again[path]):
            raise NotDifferentiableError(f"forward returns different outputs for the same arguments (output {name})")
        if not np.isfinite(_to_host(floats[path])).all():
            raise NotDifferentiableError(f"forward returns nan or infinity (output {name})")


def _same_numbers(a: Any, b: Any) -> bool:
    return np.array_equal(_to_host(a), _to_host(b), equal_nan=True)


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
    """The function t -> weights * forward(args with t v added to one array), elementwise and flattened."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    outputs: Any
    weights: Sequence[Any]  # the cotangents of the floating outputs

    def evaluate_at(self, i: int, path: KeyPath, leaf: Any, direction: Any, t: float) -> Any:
        perturbed = leaf + _like(t * direction, leaf)
        args = [*self.args]
        args[i] = _replace_leaf(args[i], path, perturbed)
        outputs, _ = self.forward(*args)
        return self.elementwise_products(outputs)

    def elementwise_products(self, outputs: Any) -> Any:
        floats = dict(_tree_leaves(outputs))
        expected = [path for path, _ in _tree_leaves(self.outputs)]
        if list(floats) != expected:
            path = next(iter({*floats} ^ {*expected}), ())
            raise NotDifferentiableError(
                f"forward returns a float at some arguments and none at others (output {_leaf_name('', path)})"
            )
        return np.concatenate([(_to_host(y) * u).ravel() for y, u in zip(floats.values(), self.weights, strict=True)])


def _check_leaf(
    weighted: _WeightedOutput,
    name: str,
    i: int,
    path: KeyPath,
    leaf: Any,
    gradient: Any,
    rng: Generator,
    rtol: float,
    check_kinks: bool,
) -> float:
    """Return the relative difference for one array along one random direction, or raise if it exceeds `rtol`."""
    direction = rng.standard_normal(_shape(leaf))
    direction /= max(float(np.linalg.norm(direction)), 1e-300)
    products = _to_host(gradient) * direction
    analytic, magnitude = float(products.sum()), float(np.abs(products).sum())
    base = weighted.elementwise_products(weighted.outputs)
    noise = 1e-15 * float(np.abs(base).sum())

    def f(t: float) -> Any:
        return weighted.evaluate_at(i, path, leaf, direction, t)

    if check_kinks:  # one random direction shows every kink
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
            if abs(total - analytic) > rtol * size:
                _check_resolved(name, size, roundoff)
            return error
    raise GradientError(
        f"{name}: backward says {analytic:.10g}, central differences say {numeric:.10g} "
        f"(relative difference {smallest_error:.3g}, allowed {rtol:.3g})"
    )


def _check_resolved(name: str, size: float, roundoff: float) -> None:
    """Raise InputError if the rounding of the outputs exceeds their change, so that every gradient would pass."""
    if roundoff > size > 0:
        raise InputError(
            f"check_gradients: {name}: the outputs round off more ({roundoff:.2g}) than they change with it"
            f" ({size:.2g}), nothing can be compared; leave large constants out of the outputs"
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
        return np.zeros(_shape(leaf))
    if _is_scalar(leaf) and _is_real_number(gradient):
        return gradient
    if isinstance(gradient, SparseGradient):
        gradient = gradient.to_dense()
    if not _is_array(gradient):
        raise GradientError(f"{name}: its gradient must be an array, found {type(gradient).__name__}")
    dtype = np.dtype("float64") if _is_scalar(leaf) else leaf.dtype
    if tuple(gradient.shape) != _shape(leaf) or gradient.dtype != dtype:
        raise GradientError(
            f"{name}: its gradient must have shape {_shape(leaf)} and dtype {dtype}, "
            f"found {tuple(gradient.shape)} and {gradient.dtype}"
        )
    return gradient


def _is_wrapped_single(gradients: Any, args: Sequence[Any]) -> bool:
    """Return True if `backward` returned the gradient of a single argument in a tuple."""
    return isinstance(gradients, (tuple, list)) and len(gradients) == 1 and not isinstance(args[0], (tuple, list))


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_scalar(value: Any) -> bool:
    """True for a float of Python or NumPy; False for an array without dimensions."""
    return isinstance(value, (float, np.floating))


def _is_real_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.floating, np.integer)) and not isinstance(value, bool)


def _is_float(value: Any) -> bool:
    return _is_scalar(value) or (
        _is_array(value) and not is_integer(namespace(value), value) and "float" in str(value.dtype)
    )


def _shape(leaf: Any) -> tuple[int, ...]:
    return () if _is_scalar(leaf) else tuple(leaf.shape)


def _to_host(leaf: Any) -> Any:
    return np.asarray(leaf) if _is_scalar(leaf) or _is_real_number(leaf) else to_numpy(leaf)


def _like(values: Any, leaf: Any) -> Any:
    """Return NumPy numbers as an array of the leaf's library, or as a float of its type."""
    return type(leaf)(values) if _is_scalar(leaf) else from_numpy(values, like=leaf)


def _all_leaves(tree: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield (path, value) for everything in nested tuples, lists and dicts that is none of these."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _all_leaves(value, (*path, key))
    elif isinstance(tree, (tuple, list)):
        for key, value in enumerate(tree):
            yield from _all_leaves(value, (*path, key))
    else:
        yield path, tree


def _tree_leaves(tree: Any) -> Iterator[tuple[KeyPath, Any]]:
    """Yield (path, value) for every floating array and every float of nested tuples, lists and dicts."""
    return ((path, value) for path, value in _all_leaves(tree) if _is_float(value))


def _tree_map(f: Callable[[Any], Any], tree: Any) -> Any:
    """Return the tree with f applied to every floating array and every float."""
    if isinstance(tree, Mapping):
        return {key: _tree_map(f, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return _rebuild(tree, [_tree_map(f, value) for value in tree])
    return f(tree) if _is_float(tree) else tree


def _rebuild(tree: Any, values: list[Any]) -> Any:
    """Return a tuple, named tuple or list of the type of `tree` with other values."""
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


def _replace_leaf(tree: Any, path: KeyPath, leaf: Any) -> Any:
    """Return a copy of the tree with the array at `path` replaced."""
    if not path:
        return leaf
    if isinstance(tree, Mapping):
        return {k: _replace_leaf(v, path[1:], leaf) if k == path[0] else v for k, v in tree.items()}
    return _rebuild(tree, [_replace_leaf(v, path[1:], leaf) if k == path[0] else v for k, v in enumerate(tree)])


def _to_float64(array: Any) -> Any:
    if _is_scalar(array):
        return array if isinstance(array, float) else np.float64(array)
    xp = namespace(array)
    try:
        return xp.astype(array, xp.float64)
    except Exception as error:
        raise InputError(f"check_gradients: float64 is not available on this device ({error})") from None


def _leaf_name(argument: str, path: KeyPath) -> str:
    return argument + "".join(f"[{key!r}]" for key in path)
