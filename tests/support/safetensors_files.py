"""Bytes of safetensors files with chosen headers."""

from __future__ import annotations

import json
import struct


def raw_safetensors(tensors: dict, metadata: dict | None, data: bytes) -> bytes:
    """Return a file with this header; `tensors` maps names to their dtype, shape and data_offsets."""
    header = json.dumps({**({"__metadata__": metadata} if metadata else {}), **tensors}).encode()
    return struct.pack("<Q", len(header)) + header + data
