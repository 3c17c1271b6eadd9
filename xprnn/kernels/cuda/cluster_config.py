"""The persistent kernels' configurations: how many blocks share a layer, and what of its weight each holds where."""

from functools import lru_cache
from math import ceil
from typing import NamedTuple

__all__ = ["CELLS", "Config", "choose", "configurations", "most_units"]

CELLS = {"tanh": 1, "relu": 1, "gru": 3, "lstm": 4}  # and their gates; the order is that of persistent_cells.cu

# cell: units: (blocks of a cluster, threads of a block, {rows: chunks in registers, forward and backward}).
# tests/kernels/cuda/test_persistent_compile.py holds the compiler to these: a row that does not fit spills, and the test fails.
_ELMAN = {
    64: (1, 256, {1: (1, 1), 2: (1, 1), 4: (1, 1)}),
    128: (1, 512, {1: (1, 1), 2: (1, 1), 4: (1, 1)}),
    256: (4, 256, {1: (2, 2), 2: (2, 2), 4: (2, 2)}),
    512: (8, 256, {1: (4, 4), 2: (4, 4), 4: (4, 4)}),
    1024: (16, 256, {1: (5, 5), 2: (5, 5), 4: (4, 4)}),
}
_TABLE: dict[str, dict[int, tuple[int, int, dict[int, tuple[int, int]]]]] = {
    "tanh": _ELMAN,
    "relu": _ELMAN,
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


class Config(NamedTuple):
    """What the source is compiled for."""

    cell: str
    units: int  # hidden units, the layer's own filled up with idle ones
    blocks: int  # of a cluster
    threads: int  # of a block
    rows: int  # of a cluster
    held: tuple[int, int]  # chunks of the weight in registers, forward and backward

    def options(self) -> tuple[str, ...]:
        """The compiler's."""
        number = list(CELLS).index(self.cell)
        values = {"CELL": number, "HP": self.units, "CL": self.blocks, "NT": self.threads, "B": self.rows}
        values |= {"KF": self.held[0], "KB": self.held[1]}
        return ("--std=c++17", *(f"-D{name}={value}" for name, value in values.items()))

    def shared_bytes(self, backward: bool) -> int:
        """Shared memory of a block: the chunks that are not in registers, two buffers, two barriers."""
        gates = CELLS[self.cell]
        length = self.units * (gates if backward else 1)
        outputs = self.units // self.blocks * (1 if backward else gates)
        wide = 32 * (2 if length % 128 else 4)
        rest = (length // wide - self.held[backward]) * wide
        return 4 * (rest * outputs + 2 * self.rows * length) + 16


def configurations() -> list[Config]:
    """Every configuration that ships."""
    return [
        Config(cell, units, blocks, threads, rows, held)
        for cell, sizes in _TABLE.items()
        for units, (blocks, threads, choices) in sizes.items()
        for rows, held in choices.items()
    ]


def most_units(cell: str) -> int:
    """The largest layer that fits on the chip."""
    return max(_TABLE[cell])


@lru_cache(maxsize=256)
def choose(name: str, hidden: int, n: int, capability: tuple[int, int]) -> Config | str:
    """The configuration that should take the least time for n rows of a layer (see `_cycles`), or why there is none."""
    units = min((k for k in _TABLE[name] if k >= hidden), default=0)
    if not units:
        return f"{hidden} units of {name} are more than fit on the chip, at most {most_units(name)}"
    blocks, threads, choices = _TABLE[name][units]
    made = [Config(name, units, blocks, threads, rows, held) for rows, held in choices.items()]
    room = (99 if capability[0] == 12 else 227) * 1024
    made = [c for c in made if max(c.shared_bytes(False), c.shared_bytes(True)) <= room]
    if not made:
        return f"{units} units of {name} need more shared memory than the device has"
    return min(made, key=lambda c: _cycles(c, n))


def _cycles(c: Config, n: int) -> float:
    """A model of a step, not a measurement: waves of clusters, each some 700 cycles of waiting beside its arithmetic.

    132 multiprocessors (an H100 or H200) of 128 multiplications and 32 words from shared memory a cycle.
    """
    waves = ceil(ceil(n / c.rows) / (132 // c.blocks))
    multiply = CELLS[c.cell] * c.units**2 / c.blocks / 128
    read = c.threads / 32 * c.units / 32
    weights = (c.shared_bytes(False) - 8 * c.rows * c.units) / 128
    return waves * (700 + max(c.rows * multiply, c.rows * read + weights))
