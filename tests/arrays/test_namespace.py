"""The room that knows array libraries: look-ups' adjoint, moving numbers in and out, whether arrays agree."""

from __future__ import annotations

import numpy as np
import pytest
from support.backends import Backend, dtype_name

from xprnn import InputError
from xprnn.arrays.namespace import from_numpy, namespace, resolve_namespace, to_numpy
from xprnn.arrays.segment_sum import segment_sum


@pytest.mark.parametrize(
    ("rows", "width", "count"), [(50, 3, 7), (1, 1, 1), (0, 3, 4), (33, 2, 100), (64, 4, 1), (5, 0, 3), (7, 2, 0)]
)
def test_sum_rows_by_id(xp, dtype, rng, rows, width, count):
    """Repeated, missing, first and last ids; against np.add.at in float64."""
    if count == 0:
        rows = 0
    ids = rng.integers(count, size=rows) if count else np.zeros(0, "int64")
    values = rng.normal(size=(rows, width)).astype(dtype)
    want = np.zeros((count, width))
    np.add.at(want, ids, values.astype("float64"))
    given = xp.asarray(values, dtype)
    got = segment_sum(namespace(given), xp.asarray(ids), given, count)
    xp.assert_close(got, want, condition=30)
    xp.assert_like(got, given)


@pytest.mark.parametrize("ids", [[3] * 9, list(range(9)), list(range(8, -1, -1)), [0, 8] * 4 + [4]], ids=str)
def test_sum_rows_by_id_in_any_order(xp, rng, ids):
    values = rng.normal(size=(9, 2)).astype("float32").astype("float64")
    want = np.zeros((9, 2))
    np.add.at(want, ids, values)
    given = xp.asarray(values)
    xp.assert_close(segment_sum(namespace(given), xp.asarray(ids), given, 9), want, condition=8)


def test_a_long_run_rounds_like_a_pairwise_sum(xp):
    """A hundred thousand equal ids, one after another in float32, would be wrong in the fourth digit."""
    count = 1 << 17
    given = xp.asarray(np.full((count, 1), 0.1), "float32")
    got = segment_sum(namespace(given), xp.asarray(np.zeros(count, "int64")), given, 1)
    xp.assert_close(got, np.full((1, 1), np.float64(np.float32(0.1)) * count), condition=32)


def test_from_numpy_takes_the_likes_home(xp, dtype, rng):
    host = rng.normal(size=(3, 2))
    like = xp.asarray(np.zeros(1), dtype)
    got = from_numpy(host, like)
    xp.assert_like(got, like)
    xp.assert_close(got, host.astype(dtype), condition=0)
    ids = from_numpy(np.asarray([1, 2], "int32"), like)
    assert dtype_name(ids.dtype) == "int64"
    xp.assert_close(ids, np.asarray([1, 2]))
    flags = from_numpy(np.asarray([True, False]), like)
    assert dtype_name(flags.dtype) == "bool"


def test_to_numpy_brings_the_numbers_home(xp, dtype, rng):
    host = rng.normal(size=(3, 2)).astype(dtype)
    given = xp.asarray(host)
    with xp.allow_host_conversion():
        back = to_numpy(given)
    assert type(back) is np.ndarray
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, host)


def test_resolve_agrees_on_one_home(xp, dtype):
    a, ids = xp.asarray(np.zeros(2), dtype), xp.asarray([1])
    found = resolve_namespace("f", {"a": a, "nothing": None, "b": a}, {"ids": ids})
    assert found is namespace(a)


def test_resolve_names_a_dtype_that_differs(xp):
    if len(xp.float_dtypes) == 1:
        pytest.skip("one real dtype only")
    with pytest.raises(InputError, match=r"^f: b is float32 but a is float64: give all arrays one dtype$"):
        resolve_namespace("f", {"a": xp.asarray([1.0], "float64"), "b": xp.asarray([1.0], "float32")})


@pytest.mark.parametrize("dtype", ["int64", "bool"])
def test_resolve_wants_floats_where_floats_belong(xp, dtype):
    wrong = xp.asarray(np.zeros(2, dtype))
    right = xp.asarray(np.zeros(2))
    for floats in ({"a": wrong}, {"b": right, "a": wrong}):
        with pytest.raises(InputError, match=r"^f: a must be of a real floating dtype, found "):
            resolve_namespace("f", floats)
    resolve_namespace("f", {"b": right}, {"a": wrong})


def test_resolve_names_a_library_that_differs():
    strict = pytest.importorskip("array_api_strict")
    with pytest.raises(InputError, match=r"^f: b is a array_api_strict array but a is a numpy array"):
        resolve_namespace("f", {"a": np.zeros(2), "b": strict.zeros(2)})


def test_resolve_names_a_device_that_differs():
    pytest.importorskip("array_api_strict")
    a, b = (Backend(name).asarray([1.0], "float32") for name in ("strict", "strict:device1"))
    with (
        Backend.STRICT.forbid_host_conversion(),
        pytest.raises(InputError, match=r"^f: b is on .*device1.* but a is on .*CPU_DEVICE"),
    ):
        resolve_namespace("f", {"a": a}, {"b": b})


@pytest.mark.parametrize("value", [[1.0, 2.0], 1.0, "text", None.__class__], ids=repr)
def test_resolve_names_what_is_no_array(value):
    with pytest.raises(InputError, match=rf"^f: b must be an array .*found {type(value).__name__}$"):
        resolve_namespace("f", {"a": np.zeros(2), "b": value})


@pytest.mark.parametrize("classes", [3, 40, 3000])
def test_sums_of_long_and_short_runs(xp, rng, classes):
    """Runs of hundreds, of a few, and rows that are mostly alone."""
    ids, values = rng.integers(classes, size=700), rng.normal(size=(700, 3))
    want = np.zeros((classes, 3))
    np.add.at(want, ids, values)
    given = xp.asarray(values)
    xp.assert_close(segment_sum(namespace(given), xp.asarray(ids), given, classes), want, condition=30)
