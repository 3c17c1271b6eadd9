"""NVRTC compiles every configuration of the persistent kernels without register spills."""

from __future__ import annotations

import os

import pytest
from support.cuda import nvrtc
from support.cuda.persistent_cases import config_for

from xprnn.kernels.cuda import persistent
from xprnn.kernels.cuda.cluster_config import all_configs

pytestmark = [pytest.mark.needs("cupy"), pytest.mark.usefixtures("nvrtc_installed")]
MAX_REGISTERS, MAX_SHARED_BYTES = 1 << 16, 227 << 10  # per multiprocessor, per block
DISASSEMBLED = [("tanh", 64, 1), ("tanh", 512, 2), ("lstm", 256, 4), ("gru", 512, 2)]


def config_id(config):
    return f"{config.cell_name}-{config.padded_hidden_size}-{config.rows_per_cluster}"


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize("config", all_configs(), ids=config_id)
def test_every_configuration_compiles_without_spills(config, arch):
    report = nvrtc.compile_resources(persistent.kernel_source(), arch, config.compiler_options())
    assert set(report) == set(persistent.KERNEL_NAMES)
    for name, kernel in report.items():
        print(f"{config_id(config)} {name} {arch}: {kernel.registers} registers")
        assert (kernel.stack_bytes, kernel.spilled_bytes) == (0, 0), (name, kernel)
        assert kernel.registers * config.threads_per_block <= MAX_REGISTERS, (name, kernel)
        assert config.shared_mem_bytes(name == persistent.KERNEL_NAMES[1]) <= MAX_SHARED_BYTES


def test_report_shows_spills_of_an_oversized_configuration():
    """A configuration that holds its whole weight in registers must spill."""
    greedy = config_for("tanh", 1024, 2)._replace(register_chunks=(8, 8))
    report = nvrtc.compile_resources(persistent.kernel_source(), "sm_90", greedy.compiler_options())
    assert all(kernel.spilled_bytes for kernel in report.values())


@pytest.mark.parametrize("config", [config_for(*c) for c in DISASSEMBLED], ids=config_id)
def test_time_loop_contains_no_memory_fence(config, tmp_path):
    """Only the cluster barriers before and after the loop flush memory.

    A fence in the loop would cost each step a round trip to the L2 cache.
    """
    if nvrtc.disassembler_path() is None and os.environ.get("XPRNN_NVRTC") != "required":
        pytest.skip("the wheel nvidia-cuda-nvdisasm is not installed")
    _, binary = nvrtc.compile_cubin(persistent.kernel_source(), "sm_90", config.compiler_options())
    machine_code = nvrtc.instructions(binary, tmp_path)
    assert set(machine_code) == set(persistent.KERNEL_NAMES)
    for name, lines in machine_code.items():
        fences = [k for k, line in enumerate(lines) if line.startswith(("MEMBAR", "CCTL", "ERRBAR"))]
        into, out = (k for k, line in enumerate(lines) if line.startswith("UCGABAR_ARV"))
        assert fences, name
        assert all(into - 8 < k < into + 8 or out - 8 < k < out + 8 for k in fences), (name, fences, into, out)
        loop = lines[into + 8 : out - 8]
        sends, waits = ("STAS.128", "SYNCS.PHASECHK") if config.cluster_size > 1 else ("STS.128", "BAR.SYNC")
        assert any(line.startswith(sends) for line in loop), name
        assert any(line.startswith(waits) for line in loop), name
        assert not any(line.startswith(("LDL", "STL")) for line in lines), name
