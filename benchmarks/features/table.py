"""What xprnn, the article's code, torch, Keras, Chainer and Thinc can do: a table in which every cell was just run.

    python benchmarks/features/table.py                       every peer that this Python has
    python benchmarks/features/table.py --peer thinc=PYTHON   a peer that another Python has; can be repeated, also for a
                                                       second column of the same peer
    python benchmarks/features/table.py --install             builds an environment for each, by pip, and removes it

Each peer runs in a process of its own. `compare_rows.py` says what each row asks. Errors are
relative to the largest entry of an array.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

TITLES = {"xprnn": "xprnn", "article": "the article's code", "torch": "torch", "keras": "Keras"}
TITLES |= {"chainer": "Chainer", "thinc": "Thinc"}
ADAPTER_MODULES = {"torch": "compare_frameworks", "keras": "compare_frameworks", "chainer": "compare_chainer"}
REQUIREMENTS = {  # what --install asks pip for: one environment for each line
    "torch": [["torch==2.13.0", "numpy"]],
    "keras": [["keras==3.15.1", "jax"]],
    # Chainer's set-up script needs pkg_resources, and Chainer an older NumPy than xprnn: both are shown.
    "chainer": [["chainer==7.8.1", "numpy>=2"], ["chainer==7.8.1", "numpy==1.23.5"]],
    "thinc": [["thinc==9.1.1"]],
}
BUILD_REQUIREMENTS = {"chainer": ["setuptools<81", "wheel"]}
TIMEOUT_S = 600  # seconds for one peer


def emit_json(**what: Any) -> None:
    """One line for the parent."""
    print(json.dumps(what), flush=True)


def answer_questions(name: str) -> None:
    """The child: a line for each row, so that a crash costs only the rows after it."""
    if name not in ("xprnn", "article") and importlib.util.find_spec(name) is None:
        emit_json(title=TITLES[name], every="not installed")
        return
    warnings.simplefilter("ignore")
    import numpy as np

    np.seterr(all="ignore")  # the article's 0/0 is reported in its row
    from benchmarks.features.questions import QUESTIONS, answer

    module = __import__(ADAPTER_MODULES.get(name, "compare_arrays"))
    try:
        peer = getattr(module, name.capitalize())()
    except Exception as error:  # whatever stops it
        line = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        from importlib import metadata

        emit_json(
            title=f"{TITLES[name]} {metadata.version(name)} (NumPy {np.__version__})", every=f"import fails: {line}"
        )
        return
    emit_json(title=f"{TITLES[name]} {peer.version}".strip())
    for row in QUESTIONS:
        emit_json(row=row, text=answer(peer, row))


def query_peer(name: str, python: str) -> dict[str, Any]:
    """Run one peer's process; {"title": ..., "rows": {row: text}}."""
    env = dict(os.environ) | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    env |= {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONDONTWRITEBYTECODE": "1"}
    if name == "keras" and "KERAS_BACKEND" not in env:
        check = "import importlib.util as u; print('jax' if u.find_spec('jax') else 'torch')"
        told = subprocess.run([python, "-c", check], capture_output=True, text=True, check=False).stdout
        env["KERAS_BACKEND"] = told.strip()
    command = [python, "-W", "ignore", __file__, "--probe", name]
    found: dict[str, Any] = {"title": TITLES[name], "rows": {}, "every": ""}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return found | {"every": f"not run ({type(error).__name__})"}
    for line in done.stdout.splitlines():
        if not line.startswith("{"):
            continue
        fact = json.loads(line)
        if "row" in fact:
            found["rows"][fact["row"]] = fact["text"]
        else:
            found |= fact
    if done.returncode:
        found["every"] = f"not run (the process ended with {done.returncode})"
        print(f"{name}: {done.stderr.strip()[-500:]}", file=sys.stderr)
    return found


def build_environments(names: list[str], home: Path) -> list[tuple[str, str]]:
    """(peer, its Python) for each environment of PINS that pip could build."""
    built = []
    for name in names:
        for k, packages in enumerate(REQUIREMENTS[name]):
            place = home / f"{name}{k}"
            print(f"installing {' '.join(packages)}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
            python = next(p for p in (place / "bin" / "python", place / "Scripts" / "python.exe") if p.exists())
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            more = ["--no-build-isolation"] if name in BUILD_REQUIREMENTS else []
            steps = [[*pip, *BUILD_REQUIREMENTS[name]]] if name in BUILD_REQUIREMENTS else []
            for command in [*steps, [*pip, *more, *packages]]:
                if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
                    print(f"pip could not install {' '.join(packages)}", file=sys.stderr)
            built.append((name, str(python)))
    return built


def cell_text(column: dict[str, Any], row: str) -> str:
    """What stops an import is said once."""
    text = column["rows"].get(row) or column["every"]
    return text.partition(":")[0] if row != "imports" and text.startswith("import fails") else text


def short_answer(text: str) -> str:
    """A cell for a narrow table: the answer without its reason; of figures, that of the gradients."""
    wrong = "wrong" in text or "another" in text
    figures = re.findall(r"gradients (\S+?)[,;)]*(?:\s|$)", text)
    if figures and (wrong or text.startswith("outputs")):
        return f"wrong by {figures[0]}" if wrong else f"right to {figures[0]}"
    word = text.split(" ", 1)[0].rstrip(":,")
    return "import fails" if word == "import" else word if word in ("yes", "no") else text


def markdown_table(columns: list[dict[str, Any]], titles: dict[str, str]) -> str:
    """The table."""
    lines = [["", *(c["title"] for c in columns)], ["---"] * (len(columns) + 1)]
    lines += [[title, *(cell_text(c, row) for c in columns)] for row, title in titles.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME[=PYTHON]", help="default: all, this Python"
    )
    parser.add_argument("--install", action="store_true", help="temporary environments for the peers without PYTHON")
    parser.add_argument("--short", action="store_true", help="answers without reasons")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table's cells")
    parser.add_argument("--probe", choices=TITLES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Ask everyone, print the table."""
    args = parse_arguments()
    if args.probe:
        answer_questions(args.probe)
        return
    given = [tuple(peer.partition("=")[::2]) for peer in args.peer]
    if unknown := {name for name, _ in given} - set(TITLES):
        sys.exit(f"compare.py: --peer must be one of {', '.join(TITLES)}, found {', '.join(sorted(unknown))}")
    from benchmarks.features.questions import QUESTIONS

    with tempfile.TemporaryDirectory() as home:
        elsewhere = [(name, python) for name, python in given if python]
        if args.install:
            elsewhere += build_environments([n for n in REQUIREMENTS if n not in dict(elsewhere)], Path(home))
        everyone = elsewhere + [(name, sys.executable) for name in TITLES if name not in dict(elsewhere)]
        columns = [query_peer(*one) for one in sorted(everyone, key=lambda one: list(TITLES).index(one[0]))]
    short = (
        {c["title"]: {row: short_answer(cell_text(c, row)) for row in QUESTIONS} for c in columns} if args.short else {}
    )
    print(markdown_table([{**c, "rows": short.get(c["title"], c["rows"])} for c in columns], QUESTIONS))
    if args.json:
        args.json.write_text(json.dumps({"rows": QUESTIONS, "columns": columns}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
