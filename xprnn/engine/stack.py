"""What a recurrent layer does: check what it is given, run its chains, put states and gradients together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.random import Generator

from xprnn.arrays import validation
from xprnn.arrays.namespace import Array, InputError, Namespace, Params, check_shape, resolve_namespace
from xprnn.engine import arguments, state_layout
from xprnn.engine.checkpointing import DirectionStack, DirectionStackTape, dropout_mask, segment_length
from xprnn.kernels import reference
from xprnn.kernels.tape import Gradients, UnpicklableTape

__all__ = [
    "StackTape",
    "backward",
    "forward",
    "step",
]


@dataclass(frozen=True)
class StackTape(UnpicklableTape):
    """The record of one forward pass of a recurrent layer."""

    layer: Any
    xp: Namespace
    params: Params
    x: Array
    y: Array
    direction_stacks: list[
        tuple[DirectionStack, DirectionStackTape]
    ]  # one for the stack, or layer by layer one for each direction
    dropout_masks: list[Array]  # dropout between the layers of a bidirectional stack
    uses_default_state: bool  # whether the state was left out

    def states(self) -> tuple[tuple[Array, ...], ...]:
        """The states after every step: for each layer and direction a tuple of (T, N, H), (h,) or (h, c)."""
        return tuple(s for chain, tape in self.direction_stacks for s in chain.states(tape))

    def explain(self) -> str:
        """Which implementation ran each chain of layers, and in how many segments."""
        lines = []
        for chain, tape in self.direction_stacks:
            way, count = "reverse" if chain.reverse else "forward", len(tape.segments)
            cut = f", in {count} segments that backward runs again" if count > 1 else ""
            lines.append(f"{chain.cell.name} x {len(chain.params)}, {way}: {tape.scan_tapes[0].kernel_name}{cut}")
        return "\n".join(lines)


def _direction_stacks(layer: Any, xp: Namespace, params: Params) -> list[DirectionStack]:
    own = state_layout.params_by_layer(layer, params)
    if not layer.bidirectional:
        return [
            DirectionStack(
                xp, layer.resolved_cell, own, reverse=layer.reverse, dropout=layer.dropout, sparse=layer.sparse
            )
        ]
    return [
        DirectionStack(xp, layer.resolved_cell, [p], reverse=bool(i % 2), sparse=layer.sparse)
        for i, p in enumerate(own)
    ]


def _checkpoint_interval(where: str, layer: Any, checkpoint: Any, params: Params, count: int, n: int) -> int | None:
    """The number of steps between checkpoints; a step of tape and adjoint holds about 3 G + 4 S + 4 arrays (N, H)."""
    if checkpoint is None:
        return None
    item = params["weight_hh_l0"].dtype.itemsize if hasattr(params["weight_hh_l0"].dtype, "itemsize") else 8
    core, width = layer.resolved_cell, n * sum(layer.hidden_sizes) * item
    return segment_length(
        where, checkpoint, count, width * (3 * core.gates + 4 * len(core.states) + 4), width * len(core.states)
    )


def forward(
    layer: Any,
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
) -> tuple[Array, Any, StackTape | None]:
    """See layers.Recurrent.forward."""
    where = f"{type(layer).__name__}.forward" if record_tape else type(layer).__name__
    xp = arguments.check_call(where, layer, params, x, state, "NT" if layer.batch_first else "TN")
    validation.check_rng(where, rng, optional=True)
    x = state_layout.time_major(layer, xp, x)
    count, n = x.shape[:2]
    steps = arguments.make_step_mask(where, layer, xp, x, lengths, mask, reset)
    initial = state_layout.unpack(where, layer, xp, params, n, state)
    every = _checkpoint_interval(where, layer, checkpoint, params, count, n)
    y, masks = x, []
    finals, record, chains = list[Any](), list[Any](), _direction_stacks(layer, xp, params)
    step = len(chains) // layer.num_layers or 1
    for i in range(0, len(chains), step):
        if i and rng is not None and layer.dropout:
            masks.append(dropout_mask(rng, layer.dropout, y))
            y = y * masks[-1]
        outputs = []
        for chain in chains[i : i + step]:
            start = initial[len(finals) : len(finals) + len(chain.params)]
            out, final, tape = chain.forward(
                y, start, steps, record_tape=record_tape, rng=rng, checkpoint_interval=every
            )
            outputs.append(out)
            finals += final
            record.append((chain, tape))
        y = outputs[0] if len(outputs) == 1 else xp.concat(outputs, axis=-1)
    out = state_layout.time_major(layer, xp, y)
    tape_ = StackTape(layer, xp, params, x, out, record, masks, state is None) if record_tape else None
    return out, state_layout.pack(layer, xp, finals), tape_


def backward(layer: Any, tape: Any, dy: Array | None, dstate: Any, dstates: Sequence[Any] | None) -> Gradients:
    """See layers.Recurrent.backward."""
    where = f"{type(layer).__name__}.backward"
    if not isinstance(tape, StackTape) or tape.layer != layer:
        found = tape.layer if isinstance(tape, StackTape) else type(tape).__name__
        raise InputError(f"{where}: tape must be what this layer's forward returned, found that of {found}")
    xp = tape.xp
    dy, dfinal, inner = _check_cotangents(where, layer, tape, dy, dstate, dstates)
    dinitial: list[Any] = []
    grads: list[Params] = []
    masks, d, end = list(tape.dropout_masks), dy, len(dfinal)
    step = len(tape.direction_stacks) // layer.num_layers or 1
    for i in range(len(tape.direction_stacks) - step, -1, -step):
        group = tape.direction_stacks[i : i + step]
        begin = end - sum(len(chain.params) for chain, _ in group)
        d, ds, dps = _layer_backward(group, d, dfinal[begin:end], inner[begin:end])
        dinitial, grads, end = ds + dinitial, dps + grads, begin
        d = d * masks.pop() if masks and d is not None else d
    packed = state_layout.pack(layer, xp, dinitial)
    named = {
        names[short]: g
        for names, own in zip(state_layout.parameter_names(layer)[1], grads, strict=True)
        for short, g in own.items()
    }
    named |= state_layout.learned_state_gradients(layer, xp, packed, tape.uses_default_state)
    d = None if d is None else state_layout.time_major(layer, xp, d)
    return Gradients(d, packed, {name: named[name] for name in tape.params})


def _layer_backward(
    group: Sequence[tuple[DirectionStack, DirectionStackTape]], dy: Any, dfinal: Sequence[Any], inner: Sequence[Any]
) -> tuple[Any, list[Any], list[Params]]:
    """One stack, or both directions of one layer: the adjoints of x, of the initial states, of the parameters."""
    dx: Any = None
    dinitial: list[Any] = []
    grads: list[Params] = []
    column = 0
    for chain, record in group:
        width, at = record.reset_states[-1][0].shape[-1], len(dinitial)
        share = dy if dy is None or len(group) == 1 else dy[..., column : column + width]
        one, ds, dps = chain.backward(
            record, share, dfinal[at : at + len(chain.params)], inner[at : at + len(chain.params)]
        )
        dx = one if dx is None else dx + one
        dinitial, grads, column = dinitial + ds, grads + dps, column + width
    return dx, dinitial, grads


def _check_cotangents(
    where: str, layer: Any, tape: StackTape, dy: Any, dstate: Any, dstates: Any
) -> tuple[Any, Any, Any]:
    """dy time-major, and for each layer and direction the adjoints of the final states and of all states."""
    xp, (count, n) = tape.xp, tape.x.shape[:2]
    given = {f"dstate[{i}]": a for i, a in enumerate(arguments.tree_leaves(dstate))}
    given |= {f"dstates[{i}]": a for i, a in enumerate(arguments.tree_leaves(dstates))}
    resolve_namespace(where, {"params": tape.params["weight_hh_l0"], "dy": dy, **given})
    if dy is not None:
        check_shape(where, "dy", "(the shape of y)", dy, tuple(tape.y.shape))
        dy = state_layout.time_major(layer, xp, dy)
    total = layer.num_layers * layer.num_directions
    names = layer.resolved_cell.states
    nothing = [(None,) * len(names)] * total
    if isinstance(dstate, (tuple, list)) and len(dstate) == len(names) and any(d is None for d in dstate):
        zero = state_layout.pack(layer, xp, state_layout.zero_states(layer, xp, tape.params["weight_hh_l0"], n))
        dstate = tuple(z if d is None else d for d, z in zip(dstate, zero, strict=True))
    dfinal = nothing if dstate is None else state_layout.unpack(where, layer, xp, tape.params, n, dstate)
    if dstates is None:
        return dy, dfinal, nothing
    widths = [tuple(s.shape[-1] for s in state) for _, record in tape.direction_stacks for state in record.reset_states]
    return dy, dfinal, arguments.check_state_cotangents(where, list(dstates), names, widths, (count, n))


def step(layer: Any, params: Params, x: Array, state: Any) -> tuple[Array, Any]:
    """See layers.Recurrent.step."""
    where = f"{type(layer).__name__}.step"
    if layer.bidirectional or layer.reverse:
        kind = "bidirectional" if layer.bidirectional else "reverse"
        raise InputError(f"{where}: a {kind} layer needs the whole sequence: call the layer instead")
    xp = arguments.check_call(where, layer, params, x, state, "N")
    states = state_layout.unpack(where, layer, xp, params, x.shape[0], state)
    y, finals = x, []
    for own, s in zip(state_layout.params_by_layer(layer, params), states, strict=True):
        finals.append(reference.single_step(xp, layer.resolved_cell, own, y, s))
        y = finals[-1][0]
    return y, state_layout.pack(layer, xp, finals)
