"""Recurrent layers of every cell with their reference loops, and random inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from support import reference_cells

import xprnn
from xprnn import cells


class LayerCase(NamedTuple):
    """A recurrent layer and the reference step of its cell."""

    make: Callable[..., Any]  # make(D, H, num_layers, **options) -> layer
    step: Callable[..., Any]


def leaky_cell() -> xprnn.Cell:
    """Return the cell of the README: a leaky Elman unit with a learnable rate for each unit."""

    def build(xp):
        def step(x, h, state, p):
            rate = 0.5 * xp.tanh(0.5 * p[0]) + 0.5
            drive = xp.tanh(x[0] + h[0])
            return (state[0] + rate * (drive - state[0]),), (drive,)

        def backward(dstate, saved, state, p):
            rate = 0.5 * xp.tanh(0.5 * p[0]) + 0.5
            (drive,), (d,) = saved, dstate
            da = d * (rate * (1.0 - drive * drive))
            return (da,), (da,), (d * (1.0 - rate),), (d * ((drive - state[0]) * (rate * (1.0 - rate))),)

        return step, backward

    return xprnn.Cell("leaky", 1, build, vectors=("rate",))


LEAKY_CELL = leaky_cell()
HARD_SIGMOID = ("hardsigmoid", 0.25, 0.5)
SCALED_TANH = ("scaledtanh", 1.5, 0.75)


def recurrent_factory(cell):
    return lambda D, H, L=1, **options: xprnn.Recurrent(D, H, L, cell=cell, **options)


def pregate_cell(separate_pregates: bool, separate_gates: bool) -> xprnn.Cell:
    """Return a cell with two pregates r, z and two gates that see q = r h + c/2.

    Each argument says whether the gates of that kind use x and h separately, or only their sum.
    """

    def build(xp):
        def pregate_sum(x, h):
            return 1.0 * x + h if separate_pregates else x + h

        def gate_sum(x, h):
            return x + 0.5 * h if separate_gates else x + h

        def pregate(x, h, state, p):
            r, z = xp.tanh(pregate_sum(x[0], h[0])), xp.tanh(pregate_sum(x[1], h[1]) + p[1] * state[1])
            return (r, z), r * state[0] + 0.5 * state[1]

        def pregate_backward(dvalues, dq, values, state, p):
            (r, z), (h, c) = values, state
            dar, daz = (dvalues[0] + dq * h) * (1.0 - r * r), dvalues[1] * (1.0 - z * z)
            return (dar, daz), (dq * r, 0.5 * dq + daz * p[1]), (None, daz * c)

        def step(x, h, state, p):
            r, z, n, o = x[0], x[1], xp.tanh(gate_sum(x[2], h[0])), xp.tanh(gate_sum(x[3], h[1]))
            c = state[1] + z * (n - state[1])
            return (o * c + p[0] * r, c), (r, z, n, o, c)

        def backward(dstate, saved, state, p):
            r, z, n, o, c = saved
            dh, dc = dstate
            dc = dc + dh * o
            dan, dao = dc * z * (1.0 - n * n), dh * c * (1.0 - o * o)
            d = (0.5 * dan, 0.5 * dao) if separate_gates else (dan, dao)
            return (dh * p[0], dc * (n - state[1]), dan, dao), d, (None, dc * (1.0 - z)), (dh * r, None)

        return cells.Pointwise(step, backward, pregate, pregate_backward)

    return xprnn.Cell("pregates", 4, build, ("h", "c"), ("weight_r", "weight_z"), pregates=2)


CASES = {
    "rnn": LayerCase(xprnn.RNN, reference_cells.elman()),
    "rnn-relu": LayerCase(
        lambda *a, **k: xprnn.RNN(*a, nonlinearity="relu", **k),
        reference_cells.elman(reference_cells.activation("relu")),
    ),
    "lstm": LayerCase(xprnn.LSTM, reference_cells.lstm()),
    "lstm-proj": LayerCase(lambda *a, **k: xprnn.LSTM(*a, proj_size=2, **k), reference_cells.lstm()),
    "gru": LayerCase(xprnn.GRU, reference_cells.gru()),
    "gru-before": LayerCase(
        lambda *a, **k: xprnn.GRU(*a, reset_after=False, **k), reference_cells.gru(reset_after=False)
    ),
    "leaky": LayerCase(recurrent_factory(LEAKY_CELL), reference_cells.leaky),
    "lstm-peepholes": LayerCase(recurrent_factory(cells.lstm(peepholes=True)), reference_cells.lstm(peepholes=True)),
    "lstm-coupled": LayerCase(
        recurrent_factory(cells.lstm(peepholes=True, coupled=True)), reference_cells.lstm(peepholes=True, coupled=True)
    ),
    "lstm-clip": LayerCase(recurrent_factory(cells.lstm(clip=0.4)), reference_cells.lstm(clip=0.4)),
    "gru-clip": LayerCase(recurrent_factory(cells.gru(clip=0.3)), reference_cells.gru(clip=0.3)),
    "gru-before-clip": LayerCase(
        recurrent_factory(cells.gru_reset_before(clip=0.3)), reference_cells.gru(reset_after=False, clip=0.3)
    ),
    "rnn-clip": LayerCase(recurrent_factory(cells.elman(clip=0.3)), reference_cells.elman(clip=0.3)),
    "lstm-activations": LayerCase(
        recurrent_factory(cells.lstm(xprnn.activation(*HARD_SIGMOID), "softsign", xprnn.activation(*SCALED_TANH))),
        reference_cells.lstm(
            reference_cells.activation(*HARD_SIGMOID),
            reference_cells.activation("softsign"),
            reference_cells.activation(*SCALED_TANH),
        ),
    ),
    "gru-activations": LayerCase(
        recurrent_factory(cells.gru(xprnn.activation(*HARD_SIGMOID), "softsign")),
        reference_cells.gru(reference_cells.activation(*HARD_SIGMOID), reference_cells.activation("softsign")),
    ),
}
# Cells with products in unusual places, which the tests of the kernels compare with the reference scan.
RARE_CASES = {
    f"pregates-{a:d}{b:d}": recurrent_factory(pregate_cell(a, b))
    for a, b in ((True, True), (True, False), (False, True))
}
RARE_CASES["peepholes-proj"] = lambda D, H, L=1: xprnn.LSTM(
    D, H, L, proj_size=3, cell=cells.lstm(peepholes=True, clip=0.5)
)
# Libraries on which a step takes a hundred times as long as on NumPy; tests run fewer cases on them.
SLOW_LIBRARIES = ("strict", "jax")
MAIN_CASES = ["rnn", "lstm", "lstm-proj", "gru", "gru-before", "leaky"]


def initial_params(layer: Any) -> dict[str, Any]:
    """Return the parameters that `layer.init` draws with seed 0, in float64 NumPy."""
    return layer.init(np.random.default_rng(0), like=np.zeros(0))


class LayerInputs(NamedTuple):
    """NumPy arrays for one call of a layer."""

    params: dict[str, Any]
    x: Any
    state: Any
    flags: dict[str, Any]


def random_state(rng: np.random.Generator, layer: Any, n: int, scale: float = 0.5) -> Any:
    """Return a random state in the structure that the layer documents."""
    arrays, projected = [], getattr(layer, "proj_size", 0)
    for i in range(len(layer.resolved_cell.states)):
        sizes = [projected if projected and i == 0 else h for h in layer.hidden_sizes]
        if isinstance(layer.hidden_size, int):
            arrays.append(scale * rng.normal(size=(layer.num_layers * layer.num_directions, n, sizes[0])))
        else:
            arrays.append(tuple(scale * rng.normal(size=(layer.num_directions, n, h)) for h in sizes))
    return arrays[0] if len(arrays) == 1 else tuple(arrays)


def split_state(layer: Any, state: Any) -> list[tuple[Any, ...]]:
    """Return the state of each layer and direction, as the reference loops take it."""
    h_and_c = (state,) if len(layer.resolved_cell.states) == 1 else state
    by_name = []
    for value in h_and_c:
        arrays = [value] if not isinstance(value, tuple) else value
        by_name.append([a[k] for a in arrays for k in range(a.shape[0])])
    return list(zip(*by_name, strict=True))


def stack_state(layer: Any, finals: list[tuple[Any, ...]]) -> Any:
    """Invert `split_state`."""
    d, state = layer.num_directions, []
    for rows in zip(*finals, strict=True):
        if isinstance(layer.hidden_size, int):
            state.append(np.stack(rows))
        else:
            state.append(tuple(np.stack(rows[k : k + d]) for k in range(0, len(rows), d)))
    return state[0] if len(state) == 1 else tuple(state)


def random_inputs(
    rng: np.random.Generator, layer: Any, T: int = 5, N: int = 3, flags: str = "", scale: float = 0.6
) -> LayerInputs:
    """Draw time-major x, all parameters (biases and peepholes too), a state and flags for `layer`.

    Args:
        flags: letters out of "lmr": draw lengths, mask, reset.
    """
    params = {name: scale * rng.normal(size=shape) for name, shape in layer.shapes().items()}
    values = {}
    if "l" in flags:
        values["lengths"] = rng.integers(0, T + 1, size=N)
    if "m" in flags:
        values["mask"] = rng.random((T, N)) < 0.7
    if "r" in flags:
        values["reset"] = rng.random((T, N)) < 0.3
    return LayerInputs(params, rng.normal(size=(T, N, layer.input_size)), random_state(rng, layer, N), values)


def reference_outputs(case: LayerCase, layer: Any, p: LayerInputs) -> tuple[Any, Any]:
    """Return y and the final state of the reference loops."""
    y, finals = reference_cells.run_stack(case.step, layer, p.params, p.x, split_state(layer, p.state), **p.flags)
    return y, stack_state(layer, finals)


def to_backend(xp: Any, tree: Any, dtype: str | None = None) -> Any:
    """Convert the arrays of nested tuples and dicts to a backend: floats to `dtype`, others to their own dtype."""
    if isinstance(tree, dict):
        return {k: to_backend(xp, v, dtype) for k, v in tree.items()}
    if isinstance(tree, tuple):
        return tuple(to_backend(xp, v, dtype) for v in tree)
    if tree is None:
        return None
    return xp.asarray(tree, dtype if np.asarray(tree).dtype.kind == "f" else None)


def inputs_on(xp: Any, p: LayerInputs, dtype: str | None = None) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Return params, x, state and flags as arrays of a backend."""
    return (
        to_backend(xp, p.params, dtype),
        to_backend(xp, p.x, dtype),
        to_backend(xp, p.state, dtype),
        to_backend(xp, p.flags),
    )


def random_cotangents(rng: np.random.Generator, tree: Any) -> Any:
    """Return random arrays in the shapes of a tree of arrays."""
    if isinstance(tree, tuple):
        return tuple(random_cotangents(rng, a) for a in tree)
    return rng.normal(size=tuple(tree.shape))
