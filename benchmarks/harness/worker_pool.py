"""Contenders in processes of their own that take turns on the same cores.

In one process the thread pools of torch, XLA, ONNX Runtime and OpenBLAS are measured against each other: a pool's
workers spin for a while after their turn and take a core from the next contender. Here a process that is not at its
turn is stopped, where the system has signals for that.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from benchmarks.harness import machine, worker

__all__ = ["RoundTimes", "Worker", "WorkerError", "WorkerPool", "run_rounds"]

WARMUP_S = 0.015  # seconds of a turn off the clock, at least a call: caches, pools that fell asleep, the clock rate
MIN_TURN_S = 0.03  # and at least so many on it, at least a call
MAX_FOREIGN_CPU = (
    0.1  # of a core: what other processes may take of a round in which several threads wait for each other,
)
TICK_SLACK = 2  # and so many ticks: the system counts its time in whole ones
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
RETRY_FACTOR = 2  # times the rounds and seconds that are wanted, for as many quiet rounds as are needed at least


class WorkerError(RuntimeError):
    """A player raised something or ended; what, in words that follow its name."""


class Worker:
    """The parent's end of one process.

    Args:
        threads: that its libraries may use, and the cores that it is kept on; `cores` where those differ.
    """

    def __init__(self, threads: int, cores: int | None = None) -> None:
        self.threads = threads
        code = f"import sys; sys.path[:] = {sys.path}; from benchmarks.harness.worker import main; main({os.getpid()})"
        allowed = machine.available_cores()
        machine.pin_to_cores(allowed[: cores or threads])  # the child inherits it
        try:
            # A group of its own: Ctrl-C is for the parent, which then ends this one.
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                env=machine.benchmark_environment(threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                process_group=None if sys.platform == "win32" else 0,
            )
        finally:
            machine.pin_to_cores(allowed)

    @property
    def has_exited(self) -> bool:
        """Whether the process is there no more."""
        return self._process.poll() is not None

    def _send_signal(self, name: str) -> None:
        if hasattr(signal, name):
            self._process.send_signal(getattr(signal, name))

    def call(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """What a function of a module returns there; it and its arguments travel as JSON.

        Raises:
            WorkerError: the function raises, or the process ends.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"call": f"{function.__module__}:{function.__name__}", "arguments": arguments}
        self._send_signal("SIGCONT")
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"ended early, code {self._process.wait()}")
        self._send_signal("SIGSTOP")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"raises {answer['error']}")
        return answer["value"]

    def load(self, factory: Callable[..., Any], task: dict[str, Any], file: Path) -> list[str]:
        """Have `make(**task)` make a contender there and write its results; returns the names of its calls."""
        found: list[str] = self.call(
            worker.load, make=f"{factory.__module__}:{factory.__name__}", task=task, file=str(file)
        )
        return found

    def time_call(self, call_name: str, seconds: float = 0.0) -> tuple[float, float]:
        """Seconds a call, over so many or TURN; and the CPU seconds of the whole turn."""
        each, cpu = self.call(worker.time_call, what=call_name, warm=WARMUP_S, seconds=max(seconds, MIN_TURN_S))
        return each, cpu

    def close(self) -> None:
        """End the process, stopped or not."""
        self._process.kill()
        self._process.communicate()


class WorkerPool:
    """Players by name, started when they are first asked for and again after they ended; all end with the `with`."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}

    def worker(self, name: str, threads: int, cores: int | None = None) -> Worker:
        """The player of this name."""
        known = self._workers.get(name)
        if known is None or known.has_exited:
            if known is not None:
                known.close()
            self._workers[name] = Worker(threads, cores)
        return self._workers[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for player in self._workers.values():
            player.close()


class RoundTimes(NamedTuple):
    """What `rounds` saw.

    times: name -> seconds a call, one entry a round.
    discarded: rounds that are not among them because other processes were busy; -1: most were, and all are there.
    lost: name -> why it could not go on; it has no times.
    """

    times: dict[str, list[float]]
    discarded: int
    failed: dict[str, str]


def _total_cpu_seconds() -> float:
    """CPU seconds that all processes have used so far; 0 where the system doesn't tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, soft, steal = map(int, stat.read_text(encoding="ascii").split()[1:9])
    return (user + nice + system + irq + soft + steal) / TICKS_PER_SECOND - time.process_time()


def run_rounds(
    workers: dict[str, Worker], call_name: str, seconds: float, min_rounds: int, max_rounds: int, turn_s: float = 0.0
) -> RoundTimes:
    """Every player has a turn in each round; who begins changes from round to round.

    Thread pools stall when another process takes one of their cores: where a player has several threads, rounds in
    which others were busy are set aside.

    Args:
        players: name -> player, seated.
        what: the call.
        seconds: stop after the round in which this time is used up,
        least: but not before so many rounds,
        most: and after so many in any case.
        turn: seconds of each turn, if more than TURN.
    """
    judged = any(p.threads > 1 for p in workers.values())
    times: dict[str, list[float]] = {name: [] for name in workers}
    lost: dict[str, str] = {}
    order, quiet, start = list(workers), list[bool](), time.perf_counter()
    while order and sum(quiet) < max_rounds:
        passed = time.perf_counter() - start
        if sum(quiet) >= min_rounds:
            if passed > seconds:
                break
        elif len(quiet) >= RETRY_FACTOR * min_rounds and passed > RETRY_FACTOR * seconds:
            break
        busy, began = _total_cpu_seconds(), time.perf_counter()
        for name in order:
            try:
                each, cpu = workers[name].time_call(call_name, turn_s)
            except WorkerError as error:
                lost[name] = str(error)
                continue
            times[name].append(each)
            busy += cpu
        allowed = MAX_FOREIGN_CPU * (time.perf_counter() - began) + TICK_SLACK / TICKS_PER_SECOND
        quiet.append(not judged or _total_cpu_seconds() - busy < allowed)
        order = [name for name in order[1:] + order[:1] if name not in lost]
    left = {name: seen for name, seen in times.items() if name not in lost}
    if sum(quiet) < min_rounds:
        return RoundTimes(left, -1, lost)
    kept = {name: [t for t, q in zip(seen, quiet, strict=True) if q] for name, seen in left.items()}
    return RoundTimes(kept, quiet.count(False), lost)
