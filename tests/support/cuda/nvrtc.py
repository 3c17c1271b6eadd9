"""NVRTC, NVIDIA's run-time compiler, by ctypes: it needs no GPU, and its report says what a kernel takes.

The library comes with the wheel nvidia-cuda-nvrtc (a dependency group of pyproject.toml). CuPy compiles kernels with
the same library.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# What CuPy adds to every compilation (cupy/cuda/compiler.py, 14.2).
CUPY_OPTIONS = ("-ftz=true", "--std=c++17")
_PTXAS_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class KernelResources(NamedTuple):
    """What ptxas says of one kernel."""

    registers: int
    stack_bytes: int
    spilled_bytes: int  # bytes


def missing_reason() -> str:
    """Why NVRTC can't be used here, or ""."""
    return "" if _library_path() else "the wheel nvidia-cuda-nvrtc is not installed"


def _library_path() -> Path | None:
    return next((p for p in _wheel_files("c*/lib/libnvrtc.so.*") if "alt" not in p.name), None)


def _wheel_files(pattern: str) -> list[Path]:
    """Files in NVIDIA's wheels, those of the newest release first."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except ModuleNotFoundError:
        return []
    roots = spec.submodule_search_locations if spec else None
    found = [p for root in roots or () for p in Path(root).glob(pattern)]
    return sorted(found, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)], reverse=True)


@cache
def _library() -> Any:
    path = _library_path()
    assert path is not None, missing_reason()
    for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def compile_resources(code: str, arch: str, options: tuple[str, ...] = ()) -> dict[str, KernelResources]:
    """The report on each kernel of a source, compiled to machine code for `arch`, "sm_90" or another.

    Raises:
        AssertionError: it does not compile, or not without a warning; the compiler's words are in the message.
    """
    return compile_cubin(code, arch, options)[0]


def compile_cubin(code: str, arch: str, options: tuple[str, ...] = ()) -> tuple[dict[str, KernelResources], bytes]:
    """As `compiled`, and the machine code."""
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
        binary = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetCUBIN(program, binary)
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))
    return {
        m["name"]: KernelResources(int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"]))
        for m in _PTXAS_ENTRY.finditer(text)
    }, binary.raw


def disassembler_path() -> Path | None:
    """Of the wheel nvidia-cuda-nvdisasm."""
    return next(iter(_wheel_files("c*/bin/nvdisasm")), None)


def instructions(binary: bytes, folder: Path) -> dict[str, list[str]]:
    """The machine instructions of each kernel, in order, without their predicates."""
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    run = subprocess.run([disassembler_path(), "-c", path], capture_output=True, text=True, check=True)
    kernels = {}
    for part in re.split(r"^\.text\.", run.stdout, flags=re.MULTILINE)[1:]:
        lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", part)
        kernels[part.partition(":")[0]] = [re.sub(r"^@!?U?P\w+\s+", "", line) for line in lines]
    return kernels
