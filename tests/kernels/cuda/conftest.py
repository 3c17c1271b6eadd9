"""Fixtures of the CUDA tests: kernel selection, the event log of the fake CuPy, NVRTC."""

from __future__ import annotations

import os

import pytest
from support.backends import Backend
from support.cuda import nvrtc


@pytest.fixture
def fused_kernels(xp):
    """Disable the persistent kernels. With the fake CuPy, check for out-of-bounds writes at the end."""
    from xprnn.kernels.cuda import no_persistent

    with no_persistent():
        yield
    if xp is Backend.CUPY_FAKE:
        from support.cuda import fake_cupy

        fake_cupy.DEVICE_MEMORY.check_guards()


@pytest.fixture
def event_log():
    """Return the event log of the fake CuPy, emptied."""
    from support.cuda import fake_cupy

    fake_cupy.EVENT_LOG.clear()
    return fake_cupy.EVENT_LOG


@pytest.fixture(scope="module")
def nvrtc_installed():
    """Skip if NVRTC is not installed. With XPRNN_NVRTC=required in the environment the test fails instead."""
    if nvrtc.missing_reason() and os.environ.get("XPRNN_NVRTC") != "required":
        pytest.skip(nvrtc.missing_reason())
