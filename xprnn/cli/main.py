"""The command line: `python -m xprnn train | sample | convert | info | run | bench`.

A command is a row of `COMMANDS`: its help, examples, the function that declares its arguments, and the one that runs
it and returns the exit code. Whatever it needs beyond the standard library it imports when it runs. An `InputError`
becomes one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from xprnn.arrays.namespace import InputError
from xprnn.cli.model_arguments import MODEL_COMMANDS


class _Parser(argparse.ArgumentParser):
    """argparse, with one line for an error instead of the usage and a line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _bounded_number(kind: type[int | float], least: float, open_below: bool = False) -> Callable[[str], Any]:
    def convert(text: str) -> int | float:
        wanted = f"{'a whole number' if kind is int else 'a number'} {'above' if open_below else 'of at least'} {least}"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {wanted}, found {text!r}") from None
        if not (value > least if open_below else value >= least) or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"expected {wanted}, found {text}")
        return value

    return convert


def _path_arg(text: str) -> str:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a directory, found {text!r}")
    return text


_positive_int, _nonnegative_int = _bounded_number(int, 1), _bounded_number(int, 0)
_positive_float, _nonnegative_float = _bounded_number(float, 0, open_below=True), _bounded_number(float, 0)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "file",
        nargs="?",
        metavar="FILE",
        help="a UTF-8 text (default: the Python manual's topics in the standard library)",
    )
    where = "where to write; no run may be there yet (default: xprnn-run, or the first free xprnn-run-2, ...)"
    add("--out", type=_path_arg, metavar="DIR", help=where)
    add(
        "--resume",
        type=_path_arg,
        metavar="DIR",
        help="go on with the run in DIR, to the last bit as if it had never stopped",
    )
    add("--backend", choices=("auto", "numpy", "cupy"), help="array library (default: auto, CuPy where a GPU is)")
    add("--cell", choices=("elman", "lstm", "gru"), help="recurrent cell (default: elman)")
    add("--hidden", type=_positive_int, metavar="H", help="hidden units of a layer (default: 256)")
    add("--layers", type=_positive_int, metavar="L", help="layers (default: 1)")
    both = "two directions: restore each character from both sides, instead of predicting the next (1 layer)"
    add("--bidirectional", action="store_true", default=None, help=both)
    add("--batch", type=_positive_int, metavar="N", help="streams read in parallel (default: 16)")
    add("--window", type=_positive_int, metavar="T", help="steps a gradient reaches back (default: 64)")
    add(
        "--learning-rate",
        type=_positive_float,
        metavar="A",
        help="Adam's, at its highest (default: 1/H, at most 0.004)",
    )
    add("--seed", type=_nonnegative_int, help="of the first parameters and of the final sample (default: 0)")
    add("--threads", type=_positive_int, help="that share a step (default: one a core, and for 8 streams or more)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_positive_int, help="windows to learn from (default: 7000)")
    length.add_argument("--epochs", type=_positive_float, help="times to read the text")
    length.add_argument("--minutes", type=_positive_float, help="time to learn, by the clock")


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dir", metavar="DIR", help="the DIR of a run, or its .safetensors or .npz file")
    add("--prompt", default="", help="text to go on from (default: a new line)")
    add("--length", type=_nonnegative_int, default=1000, help="characters to write (default: 1000)")
    add("--temperature", type=_nonnegative_float, default=0.7, help="0: the likeliest; 1: as learnt (default: 0.7)")
    add("--top-k", type=_positive_int, metavar="K", help="draw among the K likeliest characters only")
    add("--seed", type=_nonnegative_int, default=0, help="of the draws (default: 0)")
    add("--backend", choices=("auto", "numpy", "cupy"), default="numpy", help="array library (default: numpy)")


def _shape_arg(text: str) -> tuple[int, ...]:
    from benchmarks.harness.short import parse_shape

    try:
        return parse_shape(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected D,H,N,T, four positive integers, found {text!r}") from None


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    add, cells, peers = parser.add_argument, ("elman", "lstm", "gru"), ("loop", "torch", "jax", "onnxruntime")
    add("--cell", nargs="+", choices=cells, default=cells, help="recurrent cells (default: all three)")
    add("--rows", nargs="+", type=_shape_arg, metavar="D,H,N,T", help="sizes: inputs, hidden units, batch, steps")
    add("--peers", nargs="*", choices=peers, default=peers, help="whom to try (default: all that are installed)")
    add("--threads", type=_positive_int, default=1, help="of everyone (default: 1)")
    add("--quick", action="store_true", help="fewer rows and rounds, for a first look")
    add("--json", metavar="FILE", help="write all figures here too")


def _train(args: argparse.Namespace) -> int:
    from xprnn.charlm.training_run import train_command

    given = {name: value for name, value in vars(args).items() if value is not None}
    return train_command(given)


def _model_file(place: str) -> Path:
    from xprnn.layers.model_file import MODEL_FILENAME

    path = Path(place)
    if path.is_dir():
        path = path / MODEL_FILENAME
    if not path.exists():
        raise InputError(f"{path}: there is no such model; `python -m xprnn train --out DIR` makes one in DIR")
    return path


def _sample(args: argparse.Namespace) -> int:
    from itertools import islice

    import numpy as np

    from xprnn.charlm.corpus import Vocabulary
    from xprnn.charlm.generate import generate
    from xprnn.charlm.model import backend_array
    from xprnn.layers.model_file import load, load_metadata

    path = _model_file(args.dir)
    characters = load_metadata(path).get("vocabulary")
    if not isinstance(characters, str) or not characters:
        raise InputError(f"{path}: expected a text model, found no vocabulary in its metadata")
    model, params = load(path, like=backend_array(args.backend))
    rng = np.random.default_rng(args.seed)
    how = {"temperature": args.temperature, "top_k": args.top_k, "rng": rng}
    text = generate(model, params, Vocabulary(characters), args.prompt, **how)
    sys.stdout.write(args.prompt)
    for character in islice(text, args.length):
        sys.stdout.write(character)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _bench(args: argparse.Namespace) -> int:
    from benchmarks.harness.short import bench_command

    return bench_command(args.cell, args.rows, args.peers, args.threads, args.quick, args.json)


_EXAMPLES = """
  python -m xprnn train
  python -m xprnn sample xprnn-run --prompt "The "
  python -m xprnn train --help
"""
_TRAIN_EXAMPLES = """
  python -m xprnn train                                    the manual every Python carries, about two minutes
  python -m xprnn train book.txt --cell lstm --out book    another text, another cell
  python -m xprnn train book.txt --layers 2 --minutes 30   by the clock
  python -m xprnn train book.txt --bidirectional           restore characters instead of writing
  python -m xprnn train --resume book --steps 20000        go on, or make a finished run longer
Ctrl-C saves and says how to go on. DIR holds the model, the checkpoint and the learning curve: curve.csv, and curve.png
if the plot extra is there (pip install "xprnn[plot]").
"""
_SAMPLE_EXAMPLES = """
  python -m xprnn sample book --prompt "Once upon"
  python -m xprnn sample book --temperature 0.4 --length 5000 > more.txt
"""
_BENCH_EXAMPLES = """
  python -m xprnn bench                                    about a minute, beside torch, JAX and ONNX Runtime if there
  python -m xprnn bench --quick --cell lstm
  python -m xprnn bench --rows 1,16,1,1000 64,128,32,100 --threads 2 --json figures.json
Everyone's results are compared before the clock starts; the exit code is 1 where they disagree.
"""
COMMANDS = {
    "train": ("learn to write from a text, or to restore one", _TRAIN_EXAMPLES, _train_arguments, _train),
    "sample": ("write text with a trained model", _SAMPLE_EXAMPLES, _sample_arguments, _sample),
    "bench": ("say how fast this is here, beside what else is installed", _BENCH_EXAMPLES, _bench_arguments, _bench),
    **MODEL_COMMANDS,
}


def _build_parser() -> argparse.ArgumentParser:
    about, raw = "Recurrent neural networks on plain arrays.", argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="xprnn", description=about, epilog="examples:" + _EXAMPLES, formatter_class=raw)
    # The front door is open before any of its rooms is; importing it from here would make a circle.
    version = f"%(prog)s {sys.modules['xprnn'].__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="|".join(COMMANDS))
    for name, (text, examples, arguments, _) in COMMANDS.items():
        about, end = text.capitalize() + ".", "examples:" + examples
        arguments(commands.add_parser(name, help=text, description=about, epilog=end, formatter_class=raw))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0, 2 for what the caller can mend, 1 for what the system denies, 130 for Ctrl-C.

    Args:
        argv: the words after the program's name; None: those of this process.
    """
    parser = _build_parser()
    args = parser.parse_args(argv)
    command = args.command
    if command is None:
        parser.print_help(sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without some character of the text shows "?" for it
        sys.stdout.reconfigure(errors="replace")
    del args.command
    code = 2
    try:
        done = COMMANDS[command][3](args)
        print(end="", flush=True)  # what a full disk refuses is to be heard of here, not while Python exits
        return done
    except InputError as error:
        problem = " ".join(str(error).split())
    except MemoryError:
        problem = "not enough memory; take a smaller --hidden, --batch or --window"
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        _discard_stdout()
        return 0
    except OSError as error:
        _discard_stdout()
        code, problem = 1, f"{error.filename or 'output'}: cannot be written or read ({error.strerror or error})"
    print(f"xprnn {command}: {problem}", file=sys.stderr)
    return code


def _discard_stdout() -> None:
    """Point stdout away, so that the exit, which writes what is left, does not complain once more."""
    with suppress(OSError):  # of a stdout that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
