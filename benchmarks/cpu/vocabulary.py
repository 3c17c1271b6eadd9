"""Measures the cost of a large vocabulary: one-hot input as integers, V = 5000 against V = 50.

    python -m benchmarks.cpu.vocabulary [--rounds COUNT]

T, N and H are those of text training. Classes are drawn uniformly, which touches more of the table than text does.
Measured are a layer whose x are integers, and a Sequential with an Embedding of H features before the layer; gradients
of the tables are dense or, with sparse=True, hold only the classes that occur; forward, and forward+backward. For
comparison: filling an array of the table's shape with zeros, which a dense gradient cannot avoid, and a step of an
optimizer on the table alone with either gradient. One BLAS thread; the two vocabularies take turns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import xprnn
from benchmarks.harness import timing
from benchmarks.harness.options import CELLS, argument_parser, rerun_keeping_memory
from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, Call
from benchmarks.harness.report import Goal, Report, markdown_table, write_results
from benchmarks.harness.xprnn_contenders import LAYERS

VOCABULARY_SIZES = (50, 5000)
T, N, H = 64, 16, 256
MAX_RATIO = 1.1
COMPARISON = "for comparison"
Row = dict[str, Any]


def model_calls(model: Any, v: int) -> dict[str, Call]:
    """Return the passes of a model on classes 0..v-1."""
    rng = np.random.default_rng(0)
    params = model.init(rng, like=np.zeros(0, np.float32))
    ids = rng.integers(0, v, (T, N))
    y, _ = model(params, ids)
    dy = rng.standard_normal(y.shape, dtype=np.float32)

    def forward_backward() -> Any:
        _, _, tape = model.forward(params, ids)
        return model.backward(tape, dy)

    return {FORWARD: lambda: model(params, ids), FORWARD_BACKWARD: forward_backward}


def table_calls(layer_class: Any, v: int) -> dict[str, Call]:
    """Return the calls on the table alone: filling its gradient with zeros, and steps of optimizers."""
    rng, name = np.random.default_rng(0), "weight_ih_l0"
    table, ids = layer_class(v, H).init(rng, like=np.zeros(0, np.float32))[name], rng.integers(0, v, T * N)
    classes = np.unique(ids)
    values = rng.standard_normal((len(classes), len(table)), dtype=np.float32)
    sparse = xprnn.SparseGradient(classes, values, table.shape, 1)
    dense = sparse.to_dense()

    def zeros() -> Any:
        a = np.empty(table.shape, np.float32)
        a.fill(0)
        return a

    def step(optimizer: Any, gradient: Any) -> Call:
        moments = optimizer.init({name: table})
        return lambda: optimizer.update({name: table}, {name: gradient}, moments)

    return {
        "zeros like the table": zeros,
        "SGD": step(xprnn.sgd(0.1), dense),
        "SGD, sparse": step(xprnn.sgd(0.1), sparse),
        "Adam": step(xprnn.adam(1e-3), dense),
        "lazy Adam, sparse": step(xprnn.adam(1e-3, lazy=True), sparse),
    }


def embedding_model(layer_class: Any, v: int, *, sparse: bool) -> Any:
    """Create a layer with an Embedding before it."""
    return xprnn.Sequential(embed=xprnn.Embedding(v, H, sparse=sparse), rnn=layer_class(H, H))


def call_factories(cell: str) -> dict[str, Callable[[int], dict[str, Call]]]:
    """Return the measured models of a cell: name -> function from the vocabulary size to the calls."""
    layer_class = LAYERS[cell]
    layers: Any = layer_class  # its `sparse` argument is not in the type of LAYERS
    return {
        f"{cell}, integers": lambda v: model_calls(layer_class(v, H), v),
        f"{cell}, integers, sparse": lambda v: model_calls(layers(v, H, sparse=True), v),
        f"{cell}, Embedding": lambda v: model_calls(embedding_model(layer_class, v, sparse=False), v),
        f"{cell}, Embedding, sparse": lambda v: model_calls(embedding_model(layer_class, v, sparse=True), v),
        f"{cell}, {COMPARISON}": lambda v: table_calls(layer_class, v),
    }


def measure(rounds: int) -> list[Row]:
    """Measure both vocabularies: seconds, and the median of the rounds' ratios."""
    rows = []
    for cell in CELLS:
        for what, factory in call_factories(cell).items():
            small, large = (factory(v) for v in VOCABULARY_SIZES)
            for name, call in small.items():
                calls = {"small": call, "large": large[name]}
                for each in calls.values():
                    each()
                times = timing.time_interleaved(calls, rounds)
                ratio = timing.paired_ratio(times["large"], times["small"])
                seconds = {k: timing.quartile_summary(t) for k, t in times.items()}
                rows.append({"what": what, "pass": name, "seconds": seconds, "ratio": ratio})
        print(f"{cell}: measured", file=sys.stderr, flush=True)
    return rows


def goals(rows: list[Row]) -> list[Goal]:
    """Judge every pass of a layer or model."""
    small, large = VOCABULARY_SIZES
    return [
        Goal(f"one-hot, V={large} over V={small}, {row['what']}, {row['pass']}", row["ratio"], most=MAX_RATIO)
        for row in rows
        if COMPARISON not in row["what"]
    ]


def report(rows: list[Row]) -> list[str]:
    """Format the table."""
    headings = ["", "pass", *(f"V={v}" for v in VOCABULARY_SIZES), "ratio"]
    table = []
    for row in rows:
        times = (f"{1e3 * row['seconds'][name]['median']:.3g}" for name in ("small", "large"))
        table.append([row["what"], row["pass"], *times, f"{row['ratio']:.2f}"])
    caption = f"One-hot input as integers, T={T}, N={N}, H={H}, float32, one thread; milliseconds."
    return [caption, "", *markdown_table(headings, table)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = argument_parser(__doc__, rounds=25).parse_args(argv)
    if (code := rerun_keeping_memory()) is not None:
        return code
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        rows = measure(args.rounds)
    return write_results(Report({"rows": rows}, report(rows), goals(rows)), json_file=args.json)


if __name__ == "__main__":
    sys.exit(main())
