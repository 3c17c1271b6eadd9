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

__all__ = ["Company", "Player", "PlayerError", "Seen", "rounds"]

WARM = 0.015  # seconds of a turn off the clock, at least a call: caches, pools that fell asleep, the clock rate
TURN = 0.03  # and at least so many on it, at least a call
QUIET = 0.1  # of a core: what other processes may take of a round in which several threads wait for each other,
TICKS = 2  # and so many ticks: the system counts its time in whole ones
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
PATIENCE = 2  # times the rounds and seconds that are wanted, for as many quiet rounds as are needed at least


class PlayerError(RuntimeError):
    """A player raised something or ended; what, in words that follow its name."""


class Player:
    """The parent's end of one process.

    Args:
        threads: that its libraries may use, and the cores that it is kept on; `cores` where those differ.
    """

    def __init__(self, threads: int, cores: int | None = None) -> None:
        self.threads = threads
        code = f"import sys; sys.path[:] = {sys.path}; from benchmarks.harness.worker import main; main({os.getpid()})"
        allowed = machine.cores()
        machine.pin(allowed[: cores or threads])  # the child inherits it
        try:
            # A group of its own: Ctrl-C is for the parent, which then ends this one.
            self._child = subprocess.Popen(
                [sys.executable, "-c", code],
                env=machine.measuring_environment(threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                process_group=None if sys.platform == "win32" else 0,
            )
        finally:
            machine.pin(allowed)

    @property
    def ended(self) -> bool:
        """Whether the process is there no more."""
        return self._child.poll() is not None

    def _signal(self, name: str) -> None:
        if hasattr(signal, name):
            self._child.send_signal(getattr(signal, name))

    def call(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """What a function of a module returns there; it and its arguments travel as JSON.

        Raises:
            PlayerError: the function raises, or the process ends.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        asked = {"call": f"{function.__module__}:{function.__name__}", "arguments": arguments}
        self._signal("SIGCONT")
        try:
            self._child.stdin.write(json.dumps(asked) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PlayerError(f"ended early, code {self._child.wait()}")
        self._signal("SIGSTOP")
        answer = json.loads(line)
        if "error" in answer:
            raise PlayerError(f"raises {answer['error']}")
        return answer["value"]

    def sit(self, make: Callable[..., Any], task: dict[str, Any], file: Path) -> list[str]:
        """Have `make(**task)` make a contender there and write its results; returns the names of its calls."""
        found: list[str] = self.call(worker.sit, make=f"{make.__module__}:{make.__name__}", task=task, file=str(file))
        return found

    def turn(self, what: str, seconds: float = 0.0) -> tuple[float, float]:
        """Seconds a call, over so many or TURN; and the CPU seconds of the whole turn."""
        each, cpu = self.call(worker.turn, what=what, warm=WARM, seconds=max(seconds, TURN))
        return each, cpu

    def close(self) -> None:
        """End the process, stopped or not."""
        self._child.kill()
        self._child.communicate()


class Company:
    """Players by name, started when they are first asked for and again after they ended; all end with the `with`."""

    def __init__(self) -> None:
        self._players: dict[str, Player] = {}

    def player(self, name: str, threads: int, cores: int | None = None) -> Player:
        """The player of this name."""
        known = self._players.get(name)
        if known is None or known.ended:
            if known is not None:
                known.close()
            self._players[name] = Player(threads, cores)
        return self._players[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for player in self._players.values():
            player.close()


class Seen(NamedTuple):
    """What `rounds` saw.

    times: name -> seconds a call, one entry a round.
    set_aside: rounds that are not among them because other processes were busy; -1: most were, and all are there.
    lost: name -> why it could not go on; it has no times.
    """

    times: dict[str, list[float]]
    set_aside: int
    lost: dict[str, str]


def _busy() -> float:
    """CPU seconds that all processes have used so far; 0 where the system doesn't tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, soft, steal = map(int, stat.read_text(encoding="ascii").split()[1:9])
    return (user + nice + system + irq + soft + steal) / TICKS_A_SECOND - time.process_time()


def rounds(players: dict[str, Player], what: str, seconds: float, least: int, most: int, turn: float = 0.0) -> Seen:
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
    judged = any(p.threads > 1 for p in players.values())
    times: dict[str, list[float]] = {name: [] for name in players}
    lost: dict[str, str] = {}
    order, quiet, start = list(players), list[bool](), time.perf_counter()
    while order and sum(quiet) < most:
        passed = time.perf_counter() - start
        if sum(quiet) >= least:
            if passed > seconds:
                break
        elif len(quiet) >= PATIENCE * least and passed > PATIENCE * seconds:
            break
        busy, began = _busy(), time.perf_counter()
        for name in order:
            try:
                each, cpu = players[name].turn(what, turn)
            except PlayerError as error:
                lost[name] = str(error)
                continue
            times[name].append(each)
            busy += cpu
        allowed = QUIET * (time.perf_counter() - began) + TICKS / TICKS_A_SECOND
        quiet.append(not judged or _busy() - busy < allowed)
        order = [name for name in order[1:] + order[:1] if name not in lost]
    left = {name: seen for name, seen in times.items() if name not in lost}
    if sum(quiet) < least:
        return Seen(left, -1, lost)
    kept = {name: [t for t, q in zip(seen, quiet, strict=True) if q] for name, seen in left.items()}
    return Seen(kept, quiet.count(False), lost)
