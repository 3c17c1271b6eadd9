"""Starts a measuring process for a number of threads, and collects what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from xprnn.bench import machine, tables

__all__ = ["TASK", "collect", "new_run", "progress"]

# What a task holds; the caller replaces what is to be different.
TASK: dict[str, Any] = {
    "threads": 1,
    "cells": ["elman"],
    "shapes": [],
    "peers": ["torch", "jax", "onnxruntime"],
    "order": "C",  # of the article's arrays
    "published": False,  # also the article with its float64 zeros
    "seconds": 30.0,  # for all rows together
    "least": 3,  # rounds of a row
    "most": 15,
    "steps": 0,  # of the streams
    "stream_sizes": [],  # H
}


def new_run(order: str = "C") -> dict[str, Any]:
    """Where `collect` puts what it hears."""
    return {"order": order, "machines": [], "notes": [], "rows": [], "streams": []}


def collect(task: dict[str, Any], run: dict[str, Any], hear: Callable[[dict[str, Any]], None]) -> int:
    """Run one measuring process; `hear` is called with each row. Returns its exit code."""
    allowed = machine.cores()
    machine.pin(allowed[: task["threads"]])  # the child inherits it
    command = [sys.executable, "-m", "xprnn.bench.worker"]
    try:
        # A group of its own: Ctrl-C is for this process, which then ends the child.
        child = subprocess.Popen(
            command,
            env=machine.measuring_environment(task["threads"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0 if sys.platform != "win32" else None,
        )
    finally:
        machine.pin(allowed)
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        try:
            child.stdin.write(json.dumps(task))
            child.stdin.close()
            for line in child.stdout:
                _keep(json.loads(line), run, len(allowed), hear)
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        run["notes"].append(f"{task['threads']} thread(s): the measuring process ended early, code {child.returncode}")
    return child.returncode


def _keep(heard: dict[str, Any], run: dict[str, Any], cores: int, hear: Callable[[dict[str, Any]], None]) -> None:
    if "machine" in heard:
        # The child sees only the cores it is pinned to.
        run["machines"].append(heard["machine"] | {"cores": cores})
    elif "note" in heard:
        run["notes"] += [heard["note"]] if heard["note"] not in run["notes"] else []
    elif "stream" in heard:
        run["streams"].append(heard["stream"])
    else:
        run["rows"].append(heard["row"])
        hear(heard["row"])


def progress(row: dict[str, Any]) -> None:
    """One short line on standard error."""
    core = row["seconds"]["core"]
    wrong = f"  DISAGREE: {'; '.join(row['disagree'])}" if row["disagree"] else ""
    where = f"{row['cell']} {tuple(row['shape'])} {row['pass']}, {row['threads']} thread(s)"
    aside = "disturbed" if tables.disturbed(row) else f"{row['set_aside']} set aside"
    text = f"{where}: {1e3 * core['median']:.3g} ms, {core['rounds']} rounds ({aside}){wrong}"
    print(text, file=sys.stderr, flush=True)
