"""The persistent kernels on the CPU emulator (persistent_emulator.h) equal the reference scan in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from support.cuda import persistent_emulator
from support.cuda.persistent_cases import CELLS, config_for, excessive_errors, kernel_results, random_inputs
from support.paths import ROOT, TESTS

from xprnn.kernels.cuda.cluster_config import all_configs

pytestmark = pytest.mark.needs("cupy")
# Every cell, with clusters of one block and of several blocks, for the tests of shapes and schedules.
SMALL = [("tanh", 64, 2), ("tanh", 256, 2), ("relu", 256, 1), ("gru", 64, 1), ("gru", 128, 2), ("lstm", 128, 2)]


def config_id(config):
    return f"{config.cell_name}-{config.padded_hidden_size}-{config.rows_per_cluster}"


def sampled_configs():
    """List one configuration per cell and size, with varying rows; all if XPRNN_EVERY=1 in the environment."""
    kinds: dict[tuple[str, int], list[Any]] = {}
    for config in all_configs():
        kinds.setdefault((config.cell_name, config.padded_hidden_size), []).append(config)
    chosen = [configs[k % len(configs)] for k, configs in enumerate(kinds.values())]
    return all_configs() if os.environ.get("XPRNN_EVERY") == "1" else chosen


@pytest.mark.parametrize("config", sampled_configs(), ids=config_id)
def test_configurations_equal_generic_scan(rng, config):
    """With padded units, a partly filled last cluster and masked rows, in one of the two time orders."""
    number = all_configs().index(config)
    large = config.cluster_size == 16
    H, N = config.padded_hidden_size - 3 - 8 * (number % 3), 1 + config.rows_per_cluster * (1 if large else 2)
    p = random_inputs(rng, config.cell_name, H, N, 3 if large else 5, ragged=True, reverse=bool(number % 2))
    assert excessive_errors(kernel_results(p, config, seed=number), kernel_results(p)) == {}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize(("cell", "units", "rows"), SMALL)
def test_shapes_equal_generic_scan(rng, cell, units, rows, T, ragged, reverse):
    config = config_for(cell, units, rows)
    for N, H in ((1, units), (rows, units - 1), (rows + 1, units // 2 + 3)):
        p = random_inputs(rng, cell, H, N, T, ragged=ragged, reverse=reverse)
        assert excessive_errors(kernel_results(p, config, seed=N + T), kernel_results(p)) == {}, (N, H)


@pytest.mark.parametrize(("cell", "units", "rows"), SMALL)
def test_results_are_identical_for_all_schedules(rng, cell, units, rows):
    config = config_for(cell, units, rows)
    p = random_inputs(rng, cell, units, 2 * rows, 6, ragged=True)
    first = kernel_results(p, config, seed=0)
    assert excessive_errors(first, kernel_results(p)) == {}
    for seed in range(1, 3 * persistent_emulator.SCHEDULE_COUNT):
        again = kernel_results(p, config, seed=seed)
        assert all(np.array_equal(again[k], first[k]) for k in first), seed


@pytest.mark.parametrize("cell", CELLS)
def test_no_biases_and_state_cotangents_equal_generic_scan(rng, cell):
    config = config_for(cell, 128, 2)
    for ragged in (False, True):
        p = random_inputs(rng, cell, 100, 3, 4, ragged=ragged, bias=False, with_dstates=True)
        assert excessive_errors(kernel_results(p, config, seed=2), kernel_results(p)) == {}


def test_nan_stays_in_its_row(rng):
    """A NaN reaches all later steps of its batch row, and no other row."""
    for cell in CELLS:
        config, p = config_for(cell, 128, 2), random_inputs(rng, cell, 128, 2, 3)
        x = p.x.copy()
        x[1, 0, 0] = np.nan
        clean, got = (kernel_results(q, config, seed=1)["y"] for q in (p, p._replace(x=x)))
        assert np.isnan(got[1:, 0]).all(), cell
        assert np.array_equal(got[:, 1], clean[:, 1])
        assert np.array_equal(got[0], clean[0])


SANITIZED = """
import sys
sys.path.insert(0, {tests!r})
from support.cuda import fake_cupy
fake_cupy.install()
import numpy as np
from support.cuda.persistent_cases import config_for, excessive_errors, kernel_results, random_inputs
from support.cuda.persistent_emulator import SANITIZER_FLAGS
for cell, units, rows, H, N in (("lstm", 64, 2, 41, 3), ("tanh", 256, 2, 201, 3)):
    p = random_inputs(np.random.default_rng(0), cell, H, N, 3, ragged=True)
    got = kernel_results(p, config_for(cell, units, rows), seed=2, compile_options=SANITIZER_FLAGS)
    assert excessive_errors(got, kernel_results(p)) == {{}}
print("clean")
"""


def test_address_and_undefined_behavior_sanitizers_report_nothing():
    """The address sanitizer also guards the memory of the NumPy arrays."""
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
