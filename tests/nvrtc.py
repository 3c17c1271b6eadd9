"""NVIDIA's run-time compiler, which needs no GPU: from the wheel nvidia-cuda-nvrtc, or wherever the loader finds it."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple


class Kernel(NamedTuple):
    """What the compiler reports of a kernel."""

    registers: int
    stack: int  # bytes of local memory; arrays that are not in registers count too
    spill_stores: int
    spill_loads: int


def _wheels(pattern: str) -> list[Path]:
    """Files in NVIDIA's wheels, the newest release first."""
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or []) if spec else []
    found = [p for place in places for p in Path(place).glob(pattern) if "alt" not in p.name]
    return sorted(found, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)], reverse=True)


@cache
def library() -> Any:
    """The library, or None."""
    for name in (*map(str, _wheels("*/lib/libnvrtc.so.*")), "libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def disassembler() -> str | None:
    found = _wheels("*/bin/nvdisasm")
    return str(found[0]) if found else shutil.which("nvdisasm")


def compiled(source: str, arch: int, options: tuple[str, ...]) -> tuple[bytes, dict[str, Kernel]]:
    """Machine code for sm_<arch> and what the compiler says of each kernel; AssertionError with its log if it fails."""
    nvrtc, program = library(), ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    flags = [f"--gpu-architecture=sm_{arch}", "--ptxas-options=-v", "-ftz=true", *options]  # -ftz: as CuPy does
    failed = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*map(str.encode, flags)))
    log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
    assert not failed, log
    code = _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code, report(log)


def _read(size_of: Any, read: Any, program: Any) -> bytes:
    size = ctypes.c_size_t()
    assert size_of(program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert read(program, text) == 0
    return text.raw


def report(log: str) -> dict[str, Kernel]:
    """The compiler's report on each kernel."""
    kernels = {}
    for part in log.split("Compiling entry function '")[1:]:
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert memory and registers, part
        kernels[part.partition("'")[0]] = Kernel(int(registers[1]), *map(int, memory.groups()))
    return kernels


def instructions(code: bytes, folder: Path) -> dict[str, list[str]]:
    """The machine instructions of each kernel, in order."""
    path = folder / "kernel.cubin"
    path.write_bytes(code)
    command = [str(disassembler()), "-c", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[str]] = {}
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", part)
        kernels[part.partition(":")[0]] = [re.sub(r"^@!?U?P\w+\s+", "", line) for line in lines]
    return kernels
