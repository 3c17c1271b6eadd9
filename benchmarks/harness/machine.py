"""The machine that a benchmark runs on: its description, its cores, and the environment of worker processes."""

from __future__ import annotations

import os
from typing import Any

from xprnn.cli.bench import available_cores, installed_versions, machine_summary

__all__ = ["available_cores", "benchmark_environment", "describe", "pin_to_cores"]

PACKAGES = ("torch", "jax", "jaxlib", "onnxruntime", "openvino", "tract")
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def pin_to_cores(cores: list[int]) -> None:
    """Pin this process and its future children to these cores, if the system can: nothing else limits JAX."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def benchmark_environment(threads: int) -> dict[str, str]:
    """Return an environment in which all libraries use `threads` threads and glibc keeps freed memory.

    Returning memory to the system and taking it again costs 5 to 20 % of a large row in a virtual machine, for torch as
    for xprnn. Other C libraries than glibc ignore the two MALLOC_ variables.
    """
    env = dict(os.environ) | {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        env.pop(name, None)  # they make a current NumPy use the kernels of an older processor
    env |= dict.fromkeys(THREAD_VARIABLES, str(threads))
    flag = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}"
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flag}".strip()
    env["JAX_PLATFORMS"] = "cpu"
    return env


def describe() -> dict[str, Any]:
    """Describe the machine and the versions of xprnn and its peers. Call it before a peer is imported."""
    summary = machine_summary()
    return summary | {"versions": summary["versions"] | installed_versions(PACKAGES)}
