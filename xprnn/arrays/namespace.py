"""Array libraries: the namespace, dtype and device of arrays, checks that they agree, and conversion to NumPy and back.

This is the only module that distinguishes array libraries. All other code receives a namespace `xp` and calls only
functions of the Array API standard (https://data-apis.org/array-api). Each public call resolves its namespace once,
because resolving it takes as long as the matrix product of a small step. A library is recognised by the type of an
array and never imported for that purpose.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import array_api_compat
import numpy as np

Array: TypeAlias = Any
Namespace: TypeAlias = Any
Params: TypeAlias = dict[str, Array]

__all__ = [
    "Array",
    "InputError",
    "Namespace",
    "Params",
    "as_index",
    "check_dicts",
    "check_index_bounds",
    "check_shape",
    "device_of",
    "from_numpy",
    "host_view",
    "is_cupy",
    "is_integer",
    "is_numpy",
    "is_writeable",
    "namespace",
    "reject_masked_array",
    "resolve_namespace",
    "to_numpy",
]

_FLOAT_DTYPES = frozenset((np.dtype(np.float32), np.dtype(np.float64)))


class InputError(ValueError):
    """An invalid argument: the message names the function, the argument, the expectation and the value found.

    >>> issubclass(InputError, ValueError)
    True
    """


@cache
def _numpy_namespace() -> Namespace:
    """Return NumPy's namespace, created at the first call because that imports all of NumPy (numpy.f2py too)."""
    return array_api_compat.array_namespace(np.zeros(0))


def namespace(*arrays: Array) -> Namespace:
    """Return the Array API namespace of `arrays`.

    Raises:
        TypeError: one of them is not an array, or they come from different libraries.

    >>> namespace(np.zeros(3)).__name__
    'array_api_compat.numpy'
    """
    return array_api_compat.array_namespace(*arrays)


def device_of(array: Array) -> Any:
    """Return the device of `array`, in the notation of its library.

    >>> device_of(np.zeros(3))
    'cpu'
    """
    return array_api_compat.device(array)


def is_numpy(xp: Namespace) -> bool:
    """Return True if `xp` is the namespace of NumPy.

    >>> is_numpy(namespace(np.zeros(3)))
    True
    """
    return bool(array_api_compat.is_numpy_namespace(xp))


def is_cupy(xp: Namespace) -> bool:
    """Return True if `xp` is the namespace of CuPy."""
    return bool(array_api_compat.is_cupy_namespace(xp))


def is_integer(xp: Namespace, array: Array) -> bool:
    """Return True if `array` has an integer dtype: its values are then class numbers, not features.

    >>> is_integer(namespace(np.zeros(3)), np.zeros(3))
    False
    """
    if isinstance(array.dtype, np.dtype):  # NumPy, CuPy and JAX: a tenth of the time of isdtype
        return array.dtype.kind in "iu"
    return bool(xp.isdtype(array.dtype, "integral"))


def resolve_namespace(
    where: str, floats: Mapping[str, Array | None], others: Mapping[str, Array | None] | None = None
) -> Namespace:
    """Return the namespace shared by all arrays of a call, after checking that they agree.

    Args:
        where: name of the public function, for errors.
        floats: name -> array or None. None is ignored. All must have the same real floating dtype.
        others: name -> array or None, of any dtype (integer inputs, masks).

    Raises:
        InputError: an argument is not an array, or two arrays differ in library or device, or two `floats` in dtype.
            The message names both arguments.

    >>> resolve_namespace("f", {"x": np.zeros(3), "h": np.zeros(3, np.float32)})
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: f: h is float32 but x is float64: give all arrays one dtype
    """
    if not others and _share_float_dtype([a for a in floats.values() if a is not None]):
        return _numpy_namespace()
    named = [(n, a) for n, a in (*floats.items(), *(others or {}).items()) if a is not None]
    name, first = named[0]
    xp = _namespace_of(where, name, first)
    if any(type(a) is not type(first) for _, a in named[1:]):
        for n, a in named[1:]:
            if _namespace_of(where, n, a) is not xp:
                raise InputError(
                    f"{where}: {n} is a {_library_name(a)} array but {name} is a {_library_name(first)} array: "
                    "convert one (nothing is moved between libraries silently)"
                )
    if not is_numpy(xp):
        for n, a in named[1:]:
            if device_of(a) != device_of(first):
                raise InputError(f"{where}: {n} is on {device_of(a)} but {name} is on {device_of(first)}: move one")
    float_arrays = [(n, a) for n, a in floats.items() if a is not None]
    if float_arrays:
        _check_dtypes(where, xp, float_arrays)
    return xp


def _share_float_dtype(arrays: list[Array]) -> bool:
    """Return True if all are np.ndarray of one dtype, float32 or float64: the usual call, checked in a microsecond."""
    if not arrays or arrays[0].__class__ is not np.ndarray:
        return False
    dtype = arrays[0].dtype
    return dtype in _FLOAT_DTYPES and all(a.__class__ is np.ndarray and a.dtype == dtype for a in arrays)


def _check_dtypes(where: str, xp: Namespace, floats: Sequence[tuple[str, Array]]) -> None:
    """Raise InputError unless all arrays have the same real floating dtype."""
    first, dtype = floats[0][0], floats[0][1].dtype
    for n, a in floats:
        if (n == first or a.dtype != dtype) and not xp.isdtype(a.dtype, "real floating"):
            raise InputError(f"{where}: {n} must be of a real floating dtype, found {_dtype_name(a)}")
        if a.dtype != dtype:
            expected = _dtype_name(floats[0][1])
            raise InputError(f"{where}: {n} is {_dtype_name(a)} but {first} is {expected}: give all arrays one dtype")


def _namespace_of(where: str, name: str, array: Array) -> Namespace:
    """Return the namespace of one argument, or raise InputError if it is not an array."""
    reject_masked_array(where, name, array)
    try:
        return array_api_compat.array_namespace(array)
    except TypeError:
        raise InputError(
            f"{where}: {name} must be an array (NumPy, CuPy, torch, JAX, ...), found {type(array).__name__}"
        ) from None


def reject_masked_array(where: str, name: str, array: Any) -> None:
    """Raise InputError for a numpy.ma.MaskedArray, whose mask the functions of its namespace would drop silently.

    >>> reject_masked_array("f", "x", np.ma.zeros(3))
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: f: x must be a plain array, found a numpy.ma one: pass x.filled(0) and mask=
    """
    if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
        hint = f"pass {name}.filled(0) and mask="
        raise InputError(f"{where}: {name} must be a plain array, found a numpy.ma one: {hint}")


def check_dicts(where: str, **dicts: Any) -> None:
    """Raise InputError unless each keyword argument (parameters or gradients) is a dict of arrays.

    >>> check_dicts("adam.update", grads=[np.zeros(3)])
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: adam.update: grads must be a dict of arrays, found list
    """
    for name, value in dicts.items():
        if not isinstance(value, Mapping):
            hint = f": pass {name}.dparams" if hasattr(value, "dparams") else ""
            raise InputError(f"{where}: {name} must be a dict of arrays, found {type(value).__name__}{hint}")


def _library_name(array: Array) -> str:
    return type(array).__module__.partition(".")[0]


def _dtype_name(array: Array) -> str:
    return str(array.dtype).rpartition(".")[2]


def check_shape(where: str, name: str, axis_names: str, array: Array, expected: Sequence[int | None]) -> None:
    """Raise InputError unless `array` has the `expected` shape.

    Args:
        where: name of the public function, for errors.
        name: name of the argument.
        axis_names: letters of the axes, such as "(N,H)", or "".
        array: the argument.
        expected: length of each axis; None allows any length.

    >>> check_shape("rnn", "h", "(N,H)", np.zeros((2, 3)), (2, 4))
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: rnn: h (N,H) must have shape (2, 4), found (2, 3)
    """
    if array.shape == expected:
        return
    shape = tuple(array.shape)
    if len(shape) != len(expected) or any(e is not None and e != n for e, n in zip(expected, shape, strict=True)):
        pattern = f"({', '.join('any' if e is None else str(e) for e in expected)}{',' * (len(expected) == 1)})"
        raise InputError(f"{where}: {' '.join((name, *axis_names.split()))} must have shape {pattern}, found {shape}")


def host_view(array: Array) -> Any:
    """Return a NumPy view of `array` if it lies in host memory and reading it never waits for a device, else None.

    >>> host_view(np.zeros(3)) is None
    False
    """
    if array_api_compat.is_numpy_array(array):
        return np.asarray(array)
    if array_api_compat.is_torch_array(array) and array.device.type == "cpu":
        return array.detach().numpy()
    return None


def check_index_bounds(where: str, name: str, array: Array, stop: int) -> None:
    """Raise InputError if an integer lies outside 0..stop-1. Not checked if reading the values waits for a device.

    >>> check_index_bounds("Embedding", "x", np.asarray([0, 7]), 5)
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: Embedding: x must hold integers in 0..4, found 7
    """
    host = host_view(array)
    if host is not None and host.size:
        low, high = int(host.min()), int(host.max())
        if low < 0 or high >= stop:
            raise InputError(f"{where}: {name} must hold integers in 0..{stop - 1}, found {low if low < 0 else high}")


def as_index(xp: Namespace, array: Array) -> Array:
    """Return integers in the dtype that the library's `take` expects.

    >>> as_index(namespace(np.zeros(1)), np.zeros(1, np.uint8)).dtype
    dtype('uint8')
    """
    if is_numpy(xp):
        return array
    index_dtype = xp.__array_namespace_info__().default_dtypes(device=device_of(array))["indexing"]
    return array if array.dtype == index_dtype else xp.astype(array, index_dtype)


def is_writeable(array: Array) -> bool:
    """Return True if the elements of `array` can be assigned to.

    >>> is_writeable(np.zeros(3))
    True
    """
    return bool(array_api_compat.is_writeable_array(array))


def from_numpy(array: Any, like: Array) -> Array:
    """Copy a NumPy array to the library and device of `like`.

    Floats take the dtype of `like` if that is a real floating dtype. Integers take the library's index dtype. Booleans
    keep their dtype. If `like` is a NumPy array, the result may share memory with `array`.

    >>> from_numpy(np.zeros(3), like=np.zeros(1, np.float32)).dtype
    dtype('float32')
    """
    xp, array = namespace(like), np.asarray(array)
    dtype = None
    if array.dtype.kind == "f" and xp.isdtype(like.dtype, "real floating"):
        dtype = like.dtype
    elif array.dtype.kind in "iu":
        dtype = xp.__array_namespace_info__().default_dtypes(device=device_of(like))["indexing"]
    if is_numpy(xp):
        return np.asarray(array, dtype=dtype)
    if dtype is not None and array.dtype.kind == "f":
        # Round on the host: some devices do not support the wider dtype at all.
        array = array.astype(np.dtype(_dtype_name(like)))
    return xp.asarray(array, dtype=dtype, device=device_of(like), copy=True)


def to_numpy(array: Array) -> Any:
    """Return `array` as a NumPy array on the host, for files, plots and tests.

    A forward or backward pass never calls it: on a GPU it waits for the device. The result may share memory with
    `array`.

    >>> to_numpy(np.ones(2))
    array([1., 1.])
    """
    if array_api_compat.is_numpy_array(array):
        return np.asarray(array)
    if array_api_compat.is_cupy_array(array):
        return array.get()
    if array_api_compat.is_torch_array(array):
        return array.detach().cpu().numpy()
    if array_api_compat.is_jax_array(array):
        return np.asarray(array)
    if hasattr(array, "_array"):  # array-api-strict
        return array._array.copy()
    return np.from_dlpack(array_api_compat.to_device(array, "cpu"))
