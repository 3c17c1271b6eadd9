"""NVRTC, NVIDIA's runtime compiler, called by ctypes: compiles kernels without a GPU and reports their resources.

The library comes with the wheel nvidia-cuda-nvrtc (dependency group `cuda` of pyproject.toml). CuPy compiles kernels
with the same library.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# CuPy 14.2 adds these options to every compilation (cupy/cuda/compiler.py).
CUPY_OPTIONS = ("-ftz=true", "--std=c++17")
_PTXAS_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class KernelResources(NamedTuple):
    """Resources of one kernel, as ptxas reports them."""

    registers: int
    stack_bytes: int
    spilled_bytes: int  # spill stores plus spill loads


def missing_reason() -> str:
    """Return the reason why NVRTC cannot be used, or ""."""
    return "" if _library_path() else "the wheel nvidia-cuda-nvrtc is not installed"


def _library_path() -> Path | None:
    return next((p for p in _wheel_files("c*/lib/libnvrtc.so.*") if "alt" not in p.name), None)


def _wheel_files(pattern: str) -> list[Path]:
    """List files in NVIDIA's wheels, those of the newest release first."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except ModuleNotFoundError:
        return []
    roots = spec.submodule_search_locations if spec else None
    paths = [p for root in roots or () for p in Path(root).glob(pattern)]
    return sorted(paths, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)], reverse=True)


@cache
def _library() -> Any:
    path = _library_path()
    assert path is not None, missing_reason()
    for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def compile_resources(code: str, arch: str, options: tuple[str, ...] = ()) -> dict[str, KernelResources]:
    """Compile a source to machine code for `arch`, such as "sm_90", and return the resources of each kernel.

    Raises:
        AssertionError: the compiler reports an error or a warning; the message contains its log.
    """
    return compile_cubin(code, arch, options)[0]


def compile_cubin(code: str, arch: str, options: tuple[str, ...] = ()) -> tuple[dict[str, KernelResources], bytes]:
    """Return the resources of each kernel and the machine code; see `compile_resources`."""
    lib, program = _library(), ctypes.c_void_p()
    status = lib.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"kernel.cu", 0, None, None)
    assert status == 0, "nvrtcCreateProgram"
    arguments = [o.encode() for o in (f"--gpu-architecture={arch}", "--ptxas-options=-v", *CUPY_OPTIONS, *options)]
    try:
        failed = lib.nvrtcCompileProgram(program, len(arguments), (ctypes.c_char_p * len(arguments))(*arguments))
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
    """Return the path of nvdisasm from the wheel nvidia-cuda-nvdisasm, or None."""
    return next(iter(_wheel_files("c*/bin/nvdisasm")), None)


def instructions(binary: bytes, folder: Path) -> dict[str, list[str]]:
    """Disassemble: list the machine instructions of each kernel in order, without their predicates."""
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    run = subprocess.run([disassembler_path(), "-c", path], capture_output=True, text=True, check=True)
    kernels = {}
    for part in re.split(r"^\.text\.", run.stdout, flags=re.MULTILINE)[1:]:
        lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", part)
        kernels[part.partition(":")[0]] = [re.sub(r"^@!?U?P\w+\s+", "", line) for line in lines]
    return kernels
