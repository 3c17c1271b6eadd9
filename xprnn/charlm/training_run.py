"""The `train` command: a run from its text to its files, with everything a watcher wants to see on the way.

A run's DIR holds `model.safetensors` (what `sample` reads), `checkpoint.safetensors` (all that `--resume` needs),
`curve.csv` and `curve.png`. The first three are written together at every measurement, twenty times in a run, and
when the run is interrupted.
"""

from __future__ import annotations

import csv
import io
import math
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from xprnn.arrays.namespace import Array, InputError, from_numpy, namespace, to_numpy
from xprnn.charlm.checkpoint import load_checkpoint, save_checkpoint
from xprnn.charlm.corpus import BatchedText, Corpus, TokenIds, batchify
from xprnn.charlm.model import backend_array, build_model
from xprnn.charlm.plot import can_plot
from xprnn.charlm.report import print_report, save_curve
from xprnn.charlm.trainer import TrainConfig, TrainState, bits_per_character, init_train_state, train
from xprnn.io.archive import write_atomically
from xprnn.layers import model_file
from xprnn.layers.context_shift import is_noncausal
from xprnn.training.data_parallel import default_num_threads, keep_freed_memory

CHECKPOINT_FILE = "checkpoint.safetensors"
_COLUMNS = ("step", "seconds", "train_bits", "bits_per_character")
_MEASUREMENTS_PER_RUN = 20


@dataclass(frozen=True)
class TrainOptions:
    """What decides a run; kept in its checkpoint. A learning rate of 0 stands for 1/H, at most 0.004; 0 threads
    for as many as `crew.default_num_threads`, which a resumed run keeps."""

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
    options: TrainOptions
    directory: Path
    corpus: Corpus
    like: Any
    model: Any
    train_state: TrainState
    curve: list[list[float]]

    def __post_init__(self) -> None:
        o, held_out = self.options, self.corpus.held_out
        # Wider networks diverge earlier: 0.004 is best for H = 256, but already too much for 512.
        self.config = TrainConfig(o.steps, o.minutes, o.learning_rate or min(0.004, 1 / o.hidden))
        self.corpus.check_length(o.batch, o.window)
        inputs, targets = self._to_device(batchify(self.corpus.train, o.batch, o.window))
        self.train_data = BatchedText(inputs, targets, o.window)
        # Streams of 200 characters or more: what the first characters lack in context is then lost in the mean.
        self.held_out_data = self._to_device(batchify(held_out, max(1, min(32, len(held_out) // 200)), 1))

    def _to_device(self, arrays: tuple[TokenIds, TokenIds]) -> tuple[Array, Array]:
        inputs, targets = arrays
        if is_noncausal(self.model):  # each character is restored, the next one has been read
            targets = inputs
        return from_numpy(inputs, like=self.like), from_numpy(targets, like=self.like)

    def measure(self) -> float:
        bits = bits_per_character(self.model, self.train_state.params, *self.held_out_data)
        if not math.isfinite(bits) or self._diverged(bits):
            many = f"{bits:.4g} bits per character" if math.isfinite(bits) else f"{bits}"
            rate = f"lower --learning-rate (it is {self.config.learning_rate:g})"
            raise InputError(f"the held-out loss became {many} at step {self.train_state.step}; {rate}")
        return bits

    def _diverged(self, bits: float) -> bool:
        bound = 2 * math.log2(len(self.corpus.vocabulary)) + 10
        if bits <= bound:
            return False
        # A last tenth in another alphabet costs as much without anything wrong: then what was learnt costs little.
        size = max(self.train_data.window, 256)
        learnt = (self.train_data.inputs[:size, ...], self.train_data.targets[:size, ...])
        return not bits_per_character(self.model, self.train_state.params, *learnt) <= bound

    def save(self, bits: float) -> None:
        about = {
            "vocabulary": self.corpus.vocabulary.characters,
            "bits_per_character": bits,
            "step": self.train_state.step,
        }
        about["task"] = "each character from both sides" if is_noncausal(self.model) else "the next character"
        model_file.save(
            self.directory / model_file.MODEL_FILENAME,
            self.model,
            self.train_state.params,
            {**about, "text": self.corpus.name},
        )
        run = {"options": asdict(self.options), "mark": self.corpus.fingerprint, "curve": self.curve}
        save_checkpoint(self.directory / CHECKPOINT_FILE, self.model, self.train_state, run)
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([_COLUMNS, *self.curve])
        write_atomically(self.directory / "curve.csv", table.getvalue().encode())

    def train(self, bar: Any, caught: list[int]) -> float:
        """Train to the end or until a signal is caught; return the last measured bits per character."""
        characters, before = self.options.batch * self.options.window, self.config.progress(self.train_state)
        bits = self.curve[-1][-1] if self.curve else math.nan
        for now in train(self.model, self.train_state, self.train_data, self.config, self.options.threads):
            self.train_state, progress = now, self.config.progress(now)
            bar.total = round(characters * now.step / progress)
            bar.update(characters)
            if int(progress * _MEASUREMENTS_PER_RUN) > int(before * _MEASUREMENTS_PER_RUN):
                bits = self.measure()
                loss = float(to_numpy(now.loss))
                row = (now.seconds, loss / math.log(2), bits)
                self.curve.append([now.step, *(round(value, 4) for value in row)])
                self.save(bits)
                bar.set_postfix_str(f"loss {loss:.3f}, held-out {bits:.3f} bits")
            before = progress
            if caught:
                bits = self.measure()
                self.save(bits)
                break
        return bits


def train_command(arguments: dict[str, Any]) -> int:
    """Run `train` with the options given on the command line, and return the exit code."""
    if "file" in arguments:  # --resume finds it from any directory
        arguments["file"] = str(Path(arguments["file"]).absolute())
    run, made = _resume(arguments) if "resume" in arguments else _new_run(arguments)
    try:
        # A step's products are small: BLAS threads gain little where they are free, and stall all where they are not.
        keep_freed_memory()
        with threadpool_limits(1, user_api="blas"):
            return _train_with_progress(run)
    except InputError as error:
        if made and not run.curve:
            with suppress(OSError):
                run.directory.rmdir()
        kept = f"; the last good model, of step {run.curve[-1][0]:.0f}, is in {run.directory}" if run.curve else ""
        raise InputError(f"{error}{kept}") from None


def _new_run(given: dict[str, Any]) -> tuple[_TrainingRun, bool]:
    out = Path(given["out"]) if "out" in given else _unused_path("xprnn-run")
    if any((out / name).exists() for name in (model_file.MODEL_FILENAME, CHECKPOINT_FILE)):
        raise InputError(f"--out {out}: already holds a run; take another --out, or --resume {shlex.quote(str(out))}")
    text = Corpus.read(given.get("file"))
    known = {f.name for f in fields(TrainOptions)}
    options = _apply_length(TrainOptions(**{k: v for k, v in given.items() if k in known}), given, text)
    options = replace(options, threads=options.threads or default_num_threads(options.batch))
    array = backend_array(options.backend)
    model = build_model(options.cell, len(text.vocabulary), options.hidden, options.layers, options.bidirectional)
    _check_memory(model)
    now = init_train_state(model, np.random.default_rng(options.seed), array)
    run = _TrainingRun(options, out, text, array, model, now, [])
    return run, _make_writable(out)


def _resume(given: dict[str, Any]) -> tuple[_TrainingRun, bool]:
    out = Path(given["resume"])
    fixed = sorted(given.keys() - {"resume", "file", "backend", "steps", "epochs", "minutes"})
    if fixed:
        raise InputError(f"--{fixed[0].replace('_', '-')} cannot change when a run is resumed")
    kept = model_file.load_metadata(out / CHECKPOINT_FILE)
    try:
        options = replace(TrainOptions(**kept["options"]), **{k: given[k] for k in ("file", "backend") if k in given})
        mark, curve = kept["mark"], [list(map(float, row)) for row in kept["curve"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{out / CHECKPOINT_FILE}: damaged ({error})") from None
    text = Corpus.read(options.file)
    if text.fingerprint != mark:
        raise InputError(f"--resume {out}: {text.name} is not the text this run has learnt from; give FILE")
    array = backend_array(options.backend)
    model, now = load_checkpoint(out / CHECKPOINT_FILE, like=array)
    _make_writable(out)
    return _TrainingRun(_apply_length(options, given, text), out, text, array, model, now, curve), False


def _apply_length(options: TrainOptions, given: dict[str, Any], text: Corpus) -> TrainOptions:
    if "epochs" in given:
        windows = (len(text.train) - 1) // options.batch // options.window
        return replace(options, steps=max(1, math.ceil(given["epochs"] * windows)), minutes=None)
    if "steps" in given:
        return replace(options, steps=given["steps"], minutes=None)
    return replace(options, minutes=given.get("minutes", options.minutes))


def _check_memory(model: Any) -> None:
    # A machine that swaps for an hour before it gives up is no answer to one zero too many in --hidden.
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return
    needed = 4 * 4 * sum(math.prod(shape) for shape in model.shapes().values())
    if needed > there:
        raise InputError(
            f"the model needs {needed / 2**30:,.0f} GiB for parameters, gradients and Adam's two moments,"
            f" this machine has {there / 2**30:,.0f}; take a smaller --hidden or fewer --layers"
        )


def _unused_path(name: str) -> Path:
    paths = [Path(name), *(Path(f"{name}-{number}") for number in range(2, 10_000))]
    return next(path for path in paths if not path.exists())


def _make_writable(out: Path) -> bool:
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return made
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror or error})") from None


@contextmanager
def _catch_signals() -> Iterator[list[int]]:
    # Only noted: the step in progress is finished, so that what is saved is exactly the state between two steps.
    caught: list[int] = []

    def note(number: int, _: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are someone else's
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train_with_progress(run: _TrainingRun) -> int:
    o, text, plots = run.options, run.corpus, can_plot()  # a slow import: not after the first line
    total = len(text.train) + len(text.held_out)
    size = sum(math.prod(shape) for shape in run.model.shapes().values())
    library = namespace(run.like).__name__.rpartition(".")[2]
    print(f"text   {total:,} characters of {text.name}, {len(text.vocabulary)} different; the last tenth is held out")
    directions = " in each of two directions" if o.bidirectional else ""
    print(
        f"model  {o.cell}, {o.layers} x {o.hidden} units{directions}, {size:,} parameters, {library} {run.like.dtype}"
    )
    if o.bidirectional:
        print("task   to restore each character from all before it and, within a window, all after it")
    if not plots:
        print('no curve.png will be drawn: it needs matplotlib: pip install "xprnn[plot]"')
    sys.stdout.flush()
    start, seconds = run.train_state.step * o.batch * o.window, run.train_state.seconds
    quiet = {} if sys.stderr.isatty() else {"mininterval": 10.0}
    with _catch_signals() as caught, tqdm(initial=start, unit="char", unit_scale=True, smoothing=0.1, **quiet) as bar:
        bits = run.train(bar, caught)
    if caught:
        where = f"step {run.train_state.step}, {bits:.3f} held-out bits per character"
        print(
            f"\nstopped and saved ({where}). Go on with\n  python -m xprnn train --resume {shlex.quote(str(run.directory))}"
        )
        return 130
    rate = (run.train_state.step * o.batch * o.window - start) / max(run.train_state.seconds - seconds, 1e-9)
    save_curve(run.directory, run.curve, print_report(run.model, run.train_state, text, bits, rate, o.seed))
    more = "what is in it: python -m xprnn info" if o.bidirectional else "more text: python -m xprnn sample"
    print(f"saved in {run.directory}; {more} {shlex.quote(str(run.directory))}")
    return 0
