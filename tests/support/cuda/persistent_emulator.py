"""Emulator of the persistent kernels on a CPU: their source, compiled by g++ against persistent_emulator.h."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from support.cuda import fake_cupy

from xprnn.kernels.cuda import persistent

HERE = Path(__file__).parent
KERNEL_FOLDER = Path(persistent.__file__).parent
COMPILE_FLAGS = ("-std=c++17", "-O1", "-march=native", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Werror")
WARNING_FLAGS = ("-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-misleading-indentation")
SANITIZER_FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-fno-omit-frame-pointer")
SCHEDULE_COUNT = 5  # number of schedules in persistent_emulator.h; the seed selects one
GUARD_BYTES = 1 << 16  # on each side of an array
MAX_SHARED_BYTES = 227 << 10  # per block
NON_PORTABLE_CLUSTER_ATTRIBUTE = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED


class EmulatorError(Exception):
    """An error that the emulator detected while a kernel ran."""


BUILD_FOLDER = tempfile.TemporaryDirectory(prefix="xprnn-persistent")


def kernel_source(mutate: Callable[[str], str] = lambda text: text) -> str:
    """Return the host source of the kernels; `mutate` may change the kernels' text."""
    names = ("persistent_cells", "persistent")
    text = "".join((KERNEL_FOLDER / f"{name}.cu").read_text(encoding="utf-8") for name in names)
    return f'#include "{HERE / "persistent_emulator.h"}"\n{mutate(text)}\nXP_HOST_ENTRY\n'


@cache
def compile_library(options: tuple[str, ...], text: str, extra: tuple[str, ...]) -> Any:
    """Compile a host source into a shared library and load it."""
    command = ("g++", *COMPILE_FLAGS, *WARNING_FLAGS, *extra, *options)
    name = hashlib.sha256(" ".join((*command, text)).encode()).hexdigest()[:16]
    path, out = (Path(BUILD_FOLDER.name) / f"{name}.{end}" for end in ("cpp", "so"))
    path.write_text(text, encoding="utf-8")
    run = subprocess.run([*command, str(path), "-o", str(out)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[:4000]
    return ctypes.CDLL(str(out))


class GuardedBuffer:
    """A copy of an array with NaN on both sides: an out-of-bounds read returns NaN, a write is detected."""

    def __init__(self, a: Any) -> None:
        assert a.flags.c_contiguous, "a raw kernel needs C-contiguous arrays"
        assert a.dtype in (np.float32, np.bool_)
        assert a.device.id == fake_cupy.CURRENT_DEVICE[0]
        self.array, self.memory = a, np.full(GUARD_BYTES * 2 + a.nbytes, 0xFF, np.uint8)
        self.data = self.memory[GUARD_BYTES : GUARD_BYTES + a.nbytes]
        self.data[...] = np.frombuffer(a._host.tobytes(), np.uint8)
        self.address = self.data.ctypes.data

    def copy_back(self) -> None:
        """Copy the results of a kernel back to the array, after checking the guard bytes."""
        if (self.memory[:GUARD_BYTES] != 0xFF).any() or (self.memory[-GUARD_BYTES:] != 0xFF).any():
            raise EmulatorError("a write outside of an array")
        self.array._host[...] = self.data.view(self.array.dtype).reshape(self.array.shape)


class LaunchSettings(NamedTuple):
    """Settings of the next launches."""

    seed: int = 0
    mutate: Callable[[str], str] = lambda text: text
    compile_options: tuple[str, ...] = ()


SETTINGS_STACK = [LaunchSettings()]


class EmulatedKernel:
    """`cupy.RawKernel` of a persistent kernel, with the methods that persistent.launch uses."""

    def __init__(self, name: str, options: tuple[str, ...]) -> None:
        self.name, self.options = name, tuple(o for o in options if o.startswith("-D"))
        self.defines = {k: int(v) for k, v in (o[2:].split("=") for o in self.options)}
        self.max_dynamic_shared_size_bytes = 48 << 10
        self.attributes: dict[int, int] = {}
        self.kernel = SimpleNamespace(ptr=self)

    def __call__(self, grid: Any, block: Any, args: tuple[Any, ...], *, shared_mem: int) -> None:
        """Check the arguments and run the kernel in the emulator."""
        blocks, threads = self.defines["CL"], self.defines["NT"]
        assert type(grid) is type(block) is tuple
        assert block == (threads,)
        assert grid[0] % blocks == 0
        assert shared_mem <= self.max_dynamic_shared_size_bytes <= MAX_SHARED_BYTES
        assert blocks <= 8 or self.attributes.get(NON_PORTABLE_CLUSTER_ATTRIBUTE), (
            "clusters of more than 8 blocks need the non-portable attribute"
        )
        fake_cupy.EVENT_LOG.append(("launch", self.name))
        assert all(isinstance(a, (fake_cupy.ndarray, np.int32)) or (type(a) is np.uintp and a == 0) for a in args)
        buffers = [GuardedBuffer(a) if isinstance(a, fake_cupy.ndarray) else None for a in args]
        values = [f.address if f else int(a) for f, a in zip(buffers, args, strict=True)]
        packed, error = (ctypes.c_uint64 * len(values))(*values), ctypes.create_string_buffer(256)
        settings, which = SETTINGS_STACK[-1], persistent.KERNEL_NAMES.index(self.name)
        run = compile_library(self.options, kernel_source(settings.mutate), settings.compile_options).xp_host_run
        run(which, packed, grid[0] // blocks, ctypes.c_long(shared_mem), ctypes.c_uint(settings.seed), error)
        if error.value:
            raise EmulatorError(f"{self.name}, seed {settings.seed}: {error.value.decode()}")
        for f in buffers:
            if f:
                f.copy_back()


@contextmanager
def launch_settings(**changed: Any) -> Iterator[None]:
    """Apply LaunchSettings(**changed) to the launches within this context."""
    SETTINGS_STACK.append(LaunchSettings(**changed))
    try:
        yield
    finally:
        SETTINGS_STACK.pop()
