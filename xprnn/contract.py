"""What a cell's functions must return, held against what they do return: only a cell of your own can break it.

A result that is too short would otherwise pass for a zero somewhere far from its cause.
"""

from collections.abc import Callable
from typing import Any

from xprnn.arrays import InputError

__all__ = ["checked"]


def checked(cell: Any, built: Any) -> tuple[Callable[..., Any], ...]:
    """What `cell.build` returned, as functions whose results are counted at every call.

    Args:
        cell: the xprnn.Cell.
        built: (step, back), with early gates (step, back, early, early_back).

    Raises:
        InputError: other than these functions; and each function, when it is called: results of other lengths.
    """
    functions = tuple(f for f in built if f is not None) if isinstance(built, (tuple, list)) else ()
    names = ("step", "back", *(("early", "early_back") if cell.early else ()))
    if len(functions) != len(names) or not all(map(callable, functions)):
        found = f"{len(built)} of them" if isinstance(built, (tuple, list)) else type(built).__name__
        raise InputError(f"Cell {cell.name}: build must return the functions ({', '.join(names)}), found {found}")
    states, vectors, late = len(cell.states), len(cell.vectors), cell.gates - cell.early
    results: dict[str, dict[str, int | None]] = {
        "step": {"state": states, "saved": None},
        "back": {"dx": cell.gates, "dh": late, "dstate": states, "dp": vectors},
        "early": {"values": None},  # and q, an array
        "early_back": {"dx": cell.early, "dstate": states, "dp": vectors},
    }
    return tuple(_counted(cell, name, f, results[name]) for name, f in zip(names, functions, strict=True))


def _counted(cell: Any, name: str, function: Callable[..., Any], parts: dict[str, int | None]) -> Callable[..., Any]:
    wanted = (*parts, "q") if name == "early" else tuple(parts)

    def run(*args: Any) -> Any:
        found = function(*args)
        _check(cell, f"{name} must return ({', '.join(wanted)})", found, len(wanted))
        for (part, count), value in zip(parts.items(), found, strict=False):
            _check(cell, f"{part} that {name} returns must be a tuple", value, count)
        return found

    return run


def _check(cell: Any, must: str, found: Any, count: int | None) -> None:
    if not isinstance(found, (tuple, list)):
        raise InputError(f"Cell {cell.name}: {must}, found {type(found).__name__}")
    if count is not None and len(found) != count:
        raise InputError(f"Cell {cell.name}: {must} of {count}, found {len(found)}")
