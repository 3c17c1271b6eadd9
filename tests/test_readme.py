"""The Python blocks of the README files run, and the test files that tests/README.md names exist.

The blocks of one file run in order in one namespace, as a reader would type them. A block directly after the line
`<!-- not run: reason -->` is left out.
"""

from __future__ import annotations

import re

import pytest
from support.paths import ROOT

READMES = (
    "README.md",
    "benchmarks/README.md",
    "tests/README.md",
    "xprnn/kernels/README.md",
    "xprnn/interop/README.md",
    "xprnn/cli/README.md",
)
BLOCK = re.compile(r"^(<!-- not run: \S[^\n]*-->\n+)?```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
TEST_FILE = re.compile(r"`((?:\w+/)*test_\w+\.py)`")


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Return (number of lines before it, source) of each block to run."""
    matches = [match for match in BLOCK.finditer(text) if not match[1]]
    return [(text.count("\n", 0, match.start(2)), match[2]) for match in matches]


@pytest.mark.parametrize("name", [name for name in READMES if (ROOT / name).is_file()])
def test_python_blocks_run(name, tmp_path, monkeypatch):
    path = ROOT / name
    (tmp_path / "tests").symlink_to(ROOT / "tests")  # examples read recorded files
    monkeypatch.chdir(tmp_path)  # examples may save files
    namespace = {"__name__": "readme"}
    for line, source in python_blocks(path.read_text(encoding="utf-8")):
        # The blank lines give a traceback the line numbers of the README.
        exec(compile("\n" * line + source, str(path), "exec"), namespace)


def test_main_readme_has_blocks_to_run():
    assert python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))


def test_marked_blocks_are_left_out():
    shown, hidden = "```python\nx = 1\n```\n", "<!-- not run: GPU -->\n```python\ny\n```\n"
    text = f"a\n{shown}{hidden}```sh\nz\n```\n{shown}{hidden}"
    assert python_blocks(text) == [(2, "x = 1\n"), (12, "x = 1\n")]


def test_named_test_files_exist():
    names = TEST_FILE.findall((ROOT / "tests" / "README.md").read_text(encoding="utf-8"))
    assert len(names) > 20
    missing = [name for name in names if not (ROOT / "tests" / name).is_file()]
    assert not missing, f"tests/README.md names files that do not exist: {missing}"
