"""Processes that want a kernel at the same time: one compiles it, and nobody waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from support.paths import ROOT

from xprnn.kernels.jit import compile_cache

pytestmark = [
    pytest.mark.needs("numba"),
    pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks"),
]
RUN = """
import sys
import numpy as np, xprnn
from numba.core import caching
count, true = [], caching.IndexDataCacheFile.save
caching.IndexDataCacheFile.save = lambda *args: (count.append(1), true(*args))[1]
layer = xprnn.GRU(2, 3)
params = layer.init(np.random.default_rng(0), like=np.zeros(1, np.float32))
print("ready", flush=True)
sys.stdin.readline()
y, state, tape = layer.forward(params, np.ones((4, 2, 2), np.float32))
layer.backward(tape, np.ones_like(y))
print(len(count), "compiled" in tape.explain(), float(y.sum()), sep="|")
"""
SOURCE = "def kernel(table):\n    table[0] += {}\n"


def start(folder):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "XPRNN_FAST": "1", "XPRNN_CACHE": str(folder)}
    return subprocess.Popen([sys.executable, "-c", RUN], env=env, stdin=-1, stdout=-1, text=True)


def test_two_processes_compile_a_kernel_once(tmp_path):
    both = [start(tmp_path) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120)[0].strip().split("|") for process in both]
    assert [compiled for _, compiled, _ in said] == ["True", "True"]
    assert said[0][2] == said[1][2]
    assert sum(int(count) for count, _, _ in said) == len([*tmp_path.rglob("*.nbc")]) > 0


def held(path):
    """A process that has the lock of a kernel's file."""
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('held', flush=True); input()"
    words = [sys.executable, "-c", hold, path.with_suffix(".lock")]
    process = subprocess.Popen(words, stdin=-1, stdout=-1, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("dead", [True, False])
def test_who_holds_a_lock_and_never_ends_is_not_waited_for(tmp_path, monkeypatch, dead):
    monkeypatch.setenv("XPRNN_CACHE", str(tmp_path))
    monkeypatch.setattr(compile_cache, "_LOCK_TIMEOUT", 3600.0 if dead else 0.1)
    source = SOURCE.format(7 + dead)
    holder = held(compile_cache._write_source(source))
    try:
        if dead:
            holder.kill()
            holder.wait()
        table = np.zeros(1, np.int64)
        compile_cache.compile_kernel(source)(table)
        assert table[0] == 7 + dead
    finally:
        holder.kill()
        holder.communicate()
