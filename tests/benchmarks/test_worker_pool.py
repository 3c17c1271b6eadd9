"""Worker processes: their turns, exclusion of implementations that disagree, and how they end. No time is judged."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import agreement, machine, worker, worker_pool
from benchmarks.harness.problem import FORWARD, Implementation

on_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    for name in ("WARMUP_S", "MIN_TURN_S"):
        monkeypatch.setattr(worker_pool, name, 0.0)


@pytest.fixture
def pool():
    with worker_pool.WorkerPool() as workers:
        yield workers


def fake_implementation(behaviour, seconds=0.0):
    """Create an implementation that sleeps for some seconds and has one of these behaviours."""

    def results():
        if behaviour == "raises":
            raise OSError("no licence")
        y = np.ones((3, 2)) * (np.nan if behaviour == "nans" else 1.01 if behaviour == "wrong" else 1.0)
        return {"y": y[:-1] if behaviour == "other shape" else y}

    def call():
        if behaviour == "exits" and seconds:
            os._exit(3)
        time.sleep(seconds)

    return Implementation({FORWARD: call}, results)


def measure(pool, folder, tasks, **options):
    """Load and compare the implementations, then time those that agree."""
    workers = {name: pool.worker(name) for name in tasks}
    loaded, problems = agreement.check_agreement(workers, fake_implementation, tasks, folder)
    settings = {"seconds": 0.0, "min_rounds": 2, "max_rounds": 2} | options
    return worker_pool.run_rounds({name: workers[name] for name in loaded}, FORWARD, **settings), problems


def test_workers_take_turns_and_each_times_its_calls(pool, tmp_path):
    tasks = {"quick": {"behaviour": "right"}, "slow": {"behaviour": "right", "seconds": 0.02}}
    rounds, problems = measure(pool, tmp_path, tasks, max_rounds=3, seconds=100.0)
    assert not problems
    assert {name: len(times) for name, times in rounds.times.items()} == {"quick": 3, "slow": 3}
    assert min(rounds.times["slow"]) >= 0.02 > min(rounds.times["quick"])  # it slept in its own process


def test_implementations_that_disagree_or_raise_are_named_and_excluded(pool, tmp_path):
    tasks = {name: {"behaviour": name} for name in ("first", "wrong", "raises", "other shape", "nans", "right")}
    rounds, problems = measure(pool, tmp_path, tasks)
    assert list(rounds.times) == ["first", "right"]
    assert problems == [
        "wrong: y is off by 1.0e-02",
        "raises raises OSError: no licence",
        "other shape: y is off by inf",
        "nans: y is off by nan",
    ]


def test_a_worker_that_ends_in_its_turn_is_named_and_the_others_continue(pool, tmp_path):
    tasks = {"first": {"behaviour": "right"}, "killed": {"behaviour": "right"}}
    workers = {name: pool.worker(name) for name in tasks}
    agreement.check_agreement(workers, fake_implementation, tasks, tmp_path)
    workers["killed"]._process.kill()
    rounds = worker_pool.run_rounds(workers, FORWARD, 0.0, 3, 3)
    assert len(rounds.times["first"]) == 3
    assert list(rounds.times) == ["first"]
    assert rounds.failed["killed"].startswith("ended early, code ")
    restarted = pool.worker("killed")
    loaded, _ = agreement.check_agreement({"killed": restarted}, fake_implementation, tasks, tmp_path)
    assert loaded == {"killed": [FORWARD]}


def test_a_worker_that_ends_while_it_loads_is_named(pool, tmp_path):
    tasks = {"first": {"behaviour": "right"}, "exits": {"behaviour": "exits", "seconds": 1.0}}
    rounds, problems = measure(pool, tmp_path, tasks)
    assert list(rounds.times) == ["first"]
    assert problems == ["exits ended early, code 3"]


def sleep_for(seconds):
    time.sleep(seconds)


def test_a_call_that_takes_too_long_ends_the_worker(pool):
    with pytest.raises(worker_pool.WorkerError, match=r"did not answer in 0\.5 s"):
        pool.worker("slow").call(sleep_for, timeout_s=0.5, seconds=60.0)


def test_a_function_of_main_is_refused(pool):
    def function():
        pass

    function.__module__ = "__main__"
    with pytest.raises(ValueError, match="defined in __main__"):
        pool.worker("any").call(function)


def test_run_process_records_lines_their_times_and_the_exit_code():
    code = "import sys, time; print('first', flush=True); time.sleep(0.05); print('second'); sys.exit(3)"
    result = worker_pool.run_process([sys.executable, "-c", code])
    assert result.lines == ["first", "second"]
    assert result.line_times[1] - result.line_times[0] >= 0.04
    assert result.returncode == 3


def process_state(pid):
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2][0]


@on_linux
def test_a_worker_is_stopped_between_its_turns(pool):
    idle = pool.worker("idle")
    idle.call(machine.available_cores)
    deadline = time.monotonic() + 10
    while process_state(idle._process.pid) != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process_state(idle._process.pid) == "T"
    idle.close()
    assert idle.has_exited


@on_linux
@pytest.mark.parametrize("hangup", ["SIG_DFL", "SIG_IGN"])
def test_stopped_workers_end_when_their_parent_is_killed(hangup):
    code = (
        f"import os, signal; signal.signal(signal.SIGHUP, signal.{hangup})\n"
        "from benchmarks.harness import machine, worker_pool\n"
        "worker = worker_pool.Worker(); worker.call(machine.available_cores)\n"
        "print(worker._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, check=False)
    stat, deadline = Path(f"/proc/{int(run.stdout)}/stat"), time.monotonic() + 10

    def has_ended():
        return not stat.exists() or process_state(int(run.stdout)) in "ZX"

    while not has_ended() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert has_ended()


def test_rounds_that_other_processes_disturb_are_discarded_if_calls_are_threaded(pool, tmp_path, monkeypatch):
    used = iter([0.0, 0.0, 0.0, 50.0, 50.0, 50.0])  # the second round of three is disturbed
    monkeypatch.setattr(worker_pool, "_foreign_cpu_seconds", lambda: next(used, 50.0))
    workers = {"threaded": pool.worker("threaded", 2, cores=1)}
    agreement.check_agreement(workers, fake_implementation, {"threaded": {"behaviour": "right"}}, tmp_path)
    rounds = worker_pool.run_rounds(workers, FORWARD, 0.0, 2, 2)
    assert (len(rounds.times["threaded"]), rounds.discarded) == (2, 1)
    always_busy = iter(range(0, 10**6, 50))
    monkeypatch.setattr(worker_pool, "_foreign_cpu_seconds", lambda: next(always_busy))
    rounds = worker_pool.run_rounds(workers, FORWARD, 0.0, 2, 2)
    assert (len(rounds.times["threaded"]), rounds.discarded) == (2 * worker_pool.RETRY_FACTOR, -1)


def test_warm_up_is_not_timed_and_a_long_call_needs_none(monkeypatch):
    now = [0.0]
    durations = iter([5.0, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01])  # one long call, then a turn of short ones

    def call():
        now[0] += next(durations)

    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    monkeypatch.setitem(worker._loaded_calls, "work", call)
    assert worker.time_call("work", 0.25, 0.03)[0] == 5.0
    assert worker.time_call("work", 0.25, 0.035)[0] == pytest.approx(0.01)  # three of 0.1 s to warm up, four timed
