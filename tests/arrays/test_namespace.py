"""Namespaces: resolution and its errors, conversion to and from NumPy; segment sums on every array library."""

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
def test_segment_sum_equals_add_at(xp, dtype, rng, rows, width, count):
    """Repeated, missing, first and last ids; compared with np.add.at in float64."""
    if count == 0:
        rows = 0
    ids = rng.integers(count, size=rows) if count else np.zeros(0, "int64")
    values = rng.normal(size=(rows, width)).astype(dtype)
    expected = np.zeros((count, width))
    np.add.at(expected, ids, values.astype("float64"))
    values_xp = xp.asarray(values, dtype)
    sums = segment_sum(namespace(values_xp), xp.asarray(ids), values_xp, count)
    xp.assert_close(sums, expected, condition=30)
    xp.assert_like(sums, values_xp)


@pytest.mark.parametrize("ids", [[3] * 9, list(range(9)), list(range(8, -1, -1)), [0, 8] * 4 + [4]], ids=str)
def test_segment_sum_accepts_ids_in_any_order(xp, rng, ids):
    values = rng.normal(size=(9, 2)).astype("float32").astype("float64")
    expected = np.zeros((9, 2))
    np.add.at(expected, ids, values)
    values_xp = xp.asarray(values)
    xp.assert_close(segment_sum(namespace(values_xp), xp.asarray(ids), values_xp, 9), expected, condition=8)


def test_segment_sum_of_a_long_run_rounds_like_a_pairwise_sum(xp):
    """Adding the 131072 rows one after another in float32 would be wrong in the fourth digit."""
    count = 1 << 17
    values = xp.asarray(np.full((count, 1), 0.1), "float32")
    sums = segment_sum(namespace(values), xp.asarray(np.zeros(count, "int64")), values, 1)
    xp.assert_close(sums, np.full((1, 1), np.float64(np.float32(0.1)) * count), condition=32)


def test_from_numpy_gives_library_device_and_float_dtype_of_like(xp, dtype, rng):
    host = rng.normal(size=(3, 2))
    like = xp.asarray(np.zeros(1), dtype)
    array = from_numpy(host, like)
    xp.assert_like(array, like)
    xp.assert_close(array, host.astype(dtype), condition=0)
    ids = from_numpy(np.asarray([1, 2], "int32"), like)
    assert dtype_name(ids.dtype) == "int64"
    xp.assert_close(ids, np.asarray([1, 2]))
    flags = from_numpy(np.asarray([True, False]), like)
    assert dtype_name(flags.dtype) == "bool"


def test_to_numpy_keeps_values_and_dtype(xp, dtype, rng):
    host = rng.normal(size=(3, 2)).astype(dtype)
    array = xp.asarray(host)
    with xp.allow_host_conversion():
        back = to_numpy(array)
    assert type(back) is np.ndarray
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, host)


def test_resolve_namespace_returns_the_common_namespace(xp, dtype):
    a, ids = xp.asarray(np.zeros(2), dtype), xp.asarray([1])
    resolved = resolve_namespace("f", {"a": a, "nothing": None, "b": a}, {"ids": ids})
    assert resolved is namespace(a)


@pytest.mark.applies_if(lambda xp: len(xp.float_dtypes) > 1, reason="needs two real dtypes")
def test_resolve_namespace_names_two_different_dtypes(xp):
    with pytest.raises(InputError, match=r"^f: b is float32 but a is float64: give all arrays one dtype$"):
        resolve_namespace("f", {"a": xp.asarray([1.0], "float64"), "b": xp.asarray([1.0], "float32")})


@pytest.mark.parametrize("dtype", ["int64", "bool"])
def test_resolve_namespace_rejects_integers_and_booleans_among_floats(xp, dtype):
    not_float = xp.asarray(np.zeros(2, dtype))
    floating = xp.asarray(np.zeros(2))
    for floats in ({"a": not_float}, {"b": floating, "a": not_float}):
        with pytest.raises(InputError, match=r"^f: a must be of a real floating dtype, found "):
            resolve_namespace("f", floats)
    resolve_namespace("f", {"b": floating}, {"a": not_float})


@pytest.mark.needs("array_api_strict")
def test_resolve_namespace_names_two_different_libraries():
    import array_api_strict as strict

    with pytest.raises(InputError, match=r"^f: b is a array_api_strict array but a is a numpy array"):
        resolve_namespace("f", {"a": np.zeros(2), "b": strict.zeros(2)})


@pytest.mark.needs("array_api_strict")
def test_resolve_namespace_names_two_different_devices():
    a, b = (Backend(name).asarray([1.0], "float32") for name in ("strict", "strict:device1"))
    with (
        Backend.STRICT.forbid_host_conversion(),
        pytest.raises(InputError, match=r"^f: b is on .*device1.* but a is on .*CPU_DEVICE"),
    ):
        resolve_namespace("f", {"a": a}, {"b": b})


@pytest.mark.parametrize("value", [[1.0, 2.0], 1.0, "text", None.__class__], ids=repr)
def test_resolve_namespace_names_an_argument_that_is_not_an_array(value):
    with pytest.raises(InputError, match=rf"^f: b must be an array .*found {type(value).__name__}$"):
        resolve_namespace("f", {"a": np.zeros(2), "b": value})


@pytest.mark.parametrize("classes", [3, 40, 3000])
def test_segment_sum_of_long_and_short_runs(xp, rng, classes):
    """700 rows in runs of hundreds, of about 17, and mostly of one row."""
    ids, values = rng.integers(classes, size=700), rng.normal(size=(700, 3))
    expected = np.zeros((classes, 3))
    np.add.at(expected, ids, values)
    values_xp = xp.asarray(values)
    xp.assert_close(segment_sum(namespace(values_xp), xp.asarray(ids), values_xp, classes), expected, condition=30)
