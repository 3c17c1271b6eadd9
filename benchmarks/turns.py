"""Contenders in processes of their own that take turns: each has its own number of threads, and no one runs beside it.

The child calls `serve(make)`; the parent makes a `Player` for each contender and asks each in turn. Threads that wait
for each other in one process would take cores from the next contender; here they idle until their turn.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from xprnn.bench import machine

__all__ = ["Player", "rounds", "serve"]

WARM = 0.05  # seconds of calls off the clock at the start of each turn: caches, pools, the processor's clock rate


class Player:
    """The parent's end of a contender.

    Args:
        script: the file that calls `serve`.
        task: what its `make` receives.
        threads: the threads it may use, and the cores on which it is kept; `cores` where those differ.
    """

    def __init__(self, script: str, task: dict[str, Any], threads: int, cores: int | None = None) -> None:
        allowed = machine.cores()
        machine.pin(allowed[: cores or threads])  # the child inherits it
        try:
            self.child = subprocess.Popen(
                [sys.executable, script, "--play", json.dumps(task | {"threads": threads})],
                env=machine.measuring_environment(threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        finally:
            machine.pin(allowed)
        self.said: Any = self._hear()  # whatever `make` returned beside the call

    def _hear(self) -> Any:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"a measuring process ended early, code {self.child.wait()}")
        return json.loads(line)

    def turn(self, seconds: float, word: str = "") -> float:
        """Seconds a call, over about so many seconds; the call receives the word."""
        assert self.child.stdin is not None
        self.child.stdin.write(f"{seconds} {word}\n")
        self.child.stdin.flush()
        return float(self._hear())

    def close(self) -> None:
        """End the process."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()


def serve(make: Callable[[dict[str, Any]], tuple[Callable[[str], Any], Any]]) -> None:
    """The child: `make(task)` returns the call, and what the parent should hear first."""
    call, said = make(json.loads(sys.argv[sys.argv.index("--play") + 1]))
    print(json.dumps(said), flush=True)
    for line in sys.stdin:
        wanted, _, word = line.strip().partition(" ")
        start = time.perf_counter()
        while (passed := time.perf_counter() - start) < WARM:
            call(word)
        count, start = 0, time.perf_counter()
        while not count or passed < float(wanted):
            call(word)
            count, passed = count + 1, time.perf_counter() - start
        print(passed / count, flush=True)


def rounds(players: dict[str, Player], count: int, seconds: float, word: str = "") -> dict[str, list[float]]:
    """Seconds a call of each player, one entry a round; who begins changes from round to round."""
    times: dict[str, list[float]] = {name: [] for name in players}
    order = list(players)
    for _ in range(count):
        for name in order:
            times[name].append(players[name].turn(seconds, word))
        order = order[1:] + order[:1]
    return times
