"""One layer in one direction by the persistent kernels on the host machine, beside the generic scan in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import persistent_host as host
import pytest

from xprnn import cells, scan
from xprnn.kernels import generic_only
from xprnn.kernels.cuda import persistent
from xprnn.tape import Steps

CELLS = {"tanh": cells.elman("tanh"), "relu": cells.elman("relu"), "gru": cells.gru(), "lstm": cells.lstm()}
RELATIVE = 1e-6  # of each array's norm: float32 sums of up to 1024 products, over up to 7 steps


class Problem(NamedTuple):
    """Everything in float32."""

    cell: Any
    params: dict[str, Any]
    x: Any
    state: tuple[Any, ...]
    steps: Steps
    reverse: bool
    dy: Any
    dstate: tuple[Any, ...]
    dstates: tuple[Any, ...] = ()


def config_for(cell: str, units: int, rows: int) -> persistent.Config:
    (found,) = [c for c in persistent.configurations() if (c.cell, c.units, c.rows) == (cell, units, rows)]
    return found


def problem(
    rng: np.random.Generator,
    cell: str,
    H: int,
    N: int,
    T: int,
    *,
    ragged: bool = False,
    reverse: bool = False,
    bias: bool = True,
    injected: bool = False,
) -> Problem:
    D, gates, states = 5, persistent.GATES[cell], len(CELLS[cell].states)

    def draw(*shape: int, scale: float = 1.0) -> Any:
        return (scale * rng.normal(size=shape)).astype(np.float32)

    params = {"weight_ih": draw(gates * H, D, scale=0.5), "weight_hh": draw(gates * H, H, scale=H**-0.5)}
    if bias:
        params |= {name: draw(gates * H, scale=0.3) for name in ("bias_ih", "bias_hh")}
    active = None
    if ragged:  # any order, zero among them
        lengths = rng.permutation(np.r_[0, T, rng.integers(0, T + 1, size=N)][-N:] if N > 1 else [max(T - 1, 0)])
        active = np.arange(T)[:, None] < lengths
    several = tuple(draw(T, N, H) for _ in range(states)) if injected else ()
    initial, last = (tuple(draw(N, H) for _ in range(states)) for _ in range(2))
    return Problem(
        CELLS[cell], params, draw(T, N, D), initial, Steps(active), reverse, draw(T, N, H), last, several
    )


def outcome(p: Problem, config: persistent.Config | None) -> dict[str, Any]:
    """Every result and gradient; by the generic scan in float64 where there is no configuration."""
    dtype = np.float64 if config is None else np.float32
    params = {k: v.astype(dtype) for k, v in p.params.items()}
    x, dy, *rest = (a.astype(dtype) for a in (p.x, p.dy, *p.state, *p.dstate, *p.dstates))
    k = len(p.state)
    state, dstate, dstates = tuple(rest[:k]), tuple(rest[k : 2 * k]), tuple(rest[2 * k :])
    run = scan.forward
    if config is not None:
        run = lambda *a, **o: persistent.forward(config, *a, home=state, **o)  # noqa: E731
    with generic_only():
        y, final, tape = run(p.cell, params, x, state, p.steps, xp=np, reverse=p.reverse, keep=True)
        dx, dinitial, _, dparams = scan.backward(tape, dy, dstate, dstates)
    named = {"y": y, "dx": dx, **dparams}
    for name, values in {"final": final, "dinitial": dinitial, "states": tape.states()}.items():
        named |= {f"{name} {i}": v for i, v in enumerate(values)}
    return named


def on_host(monkeypatch: pytest.MonkeyPatch, p: Problem, config: persistent.Config, seed: int, **options: Any) -> Any:
    monkeypatch.setattr(persistent, "launch", host.launcher(seed, **options))
    return outcome(p, config)


def differences(got: dict[str, Any], want: dict[str, Any]) -> dict[str, float]:
    """What is further away than float32 sums explain, with its relative distance."""
    assert got.keys() == want.keys()
    assert all(got[k].shape == want[k].shape and got[k].dtype == np.float32 for k in want)
    far = {k: float(np.linalg.norm(got[k] - want[k]) / (np.linalg.norm(want[k]) or 1.0)) for k in want}
    return {k: d for k, d in far.items() if not d <= RELATIVE}
