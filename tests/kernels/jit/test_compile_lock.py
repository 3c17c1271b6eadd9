"""Several processes that need the same kernel: one compiles it, the others wait, with a timeout."""

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
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock"),
]
RUN = """
import sys
import numpy as np, xprnn
from numba.core import caching
saves, save = [], caching.IndexDataCacheFile.save
caching.IndexDataCacheFile.save = lambda *args: (saves.append(1), save(*args))[1]
layer = xprnn.GRU(2, 3)
params = layer.init(np.random.default_rng(0), like=np.zeros(1, np.float32))
print("ready", flush=True)
sys.stdin.readline()
y, state, tape = layer.forward(params, np.ones((4, 2, 2), np.float32))
layer.backward(tape, np.ones_like(y))
print(len(saves), "compiled" in tape.explain(), float(y.sum()), sep="|")
"""
SOURCE = "def kernel(table):\n    table[0] += {}\n"


def start_process(cache_dir):
    """Start a process that runs RUN with this cache directory."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "XPRNN_FAST": "1", "XPRNN_CACHE": str(cache_dir)}
    return subprocess.Popen([sys.executable, "-c", RUN], env=env, stdin=-1, stdout=-1, text=True)


def test_two_processes_compile_a_kernel_once(tmp_path):
    processes = [start_process(tmp_path) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    results = [process.communicate(timeout=120)[0].strip().split("|") for process in processes]
    assert [compiled for _, compiled, _ in results] == ["True", "True"]
    assert results[0][2] == results[1][2]
    assert sum(int(saves) for saves, _, _ in results) == len([*tmp_path.rglob("*.nbc")]) > 0


def hold_lock(path):
    """Start a process that holds the lock of a kernel's file."""
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('held', flush=True); input()"
    command = [sys.executable, "-c", code, path.with_suffix(".lock")]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("dead", [True, False])
def test_lock_of_dead_or_hanging_process_does_not_block(tmp_path, monkeypatch, dead):
    monkeypatch.setenv("XPRNN_CACHE", str(tmp_path))
    monkeypatch.setattr(compile_cache, "_LOCK_TIMEOUT", 3600.0 if dead else 0.1)
    source = SOURCE.format(7 + dead)
    holder = hold_lock(compile_cache._write_source(source))
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
