"""One-hot input by look-up: what a vocabulary of 5000 costs beside one of 50.

    python benchmarks/cpu/vocabulary.py [--rounds N]

T, N and H of the text job; classes drawn evenly, which touches more of the table than words of a text do. The layer
with integers for x, and Sequential with an Embedding of H features before it, their tables' gradients dense or, with
sparse=True, of the classes that occur; forward, and forward+backward. Beside them what a dense gradient cannot do
without, an array of zeros like the table, and an optimiser's step on the table alone, with either gradient.
One BLAS thread, the two vocabularies in turn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import xprnn
from benchmarks.harness import timing
from benchmarks.harness.options import CELLS, argument_parser, rerun_keeping_memory, write_results
from benchmarks.harness.xprnn_contenders import LAYERS

VOCABULARY_SIZES = (50, 5000)
T, N, H = 64, 16, 256
MAX_RATIO = 1.1


def model_calls(model: Any, v: int) -> dict[str, Callable[[], Any]]:
    """forward and forward+backward on classes 0..v-1."""
    rng = np.random.default_rng(0)
    params = model.init(rng, like=np.zeros(0, np.float32))
    ids = rng.integers(0, v, (T, N))
    y, _ = model(params, ids)
    dy = rng.standard_normal(y.shape, dtype=np.float32)

    def both() -> Any:
        _, _, tape = model.forward(params, ids)
        return model.backward(tape, dy)

    return {"forward": lambda: model(params, ids), "forward+backward": both}


def table_calls(kind: Any, v: int) -> dict[str, Callable[[], Any]]:
    """What belongs to a gradient of the table's shape, whoever computes it, and the table's own step."""
    rng, name = np.random.default_rng(0), "weight_ih_l0"
    table, ids = kind(v, H).init(rng, like=np.zeros(0, np.float32))[name], rng.integers(0, v, T * N)
    classes = np.unique(ids)
    values = rng.standard_normal((len(classes), len(table)), dtype=np.float32)
    sparse = xprnn.SparseGradient(classes, values, table.shape, 1)
    dense = sparse.to_dense()

    def zeros() -> Any:
        a = np.empty(table.shape, np.float32)
        a.fill(0)
        return a

    def step(optimizer: Any, gradient: Any) -> Callable[[], Any]:
        moments = optimizer.init({name: table})
        return lambda: optimizer.update({name: table}, {name: gradient}, moments)

    return {
        "zeros like the table": zeros,
        "SGD": step(xprnn.sgd(0.1), dense),
        "SGD, sparse": step(xprnn.sgd(0.1), sparse),
        "Adam": step(xprnn.adam(1e-3), dense),
        "lazy Adam, sparse": step(xprnn.adam(1e-3, lazy=True), sparse),
    }


def embedding_model(kind: Any, v: int, *, sparse: bool) -> Any:
    """A layer behind an Embedding."""
    return xprnn.Sequential(embed=xprnn.Embedding(v, H, sparse=sparse), rnn=kind(H, H))


def measure(count: int) -> list[dict[str, Any]]:
    """Milliseconds at both sizes, and the ratio of each round."""
    rows = []
    for cell in CELLS:
        kind = LAYERS[cell]
        makers: dict[str, Callable[[int], Any]] = {
            f"{cell}, integers": lambda v, kind=kind: model_calls(kind(v, H), v),
            f"{cell}, integers, sparse": lambda v, kind=kind: model_calls(kind(v, H, sparse=True), v),
            f"{cell}, Embedding": lambda v, kind=kind: model_calls(embedding_model(kind, v, sparse=False), v),
            f"{cell}, Embedding, sparse": lambda v, kind=kind: model_calls(embedding_model(kind, v, sparse=True), v),
            f"{cell}, beside it": lambda v, kind=kind: table_calls(kind, v),
        }
        for what, make in makers.items():
            small, large = (make(v) for v in VOCABULARY_SIZES)
            for which, call in small.items():
                calls = {"small": call, "large": large[which]}
                times = timing.time_interleaved(calls, count)
                ratio = timing.paired_ratio(times["large"], times["small"])
                seconds = {k: timing.quartile_summary(t) for k, t in times.items()}
                rows.append({"what": what, "pass": which, "seconds": seconds, "ratio": ratio})
        print(f"{cell}: measured", file=sys.stderr, flush=True)
    return rows


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pass of a layer or model."""
    return [
        {"what": f"one-hot, V=5000 over V=50, {r['what']}, {r['pass']}", "value": r["ratio"], "most": MAX_RATIO}
        for r in rows
        if "beside" not in r["what"]
    ]


def report(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = [f"One-hot input by look-up, T={T}, N={N}, H={H}, float32, one thread; milliseconds.", ""]
    lines += [f"| | pass | V={VOCABULARY_SIZES[0]} | V={VOCABULARY_SIZES[1]} | ratio |", "|---|---|---|---|---|"]
    for r in rows:
        small, large = (f"{1e3 * r['seconds'][k]['median']:.3g}" for k in ("small", "large"))
        lines.append(f"| {r['what']} | {r['pass']} | {small} | {large} | {r['ratio']:.2f} |")
    return lines


def main() -> int:
    """Measure, print, write."""
    args = argument_parser(__doc__, rounds=25).parse_args()
    if (code := rerun_keeping_memory()) is not None:
        return code
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        rows = measure(args.rounds)
    return write_results(args, report(rows), {"rows": rows, "goals": goals(rows)})


if __name__ == "__main__":
    sys.exit(main())
