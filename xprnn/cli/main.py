"""Argument parser and entry point of the command line: `python -m xprnn train | sample | bench | convert | info | run`.

Each row of `COMMANDS` is one command: its help, its examples, the function that declares its arguments, and the
function that runs it and returns the exit code. A command imports other libraries only when it runs, so that `--help`
is fast. An `InputError` is printed as one line on stderr, with exit code 2.
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
from xprnn.cli import bench
from xprnn.cli.model_arguments import MODEL_COMMANDS


class _Parser(argparse.ArgumentParser):
    """ArgumentParser that prints an error as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _bounded_number(kind: type[int | float], minimum: float, exclusive: bool = False) -> Callable[[str], Any]:
    """Return an argparse type: finite numbers >= minimum, or > minimum if exclusive."""

    def convert(text: str) -> int | float:
        noun = "a whole number" if kind is int else "a number"
        expected = f"{noun} {'above' if exclusive else 'of at least'} {minimum}"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}") from None
        if not (value > minimum if exclusive else value >= minimum) or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text}")
        return value

    return convert


def _path_arg(text: str) -> str:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a directory, found {text!r}")
    return text


_positive_int, _nonnegative_int = _bounded_number(int, 1), _bounded_number(int, 0)
_positive_float, _nonnegative_float = _bounded_number(float, 0, exclusive=True), _bounded_number(float, 0)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    default_text = "the help topics of the Python manual, from the standard library"
    add("file", nargs="?", metavar="FILE", help=f"UTF-8 text to train on (default: {default_text})")
    out = "directory to write, without a run in it (default: xprnn-run; if it exists, xprnn-run-2, ...)"
    add("--out", type=_path_arg, metavar="DIR", help=out)
    resume = "continue the run in DIR; the result is bit for bit that of a run without a stop"
    add("--resume", type=_path_arg, metavar="DIR", help=resume)
    backend = "array library (default: auto, which is CuPy if it finds a GPU, else NumPy)"
    add("--backend", choices=("auto", "numpy", "cupy"), help=backend)
    add("--cell", choices=("elman", "lstm", "gru"), help="recurrent cell (default: elman)")
    add("--hidden", type=_positive_int, metavar="H", help="hidden units of each layer (default: 256)")
    add("--layers", type=_positive_int, metavar="L", help="number of layers (default: 1)")
    both = "fill in each character from the text on both sides instead of predicting the next one (1 layer only)"
    add("--bidirectional", action="store_true", default=None, help=both)
    add("--batch", type=_positive_int, metavar="N", help="number of parallel text streams (default: 16)")
    add("--window", type=_positive_int, metavar="T", help="steps of back-propagation through time (default: 64)")
    rate = "peak learning rate of Adam (default: 1/H, at most 0.004)"
    add("--learning-rate", type=_positive_float, metavar="A", help=rate)
    add("--seed", type=_nonnegative_int, help="seed of the initial parameters and of the final sample (default: 0)")
    add("--threads", type=_positive_int, help="threads per step (default: one per core, each with 8 streams or more)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_positive_int, help="number of windows to train on (default: 7000)")
    length.add_argument("--epochs", type=_positive_float, help="number of passes over the text")
    length.add_argument("--minutes", type=_positive_float, help="training time in minutes")


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dir", metavar="DIR", help="directory of a run, or a model file (.safetensors or .npz)")
    add("--prompt", default="", help="text to continue (default: a newline)")
    add("--length", type=_nonnegative_int, default=1000, help="characters to generate (default: 1000)")
    temperature = "divides the logits; 0: the most likely character, 1: the model's distribution (default: 0.7)"
    add("--temperature", type=_nonnegative_float, default=0.7, help=temperature)
    add("--top-k", type=_positive_int, metavar="K", help="sample among the K most likely characters only")
    add("--seed", type=_nonnegative_int, default=0, help="seed of the random generator (default: 0)")
    add("--backend", choices=("auto", "numpy", "cupy"), default="numpy", help="array library (default: numpy)")


def _train(args: argparse.Namespace) -> int:
    from xprnn.charlm.training_run import train_command

    return train_command({name: value for name, value in vars(args).items() if value is not None})


def _model_file(source: str) -> Path:
    from xprnn.layers.model_file import MODEL_FILENAME

    path = Path(source)
    if path.is_dir():
        path = path / MODEL_FILENAME
    if not path.exists():
        raise InputError(f"{path}: no such model file; `python -m xprnn train --out DIR` writes a model to DIR")
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
        raise InputError(f"{path}: expected a character model, found no vocabulary in its metadata")
    vocabulary = Vocabulary(characters)
    try:
        vocabulary.encode(args.prompt)
    except InputError as error:
        raise InputError(f"--prompt: {error}") from None
    model, params = load(path, like=backend_array(args.backend))
    rng = np.random.default_rng(args.seed)
    options = {"temperature": args.temperature, "top_k": args.top_k, "rng": rng}
    text = generate(model, params, vocabulary, args.prompt, **options)
    sys.stdout.write(args.prompt)
    for character in islice(text, args.length):
        sys.stdout.write(character)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


_EXAMPLES = """
  python -m xprnn train
  python -m xprnn sample xprnn-run --prompt "The "
  python -m xprnn train --help
"""
_TRAIN_EXAMPLES = """
  python -m xprnn train                                    the default text, about two minutes
  python -m xprnn train book.txt --cell lstm --out book    another text and another cell
  python -m xprnn train book.txt --layers 2 --minutes 30   stop after 30 minutes
  python -m xprnn train book.txt --bidirectional           fill in characters from both sides
  python -m xprnn train --resume book --steps 20000        continue a run, or extend a finished one
Ctrl-C saves the run and prints the command that continues it. DIR holds the model, the checkpoint, and the learning
curve as curve.csv and, if matplotlib is installed (pip install ".[plot]" in the clone), as curve.png.
"""
_SAMPLE_EXAMPLES = """
  python -m xprnn sample book --prompt "Once upon"
  python -m xprnn sample book --temperature 0.4 --length 5000 > more.txt
"""
_BENCH_EXAMPLES = """
  python -m xprnn bench                                    all three cells, less than a minute
  python -m xprnn bench --quick --cell lstm
  python -m xprnn bench --rows 1,16,1,1000 64,128,32,100 --threads 2 --json figures.json
"""
COMMANDS = {
    "train": ("train a character language model on a text", _TRAIN_EXAMPLES, _train_arguments, _train),
    "sample": ("generate text with a trained model", _SAMPLE_EXAMPLES, _sample_arguments, _sample),
    "bench": ("time the layers of xprnn on this machine", _BENCH_EXAMPLES, bench.add_arguments, bench.bench_command),
    **MODEL_COMMANDS,
}


def _build_parser() -> argparse.ArgumentParser:
    options: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    about = "Recurrent neural networks on plain arrays."
    parser = _Parser(prog="xprnn", description=about, epilog="examples:" + _EXAMPLES, **options)
    # xprnn is already imported; an import statement here would be circular.
    version = f"%(prog)s {sys.modules['xprnn'].__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="|".join(COMMANDS))
    for name, (text, examples, add_arguments, _) in COMMANDS.items():
        about, epilog = text.capitalize() + ".", "examples:" + examples
        add_arguments(commands.add_parser(name, help=text, description=about, epilog=epilog, **options))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    The exit code is 0 for success, 2 for an error that the user can correct, 1 for an error of the system such as a
    full disk, and 130 for Ctrl-C.

    Args:
        argv: arguments after the program's name; None for those of this process.
    """
    parser = _build_parser()
    args = parser.parse_args(argv)
    command = args.command
    if command is None:
        parser.print_help(sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal cannot encode is printed as "?"
        sys.stdout.reconfigure(errors="replace")
    del args.command
    code = 2
    try:
        exit_code = COMMANDS[command][3](args)
        print(end="", flush=True)  # flush now, so that a full disk raises here rather than at interpreter exit
        return exit_code
    except InputError as error:
        message = " ".join(str(error).split())
    except MemoryError:
        message = "not enough memory; use a smaller --hidden, --batch or --window"
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe, for example `| head`, has ended
        _discard_stdout()
        return 0
    except OSError as error:
        _discard_stdout()
        code, message = 1, f"{error.filename or 'output'}: cannot be written or read ({error.strerror or error})"
    print(f"xprnn {command}: {message}", file=sys.stderr)
    return code


def _discard_stdout() -> None:
    """Redirect stdout to the null device, so that the flush at interpreter exit does not fail again."""
    with suppress(OSError):  # stdout may not be a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
