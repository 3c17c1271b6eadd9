"""Directory of a training run: its creation, and the lock that keeps a second process out of it."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from xprnn.arrays.namespace import InputError

fcntl: Any = import_module("fcntl") if os.name == "posix" else None
_HELD = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}


@contextmanager
def claim_directory(path: Path, option: str) -> Iterator[bool]:
    """Create the directory if needed, check that it is writable, and lock it for this process.

    The operating system releases the lock when the process ends, however it ends.

    Args:
        path: the directory.
        option: the option that named it, for messages: "--out" or "--resume".

    Yields:
        True if the directory was created.

    Raises:
        InputError: another process holds the lock, or the directory cannot be written.
    """
    created = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written ({error.strerror or error})") from None
    if lock is None:
        advice = "use another --out" if option == "--out" else "wait for its end"
        raise InputError(f"{option} {path}: another process is training the run in it; {advice}")
    try:
        try:
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise InputError(f"{option} {path}: cannot be written ({error.strerror or error})") from None
        yield created
    finally:
        _unlock(lock, path)


def _lock(path: Path) -> int | None:
    """Return the file descriptor that holds the lock, or None if another one holds it."""
    if fcntl is None:
        return _lock_file(path / "run.lock")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            os.close(descriptor)
            return None  # other errors: a network file system without locks, where the run goes on without one
    return descriptor


def _lock_file(path: Path) -> int | None:
    """Lock a file instead of the directory, which Windows cannot open."""
    msvcrt = import_module("msvcrt")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _unlock(descriptor: int, path: Path) -> None:
    os.close(descriptor)
    if fcntl is None:
        with suppress(OSError):
            (path / "run.lock").unlink()
