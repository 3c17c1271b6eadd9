"""numba signatures of the entry points in bind.py.

This module imports numba. Import it only when a kernel is about to run.
"""

from typing import Any

from numba import types

__all__ = ["entry_signature"]


def entry_signature(name: str, bits: int, num_states: int, num_vectors: int, integer: bool) -> tuple[list[str], Any]:
    """Return the argument names and the numba signature of an entry point.

    Inputs may be strided and read-only. Arrays that are written are C-contiguous.

    Args:
        name: of a function in bind.py or bind_backward.py.
        bits: 32 or 64, of a float.
        num_states: the number of the cell's states.
        num_vectors: the number of the cell's vectors.
        integer: x holds class numbers.
    """
    arguments = _Arguments(types.float32 if bits == 32 else types.float64, num_states, num_vectors, integer)
    named: dict[str, Any] = getattr(arguments, name)()
    return list(named), types.int64(*named.values())


def _each(kind: Any, count: int) -> Any:
    return types.UniTuple(kind, count) if count else types.Tuple(())


_MASK = types.Array(types.uint8, 2, "C", readonly=True)
_ROWS = {"first_row": types.int64, "rows": types.int64}


class _Arguments:
    """The types of the arguments, in order, of the entry points: one method for each."""

    def __init__(self, real: Any, num_states: int, num_vectors: int, integer: bool) -> None:
        self.real, self.num_states, self.integer = real, num_states, integer
        self.template = types.Array(types.int64, 1, "C")
        self.vectors = _each(self.read(1), num_vectors)
        self.states = _each(self.read(3), num_states)
        self.written_states = _each(self.written(3), num_states)

    def read(self, rank: int, kind: Any = None) -> Any:
        """Return the type of an input array."""
        return types.Array(kind or self.real, rank, "A", readonly=True)

    def written(self, rank: int, layout: str = "C") -> Any:
        """Return the type of an output array."""
        return types.Array(self.real, rank, layout)

    def _head(self, rank: int) -> dict[str, Any]:
        x = self.read(rank - 1, types.int64) if self.integer else self.read(rank)
        weights = {"weight_ih": self.read(2), "weight_hh": self.read(2)}
        return {"template": self.template, "layer": types.int64, "x": x, **weights}

    def _forward_head(self, rank: int) -> dict[str, Any]:
        biases = {"bias_ih": self.read(1), "bias_hh": self.read(1)}
        return {**self._head(rank), **biases, "vectors": self.vectors, "initial": self.states}

    def step(self) -> dict[str, Any]:
        """Return the arguments of bind.step."""
        return {**self._forward_head(2), "y": self.written(2), "final": self.written_states}

    def plain_forward(self) -> dict[str, Any]:
        """Return the arguments of bind.plain_forward."""
        tape = {"output": self.written(3), "saved": self.written(1)}
        return {**self._forward_head(3), **tape, "final": self.written_states}

    def forward(self) -> dict[str, Any]:
        """Return the arguments of bind.forward."""
        options = {"weight_hr": self.read(2), "reset_state": self.states, "active": _MASK, "reset": _MASK}
        return {**self.plain_forward(), **options, "y": self.written(3, "A"), **_ROWS}

    def backward(self) -> dict[str, Any]:
        """Return the arguments of bind_backward.backward."""
        matrix, vector = self.written(2), self.written(1)
        gradients = types.Tuple((matrix, matrix, vector, vector, matrix, self.written(3)))
        tape = {"output": self.read(3), "saved": self.read(1), "dy": self.read(3), "dfinal": self.states}
        results = {"dx": self.written(4 if self.integer else 3), "gradients": gradients}
        options = {"weight_hr": self.read(2), "active": _MASK, "reset": _MASK}
        options |= {"injected": _each(self.read(3), self.num_states - 1)}
        options |= {"dreset": _each(self.written(2), self.num_states)}
        head = {**self._head(3), "vectors": self.vectors, **tape, **results, "dinitial": self.written_states}
        return {**head, **options, **_ROWS, "add_to_dx": types.boolean}
