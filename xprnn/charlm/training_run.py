"""Implementation of the `train` command: new and resumed runs, progress display, measurements, and the run's files.

The directory of a run holds `model.safetensors` (which `sample` reads), `checkpoint.safetensors` (which `--resume`
reads), `curve.csv` and `curve.png`. The first three are written together at every measurement, twenty times in a run,
and when the run is interrupted. `curve.png` is written at the end.
"""

from __future__ import annotations

import csv
import io
import math
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from xprnn.arrays.namespace import Array, InputError, from_numpy, namespace, to_numpy
from xprnn.charlm.checkpoint import load_checkpoint, save_checkpoint
from xprnn.charlm.corpus import BatchedText, Corpus, TokenIds, batchify
from xprnn.charlm.model import backend_array, build_model
from xprnn.charlm.plot import can_plot
from xprnn.charlm.progress import Progress, show_progress
from xprnn.charlm.report import print_report, save_curve
from xprnn.charlm.run_directory import claim_directory
from xprnn.charlm.trainer import TrainConfig, TrainState, bits_per_character, init_train_state, train
from xprnn.io.archive import write_atomically
from xprnn.layers import model_file
from xprnn.layers.context_shift import is_noncausal
from xprnn.training.data_parallel import default_num_threads, keep_freed_memory

CHECKPOINT_FILE = "checkpoint.safetensors"
_CURVE_COLUMNS = ("step", "seconds", "train_bits", "bits_per_character")
_MEASUREMENTS_PER_RUN = 20


@dataclass(frozen=True)
class TrainOptions:
    """Options of a run, as the command line gives them; they are stored in the checkpoint.

    learning_rate 0 stands for 1/H, at most 0.004. threads 0 stands for `default_num_threads`; the checkpoint stores the
    resolved number, and a resumed run uses it.
    """

    file: str | None = None
    backend: str = "auto"
    cell: str = "elman"
    hidden: int = 256
    layers: int = 1
    bidirectional: bool = False
    batch: int = 16
    window: int = 64
    learning_rate: float = 0.0
    seed: int = 0
    threads: int = 0
    steps: int = 7000
    minutes: float | None = None


@dataclass
class _TrainingRun:
    """A run in progress: its options, data, model, state and learning curve."""

    options: TrainOptions
    directory: Path
    corpus: Corpus
    like: Any
    model: Any
    train_state: TrainState
    curve: list[list[float]]

    def __post_init__(self) -> None:
        o, held_out = self.options, self.corpus.held_out
        # Wider networks diverge at lower learning rates: 0.004 is best for H = 256, but too high for H = 512.
        self.config = TrainConfig(o.steps, o.minutes, o.learning_rate or min(0.004, 1 / o.hidden))
        self.corpus.check_length(o.batch, o.window)
        inputs, targets = self._to_device(batchify(self.corpus.train, o.batch, o.window))
        self.train_data = BatchedText(inputs, targets, o.window)
        # Streams of at least 200 characters, so that the first ones, which lack context, hardly change the mean.
        self.held_out_data = self._to_device(batchify(held_out, max(1, min(32, len(held_out) // 200)), 1))

    def _to_device(self, arrays: tuple[TokenIds, TokenIds]) -> tuple[Array, Array]:
        inputs, targets = arrays
        if is_noncausal(self.model):  # a bidirectional model predicts the character at t, not the one at t + 1
            targets = inputs
        return from_numpy(inputs, like=self.like), from_numpy(targets, like=self.like)

    def measure(self) -> float:
        """Return the held-out bits per character; raise InputError if the model has diverged."""
        bits = bits_per_character(self.model, self.train_state.params, *self.held_out_data)
        if not math.isfinite(bits) or self._diverged(bits):
            loss = f"{bits:.4g} bits per character" if math.isfinite(bits) else f"{bits}"
            hint = f"lower --learning-rate (it is {self.config.learning_rate:g})"
            raise InputError(f"the held-out loss became {loss} at step {self.train_state.step}; {hint}")
        return bits

    def _diverged(self, bits: float) -> bool:
        """True if held-out text and training text both cost far more than a uniform distribution would."""
        bound = 2 * math.log2(len(self.corpus.vocabulary)) + 10
        if bits <= bound:
            return False
        # A held-out tenth in another alphabet costs as much without divergence, but then training text costs little.
        size = max(self.train_data.window, 256)
        training_text = (self.train_data.inputs[:size, ...], self.train_data.targets[:size, ...])
        return not bits_per_character(self.model, self.train_state.params, *training_text) <= bound

    def save(self, bits: float) -> None:
        """Write model, checkpoint and curve.csv."""
        metadata = {
            "vocabulary": self.corpus.vocabulary.characters,
            "bits_per_character": bits,
            "step": self.train_state.step,
            "task": "each character from both sides" if is_noncausal(self.model) else "the next character",
            "text": self.corpus.name,
        }
        model_path = self.directory / model_file.MODEL_FILENAME
        model_file.save(model_path, self.model, self.train_state.params, metadata)
        run = {"options": asdict(self.options), "mark": self.corpus.fingerprint, "curve": self.curve}
        save_checkpoint(self.directory / CHECKPOINT_FILE, self.model, self.train_state, run)
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([_CURVE_COLUMNS, *self.curve])
        write_atomically(self.directory / "curve.csv", table.getvalue().encode())

    @property
    def is_finished(self) -> bool:
        """True if no step is left to do."""
        return self.train_state.step > 0 and self.config.progress(self.train_state) >= 1

    def train(self, display: Progress, caught: list[int]) -> float:
        """Train to the end or until a signal is caught, and return the last measured bits per character.

        Args:
            display: shows the steps and the losses.
            caught: signal numbers from `_catch_signals`.
        """
        last_progress = self.config.progress(self.train_state)
        bits = self.curve[-1][-1] if self.curve else math.nan
        for train_state in train(self.model, self.train_state, self.train_data, self.config, self.options.threads):
            self.train_state, progress = train_state, self.config.progress(train_state)
            display.advance(train_state.step, progress)
            if int(progress * _MEASUREMENTS_PER_RUN) > int(last_progress * _MEASUREMENTS_PER_RUN):
                bits = self.measure()
                training_bits = float(to_numpy(train_state.loss)) / math.log(2)
                row = (train_state.seconds, training_bits, bits)
                self.curve.append([train_state.step, *(round(value, 4) for value in row)])
                self.save(bits)
                display.measured(train_state.step, progress, training_bits, bits)
            last_progress = progress
            if caught:
                bits = self.measure()
                self.save(bits)
                break
        return bits


def train_command(arguments: dict[str, Any]) -> int:
    """Run `train`, and return its exit code.

    Args:
        arguments: the options given on the command line, by name; others are absent.

    Raises:
        InputError: an option, the text or the output directory is not usable, or the loss diverged.
    """
    if "file" in arguments:  # stored as an absolute path, so that --resume finds it from any directory
        arguments["file"] = str(Path(arguments["file"]).absolute())
    with ExitStack() as claims:
        run, created = _resume(arguments, claims) if "resume" in arguments else _new_run(arguments, claims)
        try:
            # The products of a step are small: BLAS threads gain little on idle cores, stall each other on busy ones.
            keep_freed_memory()
            with threadpool_limits(1, user_api="blas"):
                return _train_with_progress(run)
        except InputError as error:
            if created and not run.curve:
                with suppress(OSError):
                    run.directory.rmdir()
            hint = f"; the last good model, of step {run.curve[-1][0]:.0f}, is in {run.directory}" if run.curve else ""
            raise InputError(f"{error}{hint}") from None


def _new_run(arguments: dict[str, Any], claims: ExitStack) -> tuple[_TrainingRun, bool]:
    """Return a new run, whose directory is claimed until `claims` ends, and True if the directory was created."""
    if "out" in arguments:
        _check_unused(Path(arguments["out"]))
    corpus = Corpus.read(arguments.get("file"))
    names = {f.name for f in fields(TrainOptions)}
    options = TrainOptions(**{name: value for name, value in arguments.items() if name in names})
    options = _apply_length(options, arguments, corpus)
    options = replace(options, threads=options.threads or default_num_threads(options.batch))
    like = backend_array(options.backend)
    model = build_model(options.cell, len(corpus.vocabulary), options.hidden, options.layers, options.bidirectional)
    _check_memory(model)
    train_state = init_train_state(model, np.random.default_rng(options.seed), like)
    run = _TrainingRun(options, Path(), corpus, like, model, train_state, [])
    # The directory is created last, so that an error leaves none behind.
    run.directory = Path(arguments["out"]) if "out" in arguments else _create_unused_directory("xprnn-run")
    created = claims.enter_context(claim_directory(run.directory, "--out")) or "out" not in arguments
    _check_unused(run.directory)  # another run may have ended in it since the first check
    return run, created


def _check_unused(out: Path) -> None:
    """Raise InputError if the directory holds a run."""
    if any((out / name).exists() for name in (model_file.MODEL_FILENAME, CHECKPOINT_FILE)):
        raise InputError(f"--out {out}: already holds a run; use another --out, or --resume {shlex.quote(str(out))}")


def _resume(arguments: dict[str, Any], claims: ExitStack) -> tuple[_TrainingRun, bool]:
    """Return the run that a checkpoint holds, and False: its directory was not created."""
    out = Path(arguments["resume"])
    fixed = sorted(arguments.keys() - {"resume", "file", "backend", "steps", "epochs", "minutes"})
    if fixed:
        raise InputError(f"--{fixed[0].replace('_', '-')} cannot change when a run is resumed")
    if out.is_dir():  # before the checkpoint is read: the process that trains this run would replace it
        claims.enter_context(claim_directory(out, "--resume"))
    metadata = model_file.load_metadata(out / CHECKPOINT_FILE)
    try:
        changed = {name: arguments[name] for name in ("file", "backend") if name in arguments}
        options = replace(TrainOptions(**metadata["options"]), **changed)
        fingerprint, curve = metadata["mark"], [list(map(float, row)) for row in metadata["curve"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{out / CHECKPOINT_FILE}: damaged ({error})") from None
    corpus = Corpus.read(options.file)
    if corpus.fingerprint != fingerprint:
        raise InputError(
            f"--resume {out}: {corpus.name} is not the text that this run was trained on; give that text as FILE"
        )
    like = backend_array(options.backend)
    model, train_state = load_checkpoint(out / CHECKPOINT_FILE, like=like)
    options = _apply_length(options, arguments, corpus)
    return _TrainingRun(options, out, corpus, like, model, train_state, curve), False


def _apply_length(options: TrainOptions, arguments: dict[str, Any], corpus: Corpus) -> TrainOptions:
    """Apply --epochs, --steps or --minutes."""
    if "epochs" in arguments:
        windows = (len(corpus.train) - 1) // options.batch // options.window
        return replace(options, steps=max(1, math.ceil(arguments["epochs"] * windows)), minutes=None)
    if "steps" in arguments:
        return replace(options, steps=arguments["steps"], minutes=None)
    return replace(options, minutes=arguments.get("minutes", options.minutes))


def _check_memory(model: Any) -> None:
    """Raise InputError if the training state exceeds the physical memory, rather than let the machine swap."""
    try:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not known on this system
        return
    needed = 4 * 4 * sum(math.prod(shape) for shape in model.shapes().values())
    if needed > available:
        raise InputError(
            f"the model needs {needed / 2**30:,.0f} GiB for parameters, gradients and Adam's two moments,"
            f" this machine has {available / 2**30:,.0f} GiB; use a smaller --hidden or fewer --layers"
        )


def _create_unused_directory(name: str) -> Path:
    """Create and return `name`, or the first of name-2, name-3, ... that does not exist."""
    for path in [Path(name), *(Path(f"{name}-{number}") for number in range(2, 10_000))]:
        try:
            path.mkdir()
        except FileExistsError:  # also if another run has just created it
            continue
        except OSError as error:
            raise InputError(f"--out {path}: cannot be written ({error.strerror or error})") from None
        return path
    raise InputError(f"--out: {name} to {name}-9999 exist; choose another directory")


@contextmanager
def _catch_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that the current step finishes before the run is saved.

    A second signal raises KeyboardInterrupt.
    """
    caught: list[int] = []

    def handle(number: int, _: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread may set signal handlers
        previous = {}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _train_with_progress(run: _TrainingRun) -> int:
    """Train with a progress bar, print the report, and return the exit code: 0, or 130 if interrupted."""
    options, directory = run.options, shlex.quote(str(run.directory))
    _print_header(run)
    start, start_seconds, characters = run.train_state.step, run.train_state.seconds, options.batch * options.window
    if run.is_finished:
        longer = "--steps, --epochs or --minutes"
        print(f"This run is finished: it has trained for {start:,} steps. To train on, add a larger {longer}.")
    with _catch_signals() as caught, show_progress(characters, start) as display:
        bits = run.train(display, caught)
    if caught:
        print(
            f"\ninterrupted and saved (step {run.train_state.step}, {bits:.3f} held-out bits per character)."
            f" Continue with\n  python -m xprnn train --resume {directory}"
        )
        return 130
    steps, seconds = run.train_state.step - start, run.train_state.seconds - start_seconds
    rate = steps * characters / max(seconds, 1e-9) if steps else None
    baselines = print_report(run.model, run.train_state, run.corpus, bits, rate, options.seed)
    save_curve(run.directory, run.curve, baselines)
    hint = "details: python -m xprnn info" if options.bidirectional else "more text: python -m xprnn sample"
    print(f"saved in {run.directory}; {hint} {directory}")
    return 0


def _print_header(run: _TrainingRun) -> None:
    """Print the text, the model and the task of a run."""
    options, corpus = run.options, run.corpus
    plots = can_plot()  # a slow import: before the first line, so that the lines appear together
    total = len(corpus.train) + len(corpus.held_out)
    size = sum(math.prod(shape) for shape in run.model.shapes().values())
    library = namespace(run.like).__name__.rpartition(".")[2]
    characters = len(corpus.vocabulary)
    print(f"text   {total:,} characters of {corpus.name}, {characters} different; the last tenth is held out")
    layers = f"{options.layers} layer{'s' if options.layers > 1 else ''} of {options.hidden} units"
    directions = " in each of two directions" if options.bidirectional else ""
    print(f"model  {options.cell}, {layers}{directions}, {size:,} parameters, {library} {run.like.dtype}")
    if options.bidirectional:
        print("task   fill in each character from all before it and, within a window, all after it")
    if not plots:
        print('curve.png will not be written: it needs matplotlib: pip install ".[plot]" in the clone of xprnn')
    sys.stdout.flush()
