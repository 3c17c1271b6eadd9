"""Compiled kernels: cache on disk, blocks of steps, printed functions, and the switch to disable them."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from support.backends import Backend
from support.kernel_cases import everything_cell
from support.layer_cases import random_inputs
from support.paths import ROOT

import xprnn
from xprnn.kernels.config import allow_jit
from xprnn.kernels.jit import compile_cache, kernel
from xprnn.kernels.tracing import scalar_code
from xprnn.kernels.tracing.graph import UFUNCS

pytestmark = pytest.mark.needs("numba")
XP = Backend.NUMPY
# Compiled for an LSTM or GRU that runs forward and backward without masks.
FUNCTIONS = ["gemm", "forward driver", "backward driver", "forward_rows", "backward_rows"]
FUNCTIONS += ["plain_forward", "backward"]
RUN = """
import sys
import numpy as np, xprnn
layer = xprnn.GRU(2, 3)
params = layer.init(np.random.default_rng(0), like=np.zeros(1, np.float32))
y, state, tape = layer.forward(params, np.ones((4, 2, 2), np.float32))
layer.backward(tape, np.ones_like(y))
print(tape.explain(), "numba" in sys.modules, repr(float(y.sum())), sep="|")
"""


def run_in_process(**env):
    """Run RUN in a new process; return the tape's explanation, whether numba was imported, and the sum of y."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "XPRNN_FAST": "1"} | {k: str(v) for k, v in env.items()}
    run = subprocess.run([sys.executable, "-c", RUN], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    explanation, imported, total = run.stdout.strip().split("|")
    return explanation, imported == "True", float(total)


def test_numba_is_not_imported_if_switched_off(tmp_path):
    explanation, imported, _ = run_in_process(XPRNN_FAST=0, XPRNN_CACHE=tmp_path)
    assert "NumPy in place" in explanation
    assert not imported
    assert not list(tmp_path.iterdir())


def test_second_process_reuses_machine_code_and_replaces_damaged_files(tmp_path):
    explanation, _, first = run_in_process(XPRNN_CACHE=tmp_path)
    assert "compiled" in explanation
    code = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}
    assert len(code) == len(FUNCTIONS)
    assert run_in_process(XPRNN_CACHE=tmp_path)[2] == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")} == code
    for path in code:
        path.write_bytes(b"no machine code")
    for path in tmp_path.glob("*.py"):
        path.write_text("damaged")
    assert run_in_process(XPRNN_CACHE=tmp_path)[2] == first


def test_kernels_are_compiled_in_memory_without_cache_directory(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    assert "compiled" in run_in_process(XPRNN_CACHE=tmp_path / "file" / "cache")[0]


def test_every_traceable_function_is_compiled(rng, dtype):
    assert UFUNCS.keys() | {"where"} == scalar_code.OP_TEMPLATES.keys()
    layer = xprnn.Recurrent(3, 5, cell=everything_cell())
    p = random_inputs(rng, layer, T=5, N=7)
    params, x, state = ({k: v.astype(dtype) for k, v in p.params.items()}, p.x.astype(dtype), p.state.astype(dtype))
    y, final, tape = layer.forward(params, x, state)
    assert "compiled" in tape.explain()
    with allow_jit(False):
        XP.assert_close((y, final), layer(params, x, state), condition=64)


@pytest.mark.parametrize("function", ["tanh", "exp"])
def test_tanh_and_exp_are_accurate(function, dtype):
    """A cell of one unit evaluates f(x) over a range of x that includes overflow, infinities and NaN."""
    cell = xprnn.Cell(
        "f",
        1,
        lambda xp: (
            lambda x, h, s, p: ((getattr(xp, function)(x[0] + 0.0 * h[0]),), ()),
            lambda d, v, s, p: ((d[0],), (d[0],), (None,), ()),
        ),
    )
    layer = xprnn.Recurrent(1, 1, bias=False, cell=cell)
    params = {"weight_ih_l0": np.ones((1, 1), dtype), "weight_hh_l0": np.zeros((1, 1), dtype)}
    x = np.concatenate(
        [np.linspace(-30, 30, 4001), np.geomspace(1e-30, 1, 200), [0, 700, -800, np.inf, -np.inf, np.nan]]
    )
    x = x.astype(dtype)
    with np.errstate(over="ignore"):
        want = getattr(np, function)(x.astype(np.longdouble)).astype(dtype)
    got = layer(params, x.reshape(1, -1, 1))[0].ravel()
    np.testing.assert_allclose(got, want, rtol=8 * np.finfo(dtype).eps, atol=1e-300 if dtype == "float64" else 1e-37)
    assert np.nanmax(np.abs(got)) <= 1 or function == "exp"


def test_kernels_do_not_depend_on_sizes(monkeypatch):
    """For one cell and dtype, the same functions serve all sizes, masks, resets and directions."""
    sources, compile_cached = [], compile_cache._compile_cached

    def record(source, compiler):
        sources.append(source)
        return compile_cached(source, compiler)

    monkeypatch.setattr(compile_cache, "_compile_cached", record)
    for cached in (compile_cache.compile_kernel, compile_cache.compile_cfunc, compile_cache.gemm_kernel):
        cached.cache_clear()
    kernel.scan_kernel.cache_clear()
    rng = np.random.default_rng(0)
    for D, H, N, T, flags in ((1, 1, 1, 1, ""), (3, 40, 5, 7, "l"), (2, 3, 0, 4, ""), (3, 5, 2, 4, "lmr")):
        for bidirectional in (False, True):
            layer = xprnn.LSTM(D, H, bidirectional=bidirectional)
            p = random_inputs(rng, layer, T=T, N=N, flags=flags)
            y, _, tape = layer.forward(p.params, p.x, p.state, **p.flags)
            layer.backward(tape, np.ones_like(y))
    assert len(sources) == len(set(sources)) == len(FUNCTIONS) + 1  # `forward`, which takes masks and resets
