"""The array libraries that tests run on, with conversions and assertions for their arrays.

`Backend` lists them. A name is "library" or "library:variant"; `--backend library` selects all variants of a library.
The `xp` fixture (conftest.py) passes one member to a test:

    def test_tanh(xp, dtype, rng):
        x = rng.normal(size=(4, 3))
        x_xp = xp.asarray(x, dtype)                      # array of this library and device
        result = layer_under_test(x_xp)
        xp.assert_like(result, x_xp)                     # same namespace, dtype and device
        xp.assert_close(result, np.tanh(x), condition=4) # within 4 eps of the largest element

Importing this file imports no array library but NumPy.
"""

from __future__ import annotations

import importlib.util
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from functools import cached_property, wraps
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np

Array = Any


class HostConversionError(AssertionError):
    """A pass converted an array to a Python scalar or NumPy array, which on a GPU waits for the device."""


class Backend(Enum):
    """An array library in one variant."""

    NUMPY = "numpy"
    NUMPY_READONLY = "numpy:readonly"  # an in-place change of an input raises
    STRICT = "strict"  # array-api-strict: only functions of the Array API standard
    STRICT_DEVICE1 = "strict:device1"  # a second device: code that omits `device=` raises
    STRICT_NO_FLOAT64 = "strict:no_float64"  # without float64, as on Apple GPUs
    TORCH = "torch"
    JAX = "jax"  # immutable arrays
    CUPY = "cupy"
    CUPY_FAKE = "cupy:fake"  # CuPy's rules on NumPy arrays (cuda/fake_cupy.py); selected only by this name

    def __str__(self) -> str:
        return self.value

    @property
    def library(self) -> str:
        """The name without the variant."""
        return self.value.partition(":")[0]

    @property
    def variant(self) -> str:
        """The part of the name after the colon, or ""."""
        return self.value.partition(":")[2]

    def missing_reason(self) -> str:
        """Return why this machine cannot run the backend, or "" if it can."""
        if self is Backend.CUPY_FAKE:
            return "" if shutil.which("g++") else "g++ is not installed"
        module = {"strict": "array_api_strict"}.get(self.library, self.library)
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        if self is Backend.CUPY:  # CuPy imports without a GPU
            import cupy

            return "" if cupy.cuda.is_available() else "no CUDA device"
        return ""

    @cached_property
    def xp(self) -> Any:
        """The namespace, for tests that create arrays; xprnn resolves the namespace from its arguments."""
        match self.library:
            case "numpy":
                import array_api_compat.numpy as namespace
            case "strict":
                import array_api_strict as namespace
            case "torch":
                import array_api_compat.torch as namespace
            case "cupy":
                if self is Backend.CUPY_FAKE:
                    from support.cuda import fake_cupy

                    fake_cupy.install()
                import array_api_compat.cupy as namespace
            case "jax":
                import jax

                # Otherwise JAX silently converts float64 to float32.
                jax.config.update("jax_enable_x64", True)
                import jax.numpy as namespace
        return _ReadOnlyNamespace(namespace) if self is Backend.NUMPY_READONLY else namespace

    @cached_property
    def device(self) -> Any:
        """The device of arrays that `asarray` creates."""
        if self.library == "strict":
            return self.xp.Device(self.variant or "CPU_DEVICE")
        return array_api_compat.device(self.xp.zeros(1))

    @property
    def float_dtypes(self) -> tuple[str, ...]:
        """The names of the supported real dtypes, the widest first."""
        return ("float32",) if self is Backend.STRICT_NO_FLOAT64 else ("float64", "float32")

    def asarray(self, value: Any, dtype: str | None = None) -> Any:
        """Copy a NumPy array or list to this backend; a dict of them gives a dict.

        Without `dtype`, the array keeps the dtype of `value`; float64 becomes float32 if the backend has no float64.
        """
        if isinstance(value, Mapping):
            return {name: self.asarray(item, dtype) for name, item in value.items()}
        host = np.array(value)
        name = dtype or host.dtype.name
        if dtype is None and name == "float64":
            name = self.float_dtypes[0]
        return self.xp.asarray(host, dtype=getattr(self.xp, name), device=self.device, copy=True)

    def to_numpy(self, value: Any) -> Any:
        """Copy an array to NumPy; a dict of arrays gives a dict."""
        if isinstance(value, Mapping):
            return {name: self.to_numpy(item) for name, item in value.items()}
        with self.allow_host_conversion():
            match self.library:
                case "strict":
                    value = value.to_device(self.xp.Device("CPU_DEVICE"))
                case "torch":
                    value = value.detach().cpu().numpy()
                case "cupy":
                    value = value.get()
            return np.array(value)

    def forbid_host_conversion(self) -> AbstractContextManager[None]:
        """Return a context in which conversion of an array to the host raises. The `xp` fixture enters it.

        It is also a decorator: `xp.forbid_host_conversion()(f)` guards f when the caller of f itself converts.
        """
        return self._host_conversion(allowed=False)

    def allow_host_conversion(self) -> AbstractContextManager[None]:
        """Return a context in which conversion of an array to the host is allowed again, as in saving to a file."""
        return self._host_conversion(allowed=True)

    def allow_data_dependent_shapes(self) -> AbstractContextManager[None]:
        """Return a context in which array-api-strict allows shapes that depend on values, such as of unique_values."""
        if self.library != "strict":
            return nullcontext()
        import array_api_strict

        return array_api_strict.ArrayAPIStrictFlags(data_dependent_shapes=True)

    def _host_conversion(self, *, allowed: bool) -> AbstractContextManager[None]:
        if self is Backend.CUPY_FAKE:
            from support.cuda import fake_cupy

            return fake_cupy.sync_forbidden(not allowed)
        return _strict_mode(allow_conversion=allowed) if self.library == "strict" else nullcontext()

    def rtol(self, dtype: Any, condition: float) -> float:
        """Return the relative tolerance: eps of `dtype` times `condition`."""
        return condition * float(np.finfo(dtype_name(dtype)).eps)

    def assert_like(self, result: Any, like: Array) -> None:
        """Assert that every array in nested dicts and tuples has the namespace, dtype and device of `like`."""
        expected = _kind(like)
        for name, array in _leaves(result):
            found = _kind(array)
            assert found == expected, f"{self}: {name} is {found}, expected {expected}"

    def assert_close(self, actual: Any, expected: Any, *, condition: float = 8, scale: float | None = None) -> None:
        """Assert that `actual`, arrays of this backend, equal `expected`, of this backend or NumPy, within rounding.

        The allowed absolute error is eps * condition * scale, where eps is that of the dtype of `actual`. `scale` is by
        default the largest magnitude in `expected`, so that cancellation in single elements is tolerated. Integers and
        booleans must be equal. Shapes must be equal. NaN equals nothing.
        """
        expected_by_name = dict(_leaves(expected))
        actual_by_name = dict(_leaves(actual))
        assert actual_by_name.keys() == expected_by_name.keys(), (
            f"{self}: {sorted(actual_by_name)} is not {sorted(expected_by_name)}"
        )
        for name, array in actual_by_name.items():
            namespace = _kind(array)[0]
            assert namespace == _namespace(self.asarray(0)), f"{self}: {name} is of {namespace}"
            have, want = self.to_numpy(array), _as_numpy(expected_by_name[name], self)
            assert have.shape == want.shape, f"{self}: {name} {have.shape} is not {want.shape}"
            size = float(np.max(np.abs(want), initial=0)) if scale is None else scale
            exact = have.dtype.kind != "f"
            atol = 0.0 if exact else self.rtol(have.dtype, condition) * size
            np.testing.assert_allclose(have, want, rtol=0, atol=atol, equal_nan=False, err_msg=f"{self}: {name}")


def select_backends(names: list[str]) -> list[Backend]:
    """Return the backends with these names; without names, all that this machine can run."""
    if not names:
        return [b for b in Backend if b is not Backend.CUPY_FAKE and not b.missing_reason()]
    known = {name for backend in Backend for name in (backend.value, backend.library)}
    if unknown := sorted(set(names) - known):
        raise LookupError(f"unknown backend {unknown[0]!r}: expected one of {sorted(known)}")
    by_library = [b for b in Backend if b is not Backend.CUPY_FAKE and b.library in names]
    selected = [b for b in Backend if b.value in names or b in by_library]
    for backend in selected:
        if reason := backend.missing_reason():
            raise LookupError(f"backend {backend}: {reason}")
    return selected


def generator_for_test(nodeid: str) -> np.random.Generator:
    """Return a generator seeded from a pytest node id without its parameters."""
    return np.random.default_rng(zlib.crc32(nodeid.partition("[")[0].encode()))


def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype of any library, such as "float32"."""
    return getattr(dtype, "__name__", str(dtype)).rpartition(".")[2]


class _ReadOnlyNamespace:
    """NumPy's namespace with functions that return read-only arrays."""

    def __init__(self, namespace: ModuleType) -> None:
        self._namespace = namespace

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._namespace, name)
        is_function = callable(attribute) and not isinstance(attribute, type)
        return _return_readonly(attribute) if is_function else attribute


def _return_readonly(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        for array in result if isinstance(result, tuple | list) else [result]:
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
        return result

    return call


# Methods of an array that convert it to the host implicitly; on a GPU each waits for the device.
_HOST_CONVERSIONS = (
    "__bool__",
    "__int__",
    "__float__",
    "__complex__",
    "__index__",
    "__array__",
    "__buffer__",
)
_ORIGINAL_METHODS: dict[str, Any] = {}


@contextmanager
def _strict_mode(*, allow_conversion: bool) -> Iterator[None]:
    """Switch off the optional features of array-api-strict, and allow or forbid its host conversions."""
    import array_api_strict as strict

    array = type(strict.zeros(1))
    if not _ORIGINAL_METHODS:
        _ORIGINAL_METHODS.update({name: vars(array)[name] for name in _HOST_CONVERSIONS if name in vars(array)})
    before = {name: vars(array)[name] for name in _ORIGINAL_METHODS}
    flags = strict.ArrayAPIStrictFlags(boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=())
    try:
        for name, original in _ORIGINAL_METHODS.items():
            setattr(array, name, original if allow_conversion else _raise_on_conversion(name))
        with flags:
            yield
    finally:
        for name, method in before.items():
            setattr(array, name, method)


def _raise_on_conversion(name: str) -> Callable[..., Any]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise HostConversionError(
            f"{name} of an array {self.shape} inside a pass. If the test itself converts, use "
            f"xp.to_numpy(array) or `with xp.allow_host_conversion():`"
        )

    return refuse


def _namespace(array: Array) -> str:
    try:
        return str(array_api_compat.array_namespace(array).__name__)
    except TypeError:
        raise AssertionError(f"{type(array).__name__} is not an array: {array!r}") from None


def _kind(array: Array) -> tuple[str, str, Any]:
    """Return the namespace, dtype and device of an array."""
    return _namespace(array), dtype_name(array.dtype), array_api_compat.device(array)


def _as_numpy(value: Any, backend: Backend) -> np.ndarray:
    on_host = isinstance(value, np.ndarray | np.generic | int | float | list)
    return np.asarray(value) if on_host else backend.to_numpy(value)


def _leaves(value: Any, name: str = "result") -> Iterator[tuple[str, Any]]:
    """Yield (path, array) for every array in nested dicts and tuples; None is ignored."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}[{key!r}]")
    elif isinstance(value, tuple):
        for key, item in enumerate(value):
            yield from _leaves(item, f"{name}[{key}]")
    elif value is not None:
        yield name, value
