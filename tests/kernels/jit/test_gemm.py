"""Compiled matrix products against NumPy in float64, and scans on several threads."""

from __future__ import annotations

import numpy as np
import pytest
from support.backends import Backend
from support.layer_cases import CASES, inputs_on, random_cotangents, random_inputs
from threadpoolctl import threadpool_limits

import xprnn
from xprnn.kernels.config import allow_jit, reference_only
from xprnn.kernels.jit import compile_cache, threads
from xprnn.kernels.memory import address
from xprnn.kernels.row_order import RowOrder

pytestmark = pytest.mark.needs("numba")
XP = Backend.NUMPY
MATMUL, MULTIPLY_ROWS, MULTIPLY_IN_PLACE, PACK_RHS, PACK_ROWS, PACK_LHS, MATMUL_LHS_TRANSPOSED = range(7)
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


def call_gemm(number, dtype, *args):
    """Call one of gemm.py's functions, with arrays replaced by their addresses."""
    integers = [address(a) if isinstance(a, np.ndarray) else a for a in args]
    compile_cache.gemm_kernel(np.dtype(dtype).itemsize).ctypes(number, *integers, *[0] * (12 - len(args) - 1))


def panel_width(columns, itemsize):
    """Return a number of columns rounded up to whole vectors."""
    lanes = compile_cache.vector_lanes(itemsize)
    return -(-columns // lanes) * lanes


def edge_tile(dtype):
    """Return the scratch memory of matmul: a tile and a row of zeros."""
    size = compile_cache.tile_size(np.dtype(dtype).itemsize)
    return np.zeros(size + size // compile_cache.tile_rows(), dtype)


def uninitialized(size, dtype):
    """Return memory full of NaN, which shows in a result if it is read before it is written."""
    return np.full(max(size, 1), np.nan, dtype)


def pack_rhs(b, dtype, transposed):
    """Pack b, stored transposed or not, into panels."""
    inner, columns = b.shape
    out = uninitialized(inner * panel_width(columns, b.itemsize), dtype)
    source, strides = (np.ascontiguousarray(b.T), (1, inner)) if transposed else (b, (columns, 1))
    call_gemm(PACK_RHS, dtype, source, *strides, inner, columns, out, inner, 0)
    return out


def assert_product_close(got, want, inner):
    np.testing.assert_allclose(got, want, rtol=0, atol=8 * np.finfo(got.dtype).eps * (4 + inner))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n", "inner", "columns"), SIZES)
def test_matmul_equals_numpy(rng, dtype, n, inner, columns, transposed):
    a, b = rng.uniform(-1, 1, (n, inner + 3)).astype(dtype), rng.uniform(-1, 1, (inner, columns)).astype(dtype)
    start = rng.uniform(-1, 1, (n, columns)).astype(dtype)
    want = a[:, :inner].astype(np.float64) @ b.astype(np.float64)
    panels = pack_rhs(b, dtype, transposed)
    for start_, stride in ((start, columns), (start[0], 0)):
        out = np.full((n + 1, columns), 7, dtype)
        call_gemm(
            MATMUL, dtype, a, inner + 3, panels, out, columns, start_, stride, n, inner, columns, edge_tile(dtype)
        )
        assert_product_close(out[:n], start_ + want, inner)
        assert (out[n] == 7).all()  # no write beyond the last row
    out = start.copy()
    call_gemm(MATMUL, dtype, a, inner + 3, panels, out, columns, out, columns, n, inner, columns, edge_tile(dtype))
    assert_product_close(out, start + want, inner)
    wide = panel_width(columns, out.itemsize)
    out = np.zeros((n, wide), dtype)
    call_gemm(
        MATMUL, dtype, a, inner + 3, panels, out, wide, np.zeros(wide, dtype), 0, n, inner, wide, edge_tile(dtype)
    )
    assert_product_close(out[:, :columns], want, inner)


@pytest.mark.parametrize(
    ("n", "rows", "columns"), [(0, 3, 2), (1, 1, 1), (7, 9, 33), (300, 17, 5), (40, 64, 96), (3, 8, 16)]
)
def test_matmul_lhs_transposed_equals_numpy(rng, dtype, n, rows, columns):
    """The inner dimension is packed in two calls, as for two steps."""
    x, y = rng.uniform(-1, 1, (n, rows)).astype(dtype), rng.uniform(-1, 1, (n, columns)).astype(dtype)
    size, capacity, half = compile_cache.tile_rows(), n + 2, n // 2
    lhs = uninitialized(-(-rows // size) * size * capacity, dtype)
    rhs = uninitialized(panel_width(columns, x.itemsize) * capacity, dtype)
    sums, start = np.zeros(rows, dtype), rng.uniform(-1, 1, (rows, columns)).astype(dtype)
    for first, last in ((0, half), (half, n)):
        call_gemm(PACK_LHS, dtype, x[first:], rows, last - first, rows, lhs, capacity, first, sums)
        call_gemm(PACK_RHS, dtype, y[first:], columns, 1, last - first, columns, rhs, capacity, first)
    want = x.astype(np.float64).T @ y.astype(np.float64)
    for start_, stride in ((start, columns), (np.zeros(columns, dtype), 0)):
        out = np.full((rows + 1, columns), 7, dtype)
        args = (lhs, rhs, n, capacity, rows, columns, out, start_, stride, edge_tile(dtype))
        call_gemm(MATMUL_LHS_TRANSPOSED, dtype, *args)
        assert_product_close(out[:rows], start_ + want, n)
        assert (out[rows] == 7).all()
    assert_product_close(sums, x.astype(np.float64).sum(axis=0), n)


def test_nan_stays_in_row_and_column(dtype):
    """NaN in row 1 of a and in column 2 of b shows only in that row and column of the product."""
    for n, inner, columns in ((9, 20, 40), (3, 2, 5)):
        a, b = np.ones((n, inner), dtype), np.ones((inner, columns), dtype)
        a[1, 1], b[0, 2] = np.nan, np.inf
        out = np.zeros((n, columns), dtype)
        args = (
            pack_rhs(b, dtype, False),
            out,
            columns,
            np.zeros(columns, dtype),
            0,
            n,
            inner,
            columns,
            edge_tile(dtype),
        )
        call_gemm(MATMUL, dtype, a, inner, *args)
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(out, a @ b)


@pytest.mark.parametrize("layout", ["C", "F"])
@pytest.mark.parametrize(("n", "inner", "columns"), SIZES)
def test_multiply_rows_equals_numpy(rng, dtype, n, inner, columns, layout):
    """The rows of B are copied to rows of whole vectors, some of them further apart than they are long."""
    wide = panel_width(columns, np.dtype(dtype).itemsize)
    a, b = rng.uniform(-1, 1, (n, inner + 3)).astype(dtype), rng.uniform(-1, 1, (inner, columns)).astype(dtype)
    b, stride, item = np.asarray(b, order=layout), wide + 8, np.dtype(dtype).itemsize
    rows = np.zeros((inner, stride), dtype)
    call_gemm(PACK_ROWS, dtype, b, *(s // item for s in b.strides), inner, columns, rows, stride)
    np.testing.assert_array_equal(rows[:, :columns], b)
    assert not rows[:, columns:].any()
    start = rng.uniform(-1, 1, (n, wide)).astype(dtype)
    want = a[:, :inner].astype(np.float64) @ rows[:, :wide].astype(np.float64)
    for start_, lds in ((start, wide), (start[0], 0)):
        out = np.full((n + 1, wide), 7, dtype)
        call_gemm(MULTIPLY_ROWS, dtype, a, inner + 3, rows, out, wide, start_, lds, n, inner, wide, stride)
        assert_product_close(out[:n], start_ + want, inner)
        assert (out[n] == 7).all()
    out = start.copy()
    call_gemm(MULTIPLY_ROWS, dtype, a, inner + 3, rows, out, wide, out, wide, n, inner, wide, stride)
    assert_product_close(out, start + want, inner)


@pytest.mark.parametrize(("n", "inner", "columns"), SIZES)
def test_multiply_in_place_equals_numpy(rng, dtype, n, inner, columns):
    """Neither the vector of a nor the rows of W may be read beyond `inner` elements, where there is NaN."""
    a, w = np.full((n, inner + 3), np.nan, dtype), np.full((columns, inner + 5), np.nan, dtype)
    a[:, :inner], w[:, :inner] = rng.uniform(-1, 1, (n, inner)), rng.uniform(-1, 1, (columns, inner))
    start = rng.uniform(-1, 1, (n, columns)).astype(dtype)
    want = a[:, :inner].astype(np.float64) @ w[:, :inner].T.astype(np.float64)
    for start_, lds in ((start, columns), (start[0], 0)):
        out = np.full((n + 1, columns), 7, dtype)
        call_gemm(MULTIPLY_IN_PLACE, dtype, a, inner + 3, w, out, columns, start_, lds, n, inner, columns, inner + 5)
        assert_product_close(out[:n], start_ + want, inner)
        assert (out[n] == 7).all()
    out = start.copy()
    call_gemm(MULTIPLY_IN_PLACE, dtype, a, inner + 3, w, out, columns, out, columns, n, inner, columns, inner + 5)
    assert_product_close(out, start + want, inner)


def test_rows_of_a_product_do_not_depend_on_their_number(rng, dtype):
    """Bit for bit, for the two products that read rows of the weight."""
    n, inner, columns, item = 11, 37, 48, np.dtype(dtype).itemsize
    a, w = (rng.uniform(-1, 1, (size, inner)).astype(dtype) for size in (n, columns))
    rows, start = np.ascontiguousarray(w.T), np.ones(columns, dtype)
    assert columns == panel_width(columns, item)
    for number, b, last in (
        (MULTIPLY_ROWS, rows, columns),
        (MULTIPLY_IN_PLACE, w, inner),
    ):
        out, single = np.empty((n, columns), dtype), np.empty((n, columns), dtype)
        call_gemm(number, dtype, a, inner, b, out, columns, start, 0, n, inner, columns, last)
        for r in range(n):
            call_gemm(number, dtype, a[r:], inner, b, single[r:], columns, start, 0, 1, inner, columns, last)
        np.testing.assert_array_equal(single, out)


@pytest.mark.parametrize("name", ["lstm", "gru", "gru-before"])
def test_rows_of_gate_cotangents_with_padding_equal_the_reference_scan(rng, name):
    """256 units in float64 make rows of gate cotangents of a multiple of 2 KiB, to which a cache line is added."""
    layer = CASES[name].make(5, 256)
    assert layer.resolved_cell.gates * 256 * 8 % 2048 == 0
    p = random_inputs(rng, layer, T=3, N=9, flags="lmr", scale=0.05)
    y, final, tape = layer.forward(p.params, p.x, p.state, **p.flags)
    assert "compiled" in tape.explain()
    dy = random_cotangents(rng, y)
    with reference_only():
        want = layer.forward(p.params, p.x, p.state, **p.flags)
        gradients = layer.backward(want[2], dy)
    XP.assert_close((y, final, *layer.backward(tape, dy)), (*want[:2], *gradients), condition=256)


# --- threads


def run_layer(layer, p, dtype, dy=None, dfinal=None):
    """Return y and the final state; given dy also inference results and all gradients."""
    params, x, state, flags = inputs_on(XP, p, dtype)
    y, final, tape = layer.forward(params, x, state, **flags)
    assert "compiled" in tape.explain()
    if dy is None:
        return y, final
    return y, final, layer(params, x, state, **flags), *layer.backward(tape, dy.astype(dtype), dfinal)


@pytest.fixture
def on_threads(monkeypatch):
    """Return a function that calls another one on a number of threads, and checks that number."""

    def run(count, call):
        splits, parallel_map = [], threads.parallel_map
        monkeypatch.setattr(threads, "_MIN_WORK", 0)
        monkeypatch.setattr(threads, "max_threads", lambda: count)
        monkeypatch.setattr(threads, "_pools", {})
        monkeypatch.setattr(
            xprnn.kernels.jit.scan, "parallel_map", lambda fn, items: splits.append(items) or parallel_map(fn, items)
        )
        result = call()
        monkeypatch.undo()
        assert all(len(row_ranges) == count for row_ranges in splits)
        assert splits or count == 1  # on one thread, some passes do not split
        return result

    return run


@pytest.mark.parametrize("flags", ["", "l", "lmr"])
@pytest.mark.parametrize("name", ["rnn", "lstm", "lstm-proj", "gru", "gru-before", "leaky"])
def test_thread_count_does_not_change_results(rng, dtype, on_threads, name, flags):
    layer = CASES[name].make(5, 6, 2, bidirectional=True)
    p = random_inputs(rng, layer, T=7, N=37, flags=flags)
    y, final = run_layer(layer, p, "float64")
    dy, dfinal = random_cotangents(rng, y), random_cotangents(rng, final)
    dfinal = tuple(d.astype(dtype) for d in dfinal) if isinstance(dfinal, tuple) else dfinal.astype(dtype)
    one = on_threads(1, lambda: run_layer(layer, p, dtype, dy, dfinal))
    two, three = (on_threads(count, lambda: run_layer(layer, p, dtype, dy, dfinal)) for count in (2, 3))
    XP.assert_close(two, one, condition=200)
    XP.assert_close(three, one, condition=200)
    XP.assert_close(on_threads(2, lambda: run_layer(layer, p, dtype, dy, dfinal)), two, condition=0)


@pytest.mark.parametrize("name", ["gru", "lstm-proj", "gru-before"])
def test_threads_with_integer_input(rng, on_threads, name):
    layer = CASES[name].make(11, 6)
    params = layer.init(rng, like=np.zeros(0))
    ids = rng.integers(0, 11, (5, 40))

    def run():
        y, final, tape = layer.forward(params, ids, lengths=lengths)
        return y, final, *layer.backward(tape, y)[1:]

    lengths = rng.integers(0, 6, 40)
    XP.assert_close(on_threads(2, run), on_threads(1, run), condition=64)


def test_small_batch_is_not_split():
    few_rows = RowOrder.from_step_mask((1000, 15), xprnn.kernels.tape.StepMask(None, None))
    assert threads.split_rows(few_rows, 1000, 15, 1 << 20) == [(0, 15)]
    little_work = RowOrder.from_step_mask((10, 64), xprnn.kernels.tape.StepMask(None, None))
    assert threads.split_rows(little_work, 10, 64, 100) == [(0, 64)]


def test_rows_are_split_by_active_steps(monkeypatch):
    monkeypatch.setattr(threads, "max_threads", lambda: 2)
    active = np.arange(100)[:, None] < np.array([100] * 8 + [10] * 56)[None, :]
    rows = RowOrder.from_step_mask((100, 64), xprnn.kernels.tape.StepMask(active, None))
    row_ranges = threads.split_rows(rows, 100, 64, 1 << 20)
    assert [r.size for r in row_ranges] == [8, 56]
    assert [r.start for r in row_ranges] == [0, 8]


def test_blas_thread_limit_is_respected():
    with threadpool_limits(1):
        assert threads.max_threads() == 1


def test_an_error_in_a_thread_is_raised():
    def fail(row_range):
        if row_range.start:
            raise ValueError("in a thread")

    with pytest.raises(ValueError, match="in a thread"):
        threads.parallel_map(fail, [threads.RowRange(0, 1), threads.RowRange(1, 1)])


def test_numba_compiles_kernels_on_this_machine():
    with allow_jit(True):
        layer = xprnn.RNN(2, 3)
        params = layer.init(np.random.default_rng(0), like=np.zeros(0))
        assert "compiled" in layer.forward(params, np.zeros((2, 2, 2)))[2].explain()
