"""Prints a table of the features of xprnn, the article's code, torch, Keras, Chainer and Thinc.

    python -m benchmarks.features.table                       every library that this Python has
    python -m benchmarks.features.table --peer thinc=PYTHON   a library that another Python has; can be repeated, also
                                                              for a second column of the same library
    python -m benchmarks.features.table --install             builds an environment for each by pip, and removes it

Every answer comes from running the library while the table is printed. Each library runs in its own process; a crash
costs one answer. `questions` describes the rows. Errors are relative to the largest entry of an array.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.features.questions import ADAPTERS, QUESTIONS, answer, describe_peer
from benchmarks.harness.options import argument_parser
from benchmarks.harness.peers import PEERS
from benchmarks.harness.report import Report, markdown_table, write_results
from benchmarks.harness.worker_pool import WorkerError, WorkerPool, run_process

TIMEOUT_S = 600  # for one answer
ENVIRONMENT = {
    "JAX_ENABLE_X64": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONWARNINGS": "ignore",
}


def keras_backend(python: str) -> str:
    """Choose the back end of Keras: JAX if that Python has it, else torch."""
    if python == sys.executable:
        return "jax" if importlib.util.find_spec("jax") else "torch"
    check = "import importlib.util as u; print('jax' if u.find_spec('jax') else 'torch')"
    return "".join(run_process([python, "-c", check]).lines)


def query_peer(name: str, python: str) -> dict[str, Any]:
    """Ask one library all questions in worker processes of its Python.

    Returns:
        {"title": heading, "problem": what prevents all answers or "", "rows": question -> answer}.
    """
    column: dict[str, Any] = {"title": PEERS[name].title, "problem": "", "rows": {}}
    try:
        chooses_backend = name == "keras" and "KERAS_BACKEND" not in os.environ
        environment = ENVIRONMENT | ({"KERAS_BACKEND": keras_backend(python)} if chooses_backend else {})
        with WorkerPool() as pool:
            options: dict[str, Any] = {"python": python, "environment": environment}
            worker = pool.worker(name, **options)
            column |= worker.call(describe_peer, timeout_s=TIMEOUT_S, name=name)
            for question in () if column["problem"] else QUESTIONS:
                try:
                    worker = pool.worker(name, **options)  # a new process, if the last question ended it
                    arguments = {"peer_name": name, "question": question}
                    column["rows"][question] = worker.call(answer, timeout_s=TIMEOUT_S, **arguments)
                except WorkerError as error:
                    column["rows"][question] = f"no ({error})"
    except (OSError, WorkerError) as error:
        column["problem"] = f"not run ({error})"
    return column


def build_environments(names: list[str], folder: Path) -> list[tuple[str, str]]:
    """Build a virtual environment for each tuple of requirements. Return (peer, its Python) pairs."""
    built = []
    for name in names:
        for k, requirements in enumerate(PEERS[name].requirements):
            environment = folder / f"{name}{k}"
            print(f"installing {' '.join(requirements)}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
            candidates = (environment / "bin" / "python", environment / "Scripts" / "python.exe")
            python = str(next(path for path in candidates if path.exists()))
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            build_requirements = PEERS[name].build_requirements
            commands = [[*pip, *build_requirements]] if build_requirements else []
            isolation = ["--no-build-isolation"] if build_requirements else []
            for command in [*commands, [*pip, *isolation, *requirements]]:
                if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
                    print(f"pip could not install {' '.join(requirements)}", file=sys.stderr)
            built.append((name, python))
    return built


def cell_text(column: dict[str, Any], question: str) -> str:
    """Return the answer, or the problem. The reason of a failed import is shown only in the first row."""
    text = str(column["rows"].get(question) or column["problem"])
    return text.partition(":")[0] if question != "imports" and text.startswith("import fails") else text


def short_answer(text: str) -> str:
    """Shorten an answer to its first word, or to the error of the gradients."""
    wrong = "wrong" in text or "another" in text
    figures = re.findall(r"gradients (\S+?)[,;)]*(?:\s|$)", text)
    if figures and (wrong or text.startswith("outputs")):
        return f"wrong by {figures[0]}" if wrong else f"right to {figures[0]}"
    word = text.split(" ", 1)[0].rstrip(":,")
    return "import fails" if word == "import" else word if word in ("yes", "no") else text


def report(columns: list[dict[str, Any]], short: bool = False) -> list[str]:
    """Format the table."""
    table = []
    for question, title in QUESTIONS.items():
        answers = [cell_text(column, question) for column in columns]
        table.append([title, *(short_answer(text) if short else text for text in answers)])
    return markdown_table(["", *(column["title"] for column in columns)], table)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `args.peer` is then a list of (peer, its Python or "")."""
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--peer", action="append", default=[], metavar="NAME[=PYTHON]", help="default: all, in this Python")
    add("--install", action="store_true", help="build environments for the libraries without PYTHON")
    add("--short", action="store_true", help="answers without reasons")
    args = parser.parse_args(argv)
    args.peer = [tuple(peer.partition("=")[::2]) for peer in args.peer]
    if unknown := {name for name, _ in args.peer} - set(ADAPTERS):
        parser.error(f"--peer: expected {', '.join(ADAPTERS)}, found {', '.join(sorted(unknown))}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Ask all libraries, print the table."""
    args = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        peers = [(name, python) for name, python in args.peer if python]
        if args.install:
            names = [name for name in ADAPTERS if PEERS[name].requirements and name not in dict(peers)]
            peers += build_environments(names, Path(folder))
        peers += [(name, sys.executable) for name in ADAPTERS if name not in dict(peers)]
        columns = [query_peer(*peer) for peer in sorted(peers, key=lambda peer: list(ADAPTERS).index(peer[0]))]
    return write_results(
        Report({"rows": QUESTIONS, "columns": columns}, report(columns, args.short)), json_file=args.json
    )


if __name__ == "__main__":
    sys.exit(main())
