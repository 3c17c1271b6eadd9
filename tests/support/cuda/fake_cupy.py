"""A fake of the CuPy module for machines without a GPU: NumPy arrays under the rules of CuPy.

`install()` registers it in `sys.modules` as `cupy`. Like CuPy, it rejects NumPy arrays as operands and implicit
conversions to the host. `EVENT_LOG` records what is expensive on a GPU: allocations, waits for the device, launches and
matrix products. New memory is filled with NaN and has NaN guards on both sides. Every address that reaches a kernel or
a matrix product must lie in a live array on the current device (fake_cupy_cuda.py checks this).
"""

from __future__ import annotations

import bisect
import operator
import sys
import weakref
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

# Names and keywords of NumPy that CuPy 14.2 lacks, and the array flags that CuPy has.
MISSING_NAMES = (
    "block bmat emath errstate frompyfunc geomspace insert matvec ndenumerate nditer spacing unstack vecdot vecmat"
)
MISSING_LINALG_NAMES = "diagonal matrix_norm multi_dot outer svdvals tensordot trace vecdot vector_norm"
UNSUPPORTED_KEYWORDS, ARRAY_FLAGS = (
    {"device", "like", "initial"},
    ("c_contiguous", "f_contiguous", "owndata", "fnc", "forc"),
)

GUARD_ELEMENTS = 64  # on each side of an array
EVENT_LOG: list[tuple[str, Any]] = []  # ("alloc", bytes), ("sync", how), ("launch", kernel), ("gemm", (m, n, k)), ...
FORBID_SYNC = [False]  # if true, a wait for the device raises
CURRENT_DEVICE = [0]


class SyncError(AssertionError):
    """A forward or backward pass waited for the device."""


def record_sync(how: str) -> None:
    """Log a wait for the device; raise if waits are forbidden."""
    EVENT_LOG.append(("sync", how))
    if FORBID_SYNC[0]:
        raise SyncError(f"{how} of an array inside a pass: on a GPU, a wait for the device")


@contextmanager
def sync_forbidden(refuse: bool):
    """Within this context a wait for the device raises if `refuse`."""
    before, FORBID_SYNC[0] = FORBID_SYNC[0], refuse
    try:
        yield
    finally:
        FORBID_SYNC[0] = before


class DeviceMemory:
    """Addresses of the live arrays."""

    def __init__(self) -> None:
        self.block_starts: list[int] = []
        self.blocks: dict[int, tuple[int, int]] = {}  # start -> (end, device)
        self.guarded_blocks: Any = weakref.WeakValueDictionary()  # start -> the array with its guards

    def allocate(self, shape: Any, dtype: Any) -> np.ndarray:
        """Allocate memory filled with NaN on the current device."""
        dtype = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        whole = np.empty(count + 2 * GUARD_ELEMENTS, dtype)
        whole.view(np.uint8)[...] = 0xFF  # NaN for floats
        inside = whole[GUARD_ELEMENTS : GUARD_ELEMENTS + count]
        start, end = inside.ctypes.data, inside.ctypes.data + count * dtype.itemsize
        bisect.insort(self.block_starts, start)
        self.blocks[start] = (end, CURRENT_DEVICE[0])
        self.guarded_blocks[start] = whole
        weakref.finalize(whole, self._release, start).atexit = False
        EVENT_LOG.append(("alloc", count * dtype.itemsize))
        return inside.reshape(shape)

    def _release(self, start: int) -> None:
        self.block_starts.remove(start)
        del self.blocks[start]

    def check_address(self, what: str, start: int, size: int = 1) -> None:
        """Raise unless [start, start + size) lies in one live array on the current device."""
        place = bisect.bisect_right(self.block_starts, start) - 1
        if place < 0 or start + size > self.blocks[self.block_starts[place]][0]:
            raise AssertionError(f"{what}: address outside all live arrays")
        device = self.blocks[self.block_starts[place]][1]
        if device != CURRENT_DEVICE[0]:
            raise AssertionError(f"{what}: memory of device {device} while device {CURRENT_DEVICE[0]} is current")

    def check_guards(self) -> None:
        """Raise if a write beyond the ends of a live array happened."""
        for whole in list(self.guarded_blocks.values()):
            for edge in (whole[:GUARD_ELEMENTS], whole[-GUARD_ELEMENTS:]):
                assert (edge.view(np.uint8) == 0xFF).all(), "a kernel wrote beyond the end of an array"


DEVICE_MEMORY = DeviceMemory()


class ndarray:  # noqa: N801 - CuPy's name
    """A NumPy array under the rules of CuPy."""

    __array_priority__ = 100

    def __init__(self, inside: np.ndarray, device: int) -> None:
        self._host, self._device = inside, device

    shape = property(lambda s: s._host.shape)
    ndim = property(lambda s: s._host.ndim)
    dtype = property(lambda s: s._host.dtype)
    size = property(lambda s: s._host.size)
    nbytes = property(lambda s: s._host.nbytes)
    itemsize = property(lambda s: s._host.itemsize)
    strides = property(lambda s: s._host.strides)
    flags = property(lambda s: SimpleNamespace(**{k: getattr(s._host.flags, k) for k in ARRAY_FLAGS}))
    T = property(lambda s: from_numpy(s._host.T))
    mT = property(lambda s: from_numpy(s._host.mT))  # noqa: N815

    device = property(lambda s: sys.modules["cupy"].cuda.Device(s._device))

    data = property(lambda s: _Pointer(s._host.ctypes.data))

    def get(self) -> np.ndarray:
        """Return a NumPy copy."""
        EVENT_LOG.append(("sync", "get()"))  # explicit, so never forbidden
        return self._host.copy()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct one.")

    __array_ufunc__ = None

    def __len__(self) -> int:
        return len(self._host)

    def __getitem__(self, index: Any) -> ndarray:
        return from_numpy(self._host[numpy_operand(index)], self._device)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._host[numpy_operand(index)] = numpy_operand(value)
        EVENT_LOG.append(("launch", "setitem"))

    def __bool__(self) -> bool:
        record_sync("bool()")
        return bool(self._host)

    def __int__(self) -> int:
        record_sync("int()")
        return int(self._host)

    def __float__(self) -> float:
        record_sync("float()")
        return float(self._host)

    def __repr__(self) -> str:
        return f"fake_cupy.{self._host!r}"


class _Pointer:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


def from_numpy(value: Any, device: int | None = None) -> Any:
    """Convert results of NumPy to this module's arrays; an array that owns its memory is copied to an allocation."""
    if isinstance(value, (tuple, list)):
        return (
            type(value)(*(from_numpy(v) for v in value))
            if hasattr(value, "_fields")
            else type(value)(map(from_numpy, value))
        )
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray):
        return value
    if value.base is None:
        fresh = DEVICE_MEMORY.allocate(value.shape, value.dtype)
        fresh[...] = value
        value = fresh
    return ndarray(value, CURRENT_DEVICE[0] if device is None else device)


def numpy_operand(value: Any) -> Any:
    """Return the NumPy array inside an operand; reject NumPy arrays as operands."""
    if isinstance(value, ndarray):
        if value._device != CURRENT_DEVICE[0]:
            raise AssertionError(f"array of device {value._device} while device {CURRENT_DEVICE[0]} is current")
        return value._host
    if isinstance(value, (np.ndarray, np.generic)) and not isinstance(value, (np.bool_,)) and np.ndim(value):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, tuple):
        return tuple(numpy_operand(v) for v in value)
    if isinstance(value, list):
        return [numpy_operand(v) for v in value]
    return value


def cupy_function(function: Any) -> Any:
    """Wrap a NumPy function for this module's arrays."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if unknown := kwargs.keys() & UNSUPPORTED_KEYWORDS:
            raise TypeError(f"cupy.{function.__name__}: unexpected keyword argument {unknown.pop()!r}")
        EVENT_LOG.append(("launch", function.__name__))
        out = kwargs.get("out")
        result = function(*map(numpy_operand, args), **{k: numpy_operand(v) for k, v in kwargs.items()})
        return out if isinstance(out, ndarray) else from_numpy(result)

    call.__name__ = function.__name__
    return call


def _direct(f: Any) -> Any:
    return cupy_function(f)


def _reflected(f: Any) -> Any:
    return lambda a, b: cupy_function(f)(b, a)


def _inplace(f: Any) -> Any:
    def method(a: ndarray, b: Any) -> ndarray:
        a._host[...] = f(a._host, numpy_operand(b))
        EVENT_LOG.append(("launch", f.__name__))
        return a

    return method


for _name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"]:
    _f = getattr(operator, f"{_name}_" if _name in ("and", "or") else _name)
    for _prefix, _make_operator in (("", _direct), ("r", _reflected), ("i", _inplace)):
        setattr(ndarray, f"__{_prefix}{_name}__", _make_operator(_f))
for _name in ["lt", "le", "gt", "ge", "eq", "ne", "neg", "abs", "pos", "invert"]:
    setattr(ndarray, f"__{_name}__", _direct(getattr(operator, _name)))
_METHODS = "all any argsort astype copy cumsum max mean min prod ravel repeat reshape sum take transpose"
for _name in _METHODS.split(" "):
    setattr(ndarray, _name, _direct(getattr(np.ndarray, _name)))
ndarray.tolist = lambda a: a.get().tolist()
ndarray.item = lambda a: (record_sync("item()"), a._host.item())[1]
ndarray.__hash__ = None


def array(obj: Any, dtype: Any = None, copy: bool = True, order: str = "K") -> ndarray:
    """`cupy.array`: copy host data to the current device, or copy an array."""
    is_cupy = isinstance(obj, ndarray)
    if is_cupy and not copy and order == "K" and dtype in (None, obj.dtype):
        return obj
    values = np.asarray(numpy_operand(obj) if is_cupy or isinstance(obj, list) else obj, dtype)
    keep_fortran = order == "K" and values.flags.f_contiguous and not values.flags.c_contiguous
    fresh = (
        DEVICE_MEMORY.allocate(values.shape[::-1], values.dtype).T
        if keep_fortran
        else DEVICE_MEMORY.allocate(values.shape, values.dtype)
    )
    fresh[...] = values
    return ndarray(fresh, CURRENT_DEVICE[0])


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(DEVICE_MEMORY.allocate(shape, dtype), CURRENT_DEVICE[0])


def ascontiguousarray(a: ndarray, dtype: Any = None) -> ndarray:
    same = isinstance(a, ndarray) and a.flags.c_contiguous and dtype in (None, a.dtype)
    return a if same else array(a, dtype, order="C")


def _make_submodule(name: str) -> ModuleType:
    """Wrap the functions of `numpy.linalg` or `numpy.fft`."""
    submodule = ModuleType(f"cupy.{name}")
    for key in dir(getattr(np, name)):
        value = getattr(getattr(np, name), key)
        absent = key.startswith("_") or (name == "linalg" and key in MISSING_LINALG_NAMES.split())
        if not absent and not isinstance(value, ModuleType):
            plain = isinstance(value, type) or not hasattr(value, "__name__")
            setattr(submodule, key, value if plain else cupy_function(value))
    submodule.__all__ = [k for k in dir(submodule) if not k.startswith("_")]
    return submodule


def install() -> ModuleType:
    """Register the fake as `cupy` in this process and return it."""
    from support.cuda import fake_cupy_cuda

    if (module := sys.modules.get("cupy")) is not None and getattr(module, "is_fake", False):
        return module
    module = ModuleType("cupy")
    module.__spec__ = ModuleSpec("cupy", None)
    module.__version__ = "14.2.0"
    module.is_fake = True
    for name in dir(np):
        value = getattr(np, name)
        if name.startswith("_") or isinstance(value, ModuleType) or name in MISSING_NAMES.split():
            continue
        plain = (
            isinstance(value, (type, np.dtype))
            or not hasattr(value, "__name__")
            or name in ("finfo", "iinfo", "issubdtype", "result_type", "can_cast", "isscalar")
        )
        setattr(module, name, value if plain else cupy_function(value))
    for f in (array, empty, ascontiguousarray):
        setattr(module, f.__name__, f)
    module.asarray = lambda a, dtype=None, order=None, *, copy=None, blocking=False: array(a, dtype, copy=bool(copy))
    module.result_type = lambda *args: np.result_type(*(a.dtype if isinstance(a, ndarray) else a for a in args))
    module.ndarray = ndarray
    module.cuda = fake_cupy_cuda.make_module()
    module.get_default_memory_pool = lambda: SimpleNamespace(free_all_blocks=lambda: None)
    module.RawModule, module.RawKernel = fake_cupy_cuda.RawModule, fake_cupy_cuda.RawKernel
    for name in ("linalg", "fft"):
        submodule = _make_submodule(name)
        setattr(module, name, submodule)
        sys.modules[f"cupy.{name}"] = submodule
    sys.modules["cupy"] = module
    sys.modules["cupy.cuda"] = sys.modules["cupy.cuda.device"] = module.cuda
    return module
