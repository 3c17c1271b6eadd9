"""Truncated back-propagation through time: long or endless sequences in windows, with carried state and burn-in.

Every k1 steps the loss of those steps is sent back through the last k2 >= k1 steps (Williams & Peng 1990). The sequence
arrives in chunks of any length, from a list or a generator, and no more than a window of it is ever held, so memory
doesn't grow with T.

    state = None
    for window in windows(chunks, k1=64, k2=128, burn_in=200):
        value, dparams, state = gradients(model, params, window, state, cross_entropy)
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
    """A stretch of the sequence: context that was walked before, then fresh steps."""

    x: Array  # (context + fresh, N, ...)
    target: Any  # (fresh, N, ...) of the fresh steps; None in burn-in
    new_steps: int
    stride: int  # steps from this window's start to the next one's


class WindowGradients(NamedTuple):
    """What a window gave: loss and gradients (None in burn-in), and the state in which the next window starts."""

    value: Array | None
    dparams: Params | None
    state: Any


def _check_sizes(k1: Any, k2: Any, burn_in: Any) -> None:
    for name, value, least in (("k1", k1, 1), ("k2", k2, k1), ("burn_in", burn_in, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            floor = "k1" if name == "k2" else least
            raise InputError(f"windows: {name} must be an integer >= {floor}, found {value!r}")


def _check_same_shape(name: str, before: Any, now: Any) -> None:
    if before is not None and tuple(before.shape[1:]) != tuple(now.shape[1:]):
        want, found = ("(" + ", ".join(map(str, ("any", *a.shape[1:]))) + ")" for a in (before, now))
        raise InputError(f"windows: {name} of every chunk must have the shape of the first, {want}, found {found}")


def _rechunk(chunks: Iterable[Any], sizes: Iterator[int]) -> Iterator[tuple[Array, Any, int]]:
    """(x, target, size asked for) of as many steps as asked for, the last perhaps shorter."""
    x: Any = None
    target: Any = None
    want = next(sizes)
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
        while x.shape[0] >= want:
            yield x[:want, ...], target[:want, ...], want
            x, target, want = x[want:, ...], target[want:, ...], next(sizes)
    if x is not None and x.shape[0]:
        yield x, target, want


def _chunk_sizes(k1: int, burn_in: int) -> Iterator[int]:
    while burn_in:  # in pieces too: settling the state must not take more memory than training
        yield min(k1, burn_in)
        burn_in -= min(k1, burn_in)
    while True:
        yield k1


def windows(chunks: Iterable[Any], k1: int, k2: int | None = None, burn_in: int = 0) -> Iterator[Window]:
    """Cut a sequence that arrives in chunks into windows for truncated back-propagation.

    Args:
        chunks: pairs (x, target), time-major with the same first length, any lengths; a list or a generator.
        k1: fresh steps for each window, >= 1.
        k2: how many steps a gradient goes back, >= k1; None: k1.
        burn_in: the first steps, that only settle the state: no loss, no gradient.

    Yields:
        Window.

    Raises:
        InputError: k1, k2, burn_in out of range, a chunk that is not such a pair, or is not as wide as those before.

    >>> import numpy as np
    >>> chunks = [(np.arange(5), np.arange(5)), (np.arange(5, 8), np.arange(5, 8))]
    >>> [(w.x.tolist(), w.fresh, w.advance) for w in windows(chunks, k1=3, k2=4)]
    [([0, 1, 2], 3, 2), ([2, 3, 4, 5], 3, 3), ([5, 6, 7], 2, 2)]
    """
    k2 = k1 if k2 is None else k2
    _check_sizes(k1, k2, burn_in)
    return _windows(chunks, k1, k2 - k1, burn_in)


def _windows(chunks: Iterable[Any], k1: int, context: int, burn_in: int) -> Iterator[Window]:
    held: Any = None
    left = burn_in
    for x, target, _ in _rechunk(chunks, _chunk_sizes(k1, burn_in)):
        fresh = x.shape[0]
        if left:
            left -= fresh
            yield Window(x, None, fresh, fresh)
            continue
        whole = x if held is None or not held.shape[0] else namespace(x).concat((held, x))
        advance = max(0, whole.shape[0] - context)
        yield Window(whole, target, fresh, advance)
        held = whole[advance:, ...]


def window_gradients(
    model: Any, params: Params, window: Window, state: Any, loss: Callable[[Array, Any], tuple[Array, Array]]
) -> WindowGradients:
    """The loss of a window's fresh steps, its gradients through the whole window, and the state for the next one.

    Args:
        model: a layer or Sequential, time-major.
        params: its parameters.
        window: from `windows`.
        state: None for the first window, then what the last call returned.
        loss: (y, target) -> value, dy; y is that of the fresh steps.

    Returns:
        WindowGradients(value, dparams, state); value and dparams are None in burn-in.

    Raises:
        InputError: a model that reads batch-first, in reverse or in both directions.

    >>> import numpy as np, xprnn
    >>> model, rng = xprnn.RNN(2, 3), np.random.default_rng(0)
    >>> params = model.init(rng, like=np.zeros(0))
    >>> stream = ((rng.standard_normal((10, 1, 2)), rng.standard_normal((10, 1, 3))) for _ in range(4))
    >>> state, seen = None, 0
    >>> for window in windows(stream, k1=8, k2=16, burn_in=5):
    ...     value, dparams, state = window_gradients(model, params, window, state, xprnn.mse)
    ...     seen += 0 if value is None else window.fresh
    >>> seen
    35
    """
    for part in getattr(model, "layers", {"": model}).values():
        for name in ("batch_first", "bidirectional", "reverse"):
            if getattr(part, name, False):
                raise InputError(f"bptt.gradients: windows walk forward in time, time first: the model has {name}=True")
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
