"""Launch configurations of the persistent kernels: cluster size, threads, batch rows and register use."""

from functools import lru_cache
from math import ceil
from typing import NamedTuple

__all__ = ["GATE_COUNTS", "ClusterConfig", "all_configs", "choose_config", "max_hidden_size"]

GATE_COUNTS = {
    "tanh": 1,
    "relu": 1,
    "gru": 3,
    "lstm": 4,
}  # the index of a name is its CELL number in persistent_cells.cu

# {cell: {padded hidden size: (blocks per cluster, threads per block,
#     {batch rows per cluster: (weight chunks in registers in forward, in backward)})}}
# tests/kernels/cuda/test_persistent_compile.py compiles every entry and fails if one spills registers.
_ELMAN_CONFIGS = {
    64: (1, 256, {1: (1, 1), 2: (1, 1), 4: (1, 1)}),
    128: (1, 512, {1: (1, 1), 2: (1, 1), 4: (1, 1)}),
    256: (4, 256, {1: (2, 2), 2: (2, 2), 4: (2, 2)}),
    512: (8, 256, {1: (4, 4), 2: (4, 4), 4: (4, 4)}),
    1024: (16, 256, {1: (5, 5), 2: (5, 5), 4: (4, 4)}),
}
_CONFIG_TABLE: dict[str, dict[int, tuple[int, int, dict[int, tuple[int, int]]]]] = {
    "tanh": _ELMAN_CONFIGS,
    "relu": _ELMAN_CONFIGS,
    "gru": {
        64: (1, 256, {1: (1, 3), 2: (1, 3), 4: (1, 3)}),
        128: (4, 256, {1: (1, 3), 2: (1, 3), 4: (1, 3)}),
        256: (8, 256, {1: (2, 6), 2: (2, 6), 4: (2, 6)}),
        512: (16, 256, {1: (3, 10), 2: (3, 10), 4: (2, 9)}),
    },
    "lstm": {
        64: (1, 256, {1: (1, 2), 2: (1, 2)}),
        128: (4, 256, {1: (1, 4), 2: (1, 4), 4: (1, 4)}),
        256: (8, 256, {1: (2, 8), 2: (2, 8), 4: (2, 8)}),
        512: (16, 256, {1: (2, 11), 2: (2, 11), 4: (1, 9)}),
    },
}


class ClusterConfig(NamedTuple):
    """The compile-time constants of the persistent kernels."""

    cell_name: str
    padded_hidden_size: int  # the hidden size, padded with unused units
    cluster_size: int  # blocks per cluster
    threads_per_block: int
    rows_per_cluster: int  # batch rows per cluster
    register_chunks: tuple[int, int]  # weight chunks held in registers: forward, backward

    def compiler_options(self) -> tuple[str, ...]:
        """Return the options of NVRTC: the C++ standard and the macros of persistent.cu."""
        cell_number = list(GATE_COUNTS).index(self.cell_name)
        values = {
            "CELL": cell_number,
            "HP": self.padded_hidden_size,
            "CL": self.cluster_size,
            "NT": self.threads_per_block,
            "B": self.rows_per_cluster,
        }
        values |= {"KF": self.register_chunks[0], "KB": self.register_chunks[1]}
        return ("--std=c++17", *(f"-D{name}={value}" for name, value in values.items()))

    def shared_mem_bytes(self, backward: bool) -> int:
        """Return the bytes of shared memory per block: weight chunks not in registers, two buffers, two barriers."""
        gates = GATE_COUNTS[self.cell_name]
        length = self.padded_hidden_size * (gates if backward else 1)
        outputs = self.padded_hidden_size // self.cluster_size * (1 if backward else gates)
        chunk = 32 * (2 if length % 128 else 4)
        in_shared = (length // chunk - self.register_chunks[backward]) * chunk
        return 4 * (in_shared * outputs + 2 * self.rows_per_cluster * length) + 16


def all_configs() -> list[ClusterConfig]:
    """List every configuration of the table."""
    return [
        ClusterConfig(cell, padded, cluster_size, threads, rows, chunks)
        for cell, sizes in _CONFIG_TABLE.items()
        for padded, (cluster_size, threads, choices) in sizes.items()
        for rows, chunks in choices.items()
    ]


def max_hidden_size(cell: str) -> int:
    """Return the largest hidden size whose weight fits on the chip."""
    return max(_CONFIG_TABLE[cell])


@lru_cache(maxsize=256)
def choose_config(cell_name: str, hidden: int, n: int, compute_capability: tuple[int, int]) -> ClusterConfig | str:
    """Return the configuration with the least estimated time for n batch rows, or the reason why there is none."""
    padded = min((k for k in _CONFIG_TABLE[cell_name] if k >= hidden), default=0)
    if not padded:
        return f"{hidden} units of {cell_name} are more than fit on the chip, at most {max_hidden_size(cell_name)}"
    cluster_size, threads, choices = _CONFIG_TABLE[cell_name][padded]
    candidates = [
        ClusterConfig(cell_name, padded, cluster_size, threads, rows, chunks) for rows, chunks in choices.items()
    ]
    shared_mem_limit = (99 if compute_capability[0] == 12 else 227) * 1024
    candidates = [c for c in candidates if max(c.shared_mem_bytes(False), c.shared_mem_bytes(True)) <= shared_mem_limit]
    if not candidates:
        return f"{padded} units of {cell_name} need more shared memory than the device has"
    return min(candidates, key=lambda c: _estimated_cycles(c, n))


def _estimated_cycles(c: ClusterConfig, n: int) -> float:
    """Estimate the cycles of one step from a model, not from a measurement.

    The clusters run in waves; each wave costs 700 cycles of latency plus its arithmetic. The model assumes 132
    multiprocessors (H100, H200), each with 128 multiplications and 32 shared-memory words per cycle.
    """
    waves = ceil(ceil(n / c.rows_per_cluster) / (132 // c.cluster_size))
    multiply = GATE_COUNTS[c.cell_name] * c.padded_hidden_size**2 / c.cluster_size / 128
    read = c.threads_per_block / 32 * c.padded_hidden_size / 32
    weights = (c.shared_mem_bytes(False) - 8 * c.rows_per_cluster * c.padded_hidden_size) / 128
    return waves * (700 + max(c.rows_per_cluster * multiply, c.rows_per_cluster * read + weights))
