"""Contenders in processes of their own: whose turn it is, who is refused, who dies. No time is judged."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import contenders, machine, worker, worker_pool
from benchmarks.harness.problem import FORWARD, Implementation


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name in ("WARM", "TURN"):
        monkeypatch.setattr(worker_pool, name, 0.0)


@pytest.fixture
def company():
    with worker_pool.WorkerPool() as those:
        yield those


def actor(part, seconds=0.0):
    """What a player's process makes of a part that it is to play."""

    def results():
        if part == "lazy":
            raise OSError("no licence")
        y = np.ones((3, 2)) * (np.nan if part == "nans" else 1.01 if part == "liar" else 1.0)
        return {"y": y[:-1] if part == "short" else y}

    def call():
        if part == "mortal" and seconds:
            os._exit(3)
        time.sleep(seconds)

    return Implementation({FORWARD: results if part == "lazy" else call}, results)


def play(company, folder, parts, **options):
    """Actors by name, seated and agreeing; then their rounds."""
    those = {name: company.worker(name, 1) for name in parts}
    seated, wrong = contenders.check_agreement(those, actor, parts, folder)
    chosen = {"seconds": 0.0, "least": 2, "most": 2} | options
    return worker_pool.run_rounds({name: those[name] for name in seated}, FORWARD, **chosen), wrong


def test_players_take_turns_and_each_times_its_own(company, tmp_path):
    parts = {"quick": {"part": "a"}, "slow": {"part": "b", "seconds": 0.02}}
    seen, wrong = play(company, tmp_path, parts, most=3, seconds=100.0)
    assert not wrong
    assert {name: len(times) for name, times in seen.times.items()} == {"quick": 3, "slow": 3}
    assert min(seen.times["slow"]) >= 0.02 > min(seen.times["quick"])  # it slept in its own process


def test_who_disagrees_or_raises_is_named_and_refused(company, tmp_path):
    parts = {name: {"part": name} for name in ("core", "liar", "lazy", "short", "nans", "fair")}
    seen, wrong = play(company, tmp_path, parts)
    assert list(seen.times) == ["core", "fair"]
    assert wrong == [
        "liar: y is off by 1.0e-02",
        "lazy raises OSError: no licence",
        "short: y is off by inf",
        "nans: y is off by nan",
    ]


def test_who_dies_in_its_turn_is_named_and_the_others_go_on(company, tmp_path, monkeypatch):
    parts = {"core": {"part": "core"}, "mortal": {"part": "mortal"}}
    those = {name: company.worker(name, 1) for name in parts}
    contenders.check_agreement(those, actor, parts, tmp_path)
    those["mortal"]._child.kill()
    seen = worker_pool.run_rounds(those, FORWARD, 0.0, 3, 3)
    assert len(seen.times["core"]) == 3
    assert list(seen.times) == ["core"]
    assert seen.failed["mortal"].startswith("ended early, code ")
    again = company.worker("mortal", 1)  # another one, for the next row
    assert contenders.check_agreement({"mortal": again}, actor, parts, tmp_path)[0] == {"mortal": [FORWARD]}


def test_who_ends_while_it_sits_down_is_named(company, tmp_path):
    parts = {"core": {"part": "core"}, "mortal": {"part": "mortal", "seconds": 1.0}}
    seen, wrong = play(company, tmp_path, parts)
    assert list(seen.times) == ["core"]
    assert wrong == ["mortal ended early, code 3"]


def state_of(player):
    return Path(f"/proc/{player._process.pid}/stat").read_text(encoding="ascii").rpartition(") ")[2][0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it is read from Linux's /proc")
def test_a_player_that_is_not_at_its_turn_is_stopped(company):
    player = company.worker("someone", 1)
    player.call(machine.available_cores)
    deadline = time.monotonic() + 10
    while state_of(player) != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state_of(player) == "T"
    player.close()
    assert player.has_exited


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it is read from Linux's /proc")
@pytest.mark.parametrize("hangup", ["SIG_DFL", "SIG_IGN"])
def test_stopped_players_end_with_a_parent_that_is_killed(hangup):
    code = (
        f"import os, signal; signal.signal(signal.SIGHUP, signal.{hangup})\n"
        "from benchmarks.harness import machine, players\n"
        "one = players.Player(1); one.call(machine.cores)\n"
        "print(one._child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    said = subprocess.run([sys.executable, "-c", code], env=env, stdout=-1, text=True, check=False).stdout
    stat, deadline = Path(f"/proc/{int(said)}/stat"), time.monotonic() + 10
    gone = lambda: not stat.exists() or stat.read_text(encoding="ascii").rpartition(") ")[2][0] in "ZX"  # noqa: E731
    while not gone() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone()


def test_busy_rounds_are_set_aside_where_threads_wait_for_each_other(company, tmp_path, monkeypatch):
    used = iter([0.0, 0.0, 0.0, 50.0, 50.0, 50.0])  # the second round of three is disturbed
    monkeypatch.setattr(worker_pool, "_total_cpu_seconds", lambda: next(used, 50.0))
    those = {name: company.worker(name, 2, cores=1) for name in ("core",)}
    contenders.check_agreement(those, actor, {"core": {"part": "core"}}, tmp_path)
    seen = worker_pool.run_rounds(those, FORWARD, 0.0, 2, 2)
    assert (len(seen.times["core"]), seen.discarded) == (2, 1)
    ever = iter(range(0, 10**6, 50))
    monkeypatch.setattr(worker_pool, "_total_cpu_seconds", lambda: next(ever))
    seen = worker_pool.run_rounds(those, FORWARD, 0.0, 2, 2)
    assert (len(seen.times["core"]), seen.discarded) == (2 * worker_pool.RETRY_FACTOR, -1)


def test_a_turn_warms_up_off_the_clock_unless_a_call_is_long(monkeypatch):
    now, lasts = [0.0], iter([5.0, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01])  # one long call; then a turn of short ones

    def call():
        now[0] += next(lasts)

    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    monkeypatch.setitem(worker._loaded_calls, "work", call)
    assert worker.time_call("work", 0.25, 0.03)[0] == 5.0
    assert worker.time_call("work", 0.25, 0.035)[0] == pytest.approx(0.01)  # three of 0.1 off the clock, four on it
