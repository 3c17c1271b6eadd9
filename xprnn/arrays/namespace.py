"""The one room that knows array libraries: which one an array belongs to, and whether the arrays of a call agree.

Everything else receives a namespace `xp` and uses functions of the Array API standard alone. A call resolves its
namespace once, at the public boundary: a look-up costs as much as a small step's matrix product.
Array libraries are recognised by the arrays they made; none is ever imported to find out.
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
    """What the caller passed does not fit: the message says what, where, expected and found.

    >>> issubclass(InputError, ValueError)
    True
    """


@cache
def _numpy_namespace() -> Namespace:
    """NumPy's namespace, asked for when it is first wanted: to make it imports all of NumPy, f2py and testing too."""
    return array_api_compat.array_namespace(np.zeros(0))


def namespace(*arrays: Array) -> Namespace:
    """The Array API namespace of `arrays`.

    >>> namespace(np.zeros(3)).__name__
    'array_api_compat.numpy'
    """
    return array_api_compat.array_namespace(*arrays)


def device_of(array: Array) -> Any:
    """The device `array` lives on, as its library names it.

    >>> device_of(np.zeros(3))
    'cpu'
    """
    return array_api_compat.device(array)


def is_numpy(xp: Namespace) -> bool:
    """Whether `xp` is NumPy.

    >>> is_numpy(namespace(np.zeros(3)))
    True
    """
    return bool(array_api_compat.is_numpy_namespace(xp))


def is_cupy(xp: Namespace) -> bool:
    """Whether `xp` is CuPy."""
    return bool(array_api_compat.is_cupy_namespace(xp))


def is_integer(xp: Namespace, array: Array) -> bool:
    """Whether `array` holds integers, that is, row numbers rather than features.

    >>> is_integer(namespace(np.zeros(3)), np.zeros(3))
    False
    """
    if isinstance(array.dtype, np.dtype):  # of NumPy, CuPy and JAX: a tenth of the time
        return array.dtype.kind in "iu"
    return bool(xp.isdtype(array.dtype, "integral"))


def resolve_namespace(
    where: str, floats: Mapping[str, Array | None], others: Mapping[str, Array | None] | None = None
) -> Namespace:
    """The namespace that all arrays of a call share; the arrays in `floats` share one real dtype too.

    Args:
        where: the public function, named in errors.
        floats: name -> array (None is passed over) of one real floating dtype.
        others: name -> array of any dtype (integer inputs, masks).

    Raises:
        InputError: not an array, or mixed libraries, devices or dtypes: says which argument has what.

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
    given = [(n, a) for n, a in floats.items() if a is not None]
    if given:
        _check_dtypes(where, xp, given)
    return xp


def _share_float_dtype(arrays: list[Array]) -> bool:
    """Whether all are NumPy's own arrays of one usual dtype: what nearly every call has, seen in a microsecond."""
    if not arrays or arrays[0].__class__ is not np.ndarray:
        return False
    dtype = arrays[0].dtype
    return dtype in _FLOAT_DTYPES and all(a.__class__ is np.ndarray and a.dtype == dtype for a in arrays)


def _check_dtypes(where: str, xp: Namespace, floats: Sequence[tuple[str, Array]]) -> None:
    first, dtype = floats[0][0], floats[0][1].dtype
    for n, a in floats:
        if (n == first or a.dtype != dtype) and not xp.isdtype(a.dtype, "real floating"):
            raise InputError(f"{where}: {n} must be of a real floating dtype, found {_dtype_name(a)}")
        if a.dtype != dtype:
            home = _dtype_name(floats[0][1])
            raise InputError(f"{where}: {n} is {_dtype_name(a)} but {first} is {home}: give all arrays one dtype")


def _namespace_of(where: str, name: str, array: Array) -> Namespace:
    reject_masked_array(where, name, array)
    try:
        return array_api_compat.array_namespace(array)
    except TypeError:
        raise InputError(
            f"{where}: {name} must be an array (NumPy, CuPy, torch, JAX, ...), found {type(array).__name__}"
        ) from None


def reject_masked_array(where: str, name: str, array: Any) -> None:
    """Raise InputError for a masked array: a NumPy array by its class, but its mask would be lost on the way.

    >>> reject_masked_array("f", "x", np.ma.zeros(3))
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: f: x must be a plain array, found a numpy.ma one: give x.filled(0), and mask= its steps
    """
    if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
        hint = f"give {name}.filled(0), and mask= its steps"
        raise InputError(f"{where}: {name} must be a plain array, found a numpy.ma one: {hint}")


def check_dicts(where: str, **dicts: Any) -> None:
    """Raise InputError unless each of these, parameters or their gradients, is a dict of arrays.

    >>> check_dicts("adam.update", grads=[np.zeros(3)])
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: adam.update: grads must be a dict of arrays, found list
    """
    for name, value in dicts.items():
        if not isinstance(value, Mapping):
            hint = f": give its .dparams ({name}.dparams)" if hasattr(value, "dparams") else ""
            raise InputError(f"{where}: {name} must be a dict of arrays, found {type(value).__name__}{hint}")


def _library_name(array: Array) -> str:
    return type(array).__module__.partition(".")[0]


def _dtype_name(array: Array) -> str:
    return str(array.dtype).rpartition(".")[2]


def check_shape(where: str, name: str, axis_names: str, array: Array, expected: Sequence[int | None]) -> None:
    """Raise InputError unless `array` has the `expected` shape (None: any length), whose axes are called `letters`.

    >>> check_shape("rnn", "h", "(N,H)", np.zeros((2, 3)), (2, 4))
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: rnn: h (N,H) must have shape (2, 4), found (2, 3)
    """
    if array.shape == expected:
        return
    found = tuple(array.shape)
    if len(found) != len(expected) or any(e is not None and e != f for e, f in zip(expected, found, strict=True)):
        want = f"({', '.join('any' if e is None else str(e) for e in expected)}{',' * (len(expected) == 1)})"
        raise InputError(f"{where}: {' '.join((name, *axis_names.split()))} must have shape {want}, found {found}")


def host_view(array: Array) -> Any:
    """The array as NumPy, nothing copied, if it lies in host memory and nothing has to be waited for; else None.

    >>> host_view(np.zeros(3)) is None
    False
    """
    if array_api_compat.is_numpy_array(array):
        return np.asarray(array)
    if array_api_compat.is_torch_array(array) and array.device.type == "cpu":
        return array.detach().numpy()
    return None


def check_index_bounds(where: str, name: str, array: Array, stop: int) -> None:
    """Raise InputError if integers lie outside 0..below-1; unchecked where reading them would wait for a device.

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
    """Integers in the dtype that a library's look-ups want.

    >>> as_index(namespace(np.zeros(1)), np.zeros(1, np.uint8)).dtype
    dtype('uint8')
    """
    if is_numpy(xp):
        return array
    wanted = xp.__array_namespace_info__().default_dtypes(device=device_of(array))["indexing"]
    return array if array.dtype == wanted else xp.astype(array, wanted)


def is_writeable(array: Array) -> bool:
    """Whether `array` can be assigned to.

    >>> is_writeable(np.zeros(3))
    True
    """
    return bool(array_api_compat.is_writeable_array(array))


def from_numpy(array: Any, like: Array) -> Array:
    """A host array, put where `like` lives; floats take `like`'s dtype when it has a real one, integers keep theirs.

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
        # Rounded on the host: some devices cannot hold the wider dtype even for a moment.
        array = array.astype(np.dtype(_dtype_name(like)))
    return xp.asarray(array, dtype=dtype, device=device_of(like), copy=True)


def to_numpy(array: Array) -> Any:
    """A copy on the host, as a NumPy array: for files, pictures and tests, never inside a pass.

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
    if hasattr(array, "_array"):  # array-api-strict's
        return array._array.copy()
    return np.from_dlpack(array_api_compat.to_device(array, "cpu"))
