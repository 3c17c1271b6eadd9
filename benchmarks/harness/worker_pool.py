"""Runs implementations in worker processes that take turns on the same cores.

In one process the thread pools of torch, XLA, ONNX Runtime and OpenBLAS disturb each other: the threads of a pool spin
for a while after their turn and take a core from the next implementation. A worker process is stopped (SIGSTOP) between
its turns, on systems that have this signal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from benchmarks.harness import machine, worker
from benchmarks.harness.worker import WorkerError

__all__ = ["ProcessResult", "RoundTimes", "Worker", "WorkerError", "WorkerPool", "run_process", "run_rounds"]

ROOT = Path(__file__).resolve().parents[2]
WARMUP_S = 0.015  # calls before the clock starts: caches, sleeping thread pools, the clock rate
MIN_TURN_S = 0.03  # calls on the clock
MAX_FOREIGN_CPU = 0.1  # cores that other processes may use in a round of multi-threaded calls
TICK_SLACK = 2  # clock ticks added to it: the system counts CPU time in whole ticks
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
RETRY_FACTOR = 2  # a measurement is given up after this many times its rounds and seconds


@contextmanager
def _killed_after(process: subprocess.Popen[str], timeout_s: float | None) -> Iterator[threading.Event]:
    """Kill the process after a time; the event tells whether that happened."""
    expired = threading.Event()

    def kill() -> None:
        expired.set()
        process.kill()

    if timeout_s is None:
        yield expired
        return
    timer = threading.Timer(timeout_s, kill)
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()


class Worker:
    """A worker process, seen from its parent.

    Args:
        threads: number of threads that its libraries may use.
        cores: number of cores that it is pinned to; default: `threads`.
        python: its interpreter. One other than this process's finds `benchmarks` and `xprnn` in the repository.
        environment: variables added to its environment.
    """

    def __init__(
        self,
        threads: int = 1,
        cores: int | None = None,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.threads = threads
        # Another interpreter keeps its sys.path: ours would show it packages that were built for this one.
        path = f"sys.path[:] = {sys.path}" if python == sys.executable else f"sys.path.append({str(ROOT)!r})"
        code = f"import sys; {path}; from benchmarks.harness.worker import main; main({os.getpid()})"
        available = machine.available_cores()
        machine.pin_to_cores(available[: cores or threads])  # the child inherits it
        try:
            # Its own process group: Ctrl-C reaches the parent, which then ends the worker.
            self._process = subprocess.Popen(
                [python, "-c", code],
                env=machine.benchmark_environment(threads) | dict(environment or {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                process_group=None if sys.platform == "win32" else 0,
            )
        finally:
            machine.pin_to_cores(available)

    @property
    def has_exited(self) -> bool:
        """True if the process has ended."""
        return self._process.poll() is not None

    def _send_signal(self, name: str) -> None:
        if hasattr(signal, name):
            self._process.send_signal(getattr(signal, name))

    def call(self, function: Callable[..., Any], timeout_s: float | None = None, **arguments: Any) -> Any:
        """Call a function in the worker.

        Args:
            function: a function of an importable module.
            timeout_s: kill the worker after this time.
            arguments: keyword arguments; they and the result travel as JSON.

        Raises:
            ValueError: the function is defined in `__main__`, which the worker cannot import.
            WorkerError: the function raises, the process ends, or the time is over.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if function.__module__ == "__main__":
            raise ValueError(f"{function.__name__} is defined in __main__, which a worker cannot import")
        request = {"function": f"{function.__module__}:{function.__name__}", "arguments": arguments}
        self._send_signal("SIGCONT")
        with _killed_after(self._process, timeout_s) as expired:
            try:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except BrokenPipeError:
                line = ""
        if not line:
            code = self._process.wait()
            raise WorkerError(f"did not answer in {timeout_s} s" if expired.is_set() else f"ended early, code {code}")
        self._send_signal("SIGSTOP")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"raises {reply['error']}")
        return reply["value"]

    def load(self, factory: Callable[..., Any], task: dict[str, Any], file: Path) -> list[str]:
        """Build the implementation `factory(**task)` in the worker and write its results to a .npz file.

        Returns:
            The names of its calls.
        """
        names: list[str] = self.call(
            worker.load, factory=f"{factory.__module__}:{factory.__name__}", task=task, file=str(file)
        )
        return names

    def time_call(self, call_name: str, seconds: float = 0.0) -> tuple[float, float]:
        """Time a call for at least `seconds` or MIN_TURN_S. Return seconds per call and the turn's CPU seconds."""
        each, cpu = self.call(worker.time_call, call_name=call_name, warmup_s=WARMUP_S, min_s=max(seconds, MIN_TURN_S))
        return each, cpu

    def close(self) -> None:
        """End the process, stopped or not."""
        self._process.kill()
        self._process.communicate()


class WorkerPool:
    """Workers by name. A worker starts at its first use and again after it ended; all end with the `with` block."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}

    def worker(
        self,
        name: str,
        threads: int = 1,
        cores: int | None = None,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> Worker:
        """Return the worker of this name; see `Worker` for the arguments."""
        known = self._workers.get(name)
        if known is None or known.has_exited:
            if known is not None:
                known.close()
            self._workers[name] = Worker(threads, cores, python, environment)
        return self._workers[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for each in self._workers.values():
            each.close()


class RoundTimes(NamedTuple):
    """Result of `run_rounds`.

    times: name -> seconds per call, one entry a round.
    discarded: number of rounds left out because other processes were busy; -1 if most were and none is left out.
    failed: name -> why its measurement ended; it has no times.
    """

    times: dict[str, list[float]]
    discarded: int
    failed: dict[str, str]


def _foreign_cpu_seconds() -> float:
    """CPU seconds that all processes but this one have used so far; 0 if the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, soft, steal = map(int, stat.read_text(encoding="ascii").split()[1:9])
    return (user + nice + system + irq + soft + steal) / TICKS_PER_SECOND - time.process_time()


def run_rounds(
    workers: dict[str, Worker], call_name: str, seconds: float, min_rounds: int, max_rounds: int, turn_s: float = 0.0
) -> RoundTimes:
    """Time a call of every worker in rounds; each round starts with another worker.

    Thread pools stall while another process uses one of their cores. If a worker has several threads, rounds in which
    other processes were busy are discarded.

    Args:
        workers: name -> worker with a loaded implementation.
        call_name: the call.
        seconds: stop after the round in which this time is used up.
        min_rounds: rounds to measure in any case.
        max_rounds: rounds to measure at most.
        turn_s: seconds of each turn, if more than MIN_TURN_S.
    """
    discards = any(w.threads > 1 for w in workers.values())
    times: dict[str, list[float]] = {name: [] for name in workers}
    failed: dict[str, str] = {}
    order, quiet, start = list(workers), list[bool](), time.perf_counter()
    while order and sum(quiet) < max_rounds:
        elapsed = time.perf_counter() - start
        if sum(quiet) >= min_rounds:
            if elapsed > seconds:
                break
        elif len(quiet) >= RETRY_FACTOR * min_rounds and elapsed > RETRY_FACTOR * seconds:
            break
        expected_cpu, round_start = _foreign_cpu_seconds(), time.perf_counter()
        for name in order:
            try:
                each, cpu = workers[name].time_call(call_name, turn_s)
            except WorkerError as error:
                failed[name] = str(error)
                continue
            times[name].append(each)
            expected_cpu += cpu
        allowed = MAX_FOREIGN_CPU * (time.perf_counter() - round_start) + TICK_SLACK / TICKS_PER_SECOND
        quiet.append(not discards or _foreign_cpu_seconds() - expected_cpu < allowed)
        order = [name for name in order[1:] + order[:1] if name not in failed]
    remaining = {name: seen for name, seen in times.items() if name not in failed}
    if sum(quiet) < min_rounds:
        return RoundTimes(remaining, -1, failed)
    undisturbed = {name: [t for t, q in zip(seen, quiet, strict=True) if q] for name, seen in remaining.items()}
    return RoundTimes(undisturbed, quiet.count(False), failed)


class ProcessResult(NamedTuple):
    """Result of `run_process`: lines of standard output, seconds from the start to each line, the exit code."""

    lines: list[str]
    line_times: list[float]
    returncode: int


def run_process(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout_s: float | None = None,
) -> ProcessResult:
    """Run one fresh process and record when it prints each line. Its standard error is this process's."""
    lines, line_times, start = [], [], time.perf_counter()
    with subprocess.Popen(
        command, env=None if environment is None else dict(environment), stdout=subprocess.PIPE, text=True, cwd=folder
    ) as process:
        assert process.stdout is not None
        with _killed_after(process, timeout_s):
            for line in process.stdout:
                line_times.append(time.perf_counter() - start)
                lines.append(line.rstrip("\n"))
            returncode = process.wait()
    return ProcessResult(lines, line_times, returncode)
