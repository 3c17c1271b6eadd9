"""Forward, backward and step of a recurrent layer: a stack of scans in one or two directions.

A unidirectional layer is one DirectionStack of all its layers. In a bidirectional layer each direction of each layer is
a DirectionStack, because the next layer needs the outputs of both directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.random import Generator

from xprnn.arrays import validation
from xprnn.arrays.namespace import Array, InputError, Namespace, Params, check_shape, resolve_namespace
from xprnn.engine import arguments, state_layout
from xprnn.engine.checkpointing import DirectionStack, DirectionStackTape, dropout_mask, segment_length
from xprnn.engine.layer import RecurrentLayer
from xprnn.kernels import reference
from xprnn.kernels.tape import Gradients, State, StepMask, UnpicklableTape

__all__ = [
    "StackTape",
    "backward",
    "forward",
    "step",
]


class PlanCache(Protocol):
    """Plans of calls that need no further checks; see call_cache.LayerCalls."""

    def add_plan(self, params: Params, x: Array, lengths: Any) -> bool:
        """Make the plan of a checked call; False if none applies."""

    def forward(
        self, params: Params, x: Array, state: Any, lengths: Any, *, record_tape: bool
    ) -> "tuple[Array, Any, StackTape | None] | None":
        """Run the plan of a call; None if an array does not fit."""


@dataclass(frozen=True)
class StackTape(UnpicklableTape):
    """Tape of a recurrent layer: the arrays that one forward pass saved for backward."""

    layer: RecurrentLayer
    xp: Namespace
    params: Params
    x: Array  # time-major
    y: Array
    direction_stacks: list[tuple[DirectionStack, DirectionStackTape]]  # bidirectional: layer by layer, forward first
    dropout_masks: list[Array]  # between the layers of a bidirectional stack; see DirectionStackTape for the others
    uses_default_state: bool  # True if `forward` was called with state=None

    def states(self) -> tuple[tuple[Array, ...], ...]:
        """Return the states after every step: for each layer and direction a tuple (h,) or (h, c) of (T, N, H)."""
        return tuple(s for stack, tape in self.direction_stacks for s in stack.states(tape))

    def explain(self) -> str:
        """Return one line for each direction stack: the kernel that ran it, and the number of segments."""
        lines = []
        for stack, tape in self.direction_stacks:
            direction, count = "reverse" if stack.reverse else "forward", len(tape.segments)
            segments = f", in {count} segments that backward runs again" if count > 1 else ""
            kernel = tape.scan_tapes[0].kernel_name
            lines.append(f"{stack.cell.name} x {len(stack.params)}, {direction}: {kernel}{segments}")
        return "\n".join(lines)


def _direction_stacks(layer: RecurrentLayer, xp: Namespace, params: Params) -> list[DirectionStack]:
    cell, by_layer = layer.resolved_cell, state_layout.params_by_layer(layer, params)
    if not layer.bidirectional:
        return [DirectionStack(xp, cell, by_layer, layer.reverse, layer.dropout, layer.sparse)]
    return [DirectionStack(xp, cell, [p], reverse=bool(i % 2), sparse=layer.sparse) for i, p in enumerate(by_layer)]


def _checkpoint_interval(
    where: str, layer: RecurrentLayer, checkpoint: Any, params: Params, count: int, n: int
) -> int | None:
    """The number of steps between checkpoints, or None.

    With G gates and S states, one step of tape and cotangents holds about 3 G + 4 S + 4 arrays (N, H).
    """
    if checkpoint is None:
        return None
    item = params["weight_hh_l0"].dtype.itemsize if hasattr(params["weight_hh_l0"].dtype, "itemsize") else 8
    cell, array_bytes = layer.resolved_cell, n * sum(layer.hidden_sizes) * item
    step_bytes = array_bytes * (3 * cell.gates + 4 * len(cell.states) + 4)
    return segment_length(where, checkpoint, count, step_bytes, array_bytes * len(cell.states))


def forward(
    layer: RecurrentLayer,
    params: Params,
    x: Array,
    state: Any,
    *,
    record_tape: bool,
    lengths: Any = None,
    mask: Any = None,
    reset: Any = None,
    rng: Generator | None = None,
    checkpoint: Any = None,
    plans: PlanCache | None = None,
) -> tuple[Array, Any, StackTape | None]:
    """Check all arguments and run a recurrent layer; see layers.Recurrent.forward.

    The tape is None unless `record_tape` is True. If a plan of `plans` applies, it is made and runs the call.
    """
    where = f"{type(layer).__name__}.forward" if record_tape else type(layer).__name__
    xp = arguments.check_call(where, layer, params, x, state, "NT" if layer.batch_first else "TN")
    validation.check_rng(where, rng, optional=True)
    caller_x, x = x, state_layout.time_major(layer, xp, x)
    count, n = x.shape[:2]
    step_mask = arguments.make_step_mask(where, layer, xp, x, lengths, mask, reset)
    initial = state_layout.unpack(where, layer, xp, params, n, state)
    if plans is not None and plans.add_plan(params, caller_x, lengths):
        result = plans.forward(params, caller_x, state, lengths, record_tape=record_tape)
        if result is not None:
            return result
    options = {
        "record_tape": record_tape,
        "rng": rng,
        "checkpoint_interval": _checkpoint_interval(where, layer, checkpoint, params, count, n),
    }
    stacks = _direction_stacks(layer, xp, params)
    y, finals, tapes, masks = _run_stacks(layer, xp, stacks, x, initial, step_mask, options)
    y = state_layout.time_major(layer, xp, y)
    tape = StackTape(layer, xp, params, x, y, tapes, masks, state is None) if record_tape else None
    return y, state_layout.pack(layer, xp, finals), tape


def _run_stacks(
    layer: RecurrentLayer,
    xp: Namespace,
    stacks: list[DirectionStack],
    x: Array,
    initial: list[State],
    step_mask: StepMask,
    options: dict[str, Any],
) -> tuple[Array, list[State], list[Any], list[Array]]:
    """Run the stacks one after the other, with dropout between the layers of a bidirectional stack.

    Returns y time-major, the final states, the pairs (stack, tape), and the dropout masks.
    """
    y, rng, masks = x, options["rng"], []
    finals, tapes = list[State](), list[Any]()
    group = len(stacks) // layer.num_layers or 1  # the number of stacks that read the same input
    for i in range(0, len(stacks), group):
        if i and rng is not None and layer.dropout:
            masks.append(dropout_mask(rng, layer.dropout, y))
            y = y * masks[-1]
        outputs = []
        for stack in stacks[i : i + group]:
            start = initial[len(finals) : len(finals) + len(stack.params)]
            output, final, tape = stack.forward(y, start, step_mask, **options)
            outputs.append(output)
            finals += final
            tapes.append((stack, tape))
        y = outputs[0] if len(outputs) == 1 else xp.concat(outputs, axis=-1)
    return y, finals, tapes, masks


def backward(
    layer: RecurrentLayer, tape: Any, dy: Array | None, dstate: Any, dstates: Sequence[Any] | None
) -> Gradients:
    """The adjoint of `forward`; see layers.Recurrent.backward."""
    where = f"{type(layer).__name__}.backward"
    if not isinstance(tape, StackTape) or tape.layer != layer:
        found = tape.layer if isinstance(tape, StackTape) else type(tape).__name__
        raise InputError(f"{where}: tape must be what this layer's forward returned, found that of {found}")
    xp = tape.xp
    dy, dfinal, state_cotangents = _check_cotangents(where, layer, tape, dy, dstate, dstates)
    dinitial: list[Any] = []
    grads: list[Params] = []
    masks, d, end = list(tape.dropout_masks), dy, len(dfinal)
    size = len(tape.direction_stacks) // layer.num_layers or 1
    for i in range(len(tape.direction_stacks) - size, -1, -size):
        group = tape.direction_stacks[i : i + size]
        begin = end - sum(len(stack.params) for stack, _ in group)
        d, dstart, dparams = _layer_backward(group, d, dfinal[begin:end], state_cotangents[begin:end])
        dinitial, grads, end = dstart + dinitial, dparams + grads, begin
        d = d * masks.pop() if masks and d is not None else d
    packed = state_layout.pack(layer, xp, dinitial)
    named = {
        names[short]: g
        for names, scan_grads in zip(state_layout.parameter_names(layer)[1], grads, strict=True)
        for short, g in scan_grads.items()
    }
    named |= state_layout.learned_state_gradients(layer, xp, packed, tape.uses_default_state)
    d = None if d is None else state_layout.time_major(layer, xp, d)
    return Gradients(d, packed, {name: named[name] for name in tape.params})


def _layer_backward(
    group: Sequence[tuple[DirectionStack, DirectionStackTape]],
    dy: Any,
    dfinal: Sequence[Any],
    state_cotangents: Sequence[Any],
) -> tuple[Any, list[Any], list[Params]]:
    """The adjoint of the stacks that read the same input: one, or both directions of a layer.

    Returns the cotangent of that input, those of the initial states, and the gradients of the parameters.
    """
    dx: Any = None
    dinitial: list[Any] = []
    grads: list[Params] = []
    column = 0
    for stack, tape in group:
        width, k = tape.reset_states[-1][0].shape[-1], len(dinitial)
        d = dy if dy is None or len(group) == 1 else dy[..., column : column + width]
        layers = slice(k, k + len(stack.params))
        dstack, dstart, dparams = stack.backward(tape, d, dfinal[layers], state_cotangents[layers])
        dx = dstack if dx is None else dx + dstack
        dinitial, grads, column = dinitial + dstart, grads + dparams, column + width
    return dx, dinitial, grads


def _check_cotangents(
    where: str, layer: RecurrentLayer, tape: StackTape, dy: Any, dstate: Any, dstates: Any
) -> tuple[Any, Any, Any]:
    """Check the cotangents that the caller passed.

    Returns dy time-major and, for each layer and direction, the cotangents of the final states and of all states.
    """
    xp, (count, n) = tape.xp, tape.x.shape[:2]
    arrays = {f"dstate[{i}]": a for i, a in enumerate(arguments.tree_leaves(dstate))}
    arrays |= {f"dstates[{i}]": a for i, a in enumerate(arguments.tree_leaves(dstates))}
    resolve_namespace(where, {"params": tape.params["weight_hh_l0"], "dy": dy, **arrays})
    if dy is not None:
        check_shape(where, "dy", "(the shape of y)", dy, tuple(tape.y.shape))
        dy = state_layout.time_major(layer, xp, dy)
    total = layer.num_layers * layer.num_directions
    names = layer.resolved_cell.states
    none = [(None,) * len(names)] * total
    if isinstance(dstate, (tuple, list)) and len(dstate) == len(names) and any(d is None for d in dstate):
        zero = state_layout.pack(layer, xp, state_layout.zero_states(layer, xp, tape.params["weight_hh_l0"], n))
        dstate = tuple(z if d is None else d for d, z in zip(dstate, zero, strict=True))
    dfinal = none if dstate is None else state_layout.unpack(where, layer, xp, tape.params, n, dstate)
    if dstates is None:
        return dy, dfinal, none
    widths = [tuple(s.shape[-1] for s in state) for _, stack in tape.direction_stacks for state in stack.reset_states]
    return dy, dfinal, arguments.check_state_cotangents(where, list(dstates), names, widths, (count, n))


def step(layer: RecurrentLayer, params: Params, x: Array, state: Any) -> tuple[Array, Any]:
    """Run one time step; see layers.Recurrent.step."""
    where = f"{type(layer).__name__}.step"
    if layer.bidirectional or layer.reverse:
        kind = "bidirectional" if layer.bidirectional else "reverse"
        raise InputError(f"{where}: a {kind} layer needs the whole sequence: call the layer instead")
    xp = arguments.check_call(where, layer, params, x, state, "N")
    states = state_layout.unpack(where, layer, xp, params, x.shape[0], state)
    y, finals = x, []
    for scan_params, s in zip(state_layout.params_by_layer(layer, params), states, strict=True):
        finals.append(reference.single_step(xp, layer.resolved_cell, scan_params, y, s))
        y = finals[-1][0]
    return y, state_layout.pack(layer, xp, finals)
