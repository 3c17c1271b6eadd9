"""Entry points of the compiled scan against the reference scan in float64, with random cotangents of every output."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.layer_cases import LEAKY_CELL, pregate_cell

from xprnn import cells
from xprnn.arrays.namespace import namespace
from xprnn.kernels import reference
from xprnn.kernels.jit import kernel, scan
from xprnn.kernels.jit.threads import RowRange
from xprnn.kernels.tape import StepMask

pytestmark = pytest.mark.needs("numba")
XP = namespace(np.zeros(0))
CELLS = {
    "elman": (cells.elman(), 0),
    "lstm": (cells.lstm(), 0),
    "lstm-proj": (cells.lstm(), 3),
    "gru": (cells.gru(), 0),
    "gru-before": (cells.gru_reset_before(), 0),
    "peepholes": (cells.lstm(peepholes=True), 0),
    "leaky": (LEAKY_CELL, 0),
    "pregates": (pregate_cell(True, True), 0),
}
each_cell = pytest.mark.parametrize("name", CELLS)
# (T, N, D, H). Units: fewer than a vector, whole vectors, and a remainder. The last two have too much work for the
# product ROWS (bind.MAX_ROWS_WORK) and run PANELS.
SIZES = [
    (1, 2, 1, 1),
    (5, 3, 4, 3),
    (4, 2, 3, 7),
    (3, 5, 2, 8),
    (3, 1, 7, 9),
    (6, 4, 5, 15),
    (2, 3, 3, 16),
    (7, 1, 3, 17),
]
SIZES += [(0, 2, 3, 4), (3, 0, 2, 4), (4, 20, 5, 33), (6, 70, 30, 50)]
# Several blocks of steps: forward 1 MiB of gate sums; backward 256 rows, or one step if it has more.
LONG_SIZES = [(100, 20, 5, 33), (300, 1, 3, 5), (20, 90, 2, 40), (4, 300, 2, 5), (9, 130, 2, 5)]
MODES = ["plain", "lengths", "mask", "reset", "all"]


class Arguments(NamedTuple):
    """Arguments of a pass and the cotangents of its results, in float64."""

    cell: Any
    params: dict[str, Any]
    x: Any
    state: tuple[Any, ...]
    mask: StepMask
    reset_state: tuple[Any, ...]
    reverse: bool
    dy: Any
    dstate: tuple[Any, ...]
    dstates: tuple[Any, ...]


def random_mask(rng, mode, T, N):
    """Return the mask of a mode: lengths, or a mask with gaps; resets; or both."""
    active = reset = None
    if mode == "lengths":
        active = np.arange(T)[:, None] < rng.integers(0, T + 1, N)[None]
    if mode in ("mask", "all"):
        active = rng.random((T, N)) < 0.7
    if mode in ("reset", "all"):
        reset = rng.random((T, N)) < 0.3
    return StepMask(active, reset & active if mode == "all" else reset)


def random_arguments(name, mode, sizes, *, integer=False, reverse=False, bias=True):
    """Draw the arguments of a case, from a seed that depends on it."""
    rng = np.random.default_rng(zlib.crc32(repr((name, mode, sizes, integer, reverse)).encode()))
    (cell, P), (T, N, D, H) = CELLS[name], sizes
    W, width = cell.gates * H, P or H
    shapes = {"weight_ih": (W, D), "weight_hh": (W, width)} | ({"bias_ih": W, "bias_hh": W} if bias else {})
    shapes |= ({"weight_hr": (P, H)} if P else {}) | dict.fromkeys(cell.vectors, H)
    params = {key: 0.12 * rng.standard_normal(shape) for key, shape in shapes.items()}
    x = rng.integers(0, D, (T, N)) if integer else rng.standard_normal((T, N, D))
    widths = [H if k else width for k in range(len(cell.states))]
    state, reset_state, dstate = ([rng.standard_normal((N, w)) for w in widths] for _ in range(3))
    dstates = [rng.standard_normal((T, N, w)) for w in widths] if mode == "all" else []
    dy, mask = rng.standard_normal((T, N, width)), random_mask(rng, mode, T, N)
    return Arguments(cell, params, x, (*state,), mask, (*reset_state,), reverse, dy, (*dstate,), (*dstates,))


def convert(tree, change):
    """Apply a function to every float array of a tree."""
    if isinstance(tree, dict):
        return {key: convert(a, change) for key, a in tree.items()}
    if isinstance(tree, tuple) and not isinstance(tree, StepMask):
        values = [convert(a, change) for a in tree]
        return Arguments(*values) if isinstance(tree, Arguments) else tuple(values)
    return change(tree) if isinstance(tree, np.ndarray) and tree.dtype.kind == "f" else tree


def run(forward, a):
    """Return every result of a pass by name: with a tape, without one, and of backward."""
    options = {"reset_state": a.reset_state, "xp": XP, "reverse": a.reverse}
    y, final, tape = forward(a.cell, a.params, a.x, a.state, a.mask, record_tape=True, **options)
    bare_y, bare_final, _ = forward(a.cell, a.params, a.x, a.state, a.mask, record_tape=False, **options)
    dx, dstate, dreset, grads = tape.backward_fn(tape, a.dy, a.dstate, a.dstates)
    names = a.cell.states
    results = {"y": y, "y without tape": bare_y} | {f"d{key}": grads[key] for key in a.params}
    results |= {} if dx is None else {"dx": dx}
    for what, arrays in (
        ("final", final),
        ("final without tape", bare_final),
        ("states", tape.states()),
        ("d", dstate),
    ):
        results |= {f"{what} {key}": value for key, value in zip(names, arrays, strict=True)}
    if a.mask.reset is not None and len(a.x):
        results |= {f"dreset {key}": value for key, value in zip(names, dreset, strict=True)}
    return results


def compiled(a):
    forward = scan.find_kernel(a.cell, a.params)
    assert forward is not None
    return forward


def assert_close(got, want, dtype):
    """Assert that results equal those of the float64 loop; the tolerance is relative to the largest element."""
    assert got.keys() == want.keys()
    for key, expected in want.items():
        assert got[key].dtype == dtype, key
        assert got[key].shape == expected.shape, key
        size = 1 + np.abs(expected).max(initial=0)
        atol = (1e-12 if dtype == "float64" else 2e-5) * size
        np.testing.assert_allclose(got[key], expected, rtol=0, atol=atol, err_msg=key)


def check(a, *dtypes):
    """Assert that the compiled pass equals the reference scan, which runs in float64, for each of the dtypes."""
    want = run(reference.reference_forward, a)
    for dtype in dtypes:
        cast = convert(a, lambda array, dtype=dtype: array.astype(dtype))
        assert_close(run(compiled(cast), cast), want, dtype)


@pytest.mark.parametrize("mode", MODES)
@each_cell
def test_scan_equals_float64_loop(name, mode):
    for sizes in SIZES:
        for integer, reverse in ((False, False), (False, True), (True, False)):
            a = random_arguments(name, mode, sizes, integer=integer, reverse=reverse, bias=mode != "mask")
            check(a, "float64", "float32")


@pytest.mark.parametrize("mode", ["plain", "all"])
@pytest.mark.parametrize("sizes", LONG_SIZES, ids=str)
@pytest.mark.parametrize("name", ["elman", "lstm-proj", "gru-before", "peepholes"])
def test_blocks_of_steps_equal_float64_loop(name, sizes, mode):
    for integer, reverse in ((False, True), (True, False)):
        check(random_arguments(name, mode, sizes, integer=integer, reverse=reverse), "float64")


@pytest.mark.parametrize("mode", MODES)
@each_cell
def test_row_ranges_equal_float64_loop(monkeypatch, name, mode):
    """Ranges of 1, N - 2 and 1 rows, each of which runs by itself and adds to the gradients of the parameters."""
    monkeypatch.setattr(
        scan, "_split", lambda rows, T, N, weights: [RowRange(0, 1), RowRange(1, N - 2), RowRange(N - 1, 1)]
    )
    for sizes in ((5, 7, 3, 9), (40, 33, 4, 16)):
        for integer, reverse in ((False, False), (False, True), (True, False)):
            check(random_arguments(name, mode, sizes, integer=integer, reverse=reverse), "float64")


# --- strides


def permuted(a):
    """Return a copy whose first axis is the fastest in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 0, -1)), -1, 0)


def swapped(a):
    """Return a copy whose first two axes are exchanged in memory, as in a batch-first array."""
    return np.ascontiguousarray(a.swapaxes(0, 1)).swapaxes(0, 1) if a.ndim > 1 else a


def spaced(axis):
    """Return a function that makes a view of every third element along an axis of a larger array."""

    def change(a):
        k = min(axis, a.ndim - 1)
        return np.repeat(a, 3, axis=k)[(*[slice(None)] * k, slice(None, None, 3))]

    return change


def repeated(axis):
    """Return a function that repeats the first entry along an axis, with stride 0."""

    def change(a):
        first = a.take([0], axis=min(axis, a.ndim - 1)) if a.size else a
        return np.broadcast_to(first, a.shape)

    return change


LAYOUTS = {
    "fortran": np.asfortranarray,
    "first axis fastest": permuted,
    "batch first": swapped,
    "negative": lambda a: np.flip(np.flip(a).copy()),
    "negative units": lambda a: a[..., ::-1].copy()[..., ::-1],
    **{f"every third, axis {axis}": spaced(axis) for axis in range(3)},
    **{f"stride 0, axis {axis}": repeated(axis) for axis in range(3)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["lstm", "lstm-proj", "gru-before", "peepholes"])
def test_strides_of_arguments_equal_float64_loop(dtype, name, layout):
    """Sizes with one row, few rows, and 16 rows or more, for which x is copied in other cases."""
    change = LAYOUTS[layout]
    for sizes in ((5, 1, 3, 9), (6, 3, 4, 17), (4, 17, 3, 8), (3, 2, 1, 5)):
        for mode, integer in (("plain", False), ("all", False), ("plain", True)):
            a = random_arguments(name, mode, sizes, integer=integer)
            a = a._replace(x=change(a.x)) if integer else a
            got = convert(convert(a, lambda array: array.astype(dtype)), change)
            assert_close(run(compiled(got), got), run(reference.reference_forward, convert(a, change)), dtype)


@pytest.mark.parametrize("classes", [2, 500])
def test_class_numbers_read_either_copy_of_the_weight(dtype, classes):
    """The weight is transposed first if there are few classes; otherwise, or if it is transposed, read in place."""
    for change in (np.ascontiguousarray, np.asfortranarray):
        for name in ("lstm", "gru-before", "pregates"):
            a = random_arguments(name, "plain", (5, 4, classes, 9), integer=True)
            check(a._replace(params=a.params | {"weight_ih": change(a.params["weight_ih"])}), dtype)


# --- single steps and wrong shapes


@pytest.mark.parametrize("name", [name for name, (_, P) in CELLS.items() if not P])
def test_step_equals_float64_step(rng, dtype, name):
    """Weights with adjacent columns are read in place; others are copied."""
    cell = CELLS[name][0]
    compiled_cell = kernel.scan_kernel(cell, np.dtype(dtype), False)
    for H in (1, 3, 7, 8, 9, 15, 16, 17, 33, 70):
        for n, change in ((1, np.asarray), (8, np.asarray), (1, np.asfortranarray), (3, spaced(0)), (2, spaced(1))):
            a = convert(random_arguments(name, "plain", (1, n, 5, H), integer=False), change)
            cast = convert(convert(a, lambda array: array.astype(dtype)), change)
            for x, x64 in ((cast.x[0], a.x[0]), (ids := rng.integers(0, 5, n), ids)):
                weights = [cast.params[key] for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
                vectors = compiled_cell.vectors_tuple(np.ascontiguousarray(cast.params[key]) for key in cell.vectors)
                y, final = np.empty((n, H), dtype), tuple(np.empty((2, n, H), dtype) for _ in a.state)
                initial = tuple(np.stack((np.full_like(s, np.nan), s)) for s in cast.state)
                entry = compiled_cell.entry("step", x.dtype.kind == "i")
                pad, template = compiled_cell.states_tuple, compiled_cell.template(False, False)
                assert entry(template, 1, x, *weights, vectors, pad(initial), y, pad(final)) == 0
                want = reference.single_step(XP, cell, a.params, x64, a.state)
                got = {"y": y} | {key: s[1] for key, s in zip(cell.states, final, strict=True)}
                assert_close(got, {"y": want[0]} | dict(zip(cell.states, want, strict=True)), dtype)


def test_arrays_that_do_not_fit_raise(rng):
    a = random_arguments("peepholes", "plain", (4, 2, 3, 5))
    right = {"x": a.x, **a.params, "h": a.state[0], "c": a.state[1]}
    wrong = {
        key: np.concatenate((value, value), axis=axis) for key, value in right.items() for axis in (value.ndim - 1,)
    }
    for key, value in wrong.items():
        arrays = right | {key: value}
        params, state = {k: arrays[k] for k in a.params}, (arrays["h"], arrays["c"])
        with pytest.raises(ValueError, match=r"do not fit|must match|broadcast"):
            compiled(a)(
                a.cell, params, arrays["x"], state, a.mask,
                reset_state=state, xp=XP, reverse=False, record_tape=True,
            )  # fmt: skip
