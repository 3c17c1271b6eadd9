"""The compiled products against NumPy in float64, and a batch's rows over several threads."""

from __future__ import annotations

import numpy as np
import pytest
from support.backends import Backend
from support.layer_cases import CASES, inputs_on, random_cotangents, random_inputs
from threadpoolctl import threadpool_limits

import xprnn
from xprnn.kernels.config import allow_jit
from xprnn.kernels.jit import arguments, compile_cache, scan_plan, threads
from xprnn.kernels.jit.arguments import panel_width
from xprnn.kernels.memory import address
from xprnn.kernels.row_order import RowOrder

pytestmark = pytest.mark.needs("numba")
XP = Backend.NUMPY
PRODUCT, PACK_RIGHT, PACK_LEFT, GRADIENT = range(4)
SIZES = [
    (1, 1, 1),
    (5, 0, 3),
    (2, 5, 16),
    (7, 3, 17),
    (8, 300, 33),
    (23, 513, 70),
    (16, 8, 32),
    (9, 17, 100),
    (5, 9, 61),
    (12, 31, 130),
    (3, 600, 1),
]


def do(number, dtype, *args):
    """One of gemm.py's functions."""
    numbers = [address(a) if isinstance(a, np.ndarray) else a for a in args]
    compile_cache.gemm_kernel(np.dtype(dtype).itemsize).ctypes(number, *numbers, *[0] * (11 - len(args)))


def edge(dtype):
    size = compile_cache.tile_size(np.dtype(dtype).itemsize)
    return np.zeros(size + size // compile_cache.tile_rows(), dtype)


def unset(size, dtype):
    """Memory of which nothing may be read before it is written."""
    return np.full(max(size, 1), np.nan, dtype)


def packed(b, dtype, turned):
    inner, columns = b.shape
    out = unset(inner * panel_width(columns, b.itemsize), dtype)
    source, strides = (np.ascontiguousarray(b.T), (1, inner)) if turned else (b, (columns, 1))
    do(PACK_RIGHT, dtype, source, *strides, inner, columns, out, inner, 0)
    return out


def close(got, want, inner):
    np.testing.assert_allclose(got, want, rtol=0, atol=8 * np.finfo(got.dtype).eps * (4 + inner))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("n", "inner", "columns"), SIZES)
def test_product(rng, dtype, n, inner, columns, turned):
    a, b = rng.uniform(-1, 1, (n, inner + 3)).astype(dtype), rng.uniform(-1, 1, (inner, columns)).astype(dtype)
    start = rng.uniform(-1, 1, (n, columns)).astype(dtype)
    want = a[:, :inner].astype(np.float64) @ b.astype(np.float64)
    panels = packed(b, dtype, turned)
    for given_, stride in ((start, columns), (start[0], 0)):
        out = np.full((n + 1, columns), 7, dtype)
        do(PRODUCT, dtype, a, inner + 3, panels, out, columns, given_, stride, n, inner, columns, edge(dtype))
        close(out[:n], given_ + want, inner)
        assert (out[n] == 7).all()  # nothing is written beyond the end
    out = start.copy()
    do(PRODUCT, dtype, a, inner + 3, panels, out, columns, out, columns, n, inner, columns, edge(dtype))
    close(out, start + want, inner)
    wide = panel_width(columns, out.itemsize)
    out = np.zeros((n, wide), dtype)
    do(PRODUCT, dtype, a, inner + 3, panels, out, wide, np.zeros(wide, dtype), 0, n, inner, wide, edge(dtype))
    close(out[:, :columns], want, inner)


@pytest.mark.parametrize(
    ("n", "rows", "columns"), [(0, 3, 2), (1, 1, 1), (7, 9, 33), (300, 17, 5), (40, 64, 96), (3, 8, 16)]
)
def test_gradient(rng, dtype, n, rows, columns):
    """The inner dimension comes in two pieces, as from two steps."""
    x, y = rng.uniform(-1, 1, (n, rows)).astype(dtype), rng.uniform(-1, 1, (n, columns)).astype(dtype)
    size, room, half = compile_cache.tile_rows(), n + 2, n // 2
    left, right = unset(-(-rows // size) * size * room, dtype), unset(panel_width(columns, x.itemsize) * room, dtype)
    sums, start = np.zeros(rows, dtype), rng.uniform(-1, 1, (rows, columns)).astype(dtype)
    for first, last in ((0, half), (half, n)):
        do(PACK_LEFT, dtype, x[first:], rows, last - first, rows, left, room, first, sums)
        do(PACK_RIGHT, dtype, y[first:], columns, 1, last - first, columns, right, room, first)
    want = x.astype(np.float64).T @ y.astype(np.float64)
    nothing = np.zeros(columns, dtype)
    for given_, stride in ((start, columns), (nothing, 0)):
        out = np.full((rows + 1, columns), 7, dtype)
        do(GRADIENT, dtype, left, right, n, room, rows, columns, out, given_, stride, edge(dtype))
        close(out[:rows], given_ + want, n)
        assert (out[rows] == 7).all()
    close(sums, x.astype(np.float64).sum(axis=0), n)


def test_nan_goes_where_it_belongs(dtype):
    """A row of the left side, a column of the right one, and no further."""
    for n, inner, columns in ((9, 20, 40), (3, 2, 5)):
        a, b = np.ones((n, inner), dtype), np.ones((inner, columns), dtype)
        a[1, 1], b[0, 2] = np.nan, np.inf
        out = np.zeros((n, columns), dtype)
        args = (packed(b, dtype, False), out, columns, np.zeros(columns, dtype), 0, n, inner, columns, edge(dtype))
        do(PRODUCT, dtype, a, inner, *args)
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(out, a @ b)


@pytest.mark.parametrize("flags", ["", "lmr"])
@pytest.mark.parametrize("name", ["rnn", "lstm", "lstm-proj", "gru", "gru-before"])
def test_rows_apart_change_nothing(rng, dtype, monkeypatch, name, flags):
    """A space behind the rows of the gates' adjoints, as large nets have it, is never read."""
    layer = CASES[name].make(5, 6)
    p = random_inputs(rng, layer, T=6, N=9, flags=flags)
    dy = random_cotangents(rng, everything(layer, p, "float64")[0])
    want = everything(layer, p, dtype, dy)
    monkeypatch.setattr(arguments, "_CACHE_ALIAS_STRIDE", 1)
    scan_plan.forward_plan.cache_clear()
    got = everything(CASES[name].make(5, 6), p, dtype, dy)  # a layer keeps what it has worked out
    scan_plan.forward_plan.cache_clear()
    XP.assert_close(got, want, condition=0)


# --- threads


def everything(layer, p, dtype, dy=None, dfinal=None):
    params, x, state, flags = inputs_on(XP, p, dtype)
    y, final, tape = layer.forward(params, x, state, **flags)
    assert "compiled" in tape.explain()
    if dy is None:
        return y, final
    return y, final, layer(params, x, state, **flags), *layer.backward(tape, dy.astype(dtype), dfinal)


@pytest.fixture
def split(monkeypatch):
    """Calls the function with its batch over so many threads, and checks that it was."""

    def run(count, call):
        seen = []
        monkeypatch.setattr(threads, "_MIN_WORK", 0)
        monkeypatch.setattr(threads, "max_threads", lambda: count)
        monkeypatch.setattr(threads, "_pools", {})
        true = threads.parallel_map
        monkeypatch.setattr(
            xprnn.kernels.jit.scan, "parallel_map", lambda walk, those: seen.append(those) or true(walk, those)
        )
        result = call()
        monkeypatch.undo()
        assert all(len(those) == count for those in seen)
        assert seen or count == 1  # one thread may take the plain way, which knows no parts
        return result

    return run


@pytest.mark.parametrize("flags", ["", "l", "lmr"])
@pytest.mark.parametrize("name", ["rnn", "lstm", "lstm-proj", "gru", "gru-before", "leaky"])
def test_threads_give_what_one_gives(rng, dtype, split, name, flags):
    layer = CASES[name].make(5, 6, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=7, N=37, flags=flags)
    y, final = everything(layer, p, "float64")
    dy, dfinal = random_cotangents(rng, y), random_cotangents(rng, final)
    dfinal = tuple(d.astype(dtype) for d in dfinal) if isinstance(dfinal, tuple) else dfinal.astype(dtype)
    one = split(1, lambda: everything(layer, p, dtype, dy, dfinal))
    two, three = (split(count, lambda: everything(layer, p, dtype, dy, dfinal)) for count in (2, 3))
    XP.assert_close(two, one, condition=200)
    XP.assert_close(three, one, condition=200)
    XP.assert_close(split(2, lambda: everything(layer, p, dtype, dy, dfinal)), two, condition=0)


@pytest.mark.parametrize("name", ["gru", "lstm-proj", "gru-before"])
def test_threads_with_classes_for_input(rng, split, name):
    layer = CASES[name].make(11, 6)
    params = layer.init(rng, like=np.zeros(0))
    ids = rng.integers(0, 11, (5, 40))

    def run():
        y, final, tape = layer.forward(params, ids, lengths=rng_lengths)
        return y, final, *layer.backward(tape, y)[1:]

    rng_lengths = rng.integers(0, 6, 40)
    XP.assert_close(split(2, run), split(1, run), condition=64)


def test_a_small_batch_is_never_split():
    whole = RowOrder.from_step_mask((1000, 15), xprnn.kernels.tape.StepMask(None, None))
    assert threads.split_rows(whole, 1000, 15, 1 << 20) == [(0, 15)]
    small = RowOrder.from_step_mask((10, 64), xprnn.kernels.tape.StepMask(None, None))
    assert threads.split_rows(small, 10, 64, 100) == [(0, 64)]


def test_parts_have_about_the_same_number_of_steps(monkeypatch):
    monkeypatch.setattr(threads, "max_threads", lambda: 2)
    active = np.arange(100)[:, None] < np.array([100] * 8 + [10] * 56)[None, :]
    rows = RowOrder.from_step_mask((100, 64), xprnn.kernels.tape.StepMask(active, None))
    those = threads.split_rows(rows, 100, 64, 1 << 20)
    assert [part.size for part in those] == [8, 56]
    assert [part.start for part in those] == [0, 8]


def test_a_limit_of_the_blas_is_a_limit_here():
    with threadpool_limits(1):
        assert threads.max_threads() == 1


def test_an_error_in_a_thread_is_raised():
    def walk(part):
        if part.first:
            raise ValueError("in a thread")

    with pytest.raises(ValueError, match="in a thread"):
        threads.parallel_map(walk, [threads.RowRange(0, 1), threads.RowRange(1, 1)])


def test_the_kernel_is_compiled_here():
    with allow_jit(True):
        layer = xprnn.RNN(2, 3)
        params = layer.init(np.random.default_rng(0), like=np.zeros(0))
        assert "compiled" in layer.forward(params, np.zeros((2, 2, 2)))[2].explain()
