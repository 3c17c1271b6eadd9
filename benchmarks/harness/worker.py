"""The program of a worker process: answers the requests of `worker_pool.Worker`, one JSON line each.

A request names a function as "module:name". An implementation that was loaded stays in memory until the next is loaded.
This file imports only the standard library, so that it also runs in a Python that has an older NumPy or none.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.harness.problem import Call

__all__ = ["WorkerError", "import_function", "load", "main", "time_call"]

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
LONG_CALL_S = 0.2  # a call that takes this long needs no warm-up: cold caches are less than a hundredth of it
_loaded_calls: dict[str, Call] = {}


class WorkerError(RuntimeError):
    """A function raised in a worker, or the worker ended. The message follows the worker's name."""


def import_function(name: str) -> Any:
    """Import the function "module:name"."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def load(factory: str, task: dict[str, Any], file: str) -> list[str]:
    """Build an implementation, write its results to a .npz file and run each call once.

    Args:
        factory: "module:name" of a function that returns an Implementation.
        task: keyword arguments of the factory.
        file: the .npz file to write.

    Returns:
        The names of the implementation's calls.
    """
    import numpy as np

    _loaded_calls.clear()
    gc.collect()
    implementation = import_function(factory)(**task)
    np.savez(file, **implementation.results())
    for call in implementation.calls.values():
        call()  # allocates memory that only the calls need
    _loaded_calls.update(implementation.calls)
    gc.collect()
    return list(_loaded_calls)


def time_call(call_name: str, warmup_s: float, min_s: float) -> tuple[float, float]:
    """Time a call of the loaded implementation.

    Args:
        call_name: one of the names that `load` returned.
        warmup_s: seconds of calls before the clock starts. A call of LONG_CALL_S or more is timed once, without.
        min_s: seconds of calls on the clock; at least one call.

    Returns:
        Seconds per call, and the CPU seconds of the whole turn.
    """
    call, clock, cpu = _loaded_calls[call_name], time.perf_counter, time.process_time()
    gc.disable()
    try:
        start = clock()
        call()
        elapsed = clock() - start
        if elapsed >= LONG_CALL_S:
            return elapsed, time.process_time() - cpu
        while clock() - start < warmup_s:
            call()
        count, start, elapsed = 0, clock(), 0.0
        while not count or elapsed < min_s:
            call()
            count, elapsed = count + 1, clock() - start
    finally:
        gc.enable()
    return elapsed / count, time.process_time() - cpu


def _die_with_parent(parent_pid: int) -> None:
    """Let Linux kill this process when its parent ends.

    Other POSIX systems resume and hang up a stopped process group that loses its parent, but not one that is about to
    stop at that moment.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:
            sys.exit(1)


def main(parent_pid: int) -> None:
    """Answer requests from standard input until it is closed. Output of libraries goes to standard error."""
    _die_with_parent(parent_pid)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                reply = {"value": import_function(request["function"])(**request["arguments"])}
            except Exception as error:  # reported by the parent
                reply = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(reply), file=out, flush=True)
