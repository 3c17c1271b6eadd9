"""NVIDIA's compiler on every configuration of the persistent kernels: it accepts them, and nothing spills."""

from __future__ import annotations

import nvrtc
import pytest
from persistent_cases import config_for

from xprnn.kernels.cuda import persistent

pytestmark = pytest.mark.skipif(nvrtc.library() is None, reason="needs nvidia-cuda-nvrtc")
REGISTERS, SHARED = 1 << 16, 227 * 1024  # of a multiprocessor, and of a block: compute capability 9.0 and 10.0


def named(config):
    return f"{config.cell}-{config.units}-{config.rows}"


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("config", persistent.configurations(), ids=named)
def test_every_configuration_compiles_without_spills(config, arch):
    _, kernels = nvrtc.compiled(persistent.source(), arch, config.options())
    assert set(kernels) == set(persistent.KERNELS)
    for name, kernel in kernels.items():
        assert (kernel.stack, kernel.spill_stores, kernel.spill_loads) == (0, 0, 0), (name, kernel)
        assert kernel.registers * config.threads <= REGISTERS, (name, kernel)
        assert config.shared_bytes(name == persistent.KERNELS[1]) <= SHARED


def test_a_spill_is_seen():
    """One configuration asked to hold all of its weight in registers."""
    greedy = config_for("tanh", 1024, 1)._replace(held=(8, 8))
    _, kernels = nvrtc.compiled(persistent.source(), 90, greedy.options())
    assert all(kernel.spill_stores for kernel in kernels.values())


@pytest.mark.skipif(nvrtc.disassembler() is None, reason="needs nvidia-cuda-nvdisasm")
@pytest.mark.parametrize("config", [config_for(*c) for c in (("tanh", 64, 1), ("tanh", 512, 2), ("lstm", 256, 4))], ids=named)
def test_the_time_loop_waits_for_no_memory(config, tmp_path):
    """The two cluster barriers around the loop flush memory; inside, messages and shared memory are all there is."""
    code, _ = nvrtc.compiled(persistent.source(), 90, config.options())
    for name, lines in nvrtc.instructions(code, tmp_path).items():
        fences = [k for k, line in enumerate(lines) if line.startswith(("MEMBAR", "CCTL", "ERRBAR"))]
        (into, out) = (k for k, line in enumerate(lines) if line.startswith("UCGABAR_ARV"))
        assert all(into - 8 < k < into + 8 or out - 8 < k < out + 8 for k in fences), (name, fences, into, out)
        loop = lines[into + 8 : out - 8]
        sent = [line for line in loop if line.startswith("STAS.128" if config.blocks > 1 else "STS.128")]
        waits = [line for line in loop if line.startswith("SYNCS.PHASECHK" if config.blocks > 1 else "BAR.SYNC")]
        assert sent, name
        assert waits, name
        assert not any(line.startswith(("LDL", "STL")) for line in lines), name
