"""The benchmarks of input layouts and of bidirectional layers: results, ratios, goals. No time is judged."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.cpu import bidirectional, layouts
from benchmarks.cpu.bidirectional_passes import MODELS, Model, make_implementation
from benchmarks.harness.agreement import mismatches
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, Problem
from benchmarks.harness.report import Goal
from xprnn.cli import bench

SHAPE = (4, 3, 6, 5)  # D, H, N, T
ONE, BOTH, STACK = MODELS


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(bench, "MIN_TURN_S", 1e-7)


def test_layouts_differ_in_memory_and_not_in_values():
    x = Problem("elman", SHAPE).x
    variants = layouts.input_layouts(x)
    assert np.array_equal(variants.pop("batch_first=True").x.swapaxes(0, 1), x)
    for name, layout in variants.items():
        if not name.startswith("expanded"):
            assert np.array_equal(layout.x, x), name
        is_c_ordered = name in ("C-ordered", "read-only")
        assert layout.x.flags.c_contiguous == is_c_ordered, name
        assert not layout.batch_first
    assert not variants["read-only"].x.flags.writeable
    assert [variants[f"expanded over {letter}"].x.strides.index(0) for letter in "TN"] == [0, 1]
    assert [min(variants[f"X[{index}]"].x.strides) < 0 for index in ("::-1", ":, ::-1", "..., ::-1")] == [True] * 3


@pytest.mark.parametrize("cell", ["elman", "lstm", "gru"])
def test_every_layout_gives_the_results_of_a_c_ordered_copy(cell):
    rows = layouts.measure_cell(cell, 1, SHAPE)
    assert [row["pass"] for row in rows] == [FORWARD, FORWARD_BACKWARD]
    for row in rows:
        assert row["disagree"] == []
        assert row["ratios"].keys() == layouts.input_layouts(Problem(cell, SHAPE).x).keys()
        assert row["ratios"]["C-ordered"] == 1.0


def test_a_layout_with_other_results_is_named():
    problem = Problem("gru", SHAPE)
    implementation = layouts.make_implementation(problem, layouts.Layout(problem.x))
    other = layouts.Layout(problem.x + np.float32(0.1))
    assert [text.split(" is off")[0] for text in layouts.disagreement(problem, other, implementation)][:2] == [
        "y",
        "y (with a tape)",
    ]


def test_layout_goals_and_table():
    seconds = {name: {"median": 1e-3 * value} for name, value in {"C-ordered": 2.0, "read-only": 2.5}.items()}
    row = {"cell": "gru", "pass": FORWARD, "seconds": seconds, "disagree": ["Fortran-ordered: y is off by 1.0e+00"]}
    row["ratios"] = {"C-ordered": 1.0, "read-only": 1.25}
    assert layouts.goals([row]) == [Goal("layout of x, gru, forward, read-only over C-ordered", 1.25, most=1.15)]
    assert layouts.report([row])[2:] == [
        "| x | gru, forward |",
        "|---|---|",
        "| C-ordered, milliseconds | 2 |",
        "| read-only | 1.25 |",
        "| | **excluded: gru, Fortran-ordered: y is off by 1.0e+00** |",
    ]


def bidirectional_row(**changes):
    """A row with two rounds: both directions cost twice and four times as much as one."""
    times = {
        "xprnn": {ONE: [1.0, 1.0], BOTH: [2.0, 4.0], STACK: [5.0, 5.0]},
        "torch": {ONE: [2.0, 2.0], BOTH: [4.0, 4.0], STACK: [6.0, 6.0]},
    }
    return {"threads": 1, "pass": FORWARD, "times": times, "disagree": [], "discarded": 0} | changes


def test_bidirectional_goals():
    rows = [bidirectional_row(), bidirectional_row(discarded=-1)]
    assert bidirectional.goals(rows) == [
        Goal(f"{BOTH} over one, N=1, forward, 1 thread(s)", 3.0, most=2.2),
        Goal(f"{STACK}, N=1, forward, 1 thread(s), against torch", 1.2, least=1.3),
    ]
    assert bidirectional.inconclusive(rows) == ["bidirectional, N=1, forward, 1 thread(s)"]


def test_bidirectional_table():
    lines = bidirectional.report([bidirectional_row(disagree=["torch raises OSError: no licence"])])[2:]
    assert lines[0] == "|  | pass | threads | xprnn | torch | both over one, xprnn / torch |"
    assert lines[3].startswith(f"| {BOTH} | forward | 1 | 3000 ±")
    assert lines[3].endswith("(1.50) | 3.00 / 2.00 |")
    assert lines[-1].startswith("| | **excluded: torch raises OSError: no licence**")
    without_torch = bidirectional_row(times={"xprnn": {ONE: [1.0, 1.0]}})
    assert bidirectional.goals([without_torch]) == []
    assert len(bidirectional.report([without_torch])) == 7


@pytest.mark.needs("torch")
@pytest.mark.parametrize("name", [BOTH, STACK])
def test_bidirectional_layers_of_torch_agree(name, monkeypatch):
    model = MODELS[name]
    monkeypatch.setitem(MODELS, name, Model(3, 4, model.num_layers, model.bidirectional))
    expected = make_implementation("xprnn", name, 1).results()
    results = make_implementation("torch", name, 1).results()
    assert results.keys() == expected.keys()
    assert mismatches(expected, results) == []
    assert expected[f"{name}, y"].shape == (4, 1, 6)
