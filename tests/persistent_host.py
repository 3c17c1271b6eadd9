"""The persistent kernels on a CPU: their own source, compiled with g++ onto persistent_host.h."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from xprnn.kernels.cuda import persistent

HERE = Path(__file__).parent
KERNELS = Path(persistent.__file__).parent
FLAGS = ("-std=c++17", "-O2", "-march=native", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Werror")
QUIET = ("-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-misleading-indentation")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-fno-omit-frame-pointer")
SCHEDULES = 5  # of persistent_host.h; seed % SCHEDULES chooses


FENCE = 1 << 16  # bytes on each side of an array


class HostError(Exception):
    """What the machine found wrong with a kernel's run."""


def has_compiler() -> bool:
    return shutil.which("g++") is not None


@cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="xprnn-persistent-"))


def source(mutate: Callable[[str], str] = lambda text: text) -> str:
    names = ("persistent_cells", "persistent")
    text = "".join((KERNELS / f"{name}.cu").read_text(encoding="utf-8") for name in names)
    return f'#include "{HERE / "persistent_host.h"}"\n{mutate(text)}\nXP_HOST_ENTRY\n'


@cache
def library(options: tuple[str, ...], text: str, extra: tuple[str, ...]) -> Any:
    command = ("g++", *FLAGS, *QUIET, *extra, *(o for o in options if o.startswith("-D")))
    name = hashlib.sha256(" ".join((*command, text)).encode()).hexdigest()[:16]
    path, out = folder() / f"{name}.cpp", folder() / f"{name}.so"
    path.write_text(text, encoding="utf-8")
    run = subprocess.run([*command, str(path), "-o", str(out)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[:4000]
    return ctypes.CDLL(str(out))


class Fenced:
    """An argument's numbers in memory with NaN around them, where a stray read shows and a stray write is seen."""

    def __init__(self, a: Any) -> None:
        assert a.flags.c_contiguous
        assert a.dtype in (np.float32, np.uint8)
        self.given, edge = a, FENCE // a.itemsize
        self.whole = np.full(FENCE * 2 + a.nbytes, 0xFF, np.uint8).view(a.dtype)
        self.inside = self.whole[edge : edge + a.size]
        self.inside[...] = a.ravel()
        self.address = self.inside.ctypes.data

    def back(self) -> None:
        """Hand over what a kernel wrote."""
        bytes_ = self.whole.view(np.uint8)
        if (bytes_[:FENCE] != 0xFF).any() or (bytes_[-FENCE:] != 0xFF).any():
            raise HostError("a write outside of an array")
        if self.given.flags.writeable:
            self.given[...] = self.inside.reshape(self.given.shape)
        elif not np.array_equal(self.given.ravel(), self.inside, equal_nan=True):
            raise HostError("a write into an argument that is only read")


def launcher(seed: int, mutate: Callable[[str], str] = lambda text: text, extra: tuple[str, ...] = ()) -> Any:
    """What takes the place of `persistent.launch`."""

    def launch(config: persistent.Config, name: str, clusters: int, args: tuple[Any, ...]) -> None:
        fenced = [Fenced(a) if isinstance(a, np.ndarray) else None for a in args]
        values = [f.address if f else a or 0 for f, a in zip(fenced, args, strict=True)]
        table, error = (ctypes.c_uint64 * len(values))(*values), ctypes.create_string_buffer(256)
        which = persistent.KERNELS.index(name)
        run = library(config.options(), source(mutate), extra).xp_host_run
        run(which, table, clusters, ctypes.c_long(config.shared_bytes(bool(which))), ctypes.c_uint(seed), error)
        if error.value:
            raise HostError(f"{name} {config}, seed {seed}: {error.value.decode()}")
        for f in fenced:
            if f:
                f.back()

    return launch
