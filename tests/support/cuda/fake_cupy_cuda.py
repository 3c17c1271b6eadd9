"""`cupy.cuda` of the fake CuPy (fake_cupy.py): devices, cuBLAS, and raw kernels that g++ compiles for the host."""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import numpy as np
from numpy.lib.stride_tricks import as_strided
from support.cuda import fake_cupy

from xprnn.kernels.cuda import persistent

HEADER = Path(__file__).with_name("fake_cuda.h")
KERNEL_PATTERN = re.compile(r'extern "C" __global__ void (\w+)\(const (\w+) a\)')
STRUCT_PATTERN = re.compile(r"struct (\w+) \{(.*?)\};", re.DOTALL)
CAPABILITIES = {0: "90", 1: "80"}  # compute capability of each fake device
CUBLAS_STATE = {"math": 0, "pointers": 0}
BUILD_FOLDER = tempfile.TemporaryDirectory(prefix="xprnn-fake-cuda")


class Device:
    """`cupy.cuda.Device`: a device number, and a context that makes it current."""

    def __init__(self, device: Any = None) -> None:
        self.id = fake_cupy.CURRENT_DEVICE[0] if device is None else getattr(device, "id", device)
        self._previous: list[int] = []

    def __enter__(self) -> Self:
        self._previous.append(fake_cupy.CURRENT_DEVICE[0])
        fake_cupy.CURRENT_DEVICE[0] = self.id
        return self

    def __exit__(self, *_: object) -> None:
        fake_cupy.CURRENT_DEVICE[0] = self._previous.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    __hash__ = None  # type: ignore[assignment]  # as in CuPy

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    attributes = property(lambda self: {"ClockRate": 1_980_000, "MultiProcessorCount": 132})
    compute_capability = property(lambda self: CAPABILITIES[self.id])


class Event:
    """`cupy.cuda.Event`. The fake runs everything synchronously, so the host clock measures the time."""

    def record(self) -> None:
        """Record the current time."""
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """Log a wait for the device."""
        fake_cupy.EVENT_LOG.append(("sync", "event"))


# --- cuBLAS: column-major matrices by address, as the manual of cublasSgemm specifies


def _matrix(at: int, rows: int, columns: int, ld: int, dtype: Any, what: str) -> np.ndarray:
    """Return the host memory at an address as a column-major matrix, after checking all its arguments."""
    if not all(0 < k < 1 << 31 for k in (rows, columns, ld)):
        raise OverflowError(f"{what}: {rows}, {columns}, {ld} as C ints")
    if ld < rows:
        raise RuntimeError(f"CUBLAS_STATUS_INVALID_VALUE: {what}: leading dimension {ld} of {rows} rows")
    item = np.dtype(dtype).itemsize
    count = ld * (columns - 1) + rows
    fake_cupy.DEVICE_MEMORY.check_address(what, at, count * item)
    flat = np.frombuffer((ctypes.c_char * (count * item)).from_address(at), dtype)
    return as_strided(flat, (rows, columns), (item, ld * item))


def _tf32(a: np.ndarray) -> np.ndarray:
    """Round to ten mantissa bits."""
    bits = a.astype(np.float32).view(np.uint32)
    return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


def _gemm(dtype: Any) -> Any:
    def gemm(handle, ta, tb, m, n, k, alpha, a_at, lda, b_at, ldb, beta, c_at, ldc):
        assert handle == CUBLAS_HANDLE + fake_cupy.CURRENT_DEVICE[0], "the handle belongs to another device"
        assert CUBLAS_STATE["pointers"] == 0, "the pointer mode must be host"
        fake_cupy.EVENT_LOG.append(("gemm", (m, n, k)))
        scale = [
            float(np.frombuffer((ctypes.c_char * np.dtype(dtype).itemsize).from_address(p), dtype)[0])
            for p in (alpha, beta)
        ]
        a = _matrix(a_at, *((k, m) if ta else (m, k)), lda, dtype, "gemm's A")
        b = _matrix(b_at, *((n, k) if tb else (k, n)), ldb, dtype, "gemm's B")
        c = _matrix(c_at, m, n, ldc, dtype, "gemm's C")
        a, b = (a.T if ta else a), (b.T if tb else b)
        if CUBLAS_STATE["math"] == 3 and dtype is np.float32:
            a, b = _tf32(np.ascontiguousarray(a)), _tf32(np.ascontiguousarray(b))
        product = scale[0] * np.matmul(a, b)
        c[...] = product + scale[1] * c if scale[1] else product  # cuBLAS does not read C if beta is 0

    return gemm


CUBLAS_HANDLE = 4242


def _state_setter(name: str) -> Any:
    def setter(handle: int, value: int) -> None:
        CUBLAS_STATE[name] = value

    return setter


# --- raw kernels


@cache
def compile_for_host(code: str) -> ctypes.CDLL:
    """Compile the kernels of a CUDA source for the host."""
    calls = "".join(
        f'extern "C" void run_{name}(const void* a, unsigned g, unsigned b, int descending)'
        f" {{ launch({name}, *(const {struct}*)a, g, b, descending); }}\n"
        for name, struct in KERNEL_PATTERN.findall(code)
    )
    stem = Path(BUILD_FOLDER.name) / hashlib.sha256(code.encode()).hexdigest()[:16]
    source, library = stem.with_suffix(".cpp"), stem.with_suffix(".so")
    source.write_text(f'#include "{HEADER}"\n{code}\n{calls}', encoding="utf-8")
    flags = [
        "-O1",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-variable",
        "-ffp-contract=off",
    ]
    run = subprocess.run(["g++", *flags, "-o", library, source], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(library))


@cache
def struct_fields(code: str, struct: str) -> tuple[tuple[str, bool], ...]:
    """Return (name, is_pointer) of each struct field in order; every field has 8 bytes."""
    body = dict(STRUCT_PATTERN.findall(code))[struct]
    fields = []
    for line in filter(None, map(str.strip, body.split(";"))):
        names = line.removeprefix("const ").partition(" ")[2]
        fields += [(n.strip().lstrip("*"), "*" in n) for n in names.split(",")]
    return tuple(fields)


class RawModule:
    """`cupy.RawModule`."""

    def __init__(self, *, code: str, options: tuple[str, ...] = ()) -> None:
        assert type(options) is tuple, "Expected tuple"
        self.code, self.options = code, options

    def get_function(self, name: str) -> Any:
        """Return the kernel of this name."""
        if name in persistent.KERNEL_NAMES:
            from support.cuda import persistent_emulator

            return persistent_emulator.EmulatedKernel(name, self.options)
        return RawKernel(self.code, name)


class RawKernel:
    """`cupy.RawKernel` of a kernel with one struct argument, passed by value."""

    def __init__(self, code: str, name: str) -> None:
        self.name, self.code, self.launch_count = name, code, 0
        self.struct = dict(KERNEL_PATTERN.findall(code))[name]

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Check the arguments and run the kernel."""
        assert type(grid) is type(block) is tuple
        (struct,) = args
        assert isinstance(struct, np.ndarray), "the argument must be a NumPy array, passed by value"
        assert struct.size == 1, "You are trying to pass a numpy.ndarray as a kernel parameter"
        assert 0 < grid[0] < 1 << 31 and 0 < block[0] <= 1024  # noqa: PT018
        values = np.frombuffer(struct.tobytes(), np.int64)
        names = struct_fields(self.code, self.struct)
        assert len(names) == len(values), f"{self.name}: {len(values)} numbers for {len(names)} fields"
        for (name, pointer), value in zip(names, values.tolist(), strict=True):
            if pointer and value:
                fake_cupy.DEVICE_MEMORY.check_address(f"{self.name}: {name}", value)
        fake_cupy.EVENT_LOG.append(("launch", self.name))
        self.launch_count += 1
        copy = struct.tobytes()  # a launch copies its arguments
        getattr(compile_for_host(self.code), f"run_{self.name}")(copy, grid[0], block[0], self.launch_count % 2)


class CUDADriverError(RuntimeError):
    """`cupy.cuda.driver.CUDADriverError`."""


class CompileException(Exception):  # noqa: N818 - CuPy's name
    """`cupy.cuda.compiler.CompileException`."""


def make_module() -> ModuleType:
    """Build the fake module `cupy.cuda`."""
    module: Any = ModuleType("cupy.cuda")
    module.Device = Device
    module.is_available = lambda: True
    module.Event = Event
    module.get_elapsed_time = lambda start, stop: 1e3 * (stop.time - start.time)
    module.get_current_stream = Event
    module.runtime = SimpleNamespace(
        getDeviceProperties=lambda device: {"name": b"fake CuPy"}, driverGetVersion=lambda: 13000
    )
    module.get_cublas_handle = lambda: CUBLAS_HANDLE + fake_cupy.CURRENT_DEVICE[0]
    module.driver = SimpleNamespace(
        CUDADriverError=CUDADriverError,
        funcSetAttribute=lambda function, name, value: function.attributes.__setitem__(name, value),
    )
    module.compiler = SimpleNamespace(CompileException=CompileException)
    module.cublas = SimpleNamespace(
        sgemm=_gemm(np.float32),
        dgemm=_gemm(np.float64),
        getMathMode=lambda handle: CUBLAS_STATE["math"],
        setMathMode=_state_setter("math"),
        getPointerMode=lambda handle: CUBLAS_STATE["pointers"],
        setPointerMode=_state_setter("pointers"),
    )
    return module
