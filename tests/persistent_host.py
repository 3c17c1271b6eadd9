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


def launcher(seed: int, mutate: Callable[[str], str] = lambda text: text, extra: tuple[str, ...] = ()) -> Any:
    """What takes the place of `persistent.launch`."""

    def launch(config: persistent.Config, name: str, clusters: int, args: tuple[Any, ...]) -> None:
        for a in args:
            if isinstance(a, np.ndarray):
                assert a.flags.c_contiguous
                assert a.dtype in (np.float32, np.uint8)
        values = [0 if a is None else a if isinstance(a, int) else a.ctypes.data for a in args]
        table, error = (ctypes.c_uint64 * len(values))(*values), ctypes.create_string_buffer(256)
        which = persistent.KERNELS.index(name)
        run = library(config.options(), source(mutate), extra).xp_host_run
        run(which, table, clusters, ctypes.c_long(config.shared_bytes(bool(which))), ctypes.c_uint(seed), error)
        if error.value:
            raise HostError(f"{name} {config}, seed {seed}: {error.value.decode()}")

    return launch
