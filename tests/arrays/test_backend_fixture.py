"""The fixtures `xp` and `rng`: conversions, guards against host conversion, and assertions that can fail."""

from __future__ import annotations

import operator
import re

import numpy as np
import pytest
from support.backends import Backend, HostConversionError, dtype_name, generator_for_test, select_backends


@pytest.fixture(params=["", ":device1", ":no_float64"])
def strict(request):
    """The backend under test as `xp` gives it, on array-api-strict: the only library with a conversion guard."""
    backend = Backend("strict" + request.param)
    with backend.forbid_host_conversion():
        yield backend


def test_asarray_and_to_numpy_round_trip(xp, dtype, rng):
    x = rng.normal(size=(3, 2)).astype(dtype)
    array = xp.asarray(x, dtype)
    assert dtype_name(array.dtype) == dtype
    back = xp.to_numpy({"x": array})["x"]
    assert type(back) is np.ndarray
    np.testing.assert_array_equal(back, x)


def test_asarray_keeps_integer_dtype(xp):
    assert dtype_name(xp.asarray([1, 2]).dtype) == "int64"


def test_asarray_and_to_numpy_copy(xp):
    source = np.ones(3)
    array = xp.asarray(source)
    source[0] = 5.0
    back = xp.to_numpy(array)
    back[1] = 5.0
    np.testing.assert_array_equal(xp.to_numpy(array), [1, 1, 1])


def test_rng_gives_the_same_numbers_on_every_backend(xp, rng, request):
    test = request.node.nodeid.partition("[")[0]
    draws = {int(generator_for_test(f"{test}[{backend}]").integers(1 << 30)) for backend in Backend}
    assert draws == {int(rng.integers(1 << 30))}


def test_readonly_backend_rejects_in_place_changes():
    xp = Backend.NUMPY_READONLY
    ones = xp.asarray(np.ones(3))
    for array in (ones, xp.xp.zeros(3), xp.xp.reshape(ones, (3, 1))):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 2
        with pytest.raises(ValueError, match="read-only"):
            np.add(array, 1, out=array)


@pytest.mark.needs("array_api_strict")
@pytest.mark.parametrize("convert", [float, bool, int, complex, operator.index, np.asarray])
def test_guard_rejects_host_conversions(strict, convert):
    array = strict.asarray(np.array(1))
    with pytest.raises(HostConversionError, match=r"inside a pass"):
        convert(array)
    with strict.allow_host_conversion():
        if strict is not Backend.STRICT_DEVICE1 and convert is not np.asarray:
            assert convert(array) == 1
        with pytest.raises(HostConversionError):
            strict.forbid_host_conversion()(convert)(array)
    with pytest.raises(HostConversionError):
        convert(array)


@pytest.mark.needs("array_api_strict")
def test_guard_rejects_branches_and_data_dependent_shapes(strict):
    x = strict.asarray(np.ones(3))
    with pytest.raises(HostConversionError):
        assert strict.xp.all(x > 0)
    with pytest.raises(RuntimeError, match="boolean_indexing"):
        x[x > 0]
    with pytest.raises(RuntimeError, match="data_dependent_shapes"):
        strict.xp.nonzero(x)


@pytest.mark.needs("array_api_strict")
def test_guard_is_removed_after_the_context():
    import array_api_strict as strict

    assert float(strict.ones(())) == 1.0
    with Backend.STRICT.forbid_host_conversion(), pytest.raises(HostConversionError):
        float(strict.ones(()))
    assert float(strict.ones(())) == 1.0


@pytest.mark.needs("array_api_strict")
def test_arrays_of_two_devices_cannot_be_mixed():
    cpu, device1 = Backend.STRICT, Backend.STRICT_DEVICE1
    x = device1.asarray([1.0])
    with pytest.raises(ValueError, match="device"):
        x + cpu.asarray([1.0])
    with pytest.raises(AssertionError, match="device1"):
        device1.assert_like(cpu.asarray([1.0]), x)


@pytest.mark.needs("array_api_strict")
def test_no_float64_backend_has_no_float64():
    xp = Backend.STRICT_NO_FLOAT64
    assert dtype_name(xp.asarray(np.ones(2)).dtype) == "float32"
    with pytest.raises(ValueError, match="does not support"):
        xp.asarray(np.ones(2), "float64")


@pytest.mark.not_on("numpy", reason="a NumPy array is valid there")
def test_assert_like_and_assert_close_reject_numpy_arrays(xp):
    like = xp.asarray(np.ones(3))
    for foreign in (np.ones(3), (like, np.ones(3)), {"dW": np.ones(3)}, 1.0):
        with pytest.raises(AssertionError, match=r"numpy|float"):
            xp.assert_like(foreign, like)
    with pytest.raises(AssertionError, match="numpy"):
        xp.assert_close(np.ones(3), np.ones(3))


def test_assert_like_rejects_another_dtype(xp):
    like = xp.asarray(np.ones(3), "float32")
    xp.assert_like({"dW": (like, None)}, like)
    with pytest.raises(AssertionError, match=re.escape("result['dW'][1] is")):
        xp.assert_like({"dW": (like, xp.asarray([1]))}, like)


def test_assert_close_accepts_rounding_only(xp, dtype):
    eps = float(np.finfo(dtype).eps)
    x = np.array([1e-3, -4.0])
    near = xp.asarray(x + np.array([2 * eps, 0]), dtype)
    xp.assert_close(near, x)
    xp.assert_close((near, {"dW": near}), (x, {"dW": near}))
    far = [x + 100 * eps, x[None], x[:1], [np.nan, -4.0], [0.0, np.inf]]
    for wrong in far:
        with pytest.raises(AssertionError):
            xp.assert_close(xp.asarray(wrong, dtype), x)
    with pytest.raises(AssertionError, match="is not"):
        xp.assert_close({"dW": near}, {"dU": near})
    with pytest.raises(AssertionError):  # the tolerance is relative to the expected values, here 0
        xp.assert_close(xp.asarray([1e-30], dtype), [0.0])


def test_overflow_raises():
    with pytest.raises(FloatingPointError):
        np.exp(np.float32(1000))


def test_select_backends():
    assert select_backends(["numpy"]) == [Backend.NUMPY, Backend.NUMPY_READONLY]
    assert select_backends(["strict:device1", "numpy:readonly"]) == [
        Backend.NUMPY_READONLY,
        Backend.STRICT_DEVICE1,
    ]
    assert {Backend.NUMPY, Backend.NUMPY_READONLY} <= set(select_backends([]))
    with pytest.raises(LookupError, match="unknown backend 'tensorflow'"):
        select_backends(["tensorflow"])
