"""The persistent kernels' own source, run on a CPU (persistent_emulator.h), against the generic scan in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from support.cuda import persistent_emulator as host
from support.cuda.persistent_cases import CELLS, config_for, differences, outcome, problem
from support.paths import ROOT, TESTS

from xprnn.kernels.cuda.cluster_config import configurations

pytestmark = pytest.mark.needs("cupy")
# A cluster of one block and of several, in every cell: where shapes and schedules are varied.
SMALL = [("tanh", 64, 2), ("tanh", 256, 2), ("relu", 256, 1), ("gru", 64, 1), ("gru", 128, 2), ("lstm", 128, 2)]


def named(config):
    return f"{config.cell}-{config.units}-{config.rows}"


def in_turn():
    """One configuration of each cell and size, their rows taken in turn; XPRNN_EVERY=1 in the environment: all."""
    kinds: dict[tuple[str, int], list[Any]] = {}
    for config in configurations():
        kinds.setdefault((config.cell, config.units), []).append(config)
    chosen = [some[k % len(some)] for k, some in enumerate(kinds.values())]
    return configurations() if os.environ.get("XPRNN_EVERY") == "1" else chosen


@pytest.mark.parametrize("config", in_turn(), ids=named)
def test_every_configuration(rng, config):
    """Idle units, a last cluster that is not full, ragged rows; forwards or in reverse."""
    number = configurations().index(config)
    large = config.blocks == 16
    H, N = config.units - 3 - 8 * (number % 3), 1 + config.rows * (1 if large else 2)
    p = problem(rng, config.cell, H, N, 3 if large else 5, ragged=True, reverse=bool(number % 2))
    assert differences(outcome(p, config, seed=number), outcome(p)) == {}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize(("cell", "units", "rows"), SMALL)
def test_shapes(rng, cell, units, rows, T, ragged, reverse):
    config = config_for(cell, units, rows)
    for N, H in ((1, units), (rows, units - 1), (rows + 1, units // 2 + 3)):
        p = problem(rng, cell, H, N, T, ragged=ragged, reverse=reverse)
        assert differences(outcome(p, config, seed=N + T), outcome(p)) == {}, (N, H)


@pytest.mark.parametrize(("cell", "units", "rows"), SMALL)
def test_no_order_of_events_changes_a_bit(rng, cell, units, rows):
    config = config_for(cell, units, rows)
    p = problem(rng, cell, units, 2 * rows, 6, ragged=True)
    first = outcome(p, config, seed=0)
    assert differences(first, outcome(p)) == {}
    for seed in range(1, 3 * host.SCHEDULES):
        again = outcome(p, config, seed=seed)
        assert all(np.array_equal(again[k], first[k]) for k in first), seed


@pytest.mark.parametrize("cell", CELLS)
def test_no_biases_and_adjoints_of_every_state(rng, cell):
    config = config_for(cell, 128, 2)
    for ragged in (False, True):
        p = problem(rng, cell, 100, 3, 4, ragged=ragged, bias=False, injected=True)
        assert differences(outcome(p, config, seed=2), outcome(p)) == {}


def test_not_a_number_stays_one(rng):
    """A NaN in one row reaches that row's results and nobody else's."""
    for cell in CELLS:
        config, p = config_for(cell, 128, 2), problem(rng, cell, 128, 2, 3)
        x = p.x.copy()
        x[1, 0, 0] = np.nan
        clean, got = (outcome(q, config, seed=1)["y"] for q in (p, p._replace(x=x)))
        assert np.isnan(got[1:, 0]).all(), cell
        assert np.array_equal(got[:, 1], clean[:, 1])
        assert np.array_equal(got[0], clean[0])


SANITIZED = """
import sys
sys.path.insert(0, {tests!r})
from support.cuda import fake_cupy
fake_cupy.install()
import numpy as np
from support.cuda import persistent_emulator as host
from support.cuda.persistent_cases import config_for, differences, outcome, problem
for cell, units, rows, H, N in (("lstm", 64, 2, 41, 3), ("tanh", 256, 2, 201, 3)):
    p = problem(np.random.default_rng(0), cell, H, N, 3, ragged=True)
    got = outcome(p, config_for(cell, units, rows), seed=2, extra=host.SANITIZED)
    assert differences(got, outcome(p)) == {{}}
print("clean")
"""


def test_sanitizers_find_nothing():
    """Addresses and undefined behaviour, NumPy's arrays included: their memory is fenced as well."""
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    env = os.environ | {
        "LD_PRELOAD": asan.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    code = SANITIZED.format(tests=str(TESTS))
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "clean", run.stderr[-4000:]
