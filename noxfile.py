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

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "virtualenv"  # installs with pip, which reads the pip configuration of this machine
nox.options.reuse_venv = "yes"

PYPROJECT = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, group: str, *, extra: str = "") -> None:
    """Install the working tree (editable) and one dependency group of pyproject.toml."""
    needed = nox.project.dependency_groups(PYPROJECT, group)
    # Compiling all modules to byte code takes half of pip's time, and most of them are never imported.
    session.install("--quiet", "--no-compile", "--editable", f".[{extra}]" if extra else ".", *needed)


def pytest(session: nox.Session, *args: str, **env: str) -> None:
    """Run pytest on up to 8 cores with one BLAS thread per process; `-- -n 0` runs all tests in one process."""
    distribution = ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    session.run("python", "-m", "pytest", *distribution, *args, *session.posargs, env={"OMP_NUM_THREADS": "1", **env})


@nox.session
def numpy(session: nox.Session) -> None:
    """Test on NumPy arrays, writable and read-only."""
    install(session, "test")
    pytest(session, "--backend", "numpy")


@nox.session
def fast(session: nox.Session) -> None:
    """Test on NumPy arrays with the kernels that numba compiles."""
    install(session, "test", extra="fast")
    pytest(session, "--backend", "numpy")


@nox.session
def strict(session: nox.Session) -> None:
    """Test on array-api-strict: only functions of the Array API standard, three devices, no implicit host copies."""
    install(session, "test")
    pytest(session, "--backend", "strict")


@nox.session
def torch(session: nox.Session) -> None:
    """Test on torch tensors, and compare with torch's layers and autograd."""
    install(session, "torch")
    pytest(session, "--backend", "torch")


@nox.session
def jax(session: nox.Session) -> None:
    """Test on JAX arrays, which are immutable."""
    install(session, "jax")
    pytest(session, "--backend", "jax")


@nox.session
def keras(session: nox.Session) -> None:
    """Compare with Keras on JAX: random architectures, masks, every layer option, gradients."""
    install(session, "keras")
    pytest(session, "tests/interop/keras/test_live.py", "tests/interop/keras/test_activations.py")


@nox.session
def onnx(session: nox.Session) -> None:
    """Compare with ONNX Runtime: cells, every supported operator, models that are exported and read back."""
    install(session, "onnx")
    pytest(session, "--backend", "numpy", "tests/interop/onnx")


@nox.session
def cuda(session: nox.Session) -> None:
    """Test the CUDA kernels without a GPU: compile them with NVRTC, and run them on the host with a fake CuPy."""
    install(session, "cuda")
    # The article's functions call the kernels with one bias and with reversed axes.
    tests = ["tests/kernels/cuda", "tests/benchmarks/test_gpu_report.py", "tests/article/test_article.py"]
    pytest(session, "-q", "--dist", "loadfile", "--backend", "cupy:fake", *tests, XPRNN_NVRTC="required")


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


@nox.session
def lint(session: nox.Session) -> None:
    """Check format, style, types (strict), file and function lengths, and import directions."""
    install(session, "lint")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")
    session.run("python", "-m", "pytest", "-q", "tests/test_architecture.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Run the examples of the docstrings and of README.md."""
    install(session, "docs", extra="plot,fast")
    examples = ["--doctest-modules", "xprnn", "tests/test_readme.py"]
    session.run("python", "-m", "pytest", "-q", *examples, *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmark against the article's loop, torch, JAX and ONNX Runtime; `-- --short` takes five minutes."""
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
