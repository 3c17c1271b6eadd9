"""The README's Python blocks run, in order, in one namespace, as a reader would type them.

A block right after `<!-- not run: reason -->` is left out.
"""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^(<!-- not run: \S[^\n]*-->\n+)?```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """(line number of its first line, source) of each block to run."""
    found = [match for match in BLOCK.finditer(text) if not match[1]]
    return [(text.count("\n", 0, match.start(2)), match[2]) for match in found]


def test_readme(tmp_path, monkeypatch):
    found = blocks(README.read_text(encoding="utf-8"))
    assert found, "README.md has no ```python block to run"
    (tmp_path / "tests").symlink_to(Path(__file__).parent)  # the recorded files that examples read
    monkeypatch.chdir(tmp_path)  # an example may save a file
    namespace = {"__name__": "readme"}
    for line, source in found:
        # Blank lines in front give a traceback the README's own line numbers.
        exec(compile("\n" * line + source, str(README), "exec"), namespace)


def test_marked_blocks_are_left_out():
    shown, hidden = "```python\nx = 1\n```\n", "<!-- not run: GPU -->\n```python\ny\n```\n"
    text = f"a\n{shown}{hidden}```sh\nz\n```\n{shown}{hidden}"
    assert blocks(text) == [(2, "x = 1\n"), (12, "x = 1\n")]


def test_the_tests_it_names_exist():
    here = Path(__file__).parent
    named = re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(test_\w+))?`", README.read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, name in named:
        source = (here / file).read_text(encoding="utf-8")
        assert f"def {name or 'test_'}" in source, f"README.md names {file}::{name}"
