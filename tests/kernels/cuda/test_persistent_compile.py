"""NVIDIA's compiler on every configuration of the persistent kernels: it takes them, and nothing spills."""

from __future__ import annotations

import os

import pytest
from support.cuda import nvrtc
from support.cuda.persistent_cases import config_for

from xprnn.kernels.cuda import persistent
from xprnn.kernels.cuda.cluster_config import all_configs

pytestmark = pytest.mark.needs("cupy")
REGISTERS, SHARED = 1 << 16, 227 << 10  # of a multiprocessor; of a block
DISASSEMBLED = [("tanh", 64, 1), ("tanh", 512, 2), ("lstm", 256, 4), ("gru", 512, 2)]


@pytest.fixture(scope="module", autouse=True)
def here():
    """Where the session asks for NVRTC, its absence is an error and not a skip."""
    if nvrtc.missing_reason() and os.environ.get("XPRNN_NVRTC") != "required":
        pytest.skip(nvrtc.missing_reason())


def named(config):
    return f"{config.cell_name}-{config.padded_hidden_size}-{config.rows_per_cluster}"


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize("config", all_configs(), ids=named)
def test_every_configuration_compiles_without_spills(config, arch):
    report = nvrtc.compile_resources(persistent.kernel_source(), arch, config.compiler_options())
    assert set(report) == set(persistent.KERNEL_NAMES)
    for name, kernel in report.items():
        print(f"{named(config)} {name} {arch}: {kernel.registers} registers")
        assert (kernel.stack_bytes, kernel.spilled_bytes) == (0, 0), (name, kernel)
        assert kernel.registers * config.threads_per_block <= REGISTERS, (name, kernel)
        assert config.shared_mem_bytes(name == persistent.KERNEL_NAMES[1]) <= SHARED


def test_a_spill_is_seen():
    """A configuration that is asked to hold all of its weight in registers."""
    greedy = config_for("tanh", 1024, 2)._replace(register_chunks=(8, 8))
    report = nvrtc.compile_resources(persistent.kernel_source(), "sm_90", greedy.compiler_options())
    assert all(kernel.spilled_bytes for kernel in report.values())


@pytest.mark.parametrize("config", [config_for(*c) for c in DISASSEMBLED], ids=named)
def test_the_time_loop_waits_for_no_memory(config, tmp_path):
    """The cluster barriers before and after the loop flush memory; in it, messages and shared memory are all there is.

    A fence in the loop would cost each step a way to the second-level cache and back.
    """
    if nvrtc.disassembler_path() is None and os.environ.get("XPRNN_NVRTC") != "required":
        pytest.skip("the wheel nvidia-cuda-nvdisasm is not installed")
    _, binary = nvrtc.compile_cubin(persistent.kernel_source(), "sm_90", config.compiler_options())
    found = nvrtc.instructions(binary, tmp_path)
    assert set(found) == set(persistent.KERNEL_NAMES)
    for name, lines in found.items():
        fences = [k for k, line in enumerate(lines) if line.startswith(("MEMBAR", "CCTL", "ERRBAR"))]
        into, out = (k for k, line in enumerate(lines) if line.startswith("UCGABAR_ARV"))
        assert fences, name
        assert all(into - 8 < k < into + 8 or out - 8 < k < out + 8 for k in fences), (name, fences, into, out)
        loop = lines[into + 8 : out - 8]
        sends, waits = ("STAS.128", "SYNCS.PHASECHK") if config.cluster_size > 1 else ("STS.128", "BAR.SYNC")
        assert any(line.startswith(sends) for line in loop), name
        assert any(line.startswith(waits) for line in loop), name
        assert not any(line.startswith(("LDL", "STL")) for line in lines), name
