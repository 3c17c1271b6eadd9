"""Rules of the code base, checked on the syntax tree: file and function length, import direction, public names."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.paths import ROOT

PACKAGE = ROOT / "xprnn"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FILES = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 40
MAX_LEVELS = 8

# package or module of xprnn -> packages that it may import; each of them has a row above
IMPORTS = {
    "arrays": "",
    "cells": "arrays",
    "io": "arrays",
    "gradcheck": "arrays",
    "kernels": "arrays cells",
    "training": "arrays kernels",
    "engine": "arrays cells kernels",
    "article": "arrays cells training kernels",
    "layers": "arrays io cells kernels engine",
    "interop": "arrays io cells engine layers",
    "charlm": "arrays io training layers",
    "cli": "arrays io layers interop charlm",
    "__init__": "arrays cells training gradcheck kernels article layers interop",
    "__main__": "cli",
}
OPTIONAL = {"cupy", "h5py", "jax", "keras", "llvmlite", "matplotlib", "numba", "onnx", "onnxruntime", "torch"}
TOP_LEVEL = {"LICENSE", "README.md", "benchmarks", "noxfile.py", "pyproject.toml", "tests", "xprnn"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path):
    return str(path.relative_to(ROOT))


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), relative(path))


def package_of(path):
    """Return the name of the package or module directly below xprnn."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_packages(path) -> Iterator[tuple[int, str]]:
    """Yield (line, package) for every import from xprnn, at module level or inside a function."""
    parents = ["xprnn", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = parents[: len(parents) + 1 - node.level] if node.level else []
            base = ".".join([*prefix, *([node.module] if node.module else [])])
            modules = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for names in (module.split(".") for module in modules):
            if names[0] == "xprnn":
                yield node.lineno, names[1] if len(names) > 1 and names[1] in IMPORTS else "__init__"


def body_lines(function: Function) -> int:
    """Return the number of lines of a function without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def level(package):
    """Return 1 for a package that imports no other, else 1 more than the highest level among its imports."""
    return 1 + max((level(name) for name in IMPORTS[package].split()), default=0)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_file_length(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{relative(path)} has {lines} lines, at most {MAX_FILE_LINES}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_function_length(path):
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, Function)]
    too_long = {f"{f.name} (line {f.lineno})": body_lines(f) for f in functions if body_lines(f) > MAX_FUNCTION_LINES}
    assert not too_long, f"{relative(path)}: a function may have {MAX_FUNCTION_LINES} lines: {too_long}"


def test_allowed_imports_are_acyclic_and_have_few_levels():
    listed: set[str] = set()
    for package, allowed in IMPORTS.items():
        assert set(allowed.split()) <= listed, f"{package} may import only packages that have a row above it"
        listed.add(package)
    assert max(map(level, IMPORTS)) <= MAX_LEVELS


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_only_allowed_packages(path):
    package = package_of(path)
    assert package in IMPORTS, f"{relative(path)}: a new package needs a row in IMPORTS (tests/test_architecture.py)"
    allowed = {package, *IMPORTS[package].split()} | ({"__init__"} if package in ("cli", "__main__") else set())
    forbidden = [f"line {line}: {other}" for line, other in imported_packages(path) if other not in allowed]
    assert not forbidden, f"{relative(path)} may import from {sorted(allowed)}, not {forbidden}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_public_names_have_docstrings(path):
    module = parse(path)
    kinds = (*Function.__args__, ast.ClassDef)
    public = [node for node in module.body if isinstance(node, kinds) and not node.name.startswith("_")]
    missing = [node.name for node in public if not ast.get_docstring(node)]
    assert ast.get_docstring(module), f"{relative(path)} has no module docstring"
    assert not missing, f"{relative(path)}: no docstring: {missing}"


def test_every_package_has_a_docstring():
    folders = {path.parent for path in SOURCES}
    missing = [relative(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()]
    assert not missing, f"no __init__.py: {missing}"


def test_import_of_xprnn_loads_no_optional_library():
    code = "import sys; before = set(sys.modules); import xprnn; print(*set(sys.modules) - before)"
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    loaded = {module.partition(".")[0] for module in run.stdout.split()}
    assert "xprnn" in loaded
    assert not loaded & OPTIONAL
    # The NumPy namespace of array-api-compat imports all of NumPy, which takes as long as importing xprnn. It must be
    # created at the first call, not at import.
    assert "numpy.f2py" not in run.stdout.split()


def test_all_lists_exactly_the_public_names():
    import xprnn

    imported = {
        alias.asname or alias.name
        for node in ast.walk(parse(PACKAGE / "__init__.py"))  # includes TYPE_CHECKING, which lists lazy imports
        if isinstance(node, ast.ImportFrom) and node.module not in ("__future__", "importlib", "typing")
        for alias in node.names
    }
    public = {name for name in imported if not name.startswith("_")}
    assert len(set(xprnn.__all__)) == len(xprnn.__all__), "a name is listed twice"
    assert set(xprnn.__all__) - {"__version__"} == public
    assert all(hasattr(xprnn, name) for name in xprnn.__all__)


def test_top_level_has_only_the_listed_entries():
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "ls-files"]
    try:
        run = subprocess.run(git, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if run.returncode or not run.stdout:
        pytest.skip("not a git checkout")
    entries = {line.partition("/")[0] for line in run.stdout.splitlines()}
    unexpected = {entry for entry in entries - TOP_LEVEL if not entry.startswith(".")}
    assert not unexpected, f"the top level is {sorted(TOP_LEVEL)} and dotfiles"


def test_body_lines_excludes_the_docstring():
    source = "def f():\n    '''Doc\n    string.'''\n" + "    x = 1\n" * MAX_FUNCTION_LINES
    function = ast.parse(source).body[0]
    assert body_lines(function) == MAX_FUNCTION_LINES + 1


def test_imported_packages_recognizes_every_import_form(monkeypatch):
    monkeypatch.setattr(
        f"{__name__}.parse",
        lambda _: ast.parse(
            "import numpy\nfrom xprnn import arrays\ndef f():\n    from .arrays import x\n"
            "    from ..arrays import y\n    import xprnn.arrays\n    from xprnn import __version__\n"
        ),
    )
    path = PACKAGE / "kernels" / "numpy.py"
    found = dict(imported_packages(path))
    assert found == {2: "arrays", 4: "kernels", 5: "arrays", 6: "arrays", 7: "__init__"}
