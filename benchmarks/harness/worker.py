"""A player's process: does what the parent (players.py) asks for, one JSON line each way.

The parent names functions by module and name, so that this file knows none of them. What has been asked to `load` keeps
its calls and arrays until the next one sits down.
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
from typing import Any

import numpy as np

from benchmarks.harness.problem import Call

__all__ = ["import_function", "load", "main", "time_call"]

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
LONG_CALL_S = 0.2  # seconds of a call that is its own warming up: what it finds cold is a hundredth of it
_loaded_calls: dict[str, Call] = {}


def import_function(name: str) -> Any:
    """The function of "module:name"."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def load(factory: str, task: dict[str, Any], file: str) -> list[str]:
    """Make a contender of the task, write its results to a .npz file; returns the names of its calls."""
    _loaded_calls.clear()
    gc.collect()
    contender = import_function(factory)(**task)
    np.savez(file, **contender.results())
    for call in contender.calls.values():
        call()  # so that memory which only the calls take is there
    _loaded_calls.update(contender.calls)
    gc.collect()
    return list(_loaded_calls)


def time_call(call_name: str, warmup_s: float, min_s: float) -> tuple[float, float]:
    """Seconds a call, after `warmup_s` seconds of calls off the clock and over `seconds`; and the turn's CPU seconds.

    A call that takes LONG is timed at once, and only once.
    """
    call, clock, cpu = _loaded_calls[call_name], time.perf_counter, time.process_time()
    gc.disable()
    try:
        start = clock()
        call()
        passed = clock() - start
        if passed >= LONG_CALL_S:
            return passed, time.process_time() - cpu
        while clock() - start < warmup_s:
            call()
        count, start, passed = 0, clock(), 0.0
        while not count or passed < min_s:
            call()
            count, passed = count + 1, clock() - start
    finally:
        gc.enable()
    return passed / count, time.process_time() - cpu


def _die_with_parent(parent: int) -> None:
    """Have Linux end this process with its parent.

    A stopped group that loses its last relative is woken and hung up on by any POSIX system; one that is about to stop
    at that moment is not.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit(1)


def main(parent_pid: int) -> None:
    """Answer until nobody asks any more; what a library prints goes to standard error."""
    _die_with_parent(parent_pid)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                answer = {"value": import_function(asked["call"])(**asked["arguments"])}
            except Exception as error:  # the parent's report names it
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=out, flush=True)
