"""What only compiled kernels have: a cache on disk, functions, blocks of steps, and a way to do without."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from support.backends import Backend
from support.layer_cases import CASES, random_cotangents, random_inputs
from support.paths import ROOT

import xprnn
from xprnn.kernels.config import allow_jit
from xprnn.kernels.jit import arguments, compile_cache
from xprnn.kernels.tracing import scalar_code
from xprnn.kernels.tracing.graph import UFUNCS

pytestmark = pytest.mark.needs("numba")
XP = Backend.NUMPY
RUN = """
import sys
import numpy as np, xprnn
layer = xprnn.GRU(2, 3)
params = layer.init(np.random.default_rng(0), like=np.zeros(1, np.float32))
y, state, tape = layer.forward(params, np.ones((4, 2, 2), np.float32))
layer.backward(tape, np.ones_like(y))
print(tape.explain(), "numba" in sys.modules, repr(float(y.sum())), sep="|")
"""


def in_a_process(**env):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "XPRNN_FAST": "1"} | {k: str(v) for k, v in env.items()}
    run = subprocess.run([sys.executable, "-c", RUN], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    how, imported, total = run.stdout.strip().split("|")
    return how, imported == "True", float(total)


def test_switched_off_numba_is_not_even_imported(tmp_path):
    how, imported, _ = in_a_process(XPRNN_FAST=0, XPRNN_CACHE=tmp_path)
    assert "NumPy in place" in how
    assert not imported
    assert not list(tmp_path.iterdir())


def test_a_second_process_finds_the_machine_code_and_a_damaged_one_is_made_again(tmp_path):
    how, _, first = in_a_process(XPRNN_CACHE=tmp_path)
    assert "compiled" in how
    code = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}
    assert len(code) == 5  # forward and backward, the products, the tables of both passes
    assert in_a_process(XPRNN_CACHE=tmp_path)[2] == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")} == code
    for path in code:
        path.write_bytes(b"no machine code")
    for path in tmp_path.glob("*.py"):
        path.write_text("damaged")
    assert in_a_process(XPRNN_CACHE=tmp_path)[2] == first


def test_without_a_folder_kernels_are_compiled_in_memory(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "compiled" in in_a_process(XPRNN_CACHE=tmp_path / "file" / "cache")[0]


@pytest.mark.parametrize("name", ["rnn", "rnn-clip", "lstm", "lstm-proj", "gru", "gru-before", "leaky"])
@pytest.mark.parametrize("keep", [True, False])
def test_blocks_of_steps_are_the_whole(rng, monkeypatch, name, keep):
    layer = CASES[name].make(3, 4, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=6, N=4, flags="lmr")

    def run():
        if not keep:
            return layer(p.params, p.x, p.state, **p.flags)
        y, final, tape = layer.forward(p.params, p.x, p.state, **p.flags)
        return y, final, *layer.backward(tape, dy)

    dy = random_cotangents(rng, layer(p.params, p.x, p.state)[0])
    want = run()
    monkeypatch.setattr(arguments, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(arguments, "_BLOCK_ROWS", 8)
    XP.assert_close(run(), want, condition=64)


def everything_cell():
    """A cell whose step goes through every function that can be traced."""

    def build(xp):
        def step(x, h, state, p):
            a = xp.tanh(x[0] + h[0])
            b = 0.5 + a * a
            c = xp.log(b) + xp.log1p(b) + xp.sqrt(b) + b**1.5 + xp.square(a) + xp.positive(a) + (-a)
            d = xp.sin(a) + xp.cos(a) + xp.sinh(a) + xp.cosh(a) + xp.exp(a) + xp.expm1(a) + abs(a) + xp.sign(a)
            e = (
                xp.where(a < b, a, b)
                + xp.where(a <= 0.0, 1.0, a)
                + xp.where(a > 0.25, a, 2.0)
                + xp.where(a >= b, a, 3.0)
            )
            f = xp.maximum(a, 0.1) - xp.minimum(a, -0.1) + xp.where(a == b, 1.0, a) + xp.where(a != b, a, 1.0) + 1.0 / b
            return (0.05 * (c + d + e + f),), (a,)

        def back(dstate, saved, state, p):
            da = dstate[0] * (1.0 - saved[0] * saved[0])
            return (da,), (da,), (None,), ()

        return step, back

    return xprnn.Cell("everything", 1, build)


def test_every_function(rng, dtype):
    assert UFUNCS.keys() | {"where"} == scalar_code.OP_TEMPLATES.keys()
    layer = xprnn.Recurrent(3, 5, cell=everything_cell())
    p = random_inputs(rng, layer, T=5, N=7)
    params, x, state = ({k: v.astype(dtype) for k, v in p.params.items()}, p.x.astype(dtype), p.state.astype(dtype))
    y, final, tape = layer.forward(params, x, state)
    assert "compiled" in tape.explain()
    with allow_jit(False):
        XP.assert_close((y, final), layer(params, x, state), condition=64)


@pytest.mark.parametrize("function", ["tanh", "exp"])
def test_own_functions(function, dtype):
    """On a path through the kernel: a one-unit cell f(x) over a range of x, with the ends and NaN."""
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


def test_no_cell_takes_long_to_compile(tmp_path, monkeypatch):
    """Nothing depends on sizes: forward and backward for each cell and dtype, and what makes their tables."""
    made, true = [], compile_cache.compile_kernel

    def seen(source, *signature):
        made.append(source)
        return true(source, *signature)

    monkeypatch.setattr(compile_cache, "compile_kernel", seen)
    rng = np.random.default_rng(0)
    for D, H, N, T in ((1, 1, 1, 1), (3, 40, 5, 7), (2, 3, 0, 4)):
        layer = xprnn.LSTM(D, H)
        p = random_inputs(rng, layer, T=T, N=N)
        y, _, tape = layer.forward(p.params, p.x, p.state)
        layer.backward(tape, np.ones_like(y))
    assert len(set(made)) == 4
