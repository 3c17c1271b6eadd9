"""The persistent kernels' configurations: how many blocks share a layer, and what of its weight each holds where."""

from functools import lru_cache
from math import ceil
from typing import NamedTuple

__all__ = ["GATE_COUNTS", "ClusterConfig", "all_configs", "choose_config", "max_hidden_size"]

GATE_COUNTS = {"tanh": 1, "relu": 1, "gru": 3, "lstm": 4}  # and their gates; the order is that of persistent_cells.cu

# cell: units: (blocks of a cluster, threads of a block, {rows: chunks in registers, forward and backward}).
# tests/kernels/cuda/test_persistent_compile.py holds the compiler to these: a row that does not fit spills, and the test fails.
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
    """What the source is compiled for."""

    cell_name: str
    padded_hidden_size: int  # hidden units, the layer's own filled up with idle ones
    cluster_size: int  # of a cluster
    threads_per_block: int  # of a block
    rows_per_cluster: int  # of a cluster
    register_chunks: tuple[int, int]  # chunks of the weight in registers, forward and backward

    def compiler_options(self) -> tuple[str, ...]:
        """The compiler's."""
        number = list(GATE_COUNTS).index(self.cell_name)
        values = {
            "CELL": number,
            "HP": self.padded_hidden_size,
            "CL": self.cluster_size,
            "NT": self.threads_per_block,
            "B": self.rows_per_cluster,
        }
        values |= {"KF": self.register_chunks[0], "KB": self.register_chunks[1]}
        return ("--std=c++17", *(f"-D{name}={value}" for name, value in values.items()))

    def shared_mem_bytes(self, backward: bool) -> int:
        """Shared memory of a block: the chunks that are not in registers, two buffers, two barriers."""
        gates = GATE_COUNTS[self.cell_name]
        length = self.padded_hidden_size * (gates if backward else 1)
        outputs = self.padded_hidden_size // self.cluster_size * (1 if backward else gates)
        wide = 32 * (2 if length % 128 else 4)
        rest = (length // wide - self.register_chunks[backward]) * wide
        return 4 * (rest * outputs + 2 * self.rows_per_cluster * length) + 16


def all_configs() -> list[ClusterConfig]:
    """Every configuration that ships."""
    return [
        ClusterConfig(cell, units, blocks, threads, rows, held)
        for cell, sizes in _CONFIG_TABLE.items()
        for units, (blocks, threads, choices) in sizes.items()
        for rows, held in choices.items()
    ]


def max_hidden_size(cell: str) -> int:
    """The largest layer that fits on the chip."""
    return max(_CONFIG_TABLE[cell])


@lru_cache(maxsize=256)
def choose_config(cell_name: str, hidden: int, n: int, compute_capability: tuple[int, int]) -> ClusterConfig | str:
    """The configuration that should take the least time for n rows of a layer (see `_estimated_cycles`), or why there is none."""
    units = min((k for k in _CONFIG_TABLE[cell_name] if k >= hidden), default=0)
    if not units:
        return f"{hidden} units of {cell_name} are more than fit on the chip, at most {max_hidden_size(cell_name)}"
    blocks, threads, choices = _CONFIG_TABLE[cell_name][units]
    made = [ClusterConfig(cell_name, units, blocks, threads, rows, held) for rows, held in choices.items()]
    room = (99 if compute_capability[0] == 12 else 227) * 1024
    made = [c for c in made if max(c.shared_mem_bytes(False), c.shared_mem_bytes(True)) <= room]
    if not made:
        return f"{units} units of {cell_name} need more shared memory than the device has"
    return min(made, key=lambda c: _estimated_cycles(c, n))


def _estimated_cycles(c: ClusterConfig, n: int) -> float:
    """A model of a step, not a measurement: waves of clusters, each some 700 cycles of waiting beside its arithmetic.

    132 multiprocessors (an H100 or H200) of 128 multiplications and 32 words from shared memory a cycle.
    """
    waves = ceil(ceil(n / c.rows_per_cluster) / (132 // c.cluster_size))
    multiply = GATE_COUNTS[c.cell_name] * c.padded_hidden_size**2 / c.cluster_size / 128
    read = c.threads_per_block / 32 * c.padded_hidden_size / 32
    weights = (c.shared_mem_bytes(False) - 8 * c.rows_per_cluster * c.padded_hidden_size) / 128
    return waves * (700 + max(c.rows_per_cluster * multiply, c.rows_per_cluster * read + weights))
