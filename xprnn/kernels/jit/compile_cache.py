"""Compiles printed kernels with numba and caches the machine code on disk.

The cache directory is XPRNN_CACHE if set, else `xprnn` in XDG_CACHE_HOME or ~/.cache. The name of a kernel's file is a
hash of its source, of the modules it imports and of numba's version. numba stores the machine code for each type of
processor next to it. If several processes need the same kernel at the same time, one compiles it and the others wait.
If the directory is not writable, each process compiles its kernels in memory.
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

# Stems of the files in this directory that printed kernels import, directly or not: a change invalidates the cache.
_PRIMITIVE_MODULES = (
    *("simd", "matvec", "gemm_tile", "gemm", "segment_sum", "training"),
    *("products", "pointwise", "record", "forward", "backward", "bind", "bind_backward"),
)
_KERNEL_SIGNATURE = "void(int64[::1])"
_GEMM_ARGUMENTS = 12  # of the functions in gemm.py, with the number that selects one of them
_LOCK_TIMEOUT = 30.0  # seconds to wait for another process that compiles the same kernel
_COMPILE_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


@cache
def numba_available() -> bool:
    """Return True if numba can be imported and its JIT is enabled.

    This imports numba: call it only when a kernel could run.
    """
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        from numba import config

        from xprnn.kernels.jit import simd  # noqa: F401 - numba rejects a NumPy that is too new for it at its import
    except Exception:
        return False
    return not config.DISABLE_JIT


def _succeeds(compile_function: Callable[..., Any], *args: Any) -> bool:
    """Call a function that compiles; return False for any exception, because numba and LLVM raise many types."""
    try:
        compile_function(*args)
    except Exception:
        return False
    return True


@lru_cache(maxsize=1024)
def can_compile(source: str, signature: str = _KERNEL_SIGNATURE) -> bool:
    """Compile a kernel; return False if numba or LLVM fails."""
    return _succeeds(compile_kernel, source, signature)


@lru_cache(maxsize=1024)
def can_compile_cfunc(source: str, num_arguments: int) -> bool:
    """Compile a function that is called by address; return False if numba or LLVM fails."""
    return _succeeds(compile_cfunc, source, num_arguments)


@cache
def can_compile_gemm(itemsize: int) -> bool:
    """Compile gemm.py's functions for floats of `itemsize` bytes; return False if numba or LLVM fails."""
    return _succeeds(gemm_kernel, itemsize)


def cache_dir() -> Path | None:
    """Create the cache directory and return it, or None if it is not writable."""
    chosen, xdg_cache = os.environ.get("XPRNN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        path = Path(chosen) if chosen else (Path(xdg_cache) if xdg_cache else Path.home() / ".cache") / "xprnn"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return path if os.access(path, os.W_OK | os.X_OK) else None


@cache
def _cache_salt() -> bytes:
    """Return what a kernel's machine code depends on besides its source."""
    import importlib.metadata  # slow to import, and not needed without numba

    parts = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in _PRIMITIVE_MODULES]
    return b"".join(parts) + importlib.metadata.version("numba").encode()


@lru_cache(maxsize=1024)
def compile_kernel(source: str, signature: Any = _KERNEL_SIGNATURE) -> Callable[..., Any]:
    """Compile a printed kernel.

    Args:
        source: a module that defines `kernel`.
        signature: a numba signature, or several as text, separated by semicolons.

    Returns:
        The compiled `kernel`.
    """
    from numba import njit

    signatures = signature.split(";") if isinstance(signature, str) else [signature]
    kernel: Callable[..., Any] = _compile_cached(source, partial(njit, signatures, **_COMPILE_OPTIONS))
    return kernel


@lru_cache(maxsize=1024)
def compile_cfunc(source: str, num_arguments: int) -> Any:
    """Compile a printed function of int64 arguments that is called by its `.address`; it returns an int64."""
    from numba import cfunc

    options = {name: value for name, value in _COMPILE_OPTIONS.items() if name != "nogil"}
    signature = f"int64({', '.join(['int64'] * num_arguments)})"
    return _compile_cached(source, partial(cfunc, signature, **options))


def _compile_cached(source: str, compiler: Callable[..., Any]) -> Any:
    path = _write_source(source)
    if path is not None:
        try:
            with _file_lock(path):
                return compiler(cache=True)(_import_file(path).kernel)
        except Exception:  # a damaged cache file can raise any exception; compile in memory instead
            pass
    scope: dict[str, Any] = {}
    exec(source, scope)  # the source is printed by this package and contains no user input but repr(cell name)
    return compiler()(scope["kernel"])


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a kernel's file while it is compiled. The system releases the lock when its process ends.

    Where there are no such locks (Windows, some network file systems), two processes may compile the same kernel.
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
    """Try to acquire the lock. Return True also if the file system has no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _import_file(path: Path) -> Any:
    """Import the file under a fixed name, by which numba's cache refers to it."""
    name = f"xprnn_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _write_source(source: str) -> Path | None:
    """Write the source to a file in the cache if it does not exist. Return its path, or None if that fails."""
    import hashlib
    import tempfile

    directory = cache_dir()
    if directory is None:
        return None
    path = directory / f"k{hashlib.sha256(source.encode() + _cache_salt()).hexdigest()[:24]}.py"
    try:
        if path.exists() and path.read_text(encoding="utf-8") == source:
            return path
        with tempfile.NamedTemporaryFile("w", dir=directory, delete=False, encoding="utf-8") as file:
            file.write(source)
        Path(file.name).replace(path)  # atomic: another process never reads half a file
    except OSError:
        return None
    return path


@cache
def gemm_kernel(itemsize: int) -> Any:
    """Compile gemm.py's functions for floats of `itemsize` bytes. Kernels call them by `.address`."""
    from xprnn.kernels.jit import gemm

    return compile_cfunc(gemm.gemm_source(8 * itemsize), _GEMM_ARGUMENTS)


def vector_lanes(itemsize: int) -> int:
    """Return the number of floats of `itemsize` bytes that a SIMD vector holds."""
    from xprnn.kernels.jit import simd

    return int(simd.LANES32 if itemsize == 4 else simd.LANES64)


def tile_rows() -> int:
    """Return the number of rows of a matmul tile."""
    from xprnn.kernels.jit import gemm

    return int(gemm.TILE_ROWS)


def tile_size(itemsize: int) -> int:
    """Return the number of elements of a matmul tile: rows times padded columns."""
    from xprnn.kernels.jit import gemm

    return tile_rows() * gemm.TILE_VECTORS * vector_lanes(itemsize)
