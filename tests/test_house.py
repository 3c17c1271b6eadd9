"""The house rules, read off the syntax tree: budgets, import directions, the front door.

A rule that has to bend is bent here, in sight, and nowhere else.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "xprnn"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FILES = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted(ROOT.glob("benchmarks/*.py"))]

FILE_LINES = 300
FUNCTION_LINES = 40

# Each room and the rooms it may import from: only those written above it, so no cycle can form.
ROOMS = {
    "arrays": "",
    "bends": "",
    "activations": "arrays bends",
    "forms": "arrays activations",
    "contract": "arrays",
    "cells": "arrays activations forms contract",
    "scatter": "arrays",
    "sparse": "arrays scatter",
    "affine": "arrays scatter sparse",
    "tape": "arrays cells",
    "kernels": "arrays activations cells scatter affine tape",
    "scan": "arrays cells affine tape kernels",
    "layout": "arrays affine tape",
    "checks": "arrays affine tape layout",
    "chain": "arrays cells affine tape scan",
    "stack": "arrays tape layout checks scan chain",
    "explain": "arrays kernels layout checks",
    "quick": "arrays kernels",
    "quick_pass": "arrays chain kernels layout quick stack tape",
    "quick_recurrent": "arrays kernels layout quick quick_pass scan",
    "around": "arrays checks stack",
    "initial": "arrays",
    "recurrent": "arrays cells checks forms initial layout quick quick_recurrent stack explain",
    "layers": "arrays activations forms cells recurrent",
    "dense": "arrays affine checks quick scatter sparse stack",
    "parts": "arrays activations forms tape checks stack",
    "masks": "arrays checks stack parts",
    "widths": "arrays around dense recurrent layers parts masks",
    "model": "arrays tape forms checks quick stack around dense recurrent layers parts masks widths",
    "losses": "arrays affine",
    "bptt": "arrays affine",
    "gradcheck": "arrays sparse",
    "clipping": "arrays sparse",
    "optim": "arrays clipping sparse",
    "article": "arrays cells affine tape scan losses",
    "archive": "arrays",
    "text": "arrays archive",
    "sample": "arrays around text",
    "store": "arrays model archive",
    "interop": "arrays bends activations forms around cells checks recurrent layers dense parts masks model archive "
    "store",
    "crew": "arrays losses",
    "train": "arrays around layers dense model losses optim text sample archive crew",
    "plots": "arrays archive",
    "report": "arrays around text sample train plots",
    "run": "arrays around archive text store crew train report plots",
    "bench": "arrays layers archive article",
    "convert": "arrays archive store interop",
    "cli": "arrays convert text sample store train run bench",
    "__main__": "cli",
}
OPTIONAL = {"cupy", "h5py", "jax", "keras", "llvmlite", "matplotlib", "numba", "onnx", "onnxruntime", "torch"}
TOP_LEVEL = {
    "LICENSE",
    "README.md",
    "benchmarks",
    "noxfile.py",
    "pyproject.toml",
    "tests",
    "xprnn",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), named(path))


def room_of(path: Path) -> str:
    """The first name below xprnn; "xprnn" for the front door itself."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "xprnn" if first == "__init__" else first


def rooms_imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import from this package, wherever in the file it stands."""
    inside = ["xprnn", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            modules = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for parts in (module.split(".") for module in modules):
            if parts[0] == "xprnn":
                known = len(parts) > 1 and is_room(parts[1])
                yield node.lineno, parts[1] if known else "xprnn"


def is_room(name: str) -> bool:
    return (PACKAGE / f"{name}.py").exists() or (PACKAGE / name / "__init__.py").exists()


def functions(path: Path) -> list[Function]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, Function)]


def body_lines(function: Function) -> int:
    """From `def` to the last line, the docstring not counted: explaining costs nothing."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


@pytest.mark.parametrize("path", FILES, ids=named)
def test_file_budget(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_LINES, f"{named(path)} has {lines} lines, at most {FILE_LINES}: split it"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_function_budget(path):
    long = {f"{f.name} (line {f.lineno})": body_lines(f) for f in functions(path)}
    long = {name: lines for name, lines in long.items() if lines > FUNCTION_LINES}
    assert not long, f"{named(path)}: at most {FUNCTION_LINES} lines a function: {long}"


def test_rooms_have_an_order():
    above: set[str] = set()
    for room, allowed in ROOMS.items():
        assert set(allowed.split()) <= above, f"{room} may import only from rooms above it"
        above.add(room)


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_import_direction(path):
    room = room_of(path)
    if room == "xprnn":
        return  # the front door opens on every room
    assert room in ROOMS, f"{named(path)}: a new room needs a line in ROOMS (tests/test_house.py)"
    allowed = {room, *ROOMS[room].split()}
    wrong = [f"line {line}: {other}" for line, other in rooms_imported(path) if other not in allowed]
    assert not wrong, f"{named(path)} may import from {sorted(allowed)}, not {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_public_names_have_docstrings(path):
    module = tree(path)
    kinds = (*Function.__args__, ast.ClassDef)
    public = [n for n in module.body if isinstance(n, kinds) and not n.name.startswith("_")]
    bare = [node.name for node in public if not ast.get_docstring(node)]
    assert ast.get_docstring(module), f"{named(path)} does not say what is in this room"
    assert not bare, f"{named(path)}: no docstring: {bare}"


def test_the_front_door_imports_nothing_optional():
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
    # array-api-compat's namespace imports all of NumPy, which takes as long as xprnn: the first call asks for it.
    assert "numpy.f2py" not in run.stdout.split()


def test_all_is_what_is_exported():
    import xprnn

    door = tree(PACKAGE / "__init__.py")
    imported = {
        alias.asname or alias.name
        for node in ast.walk(door)  # also what is imported when it is first asked for
        if isinstance(node, ast.ImportFrom) and node.module not in ("__future__", "importlib", "typing")
        for alias in node.names
    }
    public = {name for name in imported if not name.startswith("_")}
    assert len(set(xprnn.__all__)) == len(xprnn.__all__), "a name is there twice"
    assert set(xprnn.__all__) - {"__version__"} == public
    assert all(hasattr(xprnn, name) for name in xprnn.__all__)


def test_top_level_is_fixed():
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "ls-files"]
    try:
        run = subprocess.run(git, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if run.returncode or not run.stdout:
        pytest.skip("not a git checkout")
    entries = {line.partition("/")[0] for line in run.stdout.splitlines()}
    strangers = {entry for entry in entries - TOP_LEVEL if not entry.startswith(".")}
    assert not strangers, f"the top level is {sorted(TOP_LEVEL)} and dotfiles"


def test_the_budget_can_fail(tmp_path):
    source = "def f():\n    '''Doc\n    string.'''\n" + "    x = 1\n" * FUNCTION_LINES
    function = ast.parse(source).body[0]
    assert body_lines(function) == FUNCTION_LINES + 1


def test_imports_are_seen_wherever_they_stand(monkeypatch):
    monkeypatch.setattr(
        f"{__name__}.tree",
        lambda _: ast.parse(
            "import numpy\nfrom xprnn import arrays\ndef f():\n    from .arrays import x\n"
            "    from ..arrays import y\n    import xprnn.arrays\n    from xprnn import __version__\n"
        ),
    )
    path = PACKAGE / "kernels" / "numpy.py"
    found = dict(rooms_imported(path))
    assert found == {2: "arrays", 4: "kernels", 5: "arrays", 6: "arrays", 7: "xprnn"}
