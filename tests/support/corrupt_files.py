"""Fuzzer for xprnn's file readers: corrupts valid files and reads them with every reader for their format.

A reader may return a result or raise an InputError with a message of one line. Any other error is a bug, and is printed
with the seed that reproduces it. Memory is limited to 256 MiB beyond what the imports use.

The tests run a few examples. For a longer run, from the root of the repository (`--help` lists the options):

    PYTHONPATH=tests python -m support.corrupt_files --minutes 5
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import random
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from support.paths import DATA

import xprnn
from xprnn.arrays.namespace import InputError
from xprnn.io import archive
from xprnn.layers import model_file

KERAS_FILES = DATA / "keras_files"
MEMORY_HEADROOM = 256 << 20  # bytes of address space beyond what the imports use
BOUNDARY_NUMBERS = [
    0,
    1,
    -1,
    7,
    255,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**64 - 1,
    10**30,
    10**400,
    0.5,
    1e308,
]
ODD_VALUES = [None, True, "", "F64", "O", "lstm", "tanh", [], {}, [[]], [2**62, 4], [-1, -12], float("nan"), "\0"]


def sample_model() -> Any:
    """A model whose configuration has many options, so that there is much to corrupt."""
    cell = xprnn.cells.lstm(peepholes=True, gate=xprnn.activation("hardsigmoid", 0.3, 0.4))
    rnn = xprnn.LSTM(3, (4, 2), 2, bidirectional=True, cell=cell, learned_state=True)
    return xprnn.Sequential(emb=xprnn.Embedding(5, 3), rnn=rnn, head=xprnn.Linear(4, 5))


def valid_files(folder: Path) -> dict[str, bytes]:
    """Return name -> content of one valid file per format; the suffix selects the readers (see `readers_for`)."""
    model = sample_model()
    params = model.init(np.random.default_rng(0), like=np.zeros(1, np.float32))
    arrays = {k: np.ascontiguousarray(a) for k, a in params.items()}
    layer = xprnn.LSTM(3, 4, 2)
    lstm_params = layer.init(np.random.default_rng(0), like=np.zeros(1, np.float32))
    for suffix in (".safetensors", ".npz"):
        xprnn.save(folder / f"xprnn_model{suffix}", model, arrays, {"vocabulary": "abc"})
        xprnn.save_state(folder / f"state{suffix}", (np.ones((2, 3)), {"a": np.zeros(4)}))
    torch_style = {f"rnn.{k}": a for k, a in lstm_params.items()} | {"head.weight": np.ones((5, 4), np.float32)}
    (folder / "torch_style.safetensors").write_bytes(safetensors.numpy.save(torch_style))
    bfloat16 = _safetensors({"emb.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}, bytes(12))
    (folder / "bfloat16.safetensors").write_bytes(bfloat16)
    if importlib.util.find_spec("h5py"):
        for name, source in (("keras.keras", "stacked_cells.keras"), ("keras.h5", "lstm_stack.weights.h5")):
            (folder / name).write_bytes((KERAS_FILES / source).read_bytes())
    if "torch" in sys.modules:
        import torch

        torch.save({k: torch.tensor(a) for k, a in torch_style.items()}, folder / "torch_style.pt")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def readers_for(name: str) -> list[Callable[[Path], Any]]:
    """Return the readers to run on a corrupted copy of the file with this name."""
    xprnn_readers = [xprnn.load, xprnn.load_state, model_file.load_metadata, archive.read_arrays]
    if name.endswith(".pt"):
        return [xprnn.from_torch]
    if name.endswith(".keras"):
        return [xprnn.from_keras]
    if name.endswith(".h5"):
        return [partial(xprnn.from_keras, config=KERAS_FILES / "lstm_stack.json")]
    return [*xprnn_readers, xprnn.from_torch] if name.endswith(".safetensors") else xprnn_readers


def _safetensors(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def replace_random_value(tree: Any, rng: random.Random) -> Any:
    """Copy nested data, with one random value replaced by another value or removed."""
    if isinstance(tree, dict) and tree and rng.random() < 0.9:
        key = rng.choice(sorted(tree))
        if rng.random() < 0.1:
            return {k: v for k, v in tree.items() if k != key}
        return {**tree, key: replace_random_value(tree[key], rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.8:
        index = rng.randrange(len(tree))
        return [*tree[:index], replace_random_value(tree[index], rng), *tree[index + 1 :]]
    return rng.choice([*BOUNDARY_NUMBERS, *ODD_VALUES])


def _corrupt_json(text: str, rng: random.Random) -> str:
    if rng.random() < 0.02:
        return "[" * 100_000
    return json.dumps(replace_random_value(json.loads(text), rng))


def corrupt_header(content: bytes, rng: random.Random) -> bytes:
    """Return a `.safetensors` file with a corrupted header and a checksum that matches it."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    if metadata and rng.random() < 0.7:
        text = _corrupt_json(metadata[archive.FORMAT], rng)
        metadata = {archive.FORMAT: text, "xprnn.crc32": str(zlib.crc32(text.encode()))}
        return _safetensors({**header, "__metadata__": metadata}, content[8 + length :])
    return _safetensors(replace_random_value(header, rng), content[8 + length :])


def corrupt_zip(content: bytes, rng: random.Random) -> bytes:
    """Return a zip file with one corrupted member and checksums that match."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            data = old.read(name)
            if name == chosen:
                data = _corrupt_member(name, data, rng) if rng.random() < 0.7 else corrupt_bytes(data, rng)
            compression = zipfile.ZIP_DEFLATED if rng.random() < 0.02 else zipfile.ZIP_STORED
            new.writestr(name, data, compression)
    return buffer.getvalue()


def _corrupt_member(name: str, data: bytes, rng: random.Random) -> bytes:
    if name.endswith(".json"):
        return _corrupt_json(data.decode(), rng).encode()
    return _corrupt_npy(data, rng) if name.endswith(".npy") else corrupt_bytes(data, rng)


def _corrupt_npy(data: bytes, rng: random.Random) -> bytes:
    shape = tuple(n for n in (rng.choice(BOUNDARY_NUMBERS) for _ in range(rng.randrange(4))))
    header = {
        "descr": rng.choice(["<f4", ">f8", "|O", "|u1", "<i8", "<U9999999", "|V0", ["a"]]),
        "fortran_order": rng.random() < 0.5,
    }
    text = repr({**header, "shape": rng.choice([shape, shape[:1] * 40, None, -1])}).encode()
    version = rng.choice([b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\x09\0"])
    length = rng.choice([len(text), 0, 65535])
    size = struct.pack("<H", length) if version == b"\1\0" else struct.pack("<I", rng.choice([length, 2**32 - 1]))
    body = data[10 + struct.unpack("<H", data[8:10])[0] :]
    # xprnn stores the model configuration in an .npz file as JSON in an array of uint8.
    if data.startswith(b"\x93NUMPY") and rng.random() < 0.5 and b"{" in body[:1]:
        changed = np.frombuffer(_corrupt_json(body.decode(), rng).encode(), np.uint8)
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, changed)
        return buffer.getvalue()
    return b"\x93NUMPY" + version + size + text + body


def corrupt_bytes(content: bytes, rng: random.Random) -> bytes:
    """Truncate the content, flip bits, overwrite a number, or delete, rotate or insert bytes."""
    if not content:
        return b"\0" * rng.randrange(9)
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    match rng.randrange(6):
        case 0:
            return content[:a]
        case 1:
            flipped = bytearray(content)
            for _ in range(rng.randrange(1, 9)):
                flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case 2:
            number = struct.pack(rng.choice(["<Q", "<I", ">I", "<H"]), rng.choice([0, 1, 255, 2**15, 2**16 - 1]))
            number = rng.choice([number, b"\xff" * len(number), b"\x7f" + b"\xff" * (len(number) - 1)])
            return content[:a] + number + content[a + len(number) :]
        case 3:
            return content[:a] + content[b:]
        case 4:
            return content[:b] + content[a:]
        case _:
            return content[:a] + rng.randbytes(rng.randrange(1, 64)) + content[a:]


def corrupt_file(name: str, content: bytes, rng: random.Random) -> bytes:
    """Corrupt the content of a valid file in a random manner that suits its format."""
    if rng.random() < 0.6 and not name.endswith(".h5"):
        return corrupt_header(content, rng) if name.endswith(".safetensors") else corrupt_zip(content, rng)
    return corrupt_bytes(content, rng)


def read_with_all(path: Path, name: str) -> Iterator[str]:
    """Run every reader for the file; yield "read" or the text of the InputError for each.

    Raises:
        AssertionError: the text has more than one line, or 5000 characters or more.
    """
    for read in readers_for(name):
        try:
            read(path)
            message = "read"
        except InputError as error:
            message = str(error)
        assert "\n" not in message
        assert len(message) < 5000, message[:1000]
        yield message


def limit_memory() -> None:
    """Limit the address space of this process to its present size plus MEMORY_HEADROOM (Linux only)."""
    try:
        import resource
    except ImportError:  # Windows
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        limit = pages * resource.getpagesize() + MEMORY_HEADROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> int:
    """Run the fuzzer until it finds a bug or the time or the number of examples is used up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--examples", type=int, help="number of seeds, each for every file; replaces --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="SUFFIX", help="only files with this suffix")
    parser.add_argument("--no-torch", action="store_true", help="do not import torch, and skip .pt files")
    args = parser.parse_args()
    if not args.no_torch:
        with suppress(ImportError):
            import torch  # noqa: F401 (valid_files adds a .pt file if torch is imported)
    with tempfile.TemporaryDirectory() as folder_name:
        folder, count, refused, start = Path(folder_name), 0, 0, time.monotonic()
        valid = {name: content for name, content in valid_files(folder).items() if name.endswith(args.only)}
        for name in valid:
            assert "read" in set(read_with_all(folder / name, name)), name
        limit_memory()
        seed = args.seed
        while seed < args.seed + args.examples if args.examples else time.monotonic() < start + 60 * args.minutes:
            for name, content in valid.items():
                path = folder / f"bad{Path(name).suffix}"
                path.write_bytes(corrupt_file(name, content, random.Random(f"{name} {seed}")))
                try:
                    outcome = list(read_with_all(path, name))
                except BaseException:
                    print(f"file {name}, seed {seed}:", flush=True)
                    raise
                count, refused = count + len(outcome), refused + sum(o != "read" for o in outcome)
            seed += 1
    print(f"{count:,} readings, {refused:,} refused, {count - refused:,} read, seeds {args.seed} to {seed - 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
