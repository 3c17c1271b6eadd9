"""Threads that share a training step: each takes some of the streams.

The rows of a batch never meet in the network, so each thread runs forward, loss and backward on its own rows, and the
gradients are added. NumPy and the compiled kernels let go of Python's lock while they work. The matrix library should
run one thread for each of these: its own threads, which meet after every product, cost more than they gain here.
Shares and sums have a fixed order: the same number of threads gives the same bits.
"""

from __future__ import annotations

import contextvars
import ctypes
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from xprnn.arrays.namespace import Array, Params, is_numpy, namespace
from xprnn.training.losses import cross_entropy

__all__ = ["DataParallel", "default_num_threads", "keep_freed_memory"]

_MIN_STREAMS_PER_THREAD = 8  # streams for a thread: a step with fewer reads the weights as often for less
_MALLOPT_SETTINGS = (
    (-1, 1 << 30),
    (-3, 1 << 25),
)  # M_TRIM_THRESHOLD and, at its highest, M_MMAP_THRESHOLD of <malloc.h>


def default_num_threads(batch: int) -> int:
    """How many threads are likely to pay for this number of streams: one for each core, and for 8 streams or more.

    >>> default_num_threads(1)
    1
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, batch // _MIN_STREAMS_PER_THREAD))


def keep_freed_memory() -> bool:
    """Have this process keep the memory that it has freed, where the C library can be told to (glibc).

    A step takes and frees the same few megabytes again and again; the system would take them back and hand out zeroed
    pages the next time, which costs an LSTM's step about a tenth. Returns whether it was done.

    >>> keep_freed_memory() in (True, False)
    True
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(which, size) == 1 for which, size in _MALLOPT_SETTINGS)


class DataParallel:
    """`threads` threads, this one among them.

    Args:
        threads: 1 or more; arrays of other libraries than NumPy are always worked on by one.

    >>> import numpy as np, xprnn
    >>> model, ids = xprnn.RNN(5, 5), np.arange(12).reshape(3, 4) % 5
    >>> params = model.init(np.random.default_rng(0), like=np.zeros(0))
    >>> with DataParallel(2) as crew:
    ...     loss, grads, state = crew.gradients(model, params, ids, ids, None)
    >>> logits, alone, _ = model.forward(params, ids)
    >>> bool(np.isclose(loss, xprnn.cross_entropy(logits, ids)[0])), bool(np.allclose(state, alone))
    (True, True)
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, "xprnn") if threads > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def _parallel_map(self, call: Callable[..., Any], parts: Sequence[tuple[Any, ...]]) -> list[Any]:
        """call(*part) of every part: the first here, the others in the pool, NumPy's error state with them."""
        waiting = [self._pool.submit(contextvars.copy_context().run, call, *p) for p in parts[1:] if self._pool]
        first = call(*parts[0])
        return [first, *(w.result() for w in waiting)]

    def gradients(self, model: Any, params: Params, x: Array, targets: Array, state: Any) -> tuple[Array, Params, Any]:
        """One window: forward, mean cross-entropy, backward.

        Args:
            model: maps integers (T, N) and a state to logits (T, N, V).
            params: its parameters.
            x, targets: (T, N) integers.
            state: the state before, with N in its second axis, or None.

        Returns:
            the loss, a 0-d array; the gradients; the state after.
        """
        n = int(x.shape[1])
        count = max(1, min(self.threads, n)) if is_numpy(namespace(x)) else 1
        cuts = [n * k // count for k in range(count + 1)]

        def share(a: int, b: int) -> tuple[Array, Params, Any]:
            before = _tree_map(lambda s: s[:, a:b, ...], state)
            logits, after, tape = model.forward(params, x[:, a:b], before)
            loss, dlogits = cross_entropy(logits, targets[:, a:b])
            if count == 1:
                return loss, model.backward(tape, dlogits).dparams, after
            part = (b - a) / n  # a mean of means, each by its rows
            return loss * part, model.backward(tape, dlogits * part).dparams, after

        done = self._parallel_map(share, list(itertools.pairwise(cuts)))
        (loss, grads, after), *others = done
        for one, more, _ in others:
            loss, grads = loss + one, {k: g + more[k] for k, g in grads.items()}
        return loss, grads, _concat_states([d[2] for d in done]) if others else after


def _tree_map(change: Callable[[Array], Array], state: Any) -> Any:
    """`change` of every array of a state: None, an array, or tuples and dicts of them."""
    if isinstance(state, dict):
        return {k: _tree_map(change, s) for k, s in state.items()}
    if isinstance(state, tuple):
        return tuple(_tree_map(change, s) for s in state)
    return None if state is None else change(state)


def _concat_states(states: list[Any]) -> Any:
    """The states of all shares, side by side along N."""
    first = states[0]
    if isinstance(first, dict):
        return {k: _concat_states([s[k] for s in states]) for k in first}
    if isinstance(first, tuple):
        return tuple(_concat_states([s[i] for s in states]) for i in range(len(first)))
    return None if first is None else namespace(first).concat(states, axis=1)
