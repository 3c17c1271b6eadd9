"""NVRTC compiles the generated CUDA kernels of every cell, dtype and architecture, without a GPU."""

from __future__ import annotations

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
MAX_REGISTERS = 64  # blocks have 128 threads: 8 of them then fit on a multiprocessor, which hides latencies


@pytest.mark.usefixtures("nvrtc_installed")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", [*PRINTED, "everything"])
def test_every_kernel_compiles_without_register_spills(name, arch):
    for bits in (32, 64):
        text = pointwise_kernels(everything_cell() if name == "everything" else CELLS[name], bits).source
        report = nvrtc.compile_resources(text, arch)
        assert report.keys() == {"forward_step", "backward_step"}
        for kernel, resources in report.items():
            assert resources.spilled_bytes == 0, (kernel, resources)
            # Only sin and cos use the stack: for the table of the Payne-Hanek reduction of large angles.
            assert resources.stack_bytes == 0 or name == "everything", (kernel, resources)
            assert resources.registers <= (MAX_REGISTERS if name != "everything" else 128), (kernel, resources)


@pytest.mark.usefixtures("nvrtc_installed")
def test_compiler_report_shows_spills_errors_and_warnings():
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
    assert nvrtc.compile_resources(spills, "sm_90")["greedy"].spilled_bytes > 0
    with pytest.raises(AssertionError, match="undefined"):
        nvrtc.compile_resources('extern "C" __global__ void k() { nothing(); }', "sm_90")
    with pytest.raises(AssertionError, match="never referenced"):
        nvrtc.compile_resources('extern "C" __global__ void k() { int unused; }', "sm_90")


@pytest.mark.usefixtures("nvrtc_installed")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("bits", [32, 64])
def test_segment_sum_compiles_without_register_spills(bits, arch):
    resources = nvrtc.compile_resources(segment_sum.kernel_source(bits), arch)["segment_sum_into"]
    assert (resources.spilled_bytes, resources.stack_bytes) == (0, 0)


def test_float32_source_contains_no_double():
    """A constant or function of the wrong width would compute in double precision."""
    for name in PRINTED:
        text = pointwise_kernels(CELLS[name], 32).source
        assert "double" not in text.replace("__longlong_as_double", ""), name
        for op in ("tanh", "exp", "fabs"):
            assert f" {op}(" not in text, name


def test_source_of_everything_cell_uses_all_functions():
    text = pointwise_kernels(everything_cell(), 32).source
    names = ["log", "log1p", "sqrt", "pow", "sin", "cos", "sinh", "cosh", "exp", "expm1", "fabs", "tanh"]
    assert [f for f in names if f"{f}f(" not in text] == []
    assert set(OP_TEMPLATES) >= {"maximum", "sign", "where"}


def constant_cell(value: float) -> xprnn.Cell:
    def build(xp):
        step = lambda x, h, s, p: ((xp.minimum(x[0] + h[0], value),), ())  # noqa: E731
        return step, lambda d, v, s, p: ((d[0],), (d[0],), (None,), ())

    return xprnn.Cell(f"constant*/\n\\{value}", 1, build)


@pytest.mark.usefixtures("nvrtc_installed")
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e-30, 0.1])
def test_special_constants_and_cell_names_compile(value):
    for bits in (32, 64):
        nvrtc.compile_resources(pointwise_kernels(constant_cell(value), bits).source, "sm_80")


def test_untraceable_cell_has_no_kernels():
    build = lambda xp: (lambda x, h, s, p: ((xp.atan(x[0]),), ()), partial(lambda *a: None))  # noqa: E731
    assert pointwise_kernels(xprnn.Cell("atan", 1, build), 32) is None
