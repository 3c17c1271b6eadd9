"""The engine's cases, each a layer beside its naive reference, and the random problems that the tests give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from support import reference_cells as naive

import xprnn
from xprnn import cells


class LayerCase(NamedTuple):
    """A kind of layer and the reference's step for it."""

    make: Callable[..., Any]  # make(D, H, num_layers, **options) -> layer
    step: Callable[..., Any]


def leaky_cell() -> xprnn.Cell:
    """A leaky, continuous-time Elman unit with a learnable rate for each unit: the README's own cell."""

    def build(xp):
        def step(x, h, state, p):
            rate = 0.5 * xp.tanh(0.5 * p[0]) + 0.5
            drive = xp.tanh(x[0] + h[0])
            return (state[0] + rate * (drive - state[0]),), (drive,)

        def back(dstate, saved, state, p):
            rate = 0.5 * xp.tanh(0.5 * p[0]) + 0.5
            (drive,), (d,) = saved, dstate
            da = d * (rate * (1.0 - drive * drive))
            return (da,), (da,), (d * (1.0 - rate),), (d * ((drive - state[0]) * (rate * (1.0 - rate))),)

        return step, back

    return xprnn.Cell("leaky", 1, build, vectors=("rate",))


LEAKY_CELL = leaky_cell()
HARD_SIGMOID = ("hardsigmoid", 0.25, 0.5)
SCALED_TANH = ("scaledtanh", 1.5, 0.75)


def recurrent_factory(cell):
    return lambda D, H, L=1, **options: xprnn.Recurrent(D, H, L, cell=cell, **options)


def pregate_cell(separate_pregates: bool, separate_gates: bool) -> xprnn.Cell:
    """Two early gates r, z, two others that see q = r h + c/2; x and h of each pair apart, or only summed."""

    def build(xp):
        def first(x, h):
            return 1.0 * x + h if separate_pregates else x + h

        def late(x, h):
            return x + 0.5 * h if separate_gates else x + h

        def early(x, h, state, p):
            r, z = xp.tanh(first(x[0], h[0])), xp.tanh(first(x[1], h[1]) + p[1] * state[1])
            return (r, z), r * state[0] + 0.5 * state[1]

        def early_back(dvalues, dq, values, state, p):
            (r, z), (h, c) = values, state
            dar, daz = (dvalues[0] + dq * h) * (1.0 - r * r), dvalues[1] * (1.0 - z * z)
            return (dar, daz), (dq * r, 0.5 * dq + daz * p[1]), (None, daz * c)

        def step(x, h, state, p):
            r, z, n, o = x[0], x[1], xp.tanh(late(x[2], h[0])), xp.tanh(late(x[3], h[1]))
            c = state[1] + z * (n - state[1])
            return (o * c + p[0] * r, c), (r, z, n, o, c)

        def back(dstate, saved, state, p):
            r, z, n, o, c = saved
            dh, dc = dstate
            dc = dc + dh * o
            dan, dao = dc * z * (1.0 - n * n), dh * c * (1.0 - o * o)
            d = (0.5 * dan, 0.5 * dao) if separate_gates else (dan, dao)
            return (dh * p[0], dc * (n - state[1]), dan, dao), d, (None, dc * (1.0 - z)), (dh * r, None)

        return cells.Pointwise(step, back, early, early_back)

    return xprnn.Cell("early", 4, build, ("h", "c"), ("weight_r", "weight_z"), pregates=2)


CASES = {
    "rnn": LayerCase(xprnn.RNN, naive.elman()),
    "rnn-relu": LayerCase(
        lambda *a, **k: xprnn.RNN(*a, nonlinearity="relu", **k), naive.elman(naive.activation("relu"))
    ),
    "lstm": LayerCase(xprnn.LSTM, naive.lstm()),
    "lstm-proj": LayerCase(lambda *a, **k: xprnn.LSTM(*a, proj_size=2, **k), naive.lstm()),
    "gru": LayerCase(xprnn.GRU, naive.gru()),
    "gru-before": LayerCase(lambda *a, **k: xprnn.GRU(*a, reset_after=False, **k), naive.gru(reset_after=False)),
    "leaky": LayerCase(recurrent_factory(LEAKY_CELL), naive.leaky),
    "lstm-peepholes": LayerCase(recurrent_factory(cells.lstm(peepholes=True)), naive.lstm(peepholes=True)),
    "lstm-coupled": LayerCase(
        recurrent_factory(cells.lstm(peepholes=True, coupled=True)), naive.lstm(peepholes=True, coupled=True)
    ),
    "lstm-clip": LayerCase(recurrent_factory(cells.lstm(clip=0.4)), naive.lstm(clip=0.4)),
    "gru-clip": LayerCase(recurrent_factory(cells.gru(clip=0.3)), naive.gru(clip=0.3)),
    "gru-before-clip": LayerCase(
        recurrent_factory(cells.gru_reset_before(clip=0.3)), naive.gru(reset_after=False, clip=0.3)
    ),
    "rnn-clip": LayerCase(recurrent_factory(cells.elman(clip=0.3)), naive.elman(clip=0.3)),
    "lstm-activations": LayerCase(
        recurrent_factory(cells.lstm(xprnn.activation(*HARD_SIGMOID), "softsign", xprnn.activation(*SCALED_TANH))),
        naive.lstm(naive.activation(*HARD_SIGMOID), naive.activation("softsign"), naive.activation(*SCALED_TANH)),
    ),
    "gru-activations": LayerCase(
        recurrent_factory(cells.gru(xprnn.activation(*HARD_SIGMOID), "softsign")),
        naive.gru(naive.activation(*HARD_SIGMOID), naive.activation("softsign")),
    ),
}
# Whose products are where no other case's are; the kernels' tests hold them to the generic scan.
RARE_CASES = {
    f"early-{a:d}{b:d}": recurrent_factory(pregate_cell(a, b)) for a, b in ((True, True), (True, False), (False, True))
}
RARE_CASES["peepholes-proj"] = lambda D, H, L=1: xprnn.LSTM(
    D, H, L, proj_size=3, cell=cells.lstm(peepholes=True, clip=0.5)
)
# Libraries on which a step costs a hundred times NumPy's: one check of each kind is enough there.
SLOW_LIBRARIES = ("strict", "jax")
MAIN_CASES = ["rnn", "lstm", "lstm-proj", "gru", "gru-before", "leaky"]


class LayerInputs(NamedTuple):
    """NumPy arrays for one call of a layer."""

    params: dict[str, Any]
    x: Any
    state: Any
    flags: dict[str, Any]


def random_state(rng: np.random.Generator, layer: Any, n: int, scale: float = 0.5) -> Any:
    """A random state in the structure that the layer documents."""
    parts, projected = [], getattr(layer, "proj_size", 0)
    for i in range(len(layer.resolved_cell.states)):
        sizes = [projected if projected and i == 0 else h for h in layer.hidden_sizes]
        if isinstance(layer.hidden_size, int):
            parts.append(scale * rng.normal(size=(layer.num_layers * layer.num_directions, n, sizes[0])))
        else:
            parts.append(tuple(scale * rng.normal(size=(layer.num_directions, n, h)) for h in sizes))
    return parts[0] if len(parts) == 1 else tuple(parts)


def split_state(layer: Any, state: Any) -> list[tuple[Any, ...]]:
    """The state of each layer and direction, as the reference takes it."""
    parts = (state,) if len(layer.resolved_cell.states) == 1 else state
    columns = []
    for part in parts:
        arrays = [part] if not isinstance(part, tuple) else part
        columns.append([a[k] for a in arrays for k in range(a.shape[0])])
    return list(zip(*columns, strict=True))


def stack_state(layer: Any, finals: list[tuple[Any, ...]]) -> Any:
    """The inverse of `split_state`."""
    d, parts = layer.num_directions, []
    for column in zip(*finals, strict=True):
        if isinstance(layer.hidden_size, int):
            parts.append(np.stack(column))
        else:
            parts.append(tuple(np.stack(column[k : k + d]) for k in range(0, len(column), d)))
    return parts[0] if len(parts) == 1 else tuple(parts)


def random_inputs(
    rng: np.random.Generator, layer: Any, T: int = 5, N: int = 3, flags: str = "", scale: float = 0.6
) -> LayerInputs:
    """Random numbers for `layer`, all parameters included (biases and peepholes too), time-major.

    Args:
        flags: any of "l", "m", "r": which of lengths, mask and reset are drawn.
    """
    params = {name: scale * rng.normal(size=shape) for name, shape in layer.shapes().items()}
    given = {}
    if "l" in flags:
        given["lengths"] = rng.integers(0, T + 1, size=N)
    if "m" in flags:
        given["mask"] = rng.random((T, N)) < 0.7
    if "r" in flags:
        given["reset"] = rng.random((T, N)) < 0.3
    return LayerInputs(params, rng.normal(size=(T, N, layer.input_size)), random_state(rng, layer, N), given)


def reference_outputs(case: LayerCase, layer: Any, p: LayerInputs) -> tuple[Any, Any]:
    """y and the final state by the naive reference."""
    y, finals = naive.run_stack(case.step, layer, p.params, p.x, split_state(layer, p.state), **p.flags)
    return y, stack_state(layer, finals)


def to_backend(xp: Any, tree: Any, dtype: str | None = None) -> Any:
    """The arrays of nested tuples and dicts, on a backend: floats in `dtype`, the others in their own."""
    if isinstance(tree, dict):
        return {k: to_backend(xp, v, dtype) for k, v in tree.items()}
    if isinstance(tree, tuple):
        return tuple(to_backend(xp, v, dtype) for v in tree)
    if tree is None:
        return None
    return xp.asarray(tree, dtype if np.asarray(tree).dtype.kind == "f" else None)


def inputs_on(xp: Any, p: LayerInputs, dtype: str | None = None) -> tuple[Any, Any, Any, dict[str, Any]]:
    """params, x, state, flags of a problem on a backend."""
    return (
        to_backend(xp, p.params, dtype),
        to_backend(xp, p.x, dtype),
        to_backend(xp, p.state, dtype),
        to_backend(xp, p.flags),
    )


def random_cotangents(rng: np.random.Generator, tree: Any) -> Any:
    """Random numbers in the shape of each array of the tree."""
    if isinstance(tree, tuple):
        return tuple(random_cotangents(rng, a) for a in tree)
    return rng.normal(size=tuple(tree.shape))
