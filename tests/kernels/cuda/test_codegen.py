"""The printed CUDA kernels as NVIDIA's own compiler sees them, without a GPU: every cell, dtype and architecture."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest
from support.cuda import nvrtc
from support.kernel_cases import everything_cell
from support.layer_cases import CASES

import xprnn
from xprnn.kernels.cuda import segment_sum
from xprnn.kernels.cuda.pointwise import pointwise_kernels
from xprnn.kernels.tracing.scalar_code import OP_TEMPLATES

pytestmark = pytest.mark.needs("cupy")
CELLS = {name: case.make(3, 4).resolved_cell for name, case in CASES.items()}
PRINTED = [name for name, cell in CELLS.items() if not cell.pregates]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
MOST_REGISTERS = 64  # of 128 threads a block: sixteen blocks then share a multiprocessor, and latencies hide each other


@pytest.fixture(scope="module")
def compiled():
    """nvrtc.compiled; where the session asks for NVRTC, its absence is an error and not a skip."""
    if nvrtc.missing_reason() and os.environ.get("XPRNN_NVRTC") != "required":
        pytest.skip(nvrtc.missing_reason())
    return nvrtc.compile_resources


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", [*PRINTED, "everything"])
def test_every_kernel_compiles_and_spills_nothing(compiled, name, arch):
    for bits in (32, 64):
        text = pointwise_kernels(everything_cell() if name == "everything" else CELLS[name], bits).source
        report = compiled(text, arch)
        assert report.keys() == {"forward_step", "backward_step"}
        for kernel, found in report.items():
            assert found.spilled_bytes == 0, (kernel, found)
            # Payne and Hanek's reduction of large angles keeps its table on the stack: sin and cos, nothing else.
            assert found.stack == 0 or name == "everything", (kernel, found)
            assert found.registers <= (MOST_REGISTERS if name != "everything" else 128), (kernel, found)


def test_the_report_is_read(compiled):
    spills = """
    extern "C" __global__ void __launch_bounds__(1024) greedy(float* x) {
      float a[200];
      #pragma unroll
      for (int i = 0; i < 200; ++i) a[i] = x[i * blockDim.x + threadIdx.x];
      for (int k = 0; k < 100; ++k) {
        #pragma unroll
        for (int i = 0; i < 200; ++i) a[i] = a[i] * a[(i * 7 + 3) % 200] + x[k];
      }
      #pragma unroll
      for (int i = 0; i < 200; ++i) x[i * blockDim.x + threadIdx.x] = a[i];
    }"""
    assert compiled(spills, "sm_90")["greedy"].spilled_bytes > 0
    with pytest.raises(AssertionError, match="undefined"):
        compiled('extern "C" __global__ void k() { nothing(); }', "sm_90")
    with pytest.raises(AssertionError, match="never referenced"):
        compiled('extern "C" __global__ void k() { int unused; }', "sm_90")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("bits", [32, 64])
def test_the_sum_by_class_compiles(compiled, bits, arch):
    found = compiled(segment_sum.kernel_source(bits), arch)["segment_sum_into"]
    assert (found.spilled_bytes, found.stack) == (0, 0)


def test_float32_stays_float32(compiled):
    """No double creeps in: a constant or a function of the wrong width would show as double-precision arithmetic."""
    for name in PRINTED:
        text = pointwise_kernels(CELLS[name], 32).source
        assert "double" not in text.replace("__longlong_as_double", ""), name
        for op in ("tanh", "exp", "fabs"):
            assert f" {op}(" not in text, name


def test_all_forms_are_there():
    text = pointwise_kernels(everything_cell(), 32).source
    names = ["log", "log1p", "sqrt", "pow", "sin", "cos", "sinh", "cosh", "exp", "expm1", "fabs", "tanh"]
    assert [f for f in names if f"{f}f(" not in text] == []
    assert set(OP_TEMPLATES) >= {"maximum", "sign", "where"}


def constant_cell(value: float) -> xprnn.Cell:
    def build(xp):
        step = lambda x, h, s, p: ((xp.minimum(x[0] + h[0], value),), ())  # noqa: E731
        return step, lambda d, v, s, p: ((d[0],), (d[0],), (None,), ())

    return xprnn.Cell(f"constant*/\n\\{value}", 1, build)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e-30, 0.1])
def test_constants_and_names_of_any_kind(compiled, value):
    for bits in (32, 64):
        compiled(pointwise_kernels(constant_cell(value), bits).source, "sm_80")


def test_what_cannot_be_traced_is_not_printed():
    build = lambda xp: (lambda x, h, s, p: ((xp.atan(x[0]),), ()), partial(lambda *a: None))  # noqa: E731
    assert pointwise_kernels(xprnn.Cell("atan", 1, build), 32) is None
