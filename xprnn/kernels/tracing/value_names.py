"""Names of traced values in printed code: those of the cell's gates, states and vectors."""

import keyword
import re
from collections.abc import Sequence
from typing import Any

from xprnn.cells.cell import Cell
from xprnn.kernels.tracing.graph import Value, input_names, nodes

__all__ = ["backward_names", "forward_names", "saved_names"]

# Names that a printed function uses for other things, and endings of its pointers.
_RESERVED = frozenset(
    """F H W np math abs range kernel args address first last row part start stop j load store offset tanh exp64
    scan_record float_pointer prefer_widest_vectors whole_units last_units padded_width recurrent_width first_padded
    h_padded P gemm edge zeros steps step num_rows last_argument recurrent_strategy packed_hh""".split()  # noqa: SIM905
)
_POINTER_ENDINGS = ("_p", "_row", "_address", "_stride", "_flip", *(f"_{k}" for k in range(10)))


def _identifier(name: str) -> str:
    """Return a name of the user's as an identifier that a printed function can use."""
    name = re.sub(r"\W", "_", name.removeprefix("weight_"), flags=re.ASCII)
    usable = name[:1].isalpha() and name not in _RESERVED and not keyword.iskeyword(name)
    usable = usable and (len(name) == 1 or not name.isupper())  # alias scopes are in capitals
    return name if usable and not name.endswith(_POINTER_ENDINGS) else f"v_{name}_"


def _input_name(cell: Cell, name: str, saved: Sequence[str] = ()) -> str:
    """Return the readable name of an input of a trace; see cell_trace.py for the letters."""
    letter, k = name[0], int(name[1:])
    if letter == "s":
        return _identifier(cell.states[k])
    if letter == "d":
        return _identifier(f"d{cell.states[k]}")
    if letter == "p":
        return _identifier(cell.vectors[k])
    if letter == "v":
        return saved[k] if k < len(saved) else f"saved{k}"
    prefix = {"g": "sum", "x": "x", "h": "h", "X": "d", "q": "dq"}[letter]
    return prefix if letter == "q" else _identifier(f"{prefix}_{cell.gate_name(k)}")


def forward_names(cell: Cell, new: Sequence[Any], saved: Sequence[Any]) -> dict[Value, str]:
    """Name the values of a step: the new states, and by each gate the last value that depends on that gate alone."""
    names: dict[Value, str] = {}
    named_gates: set[int] = set()
    for k, value in enumerate(new):
        if isinstance(value, Value) and value.op != "input":
            names.setdefault(value, _identifier(f"new_{cell.states[k]}"))
    for value in nodes([*new, *saved]):
        gates = {int(name[1:]) for name in input_names(value)}
        if value.op == "input":
            names[value] = _input_name(cell, value.name)
        elif {name[0] for name in input_names(value)} <= set("gxh") and len(gates) == 1 and not gates <= named_gates:
            names.setdefault(value, _identifier(cell.gate_name(*gates)))
            named_gates |= gates
    return names


def saved_names(cell: Cell, saved: Sequence[Any]) -> list[str]:
    """Name the saved values, as the inputs of an adjoint."""
    names = forward_names(cell, (), saved)
    return [names.get(value, f"saved{k}") if isinstance(value, Value) else f"saved{k}" for k, value in enumerate(saved)]


def backward_names(cell: Cell, outputs: Sequence[tuple[str, Any]], saved: Sequence[str]) -> dict[Value, str]:
    """Name the values of an adjoint: inputs, and outputs by the cotangent that they are."""
    values = [value for _, value in outputs]
    names = {v: _input_name(cell, v.name, saved) for v in nodes(values) if v.op == "input"}
    for name, value in outputs:
        if isinstance(value, Value) and value.op != "input":
            letter, k = name[0], int(name[1:])
            prefix = {"X": "dx_", "U": "dh_", "P": "d", "r": "dprevious_", "e": "dprevious_"}[letter]
            of = cell.gate_name(k) if letter in "XU" else cell.vectors[k] if letter == "P" else cell.states[k]
            names.setdefault(value, _identifier(prefix + of.removeprefix("weight_")))
    return names
