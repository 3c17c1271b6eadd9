"""Forward and backward runs of layers on CuPy, and the markers of tests that need CuPy or its fake."""

from __future__ import annotations

import pytest
from support.backends import Backend
from support.layer_cases import inputs_on, random_cotangents

only_cupy = pytest.mark.applies_if(lambda xp: xp.library == "cupy", reason="tests CUDA kernels")
only_fake_cupy = pytest.mark.applies_if(lambda xp: xp is Backend.CUPY_FAKE, reason="only the fake CuPy records events")


def output_cotangents(rng, layer, p):
    """Draw random cotangents of y and of the final state."""
    shape = (*p.x.shape[:2], layer.output_size)
    return rng.normal(size=shape), random_cotangents(rng, p.state)


def forward_backward(xp, layer, p, dtype, dy, dfinal):
    """Run one forward and backward pass; return all outputs and gradients in one tuple, and the tape."""
    params, x, state, flags = inputs_on(xp, p, dtype)
    y, final, tape = layer.forward(params, x, state, **flags)
    put = lambda tree: tuple(map(put, tree)) if isinstance(tree, tuple) else xp.asarray(tree, dtype)  # noqa: E731
    return (y, final, tape.states(), *layer.backward(tape, put(dy), put(dfinal))), tape
