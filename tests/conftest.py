"""Fixtures and the choice of backends: `pytest --backend numpy --backend strict:device1`.

A test that takes `xp` runs once on each chosen backend, one that also takes `dtype` on each of
the backend's real dtypes. A test that takes neither runs with NumPy. Markers:

    @pytest.mark.skip_backends("jax", reason="...")   # leave these out; the reason is shown
    @pytest.mark.needs("torch")                       # an oracle: runs only where it is installed
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from backends import Backend, choose
from quick_run import TEXT

from xprnn import kernels

CHOSEN = pytest.StashKey[list[Backend]]()
MARKERS = (
    "skip_backends(*names, reason): leave these backends (or libraries) out of the test",
    "needs(*modules): run only where these modules are installed and, if backends, chosen",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    names = ", ".join(str(backend) for backend in Backend)
    parser.addoption(
        "--backend",
        action="append",
        default=[],
        metavar="NAME",
        help=f"run on this backend only (repeatable; default: all that are installed): {names}",
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    try:
        config.stash[CHOSEN] = choose(config.getoption("backend"))
        if Backend.CUPY_STANDIN in config.stash[CHOSEN]:
            _ = Backend.CUPY_STANDIN.xp  # from here on `import cupy` finds it
    except LookupError as error:
        raise pytest.UsageError(f"--backend: {error}") from None


def pytest_report_header(config: pytest.Config) -> str:
    return "backends: " + ", ".join(str(backend) for backend in config.stash[CHOSEN])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    asked = metafunc.fixturenames
    own_dtypes = any("dtype" in m.args[0] for m in metafunc.definition.iter_markers("parametrize"))
    by_dtype = "dtype" in asked and not own_dtypes
    if "xp" not in asked:
        if by_dtype:
            metafunc.parametrize("dtype", Backend.NUMPY.float_dtypes)
        return
    chosen = [(b, skip_marks(metafunc.definition, b)) for b in metafunc.config.stash[CHOSEN]]
    if by_dtype:
        pairs = [(b, dtype, marks) for b, marks in chosen for dtype in b.float_dtypes]
        params = [pytest.param(b, d, marks=m, id=f"{b}-{d}") for b, d, m in pairs]
        metafunc.parametrize(("xp", "dtype"), params, indirect=["xp"])
    else:
        params = [pytest.param(b, marks=m, id=str(b)) for b, m in chosen]
        metafunc.parametrize("xp", params, indirect=True)


def skip_marks(definition: pytest.Item, backend: Backend) -> list[pytest.MarkDecorator]:
    """The skips that the test's skip_backends markers ask for on this backend."""
    known = {name for b in Backend for name in (b.value, b.library)}
    marks = []
    for mark in definition.iter_markers("skip_backends"):
        if not mark.args or set(mark.kwargs) != {"reason"} or not known.issuperset(mark.args):
            raise pytest.UsageError(f"{definition.nodeid}: expected known names and reason=: {mark}")
        if {backend.value, backend.library} & set(mark.args):
            marks.append(pytest.mark.skip(reason=f"{backend}: {mark.kwargs['reason']}"))
    return marks


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each test runs in the session of the library it needs; one that needs none, in NumPy's."""
    libraries = {backend.library for backend in config.stash[CHOSEN]}
    named = bool(config.getoption("backend"))
    kept, dropped = [], []
    for item in items:
        needs = [name for mark in item.iter_markers("needs") for name in mark.args]
        for name in needs:
            if importlib.util.find_spec(name) is None:
                item.add_marker(pytest.mark.skip(reason=f"{name} is not installed"))
        homes = {b.library for b in Backend}.intersection(needs) or {"numpy"}
        here = not named or "xp" in getattr(item, "fixturenames", ()) or homes <= libraries
        (kept if here else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(autouse=True)
def float_errors_raise() -> Iterator[None]:
    """A NaN or infinity is reported where it is born, not where it is noticed."""
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        yield


@pytest.fixture(autouse=True)
def compiled_where_numba_is_needed(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that needs numba asks for what it compiles, also where XPRNN_FAST=0 in the environment says no."""
    needed = any("numba" in mark.args for mark in request.node.iter_markers("needs"))
    with pytest.MonkeyPatch.context() as patch:  # its own: a test may undo what it changed
        if needed:
            patch.setattr(kernels, "_ALLOWED", True)
        yield


@pytest.fixture
def xp(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The backend under test, its conversions to the host guarded (backends.py)."""
    with request.param.guarded():
        yield request.param


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Seeded by the test's name without its parameters: the same numbers on every backend."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.partition("[")[0].encode()))


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A file to learn from."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)
