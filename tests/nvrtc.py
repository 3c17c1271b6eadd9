"""NVRTC, NVIDIA's run-time compiler, by ctypes: it needs no GPU, and its report says what a kernel takes.

The library comes with the wheel nvidia-cuda-nvrtc (a dependency group of pyproject.toml). CuPy compiles kernels with
the same library.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# What CuPy adds to every compilation (cupy/cuda/compiler.py, 14.2).
CUPY_OPTIONS = ("-ftz=true", "--std=c++17")
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class Report(NamedTuple):
    """What ptxas says of one kernel."""

    registers: int
    stack: int
    spilled: int  # bytes


def missing() -> str:
    """Why NVRTC can't be used here, or ""."""
    return "" if _path() else "the wheel nvidia-cuda-nvrtc is not installed"


def _path() -> Path | None:
    try:
        spec = importlib.util.find_spec("nvidia")
    except ModuleNotFoundError:
        return None
    roots = spec.submodule_search_locations if spec else None
    found = [p for root in roots or () for p in Path(root).glob("c*/lib/libnvrtc.so.*") if "alt" not in p.name]
    return found[0] if found else None


@cache
def _library() -> Any:
    path = _path()
    assert path is not None, missing()
    for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def compiled(code: str, arch: str, options: tuple[str, ...] = ()) -> dict[str, Report]:
    """The report on each kernel of a source, compiled to machine code for `arch`, "sm_90" or another.

    Raises:
        AssertionError: it does not compile, or not without a warning; the compiler's words are in the message.
    """
    lib, program = _library(), ctypes.c_void_p()
    made = lib.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"kernel.cu", 0, None, None)
    assert made == 0, "nvrtcCreateProgram"
    given = [o.encode() for o in (f"--gpu-architecture={arch}", "--ptxas-options=-v", *CUPY_OPTIONS, *options)]
    try:
        failed = lib.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
        size = ctypes.c_size_t()
        lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetProgramLog(program, log)
        text = log.value.decode()
        assert not failed, text
        assert "warning" not in text, text
        lib.nvrtcGetCUBINSize(program, ctypes.byref(size))
        assert size.value > 0, "no machine code"
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))
    return {
        m["name"]: Report(int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"]))
        for m in _ENTRY.finditer(text)
    }
