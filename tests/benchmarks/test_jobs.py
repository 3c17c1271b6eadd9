"""The benchmark of whole training steps: data, agreement of xprnn and torch, tables and goals. No time is judged."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from benchmarks.cpu import job_steps, jobs
from benchmarks.harness.problem import TRAIN_STEP
from benchmarks.harness.report import Goal

SMALL_SIZES = (5, 3, 4, 2, 6)


@pytest.fixture
def small_jobs(monkeypatch):
    """The jobs with few features, rows and steps."""
    small = {}
    for name, job in job_steps.JOBS.items():
        outputs = 1 if job.loss == "mse" else 4
        small[name] = dataclasses.replace(job, sizes=(*SMALL_SIZES[:2], outputs, *SMALL_SIZES[3:]))
    monkeypatch.setattr(job_steps, "JOBS", small)
    return small


def row(xprnn, peers, *, job="tagging", threads=1, discarded=0, disagree=()):
    """A row with these seconds."""
    seconds = {k: {"median": v, "q1": v, "q3": v, "rounds": 3} for k, v in ({"xprnn": xprnn} | peers).items() if v}
    ratios = {k: v / xprnn for k, v in peers.items()} if xprnn else {}
    key = {"job": job, "threads": threads, "discarded": discarded, "disagree": list(disagree)}
    return key | {"seconds": seconds, "times_faster": ratios}


@pytest.mark.parametrize("name", job_steps.JOBS)
def test_batches_have_the_shapes_of_the_job(small_jobs, name):
    job = small_jobs[name]
    d, _, outputs, n, t = job.sizes
    data = job_steps.make_data(job)
    for key in data.keys:
        x, target, lengths = data.batch(job, key)
        assert x.shape == ((t, n, d) if job.read == "features" else (t, n))
        lead = (n,) if job.last else (t, n)
        assert target.shape == ((*lead, outputs) if job.loss == "mse" else lead)
        assert (lengths is not None) == job.tagging
    assert len(data.keys) == job_steps.NUM_BATCHES


@pytest.mark.needs("torch")
@pytest.mark.parametrize("name", job_steps.JOBS)
def test_losses_of_xprnn_and_torch_agree(small_jobs, name):
    losses = [job_steps.make_implementation(f, name, threads=1).results()["losses"] for f in ("xprnn", "torch")]
    assert np.ptp(losses[0]) > 1e-3
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_an_implementation_returns_the_loss_of_each_step(small_jobs):
    implementation = job_steps.make_implementation("xprnn", "amplifier", threads=1)
    expected = job_steps.make_implementation("xprnn", "amplifier", threads=1).results()["losses"]
    assert [implementation.calls[TRAIN_STEP]() for _ in range(len(expected))] == list(expected)


def test_geometric_means_leave_out_disturbed_rows():
    rows = [
        row(1.0, {"torch": 2.0, "jax": 8.0}),
        row(1.0, {"torch": 8.0, "jax": 4.0}),
        row(1.0, {"torch": 1e6, "jax": 1e6}, discarded=-1),
    ]
    assert jobs.geometric_mean(rows, "torch") == pytest.approx(4.0)
    assert jobs.geometric_mean(rows, "best peer") == pytest.approx(8**0.5)
    assert math.isnan(jobs.geometric_mean(rows, "torch_compile"))


def test_goals_name_the_row_and_the_figure():
    rows = [row(1.0, {"torch": 2.5, "jax": 0.5}), row(1.0, {"torch": 0.1}, discarded=-1)]
    assert jobs.goals(rows, {"tagging": 0.4}) == [
        Goal("training step, tagging, 1 thread(s), against the best peer", 0.5, least=1.0),
        Goal("training step, 1 thread(s), geometric mean against torch", pytest.approx(2.5), least=2.0),
        Goal("first training step of a process, tagging, seconds", 0.4, most=0.5),
    ]


def test_a_row_in_which_xprnn_failed_meets_no_goal():
    failed = row(None, {"torch": 1.0}, disagree=["xprnn raises ValueError"])
    (goal,) = jobs.goals([failed], {})
    assert not goal.is_met
    assert jobs.job_table([failed], ["torch"])[2:4] == [
        "| tagging | 1 |  | 1000 ±0% |  |",
        "| | **tagging, 1 thread(s): xprnn raises ValueError** | | | |",
    ]


def test_a_line_of_the_job_table():
    table = jobs.job_table([row(0.5e-3, {"torch": 1e-3, "jax": 2e-3}, threads=2)], ["torch", "jax"])
    assert table[2:] == [
        "| tagging | 2 | 0.500 ±0% | 1.00 ±0% (2.00) | 2.00 ±0% (4.00) | 2.00 |",
        "| geometric mean | 2 |  | 2.00 | 4.00 | 2.00 |",
    ]


def test_a_disturbed_row_is_marked():
    text = "\n".join(jobs.job_table([row(1.0, {"torch": 1.0}, discarded=-1)], ["torch"]))
    assert "disturbed" in text
