"""Fixtures and the choice of backends: `pytest --backend numpy --backend strict:device1`.

A test that takes `xp` runs once on each chosen backend, one that also takes `dtype` on each of
the backend's real dtypes. A test that takes neither runs with NumPy. Markers:

    @pytest.mark.not_on("jax", reason="...")              # this test does not apply to these backends
    @pytest.mark.applies_if(lambda xp, name: ..., reason="...")   # nor to other values of its parameters
    @pytest.mark.needs("torch")                           # an oracle: runs only where it is installed

A test that does not apply is deselected at collection, so that a skip always names something that a user can install
or change. The summary counts the tests that were deselected for want of an installed module.
"""

from __future__ import annotations

import importlib.util
import inspect
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.backends import Backend, select_backends
from support.tiny_text import TEXT

from xprnn.kernels import config as kernels_config

SELECTED_BACKENDS = pytest.StashKey[list[Backend]]()
NOT_INSTALLED = pytest.StashKey[Counter[str]]()
MARKERS = (
    "not_on(*names, reason): the test does not apply to these backends (or libraries)",
    "applies_if(predicate, reason): the test applies where predicate(parameters named by its arguments) is true",
    "needs(*modules): run only where these modules are installed and, if backends, chosen",
    "regression: guards against a bug that was found in use",
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
        config.stash[SELECTED_BACKENDS] = select_backends(config.getoption("backend"))
        if Backend.CUPY_FAKE in config.stash[SELECTED_BACKENDS]:
            _ = Backend.CUPY_FAKE.xp  # from here on `import cupy` finds it
    except LookupError as error:
        raise pytest.UsageError(f"--backend: {error}") from None


def pytest_report_header(config: pytest.Config) -> str:
    return "backends: " + ", ".join(str(backend) for backend in config.stash[SELECTED_BACKENDS])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    asked = metafunc.fixturenames
    own_dtypes = any("dtype" in m.args[0] for m in metafunc.definition.iter_markers("parametrize"))
    by_dtype = "dtype" in asked and not own_dtypes
    if "xp" not in asked:
        if by_dtype:
            metafunc.parametrize("dtype", Backend.NUMPY.float_dtypes)
        return
    chosen = metafunc.config.stash[SELECTED_BACKENDS]
    if by_dtype:
        params = [pytest.param(b, d, id=f"{b}-{d}") for b in chosen for d in b.float_dtypes]
        metafunc.parametrize(("xp", "dtype"), params, indirect=["xp"])
    else:
        metafunc.parametrize("xp", [pytest.param(b, id=str(b)) for b in chosen], indirect=True)


def excluded_backend(item: pytest.Item) -> bool:
    """True if a not_on marker of the test names its backend."""
    backend = getattr(item, "callspec", None) and item.callspec.params.get("xp")
    known = {name for b in Backend for name in (b.value, b.library)}
    names = set()
    for mark in item.iter_markers("not_on"):
        if not mark.args or set(mark.kwargs) != {"reason"} or not known.issuperset(mark.args):
            raise pytest.UsageError(f"{item.nodeid}: expected known names and reason=: {mark}")
        names.update(mark.args)
    return bool(backend) and not names.isdisjoint((backend.value, backend.library))


def excluded_parameters(item: pytest.Item) -> bool:
    """True if the predicate of an applies_if marker is false for the test's parameters."""
    for mark in item.iter_markers("applies_if"):
        if len(mark.args) != 1 or set(mark.kwargs) != {"reason"}:
            raise pytest.UsageError(f"{item.nodeid}: expected a predicate and reason=: {mark}")
        parameters = item.callspec.params
        if not mark.args[0](**{name: parameters[name] for name in inspect.signature(mark.args[0]).parameters}):
            return True
    return False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each test runs in the session of the library it needs; one that needs none, in NumPy's."""
    libraries = {backend.library for backend in config.stash[SELECTED_BACKENDS]}
    by_name = bool(config.getoption("backend"))
    not_installed = config.stash.setdefault(NOT_INSTALLED, Counter())
    selected, deselected = [], []
    for item in items:
        needs = [name for mark in item.iter_markers("needs") for name in mark.args]
        sessions = {b.library for b in Backend}.intersection(needs) or {"numpy"}
        applies = not by_name or "xp" in getattr(item, "fixturenames", ()) or sessions <= libraries
        applies = applies and not excluded_backend(item) and not excluded_parameters(item)
        missing = [name for name in needs if not is_installed(name)] if applies else []
        not_installed.update(missing[:1])
        (selected if applies and not missing else deselected).append(item)
    items[:] = selected
    config.hook.pytest_deselected(items=deselected)


@cache
def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its count to the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_installed"] = dict(session.config.stash.get(NOT_INSTALLED, Counter()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Every worker collects all tests: the counts of one are those of all."""
    counts = Counter(getattr(node, "workeroutput", {}).get("not_installed", {}))
    node.config.stash[NOT_INSTALLED] = node.config.stash.get(NOT_INSTALLED, Counter()) | counts


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, count in config.stash.get(NOT_INSTALLED, Counter()).items():
        terminalreporter.write_line(f"{count} tests were deselected: {name} is not installed")


@pytest.fixture(autouse=True)
def float_errors_raise() -> Iterator[None]:
    """A NaN or infinity is reported where it is born, not where it is noticed."""
    with np.errstate(
        over="raise", invalid="warn", divide="raise"
    ):  # a warning is an error; pyproject has one exception
        yield


@pytest.fixture(autouse=True)
def allow_jit_where_numba_is_needed(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that needs numba asks for what it compiles, also where XPRNN_FAST=0 in the environment says no."""
    needed = any("numba" in mark.args for mark in request.node.iter_markers("needs"))
    with pytest.MonkeyPatch.context() as patch:  # its own: a test may undo what it changed
        if needed:
            patch.setattr(kernels_config, "_JIT_DEFAULT", True)
        yield


@pytest.fixture
def xp(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The backend under test, its conversions to the host guarded (backends.py)."""
    with request.param.forbid_host_conversion():
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
