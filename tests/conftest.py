"""Fixtures, markers and the selection of backends: `pytest --backend numpy --backend strict:device1`.

A test with the argument `xp` runs once on each selected backend. With `dtype` too, it runs on each real dtype of the
backend. A test with neither runs in the session of NumPy. Markers:

    @pytest.mark.not_on("jax", reason="...")                     # does not apply to these backends or libraries
    @pytest.mark.applies_if(lambda xp, name: ..., reason="...")  # applies only to parameters for which this is true
    @pytest.mark.needs("torch")                                  # runs only if these modules are installed

A test that does not apply is deselected at collection, so that a skip always names something that a user can install
or change. The summary counts the tests that were deselected because a module is not installed.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.backends import Backend, generator_for_test, select_backends
from support.tiny_text import TEXT

from xprnn.kernels import config as kernels_config

SELECTED_BACKENDS = pytest.StashKey[list[Backend]]()
NOT_INSTALLED = pytest.StashKey[Counter[str]]()
MARKERS = (
    "not_on(*names, reason): the test does not apply to these backends or libraries",
    "applies_if(predicate, reason): the test applies if predicate(parameters named by its arguments) is true",
    "needs(*modules): run only if these modules are installed and, if they are backends, selected",
    "regression: guards against a bug that was found in use",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    names = ", ".join(str(backend) for backend in Backend)
    parser.addoption(
        "--backend",
        action="append",
        default=[],
        metavar="NAME",
        help=f"run on this backend only (repeatable; default: all installed ones): {names}",
    )
    parser.addoption(
        "--needs",
        action="append",
        default=[],
        metavar="MODULE",
        help="run only tests that need this module (repeatable): the others run in the session of their backend",
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    try:
        config.stash[SELECTED_BACKENDS] = select_backends(config.getoption("backend"))
        if Backend.CUPY_FAKE in config.stash[SELECTED_BACKENDS]:
            _ = Backend.CUPY_FAKE.xp  # installs the fake module, so that `import cupy` finds it
    except LookupError as error:
        raise pytest.UsageError(f"--backend: {error}") from None


def pytest_report_header(config: pytest.Config) -> str:
    return "backends: " + ", ".join(str(backend) for backend in config.stash[SELECTED_BACKENDS])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    arguments = metafunc.fixturenames
    parametrizes_dtype = any("dtype" in m.args[0] for m in metafunc.definition.iter_markers("parametrize"))
    by_dtype = "dtype" in arguments and not parametrizes_dtype
    if "xp" not in arguments:
        if by_dtype:
            metafunc.parametrize("dtype", Backend.NUMPY.float_dtypes)
        return
    backends = metafunc.config.stash[SELECTED_BACKENDS]
    if by_dtype:
        params = [pytest.param(b, d, id=f"{b}-{d}") for b in backends for d in b.float_dtypes]
        metafunc.parametrize(("xp", "dtype"), params, indirect=["xp"])
    else:
        metafunc.parametrize("xp", [pytest.param(b, id=str(b)) for b in backends], indirect=True)


def excluded_backend(item: pytest.Item) -> bool:
    """Return True if a not_on marker of the test names its backend."""
    backend = getattr(item, "callspec", None) and item.callspec.params.get("xp")
    known = {name for b in Backend for name in (b.value, b.library)}
    names = set()
    for mark in item.iter_markers("not_on"):
        if not mark.args or set(mark.kwargs) != {"reason"} or not known.issuperset(mark.args):
            raise pytest.UsageError(f"{item.nodeid}: expected known names and reason=: {mark}")
        names.update(mark.args)
    return bool(backend) and not names.isdisjoint((backend.value, backend.library))


def excluded_parameters(item: pytest.Item) -> bool:
    """Return True if the predicate of an applies_if marker is false for the parameters of the test."""
    for mark in item.iter_markers("applies_if"):
        if len(mark.args) != 1 or set(mark.kwargs) != {"reason"}:
            raise pytest.UsageError(f"{item.nodeid}: expected a predicate and reason=: {mark}")
        parameters = item.callspec.params
        if not mark.args[0](**{name: parameters[name] for name in inspect.signature(mark.args[0]).parameters}):
            return True
    return False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that do not apply, need a missing module, or belong to the session of another library.

    With --backend, a test without `xp` runs in the sessions of the libraries it needs, or of NumPy if it needs none.
    """
    libraries = {backend.library for backend in config.stash[SELECTED_BACKENDS]}
    backends_named, needs_named = bool(config.getoption("backend")), set(config.getoption("needs"))
    not_installed = config.stash.setdefault(NOT_INSTALLED, Counter())
    selected, deselected = [], []
    for item in items:
        needs = [name for mark in item.iter_markers("needs") for name in mark.args]
        sessions = {b.library for b in Backend}.intersection(needs) or {"numpy"}
        applies = not backends_named or "xp" in getattr(item, "fixturenames", ()) or sessions <= libraries
        applies = applies and (not needs_named or not needs_named.isdisjoint(needs))
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
    """Pass the counts of a pytest-xdist worker to the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_installed"] = dict(session.config.stash.get(NOT_INSTALLED, Counter()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take the maximum of the workers' counts, not the sum, because every worker collects all tests."""
    counts = Counter(getattr(node, "workeroutput", {}).get("not_installed", {}))
    node.config.stash[NOT_INSTALLED] = node.config.stash.get(NOT_INSTALLED, Counter()) | counts


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, count in config.stash.get(NOT_INSTALLED, Counter()).items():
        terminalreporter.write_line(f"{count} tests were deselected: {name} is not installed")


@pytest.fixture(autouse=True)
def float_errors_raise() -> Iterator[None]:
    """Raise where a NaN or infinity first appears; warnings are errors, with one exception in pyproject.toml."""
    with np.errstate(over="raise", invalid="warn", divide="raise"):
        yield


@pytest.fixture(autouse=True)
def allow_jit_where_numba_is_needed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Allow compiled kernels in tests that need numba, even if the environment has XPRNN_FAST=0."""
    needs_numba = any("numba" in mark.args for mark in request.node.iter_markers("needs"))
    with pytest.MonkeyPatch.context() as patch:  # not the fixture `monkeypatch`, which a test may undo
        if needs_numba:
            patch.setattr(kernels_config, "_JIT_DEFAULT", True)
        yield


@pytest.fixture
def xp(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The backend under test; converting its arrays to the host raises (support/backends.py)."""
    with request.param.forbid_host_conversion():
        yield request.param


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator seeded from the test's node id without parameters, so that every backend gets the same numbers."""
    return generator_for_test(request.node.nodeid)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """The path of a small text file to train on."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)
