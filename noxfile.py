# /// script
# dependencies = ["nox>=2025.5"]
# ///
"""Sessions to test, check and benchmark xprnn: `nox -l` lists them, `nox` runs all that this machine supports.

Arguments after `--` go to the tool of the session: `nox -s torch -- -k lstm -x`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "virtualenv"  # installs with pip, which reads the pip configuration of this machine
nox.options.reuse_venv = "yes"

PYPROJECT = nox.project.load_toml("pyproject.toml")
KERAS_TESTS = ("tests/interop/keras/test_live.py", "tests/interop/keras/test_activations.py")
# These tests run in the session `numpy` and not in `fast`. The first eight reach no kernel. The others are about files
# and graphs, and compile some 80 kernels for that; the tests of cells, engine and kernels compare the kernels.
NUMPY_ONLY_TESTS = (
    "tests/test_architecture.py",
    "tests/io",
    "tests/benchmarks/test_worker_pool.py",
    "tests/charlm/test_corpus.py",
    "tests/cli/test_unreadable_files.py",
    "tests/interop/keras/test_corrupt_files.py",
    "tests/interop/onnx/test_corrupt_files.py",
    "tests/interop/torch/test_files.py",
    "tests/cells/test_serialization.py",
    "tests/interop/onnx/test_export.py",
    "tests/interop/onnx/test_export_masking.py",
    "tests/interop/onnx/test_recurrent_ops.py",
)
JAX_OPTIONS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # the tests compile many small functions and run each a few times
INSTALLED: dict[Path, set[str]] = {}  # what this run of nox has installed into the shared environments
shared_session = nox.session(venv_backend="none")


def install(session: nox.Session, group: str, *, extra: str = "") -> None:
    """Install the working tree (editable) and one dependency group of pyproject.toml."""
    needed = nox.project.dependency_groups(PYPROJECT, group)
    # Compiling all modules to byte code takes half of pip's time, and most of them are never imported.
    session.install("--quiet", "--no-compile", "--editable", f".[{extra}]" if extra else ".", *needed)


def shared_python(session: nox.Session, environment: str, group: str, *, extras: Sequence[str] = ()) -> str:
    """Install the working tree and a dependency group into an environment of several sessions, and return its Python.

    Installing torch, JAX and the others once for each session takes as long as two sessions. One run of nox therefore
    installs each requirement once, and a session installs only what the ones before it left out.
    """
    folder = session.cache_dir.parent / f"shared-{environment}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        session.run_install(sys.executable, "-m", "virtualenv", "--quiet", str(folder), external=True)
    optional = PYPROJECT["project"]["optional-dependencies"]
    needed = {"--editable=.", *nox.project.dependency_groups(PYPROJECT, group)}
    needed.update(*(optional[extra] for extra in extras))
    missing = sorted(needed - INSTALLED.setdefault(folder, set()))
    if missing:
        session.run_install(str(python), "-m", "pip", "install", "--quiet", "--no-compile", *missing, external=True)
        INSTALLED[folder].update(missing)
    return str(python)


def pytest(session: nox.Session, python: str, *args: str, **env: str) -> None:
    """Run pytest on up to 8 cores with one BLAS thread per process; `-- -n 0` runs all tests in one process."""
    distribution = ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    command = [python, "-m", "pytest", *distribution, *args, *session.posargs]
    session.run(*command, env={"OMP_NUM_THREADS": "1", **env}, external=True)


@shared_session
def numpy(session: nox.Session) -> None:
    """Test on NumPy arrays, writable and read-only."""
    python = shared_python(session, "test", "test")
    pytest(session, python, "--backend", "numpy")


@shared_session
def fast(session: nox.Session) -> None:
    """Test on NumPy arrays with the kernels that numba compiles, except NUMPY_ONLY_TESTS."""
    python = shared_python(session, "fast", "test", extras=("fast", "plot"))
    pytest(session, python, "--backend", "numpy", *(f"--ignore={test}" for test in NUMPY_ONLY_TESTS))


@shared_session
def strict(session: nox.Session) -> None:
    """Test on array-api-strict: only functions of the Array API standard, three devices, no implicit host copies."""
    python = shared_python(session, "test", "test")
    pytest(session, python, "--backend", "strict")


@shared_session
def torch(session: nox.Session) -> None:
    """Test on torch tensors, and compare with torch's layers and autograd."""
    python = shared_python(session, "torch", "torch")
    pytest(session, python, "--backend", "torch")


@shared_session
def jax(session: nox.Session) -> None:
    """Test on JAX arrays, which are immutable."""
    python = shared_python(session, "jax", "jax")
    pytest(session, python, "--backend", "jax", *(f"--ignore={test}" for test in KERAS_TESTS), **JAX_OPTIONS)


@shared_session
def keras(session: nox.Session) -> None:
    """Compare with Keras on JAX: random architectures, masks, every layer option, gradients."""
    python = shared_python(session, "jax", "keras")
    pytest(session, python, *KERAS_TESTS, **JAX_OPTIONS)


@shared_session
def onnx(session: nox.Session) -> None:
    """Compare with ONNX Runtime: cells, every supported operator, models that are exported and read back."""
    python = shared_python(session, "torch", "onnx")
    pytest(session, python, "--backend", "numpy", "--needs", "onnxruntime", "tests/interop/onnx")


@shared_session
def cuda(session: nox.Session) -> None:
    """Test the CUDA kernels without a GPU: compile them with NVRTC, and run them on the host with a fake CuPy."""
    python = shared_python(session, "torch", "cuda")
    # The article's functions call the kernels with one bias and with reversed axes.
    tests = ["tests/kernels/cuda", "tests/benchmarks/test_gpu_report.py", "tests/article/test_article.py"]
    pytest(session, python, "-q", "--dist", "loadfile", "--backend", "cupy:fake", *tests, XPRNN_NVRTC="required")


@nox.session(venv_backend="none")
def cupy(session: nox.Session) -> None:
    """Test on CuPy arrays if there is a CUDA device, with the CuPy that is installed beside nox."""
    if not cuda_version():
        session.skip("no CUDA device")
    if importlib.util.find_spec("cupy") is None:
        session.notify("cupy_install", session.posargs)
        return
    session.run(sys.executable, "-m", "pytest", "--backend", "cupy", *session.posargs, external=True)


@nox.session(default=False)
def cupy_install(session: nox.Session) -> None:
    """Test on CuPy arrays with the CuPy that fits the CUDA driver, installed into an environment of this session."""
    version = cuda_version()
    if not version:
        session.skip("no CUDA device")
    install(session, "test", extra="cuda13" if version >= 13000 else "cuda12")
    session.run("python", "-m", "pytest", "--backend", "cupy", *session.posargs)


@shared_session
def lint(session: nox.Session) -> None:
    """Check format, style, types (strict), file and function lengths, and import directions."""
    python = shared_python(session, "fast", "lint")
    session.run(python, "-m", "ruff", "format", "--check", ".", external=True)
    session.run(python, "-m", "ruff", "check", ".", external=True)
    session.run(python, "-m", "mypy", external=True)
    session.run(python, "-m", "pytest", "-q", "tests/test_architecture.py", *session.posargs, external=True)


@shared_session
def docs(session: nox.Session) -> None:
    """Run the examples of the docstrings and of README.md."""
    python = shared_python(session, "fast", "docs", extras=("fast", "plot"))
    pytest(session, python, "--doctest-modules", "xprnn", "tests/test_readme.py")


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmark against the article's loop, torch, JAX and runtimes of ONNX models; `-- --short` takes five minutes."""
    install(session, "bench", extra="fast")
    files = ["--markdown", "bench.md", "--json", "bench.json", "--png", "bench.png"]
    session.run("python", "-m", "benchmarks.run_all", *files, *session.posargs)


@nox.session(default=False)
def runtime(session: nox.Session) -> None:
    """Measure install size, import time, first output and step latency; installs ONNX Runtime and torch to compare."""
    install(session, "bench")
    session.run("python", "-m", "benchmarks.cpu.deployment", *session.posargs)


@nox.session(default=False, venv_backend="none")
def gpu_bench(session: nox.Session) -> None:
    """Benchmark the CUDA kernels against torch with cuDNN; CuPy and torch must be installed beside nox."""
    if not cuda_version():
        session.skip("no CUDA device")
    session.run(sys.executable, "-m", "benchmarks.gpu.grid", *session.posargs, external=True)


def cuda_version() -> int:
    """Return the CUDA version of the driver (13000 is 13.0), or 0 if there is no driver or no device."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    devices, version = ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGetCount(ctypes.byref(devices))
        or driver.cuDriverGetVersion(ctypes.byref(version))
    )
    return 0 if failed or not devices.value else version.value


if __name__ == "__main__":
    nox.main()
