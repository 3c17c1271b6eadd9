"""What the figures were measured on, in words that carry no path and no host name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

__all__ = ["available_cores", "benchmark_environment", "describe", "pin_to_cores"]

PACKAGES = ("numpy", "numba", "torch", "jax", "jaxlib", "onnxruntime")


def available_cores() -> list[int]:
    """The cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def pin_to_cores(cores: list[int]) -> None:
    """Keep this process, and what it starts, on these cores, where the system can: nothing else limits JAX."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def benchmark_environment(threads: int) -> dict[str, str]:
    """The environment of a process in which everyone has this number of threads, and keeps the memory it has freed.

    Given back and taken anew, memory costs what the system makes of it at that moment: in a virtual machine a twentieth
    of a large row or a fifth, torch's as ours. (glibc reads these two names; other C libraries don't.)
    """
    env = dict(os.environ) | {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        env.pop(name, None)  # they make a current NumPy run an older processor's kernels
    for name in (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "BLIS_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
    ):
        env[name] = str(threads)
    flag = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}"
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flag}".strip()
    env["JAX_PLATFORMS"] = "cpu"
    return env


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines() if ":" in line)
        fields = {k.strip(): v.strip() for k, v in lines.items()}
        if "model name" in fields:
            family = [f"{k} {fields[k]}" for k in ("cpu family", "model") if k in fields]
            return f"{fields['model name']} ({', '.join(family)})"
    return platform.processor() or platform.machine()


def _blas() -> str:
    """The BLAS that NumPy runs here, its kernel and its threads."""
    import numpy as np

    build = np.show_config("dicts")["Build Dependencies"]["blas"]
    text = f"{build['name']} {build['version']}"
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return f"{text} (kernel unknown: threadpoolctl is not installed)"
    np.dot(np.ones((2, 2), np.float32), np.ones((2, 2), np.float32))
    # Only NumPy is loaded so far, so that no one else's BLAS is among them.
    found = [i for i in threadpool_info() if i["user_api"] == "blas"]
    kernels = [f"{i.get('architecture') or i['internal_api']} kernel, {i['num_threads']} thread(s)" for i in found]
    return f"{text} ({'; '.join(kernels) or 'kernel unknown'})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def describe() -> dict[str, Any]:
    """Processor, cores, system, load and versions; call it before a peer is imported."""
    own = sys.modules["xprnn"].__version__  # a source tree on the path need not be an installed package
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "processor": _processor(),
        "cores": len(available_cores()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "load": load,
        "blas": _blas(),
        "versions": {"xprnn": own} | {p: v for p in PACKAGES if (v := _version(p))},
    }
