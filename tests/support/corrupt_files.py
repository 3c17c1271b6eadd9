"""Files that lie, made from good ones, and the readers that must not believe them.

The tests take a few; `python tests/support/corrupt_files.py --minutes 5` tries as many as there is time for, under a limit on
memory. A reader may return something or raise an InputError of one line; all else is a bug, and printed with the seed
that makes it again.
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
MEMORY_HEADROOM = 256 << 20  # bytes of address space beyond what the imports took
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
    cell = xprnn.cells.lstm(peepholes=True, gate=xprnn.activation("hardsigmoid", 0.3, 0.4))
    rnn = xprnn.LSTM(3, (4, 2), 2, bidirectional=True, cell=cell, learned_state=True)
    return xprnn.Sequential(emb=xprnn.Embedding(5, 3), rnn=rnn, head=xprnn.Linear(4, 5))


def valid_files(folder: Path) -> dict[str, bytes]:
    """The content of one good file of each kind; "NAME.suffix" says which readers it is for."""
    made = sample_model()
    params = made.init(np.random.default_rng(0), like=np.zeros(1, np.float32))
    plain = {k: np.ascontiguousarray(a) for k, a in params.items()}
    layer = xprnn.LSTM(3, 4, 2)
    weights = layer.init(np.random.default_rng(0), like=np.zeros(1, np.float32))
    for ending in (".safetensors", ".npz"):
        xprnn.save(folder / f"ours{ending}", made, plain, {"vocabulary": "abc"})
        xprnn.save_state(folder / f"state{ending}", (np.ones((2, 3)), {"a": np.zeros(4)}))
    theirs = {f"rnn.{k}": a for k, a in weights.items()} | {"head.weight": np.ones((5, 4), np.float32)}
    (folder / "theirs.safetensors").write_bytes(safetensors.numpy.save(theirs))
    short = _safetensors({"emb.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}, bytes(12))
    (folder / "short.safetensors").write_bytes(short)
    if importlib.util.find_spec("h5py"):
        for name, stem in (("keras.keras", "stacked_cells.keras"), ("keras.h5", "lstm_stack.weights.h5")):
            (folder / name).write_bytes((KERAS_FILES / stem).read_bytes())
    if "torch" in sys.modules:
        import torch

        torch.save({k: torch.tensor(a) for k, a in theirs.items()}, folder / "theirs.pt")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def readers_for(name: str) -> list[Callable[[Path], Any]]:
    """What is tried on a file made from this one."""
    ours = [xprnn.load, xprnn.load_state, model_file.load_metadata, archive.read_arrays]
    if name.endswith(".pt"):
        return [xprnn.from_torch]
    if name.endswith(".keras"):
        return [xprnn.from_keras]
    if name.endswith(".h5"):
        return [partial(xprnn.from_keras, config=KERAS_FILES / "lstm_stack.json")]
    return [*ours, xprnn.from_torch] if name.endswith(".safetensors") else ours


def _safetensors(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def replace_random_value(tree: Any, r: random.Random) -> Any:
    """A copy of nested data with one value in it replaced by a number or another thing."""
    if isinstance(tree, dict) and tree and r.random() < 0.9:
        key = r.choice(sorted(tree))
        if r.random() < 0.1:
            return {k: v for k, v in tree.items() if k != key}
        return {**tree, key: replace_random_value(tree[key], r)}
    if isinstance(tree, list) and tree and r.random() < 0.8:
        place = r.randrange(len(tree))
        return [*tree[:place], replace_random_value(tree[place], r), *tree[place + 1 :]]
    return r.choice([*BOUNDARY_NUMBERS, *ODD_VALUES])


def _corrupt_json(text: str, r: random.Random) -> str:
    if r.random() < 0.02:
        return "[" * 100_000
    return json.dumps(replace_random_value(json.loads(text), r))


def corrupt_header(content: bytes, r: random.Random) -> bytes:
    """A `.safetensors` file whose header lies, its checksum made to fit."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    about = header.get("__metadata__", {})
    if about and r.random() < 0.7:
        text = _corrupt_json(about[archive.FORMAT], r)
        about = {archive.FORMAT: text, "xprnn.crc32": str(zlib.crc32(text.encode()))}
        return _safetensors({**header, "__metadata__": about}, content[8 + length :])
    return _safetensors(replace_random_value(header, r), content[8 + length :])


def corrupt_zip(content: bytes, r: random.Random) -> bytes:
    """A zip file with one member changed, its checksum made to fit."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = r.choice(names)
        for name in names:
            data = old.read(name)
            if name == chosen:
                data = _corrupt_member(name, data, r) if r.random() < 0.7 else corrupt_bytes(data, r)
            kind = zipfile.ZIP_DEFLATED if r.random() < 0.02 else zipfile.ZIP_STORED
            new.writestr(name, data, kind)
    return out.getvalue()


def _corrupt_member(name: str, data: bytes, r: random.Random) -> bytes:
    if name.endswith(".json"):
        return _corrupt_json(data.decode(), r).encode()
    return _corrupt_npy(data, r) if name.endswith(".npy") else corrupt_bytes(data, r)


def _corrupt_npy(data: bytes, r: random.Random) -> bytes:
    shape = tuple(n for n in (r.choice(BOUNDARY_NUMBERS) for _ in range(r.randrange(4))))
    about = {
        "descr": r.choice(["<f4", ">f8", "|O", "|u1", "<i8", "<U9999999", "|V0", ["a"]]),
        "fortran_order": r.random() < 0.5,
    }
    text = repr({**about, "shape": r.choice([shape, shape[:1] * 40, None, -1])}).encode()
    version = r.choice([b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\x09\0"])
    length = r.choice([len(text), 0, 65535])
    size = struct.pack("<H", length) if version == b"\1\0" else struct.pack("<I", r.choice([length, 2**32 - 1]))
    body = data[10 + struct.unpack("<H", data[8:10])[0] :]
    if data.startswith(b"\x93NUMPY") and r.random() < 0.5 and b"{" in body[:1]:  # our own header, as JSON in bytes
        changed = np.frombuffer(_corrupt_json(body.decode(), r).encode(), np.uint8)
        out = io.BytesIO()
        np.lib.format.write_array(out, changed)
        return out.getvalue()
    return b"\x93NUMPY" + version + size + text + body


def corrupt_bytes(content: bytes, r: random.Random) -> bytes:
    """Cut short, with bits flipped, numbers written over, or pieces moved."""
    if not content:
        return b"\0" * r.randrange(9)
    a, b = sorted(r.randrange(len(content) + 1) for _ in range(2))
    match r.randrange(6):
        case 0:
            return content[:a]
        case 1:
            flipped = bytearray(content)
            for _ in range(r.randrange(1, 9)):
                flipped[r.randrange(len(content))] ^= 1 << r.randrange(8)
            return bytes(flipped)
        case 2:
            number = struct.pack(r.choice(["<Q", "<I", ">I", "<H"]), r.choice([0, 1, 255, 2**15, 2**16 - 1]))
            number = r.choice([number, b"\xff" * len(number), b"\x7f" + b"\xff" * (len(number) - 1)])
            return content[:a] + number + content[a + len(number) :]
        case 3:
            return content[:a] + content[b:]
        case 4:
            return content[:b] + content[a:]
        case _:
            return content[:a] + r.randbytes(r.randrange(1, 64)) + content[a:]


def corrupt_file(name: str, content: bytes, r: random.Random) -> bytes:
    """A bad file made from a good one."""
    if r.random() < 0.6 and not name.endswith(".h5"):
        return corrupt_header(content, r) if name.endswith(".safetensors") else corrupt_zip(content, r)
    return corrupt_bytes(content, r)


def read_with_all(path: Path, name: str) -> Iterator[str]:
    """Read the file in every way; yields what came of each: "read" or the error's text.

    Raises:
        AssertionError: an error of more than a line.
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
    """From here on, at most HEADROOM more than now."""
    try:
        import resource
    except ImportError:  # Windows
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        most = pages * resource.getpagesize() + MEMORY_HEADROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> int:
    """Fuzz until there is a bug, or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--examples", type=int, help="for each kind of file, instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="ENDING", help="files whose names end so")
    parser.add_argument("--no-torch", action="store_true", help="do not import it")
    args = parser.parse_args()
    if not args.no_torch:
        with suppress(ImportError):
            import torch  # noqa: F401 (its files are tried where it is there)
    with tempfile.TemporaryDirectory() as place:
        folder, count, refused, start = Path(place), 0, 0, time.monotonic()
        good = {name: content for name, content in valid_files(folder).items() if name.endswith(args.only)}
        for name in good:
            assert "read" in set(read_with_all(folder / name, name)), name
        limit_memory()
        seed = args.seed
        while seed < args.seed + args.examples if args.examples else time.monotonic() < start + 60 * args.minutes:
            for name, content in good.items():
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
