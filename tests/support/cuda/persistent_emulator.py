"""The persistent kernels on a CPU: their own source, compiled with g++ onto persistent_emulator.h."""

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
from support.cuda import fake_cupy as standin

from xprnn.kernels.cuda import persistent

HERE = Path(__file__).parent
KERNELS = Path(persistent.__file__).parent
FLAGS = ("-std=c++17", "-O1", "-march=native", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Werror")
QUIET = ("-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-misleading-indentation")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-fno-omit-frame-pointer")
SCHEDULES = 5  # of persistent_emulator.h; seed % SCHEDULES chooses


FENCE = 1 << 16  # bytes on each side of an array
MOST_SHARED, NON_PORTABLE = 227 << 10, 14  # of a block; CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED


class HostError(Exception):
    """What the machine found wrong with a kernel's run."""


FOLDER = tempfile.TemporaryDirectory(prefix="xprnn-persistent")


def source(mutate: Callable[[str], str] = lambda text: text) -> str:
    names = ("persistent_cells", "persistent")
    text = "".join((KERNELS / f"{name}.cu").read_text(encoding="utf-8") for name in names)
    return f'#include "{HERE / "persistent_emulator.h"}"\n{mutate(text)}\nXP_HOST_ENTRY\n'


@cache
def library(options: tuple[str, ...], text: str, extra: tuple[str, ...]) -> Any:
    command = ("g++", *FLAGS, *QUIET, *extra, *options)
    name = hashlib.sha256(" ".join((*command, text)).encode()).hexdigest()[:16]
    path, out = (Path(FOLDER.name) / f"{name}.{end}" for end in ("cpp", "so"))
    path.write_text(text, encoding="utf-8")
    run = subprocess.run([*command, str(path), "-o", str(out)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[:4000]
    return ctypes.CDLL(str(out))


class Fenced:
    """An argument's numbers in memory with NaN around them, where a stray read shows and a stray write is seen."""

    def __init__(self, a: Any) -> None:
        assert a.flags.c_contiguous, "a raw kernel sees no strides"
        assert a.dtype in (np.float32, np.bool_)
        assert a.device.id == standin.CURRENT[0]
        self.given, self.whole = a, np.full(FENCE * 2 + a.nbytes, 0xFF, np.uint8)
        self.inside = self.whole[FENCE : FENCE + a.nbytes]
        self.inside[...] = np.frombuffer(a._inside.tobytes(), np.uint8)
        self.address = self.inside.ctypes.data

    def back(self) -> None:
        """Hand over what a kernel wrote."""
        if (self.whole[:FENCE] != 0xFF).any() or (self.whole[-FENCE:] != 0xFF).any():
            raise HostError("a write outside of an array")
        self.given._inside[...] = self.inside.view(self.given.dtype).reshape(self.given.shape)


class Settings(NamedTuple):
    """How the next launches run."""

    seed: int = 0
    mutate: Callable[[str], str] = lambda text: text
    extra: tuple[str, ...] = ()  # the compiler's options


SETTINGS = [Settings()]


class Kernel:
    """`cupy.RawKernel` of a persistent kernel, of what persistent.launch asks of it."""

    def __init__(self, name: str, options: tuple[str, ...]) -> None:
        self.name, self.options = name, tuple(o for o in options if o.startswith("-D"))
        self.defined = {k: int(v) for k, v in (o[2:].split("=") for o in self.options)}
        self.max_dynamic_shared_size_bytes = 48 << 10
        self.attributes: dict[int, int] = {}
        self.kernel = SimpleNamespace(ptr=self)

    def __call__(self, grid: Any, block: Any, args: tuple[Any, ...], *, shared_mem: int) -> None:
        """Launch it."""
        blocks, threads = self.defined["CL"], self.defined["NT"]
        assert type(grid) is type(block) is tuple
        assert block == (threads,)
        assert grid[0] % blocks == 0
        assert shared_mem <= self.max_dynamic_shared_size_bytes <= MOST_SHARED
        assert blocks <= 8 or self.attributes.get(NON_PORTABLE), "a cluster that is not portable must be asked for"
        standin.LOG.append(("launch", self.name))
        assert all(isinstance(a, (standin.ndarray, np.int32)) or (type(a) is np.uintp and a == 0) for a in args)
        fenced = [Fenced(a) if isinstance(a, standin.ndarray) else None for a in args]
        values = [f.address if f else int(a) for f, a in zip(fenced, args, strict=True)]
        table, error = (ctypes.c_uint64 * len(values))(*values), ctypes.create_string_buffer(256)
        now, which = SETTINGS[-1], persistent.KERNELS.index(self.name)
        run = library(self.options, source(now.mutate), now.extra).xp_host_run
        run(which, table, grid[0] // blocks, ctypes.c_long(shared_mem), ctypes.c_uint(now.seed), error)
        if error.value:
            raise HostError(f"{self.name}, seed {now.seed}: {error.value.decode()}")
        for f in fenced:
            if f:
                f.back()


@contextmanager
def settings(**changed: Any) -> Iterator[None]:
    SETTINGS.append(Settings(**changed))
    try:
        yield
    finally:
        SETTINGS.pop()
