# /// script
# dependencies = ["nox>=2025.5"]
# ///
"""How to work on xprnn: `nox -l` lists the sessions, `nox` runs all that this machine can.

Anything after `--` goes to the tool: `nox -s torch -- -k lstm -x`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "virtualenv"  # pip: it honours the machine's own pip settings
nox.options.reuse_venv = "yes"

PYPROJECT = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, group: str, *, extra: str = "") -> None:
    """The working tree, editable, and one dependency group of pyproject.toml."""
    needed = nox.project.dependency_groups(PYPROJECT, group)
    # What is never imported needn't be turned into byte code: half of pip's time.
    session.install("--quiet", "--no-compile", "--editable", f".[{extra}]" if extra else ".", *needed)


def pytest(session: nox.Session, *args: str, **env: str) -> None:
    """Tests over the cores, each process with one thread for its products; `-- -n 0`: all in one process."""
    spread = ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    session.run("python", "-m", "pytest", *spread, *args, *session.posargs, env={"OMP_NUM_THREADS": "1", **env})


@nox.session
def numpy(session: nox.Session) -> None:
    """Test on NumPy, also with read-only inputs."""
    install(session, "test")
    pytest(session, "--backend", "numpy")


@nox.session
def fast(session: nox.Session) -> None:
    """Test on NumPy with kernels compiled by numba."""
    install(session, "test", extra="fast")
    pytest(session, "--backend", "numpy")


@nox.session
def strict(session: nox.Session) -> None:
    """Test on array-api-strict: three devices, nothing beyond the standard, no hidden syncs."""
    install(session, "test")
    pytest(session, "--backend", "strict")


@nox.session
def torch(session: nox.Session) -> None:
    """Test on torch tensors, and against torch's own layers and gradients."""
    install(session, "torch")
    pytest(session, "--backend", "torch")


@nox.session
def jax(session: nox.Session) -> None:
    """Test on JAX arrays, which cannot be written to."""
    install(session, "jax")
    pytest(session, "--backend", "jax")


@nox.session
def keras(session: nox.Session) -> None:
    """Test against live Keras: random architectures, masks, every option; its gradients on JAX."""
    install(session, "keras")
    pytest(session, "tests/interop/keras/test_live.py", "tests/interop/keras/test_activations.py")


@nox.session
def onnx(session: nox.Session) -> None:
    """Test against ONNX Runtime: cells, every operator of ONNX graphs, models written and read back."""
    install(session, "onnx")
    pytest(session, "--backend", "numpy", "tests/interop/onnx")


@nox.session
def cuda(session: nox.Session) -> None:
    """Test the CUDA kernels without a GPU: NVIDIA's compiler, and a stand-in for CuPy that runs them on the host."""
    install(session, "cuda")
    # The article's functions call the kernels with one bias and in a layout of their own.
    tests = ["tests/kernels/cuda", "tests/benchmarks/test_gpu_report.py", "tests/article/test_article.py"]
    pytest(session, "-q", "--dist", "loadfile", "--backend", "cupy:standin", *tests, XPRNN_NVRTC="required")


@nox.session(venv_backend="none")
def cupy(session: nox.Session) -> None:
    """Test on CuPy where there is a CUDA device, with the CuPy that nox's own Python has."""
    if not cuda_version():
        session.skip("no CUDA device: skipped")
    if importlib.util.find_spec("cupy") is None:
        session.notify("cupy_install", session.posargs)
        return
    session.run(sys.executable, "-m", "pytest", "--backend", "cupy", *session.posargs, external=True)


@nox.session(default=False)
def cupy_install(session: nox.Session) -> None:
    """The same with the CuPy that fits the driver, installed into its own environment."""
    version = cuda_version()
    if not version:
        session.skip("no CUDA device: skipped")
    install(session, "test", extra="cuda13" if version >= 13000 else "cuda12")
    session.run("python", "-m", "pytest", "--backend", "cupy", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check format, style, types (strict) and the house rules (budgets, import directions)."""
    install(session, "lint")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")
    session.run("python", "-m", "pytest", "-q", "tests/test_architecture.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Execute the examples of the docstrings and the README."""
    install(session, "docs", extra="plot,fast")
    examples = ["--doctest-modules", "xprnn", "tests/test_readme.py"]
    session.run("python", "-m", "pytest", "-q", *examples, *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure everything beside the article's loop, torch, JAX and ONNX Runtime; `-- --short` takes five minutes."""
    install(session, "bench", extra="fast")
    files = ["--markdown", "bench.md", "--json", "bench.json", "--png", "bench.png"]
    session.run("python", "-m", "benchmarks.run_all", *files, *session.posargs)


@nox.session(default=False)
def runtime(session: nox.Session) -> None:
    """Measure install size, import, first output and a step's latency beside ONNX Runtime and torch; installs all."""
    install(session, "bench")
    session.run("python", "-m", "benchmarks.cpu.deployment", *session.posargs)


@nox.session(default=False, venv_backend="none")
def gpu_bench(session: nox.Session) -> None:
    """Measure the CUDA kernels beside PyTorch's cuDNN, with the CuPy and torch that nox's own Python has."""
    if not cuda_version():
        session.skip("no CUDA device: skipped")
    session.run(sys.executable, "-m", "benchmarks.gpu.grid", *session.posargs, external=True)


def cuda_version() -> int:
    """The driver's CUDA version (13000 is 13.0), or 0 where there is no driver or no device."""
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
