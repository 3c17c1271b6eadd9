"""Data-parallel gradients: threads that compute forward, loss and backward on shards of the batch.

The rows of a batch do not interact in the network. Each thread runs forward, loss and backward on its own rows, and the
parameter gradients are added. NumPy and the compiled kernels release Python's global interpreter lock while they
compute. Limit BLAS to one thread when you use this module: BLAS threads synchronise after every product, which costs
more than it gains for the small matrices of one step. Shards and sums have a fixed order, so the same number of threads
gives the same bits.
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

_MIN_ROWS_PER_THREAD = 8  # with fewer rows, a thread spends most of its time reading the weights
_MALLOPT_SETTINGS = (
    (-1, 1 << 30),  # M_TRIM_THRESHOLD of <malloc.h>, bytes
    (-3, 1 << 25),  # M_MMAP_THRESHOLD, bytes: the largest value that glibc accepts
)


def default_num_threads(batch: int) -> int:
    """Return a number of threads that is likely to pay: at most one per core, each with at least 8 rows of the batch.

    Args:
        batch: N, rows of the batch.

    >>> default_num_threads(1)
    1
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, batch // _MIN_ROWS_PER_THREAD))


def keep_freed_memory() -> bool:
    """Tell the C library (glibc) to keep freed memory in the process instead of returning it to the system.

    A training step allocates and frees the same few megabytes every time. If freed memory returns to the system, the
    next allocation gets new zeroed pages, which costs about a tenth of the time of an LSTM's step.

    Returns:
        True if both settings were accepted, False if the C library has no mallopt.

    >>> keep_freed_memory() in (True, False)
    True
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in _MALLOPT_SETTINGS)


class DataParallel:
    """Computes the gradients of a batch with several threads, each on a shard of the rows.

    Use it as a context manager: leaving the context shuts the thread pool down.

    Args:
        threads: >= 1, the calling thread included. Arrays of libraries other than NumPy always use one thread.

    >>> import numpy as np, xprnn
    >>> model, ids = xprnn.RNN(5, 5), np.arange(12).reshape(3, 4) % 5
    >>> params = model.init(np.random.default_rng(0), like=np.zeros(0))
    >>> with DataParallel(2) as data_parallel:
    ...     loss, grads, state = data_parallel.gradients(model, params, ids, ids, None)
    >>> logits, expected_state, _ = model.forward(params, ids)
    >>> bool(np.isclose(loss, xprnn.cross_entropy(logits, ids)[0])), bool(np.allclose(state, expected_state))
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

    def _parallel_map(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Return function(*a) for every a in `arguments`, in order: the first in this thread, the others in the pool.

        Each pool thread runs in a copy of the context variables, so that np.errstate holds there too.
        """
        futures = [self._pool.submit(contextvars.copy_context().run, function, *a) for a in arguments[1:] if self._pool]
        first = function(*arguments[0])
        return [first, *(future.result() for future in futures)]

    def gradients(self, model: Any, params: Params, x: Array, targets: Array, state: Any) -> tuple[Array, Params, Any]:
        """Run forward, mean cross-entropy and backward on one window.

        Args:
            model: maps integers (T, N) and a state to logits (T, N, V).
            params: parameters of the model.
            x, targets: (T, N) integers.
            state: initial state, arrays with N as their second axis, or None for zeros.

        Returns:
            The loss (a 0-d array, nats per position), the gradients of the parameters, and the final state.
        """
        batch = int(x.shape[1])
        num_shards = max(1, min(self.threads, batch)) if is_numpy(namespace(x)) else 1
        bounds = [batch * k // num_shards for k in range(num_shards + 1)]

        def shard_gradients(start: int, stop: int) -> tuple[Array, Params, Any]:
            initial_state = _tree_map(lambda s: s[:, start:stop, ...], state)
            logits, final_state, tape = model.forward(params, x[:, start:stop], initial_state)
            loss, dlogits = cross_entropy(logits, targets[:, start:stop])
            if num_shards == 1:
                return loss, model.backward(tape, dlogits).dparams, final_state
            weight = (stop - start) / batch  # the mean over the batch is the weighted mean of the shards' means
            return loss * weight, model.backward(tape, dlogits * weight).dparams, final_state

        results = self._parallel_map(shard_gradients, list(itertools.pairwise(bounds)))
        (loss, grads, final_state), *others = results
        for shard_loss, shard_grads, _ in others:
            loss, grads = loss + shard_loss, {name: g + shard_grads[name] for name, g in grads.items()}
        return loss, grads, _concat_states([r[2] for r in results]) if others else final_state


def _tree_map(function: Callable[[Array], Array], state: Any) -> Any:
    """Apply `function` to every array of a state: None, an array, or tuples and dicts of them."""
    if isinstance(state, dict):
        return {k: _tree_map(function, s) for k, s in state.items()}
    if isinstance(state, tuple):
        return tuple(_tree_map(function, s) for s in state)
    return None if state is None else function(state)


def _concat_states(states: list[Any]) -> Any:
    """Concatenate the states of all shards along N, the second axis of every array."""
    first = states[0]
    if isinstance(first, dict):
        return {k: _concat_states([s[k] for s in states]) for k in first}
    if isinstance(first, tuple):
        return tuple(_concat_states([s[i] for s in states]) for i in range(len(first)))
    return None if first is None else namespace(first).concat(states, axis=1)
