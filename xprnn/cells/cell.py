"""Cell: the elementwise step of a recurrent unit and its adjoint, with their configuration."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from xprnn.arrays.namespace import InputError
from xprnn.cells.serialization import cell_from_config, cell_to_config

__all__ = [
    "Cell",
    "Pointwise",
    "with_result_checks",
]


Values = tuple[Any, ...]


class Pointwise(NamedTuple):
    """A cell's functions over one namespace; the last two only where a part of a gate acts before its product."""

    step: Callable[..., Any]
    backward: Callable[..., Any]
    pregate: Callable[..., Any] | None = None
    pregate_backward: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Cell:
    """A recurrent cell: how many gates and states it has, and its elementwise maths.

    Args:
        name: how configurations and errors call it.
        gates: G, the number of row blocks of its weights, at least 1.
        build: namespace -> (step, back), see the module's text.
        states: names of its state arrays; the first is the output h.
        vectors: names of its own (H,) parameters, in the order of `p`.
        early: E > 0 where the first E gates act on the state before the other gates' recurrent product (GRU with
            reset_after=False): `build` then returns two functions more, `early(x, h, state, p) -> values, q` and
            its adjoint `early_back(dvalues, dq, values, state, p) -> dx, dstate, dp`; the other gates' product is
            q U', and `step` receives `values` in the place of the first E entries of x.
        options: what its factory here was given, for files (forms.cell_to_config); None for a cell of your own.

    >>> leak = Cell("leak", 1, lambda xp: (
    ...     lambda x, h, s, p: ((0.9 * s[0] + 0.1 * (x[0] + h[0]),), ()),
    ...     lambda ds, saved, s, p: ((0.1 * ds[0],), (0.1 * ds[0],), (0.9 * ds[0],), ()),
    ... ))
    >>> leak.states
    ('h',)
    """

    name: str
    gates: int
    build: Callable[[Any], Any]
    states: tuple[str, ...] = ("h",)
    vectors: tuple[str, ...] = ()
    pregates: int = 0
    options: tuple[tuple[str, Any], ...] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        gates: Any = self.gates
        if not isinstance(gates, int) or gates < 1:
            raise InputError(f"Cell {self.name}: gates must be an integer >= 1, found {self.gates!r}")
        if not callable(self.build):
            raise InputError(f"Cell {self.name}: build must be a function of a namespace, found {self.build!r}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        form = cell_to_config(self)
        if form is None or cell_from_config(form) != self:
            return super().__reduce_ex__(protocol)  # your own goes where its functions go
        return cell_from_config, (form,)

    def bind(self, xp: Any) -> Pointwise:
        """The cell's functions over the namespace `xp`; those of your own cell are held to their word."""
        built = self.build(xp)
        return Pointwise(*(built if self.options is not None else with_result_checks(self, built)))


def with_result_checks(cell: Any, built: Any) -> tuple[Callable[..., Any], ...]:
    """What `cell.build` returned, as functions whose results are counted at every call.

    Args:
        cell: the xprnn.Cell.
        built: (step, back), with early gates (step, back, early, early_back).

    Raises:
        InputError: other than these functions; and each function, when it is called: results of other lengths.
    """
    functions = tuple(f for f in built if f is not None) if isinstance(built, (tuple, list)) else ()
    names = ("step", "backward", *(("pregate", "pregate_backward") if cell.pregates else ()))
    if len(functions) != len(names) or not all(map(callable, functions)):
        found = f"{len(built)} of them" if isinstance(built, (tuple, list)) else type(built).__name__
        raise InputError(f"Cell {cell.name}: build must return the functions ({', '.join(names)}), found {found}")
    states, vectors, late = len(cell.states), len(cell.vectors), cell.gates - cell.pregates
    results: dict[str, dict[str, int | None]] = {
        "step": {"state": states, "saved": None},
        "backward": {"dx": cell.gates, "dh": late, "dstate": states, "dp": vectors},
        "pregate": {"values": None},  # and q, an array
        "pregate_backward": {"dx": cell.pregates, "dstate": states, "dp": vectors},
    }
    return tuple(_with_length_checks(cell, name, f, results[name]) for name, f in zip(names, functions, strict=True))


def _with_length_checks(
    cell: Any, name: str, function: Callable[..., Any], parts: dict[str, int | None]
) -> Callable[..., Any]:
    wanted = (*parts, "q") if name == "pregate" else tuple(parts)

    def run(*args: Any) -> Any:
        found = function(*args)
        _check_tuple(cell, f"{name} must return ({', '.join(wanted)})", found, len(wanted))
        for (part, count), value in zip(parts.items(), found, strict=False):
            _check_tuple(cell, f"{part} that {name} returns must be a tuple", value, count)
        return found

    return run


def _check_tuple(cell: Any, must: str, found: Any, count: int | None) -> None:
    if not isinstance(found, (tuple, list)):
        raise InputError(f"Cell {cell.name}: {must}, found {type(found).__name__}")
    if count is not None and len(found) != count:
        raise InputError(f"Cell {cell.name}: {must} of {count}, found {len(found)}")
