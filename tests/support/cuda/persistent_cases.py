"""Runs of one layer and direction on the emulated persistent kernels, compared with the reference scan in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace
from support.cuda import persistent_emulator

from xprnn import cells
from xprnn.kernels import dispatch
from xprnn.kernels.config import reference_only
from xprnn.kernels.cuda import cluster_config, persistent
from xprnn.kernels.cuda.cluster_config import ClusterConfig, all_configs
from xprnn.kernels.tape import StepMask

CELLS = {"tanh": cells.elman("tanh"), "relu": cells.elman("relu"), "gru": cells.gru(), "lstm": cells.lstm()}
MAX_RELATIVE_ERROR = 1e-6  # of each array's norm; float32 sums of up to 1024 products, over up to 7 steps
MAX_RELATIVE_ERROR_DX = 3e-6  # dx is a NumPy float32 product with sums of up to 4 * 512 terms that mostly cancel


class KernelInputs(NamedTuple):
    """Inputs and cotangents of one layer and direction, all in float32."""

    cell: Any
    params: dict[str, Any]
    x: Any
    state: tuple[Any, ...]
    steps: StepMask
    reverse: bool
    dy: Any
    dstate: tuple[Any, ...]
    dstates: tuple[Any, ...] = ()


def config_for(cell: str, units: int, rows: int) -> ClusterConfig:
    """Return the configuration of a cell with these padded units and batch rows per cluster."""
    (config,) = [
        c for c in all_configs() if (c.cell_name, c.padded_hidden_size, c.rows_per_cluster) == (cell, units, rows)
    ]
    return config


def random_inputs(
    rng: np.random.Generator,
    cell: str,
    H: int,
    N: int,
    T: int,
    *,
    ragged: bool = False,
    reverse: bool = False,
    bias: bool = True,
    with_dstates: bool = False,
) -> KernelInputs:
    """Draw inputs, parameters and cotangents of a layer with T steps, N batch rows and H units."""
    D, gates, states = 5, cluster_config.GATE_COUNTS[cell], len(CELLS[cell].states)

    def draw(*shape: int, scale: float = 1.0) -> Any:
        return (scale * rng.normal(size=shape)).astype(np.float32)

    params = {"weight_ih": draw(gates * H, D, scale=0.5), "weight_hh": draw(gates * H, H, scale=H**-0.5)}
    if bias:
        params |= {name: draw(gates * H, scale=0.3) for name in ("bias_ih", "bias_hh")}
    active = None
    if ragged:  # unsorted lengths, 0 among them
        lengths = rng.permutation(np.r_[0, T, rng.integers(0, T + 1, size=N)][-N:] if N > 1 else [max(T - 1, 0)])
        active = np.arange(T)[:, None] < lengths
    dstates = tuple(draw(T, N, H) for _ in range(states)) if with_dstates else ()
    initial, last = (tuple(draw(N, H) for _ in range(states)) for _ in range(2))
    return KernelInputs(
        CELLS[cell], params, draw(T, N, D), initial, StepMask(active), reverse, draw(T, N, H), last, dstates
    )


def kernel_results(p: KernelInputs, config: ClusterConfig | None = None, **settings: Any) -> dict[str, Any]:
    """Return every output and gradient by name; without a configuration, those of the reference scan in float64."""
    if config is None:
        return _reference_results(p)
    import cupy

    params = {k: cupy.asarray(v) for k, v in p.params.items()}
    x, dy, *rest = (cupy.asarray(a) for a in (p.x, p.dy, *p.state, *p.dstate, *p.dstates))
    k = len(p.state)
    state, dstate, dstates = tuple(rest[:k]), tuple(rest[k : 2 * k]), tuple(rest[2 * k :])
    steps = p.steps if p.steps.active is None else StepMask(cupy.asarray(p.steps.active))
    namespace = array_namespace(x)
    with persistent_emulator.launch_settings(**settings):
        y, final, tape = persistent.forward(
            config,
            p.cell,
            params,
            x,
            state,
            steps,
            reset_state=state,
            xp=namespace,
            reverse=p.reverse,
            record_tape=True,
        )
        dx, dinitial, _, dparams = dispatch.backward(tape, dy, dstate, dstates)
    results = _named_results(y, final, tape.states(), dx, dinitial, dparams)
    return {name: a.get() for name, a in results.items()}


def _reference_results(p: KernelInputs) -> dict[str, Any]:
    params = {k: v.astype(np.float64) for k, v in p.params.items()}
    x, dy, *rest = (a.astype(np.float64) for a in (p.x, p.dy, *p.state, *p.dstate, *p.dstates))
    k = len(p.state)
    with reference_only():
        y, final, tape = dispatch.forward(
            p.cell, params, x, tuple(rest[:k]), p.steps, xp=np, reverse=p.reverse, record_tape=True
        )
        dx, dinitial, _, dparams = dispatch.backward(tape, dy, tuple(rest[k : 2 * k]), tuple(rest[2 * k :]))
    return _named_results(y, final, tape.states(), dx, dinitial, dparams)


def _named_results(y: Any, final: Any, states: Any, dx: Any, dinitial: Any, dparams: Any) -> dict[str, Any]:
    named = {"y": y, "dx": dx, **dparams}
    for name, values in {"final": final, "dinitial": dinitial, "states": states}.items():
        named |= {f"{name} {i}": v for i, v in enumerate(values)}
    return named


def excessive_errors(got: dict[str, Any], want: dict[str, Any]) -> dict[str, float]:
    """Return the relative error of every array whose error exceeds the tolerance of float32 sums."""
    assert got.keys() == want.keys()
    assert all(got[k].shape == want[k].shape and got[k].dtype == np.float32 for k in want)
    errors = {k: float(np.linalg.norm(got[k] - want[k]) / (np.linalg.norm(want[k]) or 1.0)) for k in want}
    return {k: d for k, d in errors.items() if not d <= (MAX_RELATIVE_ERROR_DX if k == "dx" else MAX_RELATIVE_ERROR)}
