"""Compiles printed kernels with numba and keeps the machine code in a folder, so that a later process starts at once.

The folder is XPRNN_CACHE, else `xprnn` in XDG_CACHE_HOME or ~/.cache. A kernel's file is named by a hash of its text,
of the modules it is built from and of numba's version; next to it numba keeps the machine code for each kind of
processor. Of processes that want a kernel at the same time, one compiles it. Where the folder can't be written, kernels
are compiled afresh in each process.
"""

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

__all__ = [
    "can_compile",
    "can_compile_gemm",
    "compile_kernel",
    "gemm_kernel",
    "numba_available",
    "tile_rows",
    "tile_size",
    "vector_lanes",
]

_PRIMITIVE_MODULES = (
    "simd",
    "matvec",
    "gemm_tile",
    "gemm",
    "segment_sum",
)  # the modules whose functions kernels are built from
_KERNEL_SIGNATURE = "void(int64[::1])"
_GEMM_SIGNATURE = f"int64({', '.join(['int64'] * 12)})"
_LOCK_TIMEOUT = 30.0  # seconds for another process to compile a kernel; after that it is compiled here, too
_COMPILE_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


@cache
def numba_available() -> bool:
    """Whether numba is installed and works; asked only when a kernel could run, because it imports numba."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        from numba import config

        from xprnn.kernels.jit import simd  # noqa: F401 - numba rejects a NumPy that is too new for it at its import
    except Exception:
        return False
    return not config.DISABLE_JIT


@lru_cache(maxsize=1024)
def can_compile(source: str, signature: str = _KERNEL_SIGNATURE) -> bool:
    """Whether a kernel can be compiled; it is, and kept."""
    try:
        compile_kernel(source, signature)
    except Exception:  # whatever LLVM or numba stumble over, there is a kernel that needs neither
        return False
    return True


@cache
def can_compile_gemm(itemsize: int) -> bool:
    """Whether the products for numbers of so many bytes can be compiled; they are, and kept."""
    try:
        gemm_kernel(itemsize)
    except Exception:
        return False
    return True


def cache_dir() -> Path | None:
    """Where kernels are kept; None if it can't be made."""
    chosen, home = os.environ.get("XPRNN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        path = Path(chosen) if chosen else (Path(home) if home else Path.home() / ".cache") / "xprnn"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return path if os.access(path, os.W_OK | os.X_OK) else None


@cache
def _cache_salt() -> bytes:
    """What a kernel depends on beside its own text."""
    import importlib.metadata  # here, as below, because it takes every process's time that has no numba too

    parts = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in _PRIMITIVE_MODULES]
    return b"".join(parts) + importlib.metadata.version("numba").encode()


@lru_cache(maxsize=1024)
def compile_kernel(source: str, signature: str = _KERNEL_SIGNATURE) -> Callable[..., Any]:
    """The machine code of a printed kernel: call it with a table of int64, or what one of its signatures says."""
    from numba import njit

    kernel: Callable[..., Any] = _compile_cached(source, partial(njit, signature.split(";"), **_COMPILE_OPTIONS))
    return kernel


def _compile_cached(source: str, compiler: Callable[..., Any]) -> Any:
    path = _write_source(source)
    if path is not None:
        try:
            with _file_lock(path):
                return compiler(cache=True)(_import_file(path).kernel)
        except Exception:  # a damaged cache may fail in any way, and is only a cache
            pass
    scope: dict[str, Any] = {}
    exec(source, scope)  # printed by source.py and gemm.py, from a finite list of names
    return compiler()(scope["kernel"])


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """While no other process makes this kernel; the system lets go of a lock whose holder ends, however it ends.

    Without such locks (Windows, some network file systems) nobody waits, and a kernel may be compiled twice.
    """
    try:
        import fcntl

        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (ImportError, OSError):
        yield
        return
    try:
        end = time.monotonic() + _LOCK_TIMEOUT
        while not _try_lock(fcntl, lock) and time.monotonic() < end:
            time.sleep(0.02)
        yield
    finally:
        os.close(lock)


def _try_lock(fcntl: Any, lock: int) -> bool:
    """Whether the lock is ours now, or there are none here."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _import_file(path: Path) -> Any:
    """The module, under a name by which numba finds it again."""
    name = f"xprnn_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _write_source(source: str) -> Path | None:
    """The file that holds exactly this text, or None."""
    import hashlib
    import tempfile

    where = cache_dir()
    if where is None:
        return None
    path = where / f"k{hashlib.sha256(source.encode() + _cache_salt()).hexdigest()[:24]}.py"
    try:
        if path.exists() and path.read_text(encoding="utf-8") == source:
            return path
        with tempfile.NamedTemporaryFile("w", dir=where, delete=False, encoding="utf-8") as file:
            file.write(source)
        Path(file.name).replace(path)  # another process sees all of it or nothing
    except OSError:
        return None
    return path


@cache
def gemm_kernel(itemsize: int) -> Any:
    """gemm.py's products for numbers of so many bytes; kernels call them by `address`."""
    from numba import cfunc

    from xprnn.kernels.jit import gemm

    options = {name: value for name, value in _COMPILE_OPTIONS.items() if name != "nogil"}
    return _compile_cached(gemm.gemm_source(8 * itemsize), partial(cfunc, _GEMM_SIGNATURE, **options))


def vector_lanes(itemsize: int) -> int:
    """How many numbers of so many bytes a vector holds."""
    from xprnn.kernels.jit import simd

    return int(simd.LANES32 if itemsize == 4 else simd.LANES64)


def tile_rows() -> int:
    """How many rows a product takes at once."""
    from xprnn.kernels.jit import gemm

    return int(gemm.TILE_ROWS)


def tile_size(itemsize: int) -> int:
    """How many numbers a product works out at once."""
    from xprnn.kernels.jit import gemm

    return tile_rows() * gemm.TILE_VECTORS * vector_lanes(itemsize)
