"""Cell: the elementwise step of a recurrent unit, its adjoint, and checks of user-defined ones."""

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
    """The functions of a cell over one namespace; the last two are None unless the cell has pregates."""

    step: Callable[..., Any]
    backward: Callable[..., Any]
    pregate: Callable[..., Any] | None = None
    pregate_backward: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Cell:
    """A recurrent cell: the elementwise part of one time step, and its adjoint.

    The layer that uses a cell computes the matrix products and loops over time. For each gate k < G, the cell receives
    two arrays of shape (N, H):

        x[k] = row block k of  x_t W' + b_ih        (input projection; W is weight_ih)
        h[k] = row block k of  h_{t-1} U' + b_hh    (recurrent product; U is weight_hh)

    `build(xp)` returns two functions. Their arguments and results are tuples of arrays of the namespace `xp`:

        step(x, h, state, p)              -> new_state, saved
        backward(dstate, saved, state, p) -> dx, dh, dstate_prev, dp

        x, h         G arrays (N, H) each
        state        an array (N, H) for each name in `states`, before the step; state[0] is the output h_{t-1}
        p            an array (H,) for each name in `vectors`
        new_state    like state, after the step
        saved        any number of arrays (N, H) that `backward` needs
        dstate       cotangents of new_state
        dx, dh       cotangents of x and of h
        dstate_prev  cotangents of state, one entry for each state, without the path through h, which the layer adds;
                     an entry is None if there is no other path
        dp           cotangents of p as (N, H); the layer sums them over the batch and over time

    The functions may use operators, numbers and elementwise functions of the Array API standard, and no branch on
    values. The same code then runs on every array library, as in-place NumPy calls and in compiled loops. A cell that
    uses other functions of `xp` also works, but only on the slower reference path. To compute `backward` fast, write
    each cotangent as `d * (expression without d)`: kernels evaluate the expression for many steps at once.

    A cell may have E > 0 pregates: its first E gates change the state before the recurrent product of the other gates
    (for example, r in a GRU with reset_after=False). `build` then returns four functions, `step` and `backward` and

        pregate(x, h, state, p)                         -> values, q
        pregate_backward(dvalues, dq, values, state, p) -> dx, dstate_prev, dp

    `pregate` receives the first E entries of x and h. `values` begins with E arrays (N, H), which `step` receives in
    place of the first E entries of x. q (N, H) takes the place of h_{t-1} in the recurrent product of the other gates,
    and `step` receives only those G - E entries of h. `backward` returns the cotangents of `values` as the first E
    entries of dx, None for no influence. An entry of dp may be None in one of the two adjoints.

    Args:
        name: name of the cell in errors and configurations.
        gates: G >= 1, number of row blocks of H rows in weight_ih and weight_hh.
        build: function of a namespace that returns (step, backward), or with pregates (step, backward, pregate,
            pregate_backward).
        states: names of the state arrays; the first is the output h.
        vectors: names of the additional parameters of shape (H,), in the order of `p`.
        pregates: E, 0 <= E < G.
        options: set by the factories of `xprnn.cells` so that the cell can be saved; leave None in user-defined cells.
        gate_names: a name for each gate, used in printed code; by default gate0, gate1, ...

    Raises:
        InputError: `gates` or `build` is invalid; later, when the layer runs, a function of a user-defined cell does
            not return tuples of the documented lengths.

    A leaky unit, h' = h + a (f - h) with f = tanh(x W' + b_ih + h U' + b_hh) and a learned rate a for each unit:

    >>> import numpy as np, xprnn
    >>> def leaky(xp):
    ...     def step(x, h, state, p):
    ...         (v,), (rate,) = state, p
    ...         f = xp.tanh(x[0] + h[0])
    ...         return (v + rate * (f - v),), (f,)
    ...
    ...     def backward(dstate, saved, state, p):
    ...         (dv,), (f,), (v,), (rate,) = dstate, saved, state, p
    ...         da = dv * (rate * (1.0 - f * f))
    ...         return (da,), (da,), (dv * (1.0 - rate),), (dv * (f - v),)
    ...
    ...     return step, backward
    >>> layer = xprnn.Recurrent(3, 4, cell=xprnn.Cell("leaky", gates=1, build=leaky, vectors=("rate",)))
    >>> rng = np.random.default_rng(0)
    >>> params = layer.init(rng, like=np.zeros(1))
    >>> params["rate_l0"].shape
    (4,)

    `check_layer` compares the adjoint with central differences:

    >>> max(xprnn.check_layer(layer, params, rng.standard_normal((5, 2, 3))).values()) < 1e-6
    True
    """

    name: str
    gates: int
    build: Callable[[Any], Any]
    states: tuple[str, ...] = ("h",)
    vectors: tuple[str, ...] = ()
    pregates: int = 0
    options: tuple[tuple[str, Any], ...] | None = field(default=None, compare=False, repr=False)
    gate_names: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        gates: Any = self.gates
        if not isinstance(gates, int) or gates < 1:
            raise InputError(f"Cell {self.name}: gates must be an integer >= 1, found {self.gates!r}")
        if not callable(self.build):
            raise InputError(f"Cell {self.name}: build must be a function of a namespace, found {self.build!r}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        config = cell_to_config(self)
        if config is None or cell_from_config(config) != self:
            return super().__reduce_ex__(protocol)  # a user-defined cell pickles by reference to its functions
        return cell_from_config, (config,)

    def gate_name(self, k: int) -> str:
        """Return the name of gate k."""
        return self.gate_names[k] if k < len(self.gate_names) else f"gate{k}"

    def bind(self, xp: Any) -> Pointwise:
        """Return the functions of the cell over the namespace `xp`; user-defined ones check the lengths of results."""
        functions = self.build(xp)
        return Pointwise(*(functions if self.options is not None else with_result_checks(self, functions)))


def with_result_checks(cell: Any, built: Any) -> tuple[Callable[..., Any], ...]:
    """Wrap the functions of a user-defined cell, so that every call checks the lengths of the results.

    Args:
        cell: the Cell.
        built: result of `cell.build`: (step, backward), with pregates (step, backward, pregate, pregate_backward).

    Returns:
        The wrapped functions. They raise InputError if a result is not a tuple of the documented length.

    Raises:
        InputError: `built` is not a tuple of these functions.
    """
    functions = tuple(f for f in built if f is not None) if isinstance(built, (tuple, list)) else ()
    names = ("step", "backward", *(("pregate", "pregate_backward") if cell.pregates else ()))
    if len(functions) != len(names) or not all(map(callable, functions)):
        found = f"{len(built)} of them" if isinstance(built, (tuple, list)) else type(built).__name__
        raise InputError(f"Cell {cell.name}: build must return the functions ({', '.join(names)}), found {found}")
    states, vectors, other_gates = len(cell.states), len(cell.vectors), cell.gates - cell.pregates
    results: dict[str, dict[str, int | None]] = {
        "step": {"state": states, "saved": None},
        "backward": {"dx": cell.gates, "dh": other_gates, "dstate_prev": states, "dp": vectors},
        "pregate": {"values": None},  # q is an array, not a tuple
        "pregate_backward": {"dx": cell.pregates, "dstate_prev": states, "dp": vectors},
    }
    return tuple(_with_length_checks(cell, name, f, results[name]) for name, f in zip(names, functions, strict=True))


def _with_length_checks(
    cell: Any, name: str, function: Callable[..., Any], lengths: dict[str, int | None]
) -> Callable[..., Any]:
    """Wrap one function. `lengths`: name of each tuple that it returns -> required length, None for any."""
    result_names = (*lengths, "q") if name == "pregate" else tuple(lengths)

    def checked(*args: Any) -> Any:
        results = function(*args)
        _check_tuple(cell, f"{name} must return ({', '.join(result_names)})", results, len(result_names))
        for (result_name, length), value in zip(lengths.items(), results, strict=False):
            _check_tuple(cell, f"{result_name} that {name} returns must be a tuple", value, length)
        return results

    return checked


def _check_tuple(cell: Any, requirement: str, value: Any, length: int | None) -> None:
    if not isinstance(value, (tuple, list)):
        raise InputError(f"Cell {cell.name}: {requirement}, found {type(value).__name__}")
    if length is not None and len(value) != length:
        raise InputError(f"Cell {cell.name}: {requirement} of {length}, found {len(value)}")
