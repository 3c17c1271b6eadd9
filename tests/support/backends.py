"""The array libraries every test runs on, and what a test may ask of each of them.

`Backend` is the one list. A name is "library" or "library:variant"; `--backend library` takes all
of a library's variants. The `xp` fixture (conftest.py) hands a test one member:

    def test_tanh(xp, dtype, rng):
        x = rng.normal(size=(4, 3))
        given = xp.asarray(x, dtype)                     # this library's array, on this device
        result = layer_under_test(given)
        xp.assert_like(result, given)                    # same namespace, dtype and device
        xp.assert_close(result, np.tanh(x), condition=4) # within 4 eps of the largest element

Importing this file imports no array library but NumPy.
"""

from __future__ import annotations

import importlib.util
import shutil
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
    """A pass turned an array into a Python scalar or NumPy array: on a GPU, a synchronisation."""


class Backend(Enum):
    """One array library in one variant."""

    NUMPY = "numpy"
    NUMPY_READONLY = "numpy:readonly"  # any in-place change of an input raises
    STRICT = "strict"  # nothing beyond the standard
    STRICT_DEVICE1 = "strict:device1"  # a second device: forgetting `device=` raises
    STRICT_NO_FLOAT64 = "strict:no_float64"  # float64 does not exist there, as on Apple's GPUs
    TORCH = "torch"
    JAX = "jax"  # immutable arrays
    CUPY = "cupy"
    CUPY_FAKE = "cupy:standin"  # its rules on NumPy's arrays (standin.py): only where it is asked for by this name

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
        """Why this machine cannot run it, or "" when it can."""
        if self is Backend.CUPY_FAKE:
            return "" if shutil.which("g++") else "g++ is not installed"
        module = {"strict": "array_api_strict"}.get(self.library, self.library)
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        if self is Backend.CUPY:  # it imports without a GPU: importing proves nothing
            import cupy

            return "" if cupy.cuda.is_available() else "no CUDA device"
        return ""

    @cached_property
    def xp(self) -> Any:
        """The namespace. For array-making only: xprnn finds its own."""
        match self.library:
            case "numpy":
                import array_api_compat.numpy as namespace
            case "strict":
                import array_api_strict as namespace
            case "torch":
                import array_api_compat.torch as namespace
            case "cupy":
                if self is Backend.CUPY_FAKE:
                    from support.cuda import fake_cupy as standin

                    standin.install()
                import array_api_compat.cupy as namespace
            case "jax":
                import jax

                # Without this JAX silently makes float32 of float64.
                jax.config.update("jax_enable_x64", True)
                import jax.numpy as namespace
        return _ReadOnlyNamespace(namespace) if self is Backend.NUMPY_READONLY else namespace

    @cached_property
    def device(self) -> Any:
        """Where `asarray` puts arrays."""
        if self.library == "strict":
            return self.xp.Device(self.variant or "CPU_DEVICE")
        return array_api_compat.device(self.xp.zeros(1))

    @property
    def float_dtypes(self) -> tuple[str, ...]:
        """The names of the real dtypes that exist here, the widest first."""
        return ("float32",) if self is Backend.STRICT_NO_FLOAT64 else ("float64", "float32")

    def asarray(self, value: Any, dtype: str | None = None) -> Any:
        """A fresh array here from a NumPy array or list; a dict gives a dict.

        Without a dtype it is the value's own, or float32 where float64 does not exist.
        """
        if isinstance(value, Mapping):
            return {name: self.asarray(item, dtype) for name, item in value.items()}
        host = np.array(value)
        name = dtype or host.dtype.name
        if dtype is None and name == "float64":
            name = self.float_dtypes[0]
        dtype_here = getattr(self.xp, name)
        return self.xp.asarray(host, dtype=dtype_here, device=self.device, copy=True)

    def to_numpy(self, value: Any) -> Any:
        """A NumPy copy of an array; a dict gives a dict."""
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
        """Inside: converting an array to the host raises. The `xp` fixture starts inside.

        Also a decorator: `xp.forbid_host_conversion()(f)` is f with the guard, to hand to a caller that converts.
        """
        return self._host_conversion(allowed=False)

    def allow_host_conversion(self) -> AbstractContextManager[None]:
        """Inside: conversions are allowed again, for code whose job is to bring numbers home."""
        return self._host_conversion(allowed=True)

    def _host_conversion(self, *, allowed: bool) -> AbstractContextManager[None]:
        if self is Backend.CUPY_FAKE:
            from support.cuda import fake_cupy

            return fake_cupy.sync_forbidden(not allowed)
        return _strict_mode(allow_conversion=allowed) if self.library == "strict" else nullcontext()

    def rtol(self, dtype: Any, condition: float) -> float:
        """The one place for tolerances: rounding errors of `dtype` times the stated condition."""
        return condition * float(np.finfo(dtype_name(dtype)).eps)

    def assert_like(self, result: Any, like: Array) -> None:
        """Every array in `result` (dicts and tuples are walked) lives where `like` lives."""
        home = _kind(like)
        for name, array in _leaves(result):
            found = _kind(array)
            assert found == home, f"{self}: {name} is {found}, expected {home}"

    def assert_close(self, actual: Any, expected: Any, *, condition: float = 8, scale: float | None = None) -> None:
        """`actual`, of this backend, is `expected`, of this or NumPy, within rounding.

        The error allowed is eps * condition * scale, where eps is that of `actual`'s dtype and
        scale the largest magnitude in `expected`: sums that cancel are judged by what went in.
        Shapes must be equal, and NaN equals nothing.
        """
        wanted = dict(_leaves(expected))
        got = dict(_leaves(actual))
        assert got.keys() == wanted.keys(), f"{self}: {sorted(got)} is not {sorted(wanted)}"
        for name, array in got.items():
            namespace = _kind(array)[0]
            assert namespace == _namespace(self.asarray(0)), f"{self}: {name} is of {namespace}"
            have, want = self.to_numpy(array), _as_numpy(wanted[name], self)
            assert have.shape == want.shape, f"{self}: {name} {have.shape} is not {want.shape}"
            size = float(np.max(np.abs(want), initial=0)) if scale is None else scale
            exact = have.dtype.kind != "f"
            atol = 0.0 if exact else self.rtol(have.dtype, condition) * size
            np.testing.assert_allclose(have, want, rtol=0, atol=atol, equal_nan=False, err_msg=f"{self}: {name}")


def select_backends(names: list[str]) -> list[Backend]:
    """The backends asked for by name; with no name all that this machine can run."""
    if not names:
        return [b for b in Backend if b is not Backend.CUPY_FAKE and not b.missing_reason()]
    known = {name for backend in Backend for name in (backend.value, backend.library)}
    if unknown := sorted(set(names) - known):
        raise LookupError(f"unknown backend {unknown[0]!r}: expected one of {sorted(known)}")
    plain = [b for b in Backend if b is not Backend.CUPY_FAKE and b.library in names]
    chosen = [b for b in Backend if b.value in names or b in plain]
    for backend in chosen:
        if reason := backend.missing_reason():
            raise LookupError(f"backend {backend}: {reason}")
    return chosen


def dtype_name(dtype: Any) -> str:
    """ "float32" from any library's float32."""
    return getattr(dtype, "__name__", str(dtype)).rpartition(".")[2]


class _ReadOnlyNamespace:
    """A namespace whose functions return arrays that cannot be written to."""

    def __init__(self, namespace: ModuleType) -> None:
        self._namespace = namespace

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._namespace, name)
        return found if isinstance(found, type) or not callable(found) else _return_readonly(found)


def _return_readonly(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        for array in result if isinstance(result, tuple | list) else [result]:
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
        return result

    return call


# What brings numbers to the host without asking: each is a hidden wait for a GPU.
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
    """array-api-strict without what the standard makes optional, its host conversions on or off."""
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
            f"xp.to_numpy(array) or `with xp.converting():`"
        )

    return refuse


def _namespace(array: Array) -> str:
    try:
        return str(array_api_compat.array_namespace(array).__name__)
    except TypeError:
        raise AssertionError(f"{type(array).__name__} is not an array: {array!r}") from None


def _kind(array: Array) -> tuple[str, str, Any]:
    return _namespace(array), dtype_name(array.dtype), array_api_compat.device(array)


def _as_numpy(value: Any, backend: Backend) -> np.ndarray:
    plain = isinstance(value, np.ndarray | np.generic | int | float | list)
    return np.asarray(value) if plain else backend.to_numpy(value)


def _leaves(value: Any, name: str = "result") -> Iterator[tuple[str, Any]]:
    """(path, array) of every array in nested dicts and tuples; None stands for no array."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}[{key!r}]")
    elif isinstance(value, tuple):
        for key, item in enumerate(value):
            yield from _leaves(item, f"{name}[{key}]")
    elif value is not None:
        yield name, value
