"""Truncated back-propagation through time: training on long or endless sequences in windows with a carried state.

Every k1 steps, the loss of these steps is back-propagated through the last k2 >= k1 steps. The first `burn_in` steps
only run the model forward, until its state is independent of the initial one. The sequence arrives in chunks of any
length, from a list or a generator. At most one window and one chunk are held in memory, so memory does not grow with T.
Source: Williams and Peng 1990.

    state = None
    for window in windows(chunks, k1=64, k2=128, burn_in=200):
        value, dparams, state = window_gradients(model, params, window, state, cross_entropy)
        if dparams is not None:
            params, opt_state = optimizer.update(params, dparams, opt_state)
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays.linear import zeros
from xprnn.arrays.namespace import Array, InputError, Params, namespace

__all__ = ["Window", "WindowGradients", "window_gradients", "windows"]


class Window(NamedTuple):
    """One window of the sequence: context steps that an earlier window ended with, then the new steps."""

    x: Array  # (context + new_steps, N, ...)
    target: Any  # (new_steps, N, ...), None in burn-in
    new_steps: int
    stride: int  # steps from the start of this window to the start of the next one


class WindowGradients(NamedTuple):
    """Loss and gradients of a window (None in burn-in), and the initial state of the next window."""

    value: Array | None
    dparams: Params | None
    state: Any


def _check_sizes(k1: Any, k2: Any, burn_in: Any) -> None:
    for name, value, minimum in (("k1", k1, 1), ("k2", k2, k1), ("burn_in", burn_in, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
            bound = "k1" if name == "k2" else minimum
            raise InputError(f"windows: {name} must be an integer >= {bound}, found {value!r}")


def _check_same_shape(name: str, first: Any, chunk: Any) -> None:
    if first is not None and tuple(first.shape[1:]) != tuple(chunk.shape[1:]):
        expected, found = ("(" + ", ".join(map(str, ("any", *a.shape[1:]))) + ")" for a in (first, chunk))
        raise InputError(f"windows: {name} of every chunk must have the shape of the first, {expected}, found {found}")


def _rechunk(chunks: Iterable[Any], sizes: Iterator[int]) -> Iterator[tuple[Array, Any]]:
    """Join and split the chunks into pairs (x, target) with `sizes` steps; the last pair may be shorter."""
    x: Any = None
    target: Any = None
    size = next(sizes)
    for chunk in chunks:
        if not isinstance(chunk, (tuple, list)) or len(chunk) != 2:
            raise InputError(f"windows: each chunk must be a pair (x, target), found {type(chunk).__name__}")
        if chunk[0].shape[0] != chunk[1].shape[0]:
            raise InputError(f"windows: a chunk has {chunk[0].shape[0]} steps of x but {chunk[1].shape[0]} of target")
        if not chunk[0].shape[0]:
            continue
        _check_same_shape("x", x, chunk[0])
        _check_same_shape("target", target, chunk[1])
        xp = namespace(chunk[0])
        x = chunk[0] if x is None or not x.shape[0] else xp.concat((x, chunk[0]))
        target = chunk[1] if target is None or not target.shape[0] else xp.concat((target, chunk[1]))
        while x.shape[0] >= size:
            yield x[:size, ...], target[:size, ...]
            x, target, size = x[size:, ...], target[size:, ...], next(sizes)
    if x is not None and x.shape[0]:
        yield x, target


def _chunk_sizes(k1: int, burn_in: int) -> Iterator[int]:
    """Yield the new steps of every window; burn-in is split too, so that it needs no more memory than training."""
    while burn_in:
        yield min(k1, burn_in)
        burn_in -= min(k1, burn_in)
    while True:
        yield k1


def windows(chunks: Iterable[Any], k1: int, k2: int | None = None, burn_in: int = 0) -> Iterator[Window]:
    """Cut a sequence that arrives in chunks into windows for truncated back-propagation.

    Args:
        chunks: list or generator of pairs (x, target), time-major, each pair with the same number of steps.
        k1: new steps of each window, >= 1.
        k2: steps that a gradient goes back, >= k1; None for k1.
        burn_in: number of first steps without loss and gradient, >= 0.

    Yields:
        Window.

    Raises:
        InputError: k1, k2 or burn_in is out of range; a chunk is not a pair (x, target), or differs from the first
            chunk in an axis other than time.

    >>> import numpy as np
    >>> chunks = [(np.arange(5), np.arange(5)), (np.arange(5, 8), np.arange(5, 8))]
    >>> [(w.x.tolist(), w.new_steps, w.stride) for w in windows(chunks, k1=3, k2=4)]
    [([0, 1, 2], 3, 2), ([2, 3, 4, 5], 3, 3), ([5, 6, 7], 2, 2)]
    """
    k2 = k1 if k2 is None else k2
    _check_sizes(k1, k2, burn_in)
    return _windows(chunks, k1, k2 - k1, burn_in)


def _windows(chunks: Iterable[Any], k1: int, context_steps: int, burn_in: int) -> Iterator[Window]:
    context: Any = None
    burn_in_left = burn_in
    for x, target in _rechunk(chunks, _chunk_sizes(k1, burn_in)):
        new_steps = x.shape[0]
        if burn_in_left:
            burn_in_left -= new_steps
            yield Window(x, None, new_steps, new_steps)
            continue
        window_x = x if context is None or not context.shape[0] else namespace(x).concat((context, x))
        stride = max(0, window_x.shape[0] - context_steps)
        yield Window(window_x, target, new_steps, stride)
        context = window_x[stride:, ...]


def window_gradients(
    model: Any, params: Params, window: Window, state: Any, loss: Callable[[Array, Any], tuple[Array, Array]]
) -> WindowGradients:
    """Return the loss of a window's new steps, its gradients through the whole window, and the next initial state.

    Args:
        model: a layer or Sequential, time-major.
        params: parameters of the model.
        window: a Window from `windows`.
        state: None for the first window, then the state that the last call returned.
        loss: function (y, target) -> value, dy of the outputs and targets of the new steps.

    Returns:
        WindowGradients(value, dparams, state); value and dparams are None in burn-in.

    Raises:
        InputError: the model is batch-first, reverse or bidirectional.

    >>> import numpy as np, xprnn
    >>> model, rng = xprnn.RNN(2, 3), np.random.default_rng(0)
    >>> params = model.init(rng, like=np.zeros(0))
    >>> stream = ((rng.standard_normal((10, 1, 2)), rng.standard_normal((10, 1, 3))) for _ in range(4))
    >>> state, trained_steps = None, 0
    >>> for window in windows(stream, k1=8, k2=16, burn_in=5):
    ...     value, dparams, state = window_gradients(model, params, window, state, xprnn.mse)
    ...     trained_steps += 0 if value is None else window.new_steps
    >>> trained_steps
    35
    """
    for layer in getattr(model, "layers", {"": model}).values():
        for name in ("batch_first", "bidirectional", "reverse"):
            if getattr(layer, name, False):
                raise InputError(
                    f"window_gradients: expected a time-major model that runs forward in time, found {name}=True"
                )
    if window.target is None:
        return WindowGradients(None, None, model(params, window.x, state)[1])
    y, final, tape = model.forward(params, window.x, state)
    context = window.x.shape[0] - window.new_steps
    value, dy = loss(y[context:, ...], window.target)
    if context:
        xp = namespace(dy)
        dy = xp.concat((zeros(xp, (context, *dy.shape[1:]), dy), dy))
    dparams = model.backward(tape, dy).dparams
    if window.stride < window.x.shape[0]:
        final = model(params, window.x[: window.stride, ...], state)[1] if window.stride else state
    return WindowGradients(value, dparams, final)
