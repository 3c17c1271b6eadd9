"""`cupy.cuda` of the stand-in (standin.py): devices, cuBLAS, and raw kernels that g++ compiles for the host."""

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
from support.cuda import fake_cupy as standin

from xprnn.kernels.cuda import persistent

HEADER = Path(__file__).with_name("fake_cuda.h")
KERNEL_PATTERN = re.compile(r'extern "C" __global__ void (\w+)\(const (\w+) a\)')
STRUCT_PATTERN = re.compile(r"struct (\w+) \{(.*?)\};", re.DOTALL)
CAPABILITIES = {0: "90", 1: "80"}  # of the two devices
CUBLAS_STATE = {"math": 0, "pointers": 0}
BUILD_FOLDER = tempfile.TemporaryDirectory(prefix="xprnn-standin")


class Device:
    """`cupy.cuda.Device`: a number, and a context in which it is the current one."""

    def __init__(self, device: Any = None) -> None:
        self.id = standin.CURRENT_DEVICE[0] if device is None else getattr(device, "id", device)
        self._previous: list[int] = []

    def __enter__(self) -> Self:
        self._previous.append(standin.CURRENT_DEVICE[0])
        standin.CURRENT_DEVICE[0] = self.id
        return self

    def __exit__(self, *_: object) -> None:
        standin.CURRENT_DEVICE[0] = self._previous.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    __hash__ = None  # type: ignore[assignment]  # as CuPy's

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    attributes = property(lambda self: {"ClockRate": 1_980_000, "MultiProcessorCount": 132})
    compute_capability = property(lambda self: CAPABILITIES[self.id])


class Event:
    """`cupy.cuda.Event`: everything is done at once here, so the host's clock tells the time."""

    def record(self) -> None:
        """Now."""
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """Wait."""
        standin.EVENT_LOG.append(("sync", "event"))


# --- cuBLAS: column-major, by address, as in cublasSgemm's manual


def _matrix(at: int, rows: int, columns: int, ld: int, dtype: Any, what: str) -> np.ndarray:
    if not all(0 < k < 1 << 31 for k in (rows, columns, ld)):
        raise OverflowError(f"{what}: {rows}, {columns}, {ld} as C ints")
    if ld < rows:
        raise RuntimeError(f"CUBLAS_STATUS_INVALID_VALUE: {what}: leading dimension {ld} of {rows} rows")
    item = np.dtype(dtype).itemsize
    count = ld * (columns - 1) + rows
    standin.DEVICE_MEMORY.check_address(what, at, count * item)
    flat = np.frombuffer((ctypes.c_char * (count * item)).from_address(at), dtype)
    return as_strided(flat, (rows, columns), (item, ld * item))


def _tf32(a: np.ndarray) -> np.ndarray:
    """Rounded to ten bits after the point."""
    bits = a.astype(np.float32).view(np.uint32)
    return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


def _gemm(dtype: Any) -> Any:
    def gemm(handle, ta, tb, m, n, k, alpha, a_at, lda, b_at, ldb, beta, c_at, ldc):
        assert handle == CUBLAS_HANDLE + standin.CURRENT_DEVICE[0], "a handle of another device"
        assert CUBLAS_STATE["pointers"] == 0, "scalars are read from the host"
        standin.EVENT_LOG.append(("gemm", (m, n, k)))
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
        c[...] = product + scale[1] * c if scale[1] else product  # where beta is 0, C is not read

    return gemm


CUBLAS_HANDLE = 4242


def _state_setter(name: str) -> Any:
    def setter(handle: int, value: int) -> None:
        CUBLAS_STATE[name] = value

    return setter


# --- raw kernels


@cache
def compile_for_host(code: str) -> ctypes.CDLL:
    """The kernels of a source, compiled for the host."""
    calls = "".join(
        f'extern "C" void run_{name}(const void* a, unsigned g, unsigned b, int backwards)'
        f" {{ launch({name}, *(const {struct}*)a, g, b, backwards); }}\n"
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
    """(name, whether a pointer) of each field, in order; all have 8 bytes."""
    body = dict(STRUCT_PATTERN.findall(code))[struct]
    found = []
    for line in filter(None, map(str.strip, body.split(";"))):
        names = line.removeprefix("const ").partition(" ")[2]
        found += [(n.strip().lstrip("*"), "*" in n) for n in names.split(",")]
    return tuple(found)


class RawModule:
    """`cupy.RawModule`."""

    def __init__(self, *, code: str, options: tuple[str, ...] = ()) -> None:
        assert type(options) is tuple, "Expected tuple"
        self.code, self.options = code, options

    def get_function(self, name: str) -> Any:
        """The kernel of this name."""
        if name in persistent.KERNEL_NAMES:
            from support.cuda import persistent_emulator as persistent_host

            return persistent_host.EmulatedKernel(name, self.options)
        return RawKernel(self.code, name)


class RawKernel:
    """`cupy.RawKernel`; its one argument is a structure passed by value."""

    def __init__(self, code: str, name: str) -> None:
        self.name, self.code, self.launch_count = name, code, 0
        self.struct = dict(KERNEL_PATTERN.findall(code))[name]

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Launch it."""
        assert type(grid) is type(block) is tuple
        (whole,) = args
        assert isinstance(whole, np.ndarray), "by value"
        assert whole.size == 1, "You are trying to pass a numpy.ndarray as a kernel parameter"
        assert 0 < grid[0] < 1 << 31 and 0 < block[0] <= 1024  # noqa: PT018
        values = np.frombuffer(whole.tobytes(), np.int64)
        names = struct_fields(self.code, self.struct)
        assert len(names) == len(values), f"{self.name}: {len(values)} numbers for {len(names)} fields"
        for (name, pointer), value in zip(names, values.tolist(), strict=True):
            if pointer and value:
                standin.DEVICE_MEMORY.check_address(f"{self.name}: {name}", value)
        standin.EVENT_LOG.append(("launch", self.name))
        self.launch_count += 1
        copy = whole.tobytes()  # as a launch does
        getattr(compile_for_host(self.code), f"run_{self.name}")(copy, grid[0], block[0], self.launch_count % 2)


class CUDADriverError(RuntimeError):
    """`cupy.cuda.driver.CUDADriverError`."""


class CompileException(Exception):  # noqa: N818 - CuPy's name
    """`cupy.cuda.compiler.CompileException`."""


def make_module() -> ModuleType:
    """`cupy.cuda`."""
    made: Any = ModuleType("cupy.cuda")
    made.Device = Device
    made.is_available = lambda: True
    made.Event = Event
    made.get_elapsed_time = lambda start, stop: 1e3 * (stop.at - start.at)
    made.get_current_stream = Event
    made.runtime = SimpleNamespace(
        getDeviceProperties=lambda device: {"name": b"stand-in"}, driverGetVersion=lambda: 13000
    )
    made.get_cublas_handle = lambda: CUBLAS_HANDLE + standin.CURRENT_DEVICE[0]
    made.driver = SimpleNamespace(
        CUDADriverError=CUDADriverError,
        funcSetAttribute=lambda function, name, value: function.attributes.__setitem__(name, value),
    )
    made.compiler = SimpleNamespace(CompileException=CompileException)
    made.cublas = SimpleNamespace(
        sgemm=_gemm(np.float32),
        dgemm=_gemm(np.float64),
        getMathMode=lambda handle: CUBLAS_STATE["math"],
        setMathMode=_state_setter("math"),
        getPointerMode=lambda handle: CUBLAS_STATE["pointers"],
        setPointerMode=_state_setter("pointers"),
    )
    return made
