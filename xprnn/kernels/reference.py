"""Reference scan: one layer in one direction over a whole sequence, forward and backward.

This loop is the specification of every kernel. It runs on every namespace of the Array API standard, also on immutable
arrays. Each forward function is followed by its adjoint.

Forward. The cell has the states s = (h, ...); before the first step they are the initial states. W is weight_ih, U is
weight_hh, and ^T is the transpose.

    xg = x W^T + b_ih                                 input projection, one matrix product for all steps
    for t = 0, ..., T-1:
        s        <- reset states in the rows that are reset at t
        hg       =  h U^T + b_hh                      recurrent product
        s', saved = cell.step(xg[t], hg, s)           elementwise
        s        <- s' in the rows that are active at t
        y[t]     =  h in these rows, 0 in the others

Backward. The cotangent da of an array a is the gradient of the loss with respect to a. The steps run in reverse order:

    ds = cotangents of the final states
    for t = T-1, ..., 0:
        ds       <- ds + dstates[t],  dh <- dh + dy[t]
        dxg[t], dhg[t], ds' = cell.backward(ds, saved)
        dh'      <- dh' + dhg[t] U
        ds       <- ds' in the rows that are active at t
        dreset   <- dreset + ds in the rows that are reset at t,  ds <- 0 in these rows
    dx = dxg W,  dW = dxg^T x,  dU = dhg^T h_previous, and the biases sum over rows and steps

In the inactive rows dy[t], dxg[t] and dhg[t] are 0. With `reverse` the forward steps run from T-1 to 0. A row that is
shorter than T is inactive after its end, so its reverse scan begins at its last valid step.

A layer with weight_hr V (P, H) projects the h of each step: the cell returns h~, and h = h~ V^T. A cell with E pregates
computes them before the recurrent product of its other gates:

    values, q = cell.pregate(xg[t][:E], h U[:E]^T + b_hh[:E], s)
    hg        = q U[E:]^T + b_hh[E:]
    s', saved = cell.step((values[:E], xg[t][E:]), hg, s)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from xprnn.arrays.linear import flatten_leading, linear, linear_backward, zeros
from xprnn.arrays.namespace import Array, Namespace, Params
from xprnn.cells.cell import Cell, Pointwise
from xprnn.kernels import config
from xprnn.kernels.tape import State, StepMask, Tape

__all__ = [
    "single_step",
]

ScanGradients = tuple[Array | None, State, Sequence[Array | None], Params]


class _RecurrentWeights(NamedTuple):
    """The parameters of the recurrent product, transposed once for a sequence."""

    pregate_weight_t: Array | None  # (P, E*H); None if the cell has no pregates
    pregate_bias: Array | None
    weight_t: Array  # (P, (G-E)*H)
    bias: Array | None
    projection_t: Array | None  # weight_hr transposed, (H, P)
    vectors: tuple[Array, ...]  # the cell's vectors, (H,) each


class _SavedStep(NamedTuple):
    """The arrays that one step saves for backward."""

    states: State  # before the step, after resets
    cell_saved: tuple[Array, ...]
    pregate_values: tuple[Array, ...]
    gated_state: Array | None  # q, which replaces h in the recurrent product of the gates after the pregates
    unprojected_h: Array | None  # h~


# --- one step


def _split_gates(a: Array, count: int) -> tuple[Array, ...]:
    """(..., count*H) -> count arrays (..., H)."""
    width = a.shape[-1] // count if count else 0
    return tuple(a[..., k * width : (k + 1) * width] for k in range(count))


def _num_pregate_rows(cell: Cell, weight_hh: Array) -> int:
    """E*H, the number of rows of weight_hh that are the pregates'."""
    return cell.pregates * (int(weight_hh.shape[0]) // cell.gates)


def _recurrent_weights(xp: Namespace, cell: Cell, params: Params) -> _RecurrentWeights:
    weight_t, bias = xp.permute_dims(params["weight_hh"], (1, 0)), params.get("bias_hh")
    pregate_weight_t = pregate_bias = None
    if cell.pregates:
        cut = _num_pregate_rows(cell, params["weight_hh"])
        pregate_weight_t, weight_t = weight_t[:, :cut], weight_t[:, cut:]
        if bias is not None:
            pregate_bias, bias = bias[:cut], bias[cut:]
    hr = params.get("weight_hr")
    projection_t = None if hr is None else xp.permute_dims(hr, (1, 0))
    vectors = tuple(params[name] for name in cell.vectors)
    return _RecurrentWeights(pregate_weight_t, pregate_bias, weight_t, bias, projection_t, vectors)


def _recurrent_product(xp: Namespace, h: Array, weight_t: Array, bias: Array | None) -> Array:
    hg = xp.matmul(h, weight_t)
    return hg if bias is None else hg + bias


def _step(
    xp: Namespace, cell: Cell, fns: Pointwise, w: _RecurrentWeights, xg: Array, state: State
) -> tuple[State, _SavedStep]:
    """One step of all rows: from the states before the step to those after it."""
    e, x, h = cell.pregates, _split_gates(xg, cell.gates), state[0]
    values: tuple[Array, ...] = ()
    gated_state = unprojected_h = None
    if fns.pregate is not None:
        hg = _recurrent_product(xp, h, w.pregate_weight_t, w.pregate_bias)
        values, gated_state = fns.pregate(x[:e], _split_gates(hg, e), state, w.vectors)
        x, h = (*values[:e], *x[e:]), gated_state
    hg = _recurrent_product(xp, h, w.weight_t, w.bias)
    new, saved = fns.step(x, _split_gates(hg, cell.gates - e), state, w.vectors)
    if w.projection_t is not None:
        unprojected_h = new[0]
        new = (xp.matmul(unprojected_h, w.projection_t), *new[1:])
    return new, _SavedStep(state, saved, values, gated_state, unprojected_h)


def _step_backward(
    xp: Namespace,
    cell: Cell,
    fns: Pointwise,
    params: Params,
    saved: _SavedStep,
    ds: list[Array],
    sums: dict[str, Array],
) -> tuple[Array, Array, list[Array]]:
    """The adjoint of `_step`: from the cotangents of the states after the step to (dxg, dhg, those before it).

    The gradients of weight_hr and of the cell's vectors are added to `sums`.
    """
    e, u, vectors = cell.pregates, params["weight_hh"], tuple(params[name] for name in cell.vectors)
    cut = _num_pregate_rows(cell, u)
    if saved.unprojected_h is not None:
        _accumulate(sums, "weight_hr", xp.matmul(xp.permute_dims(ds[0], (1, 0)), saved.unprojected_h))
        ds = [xp.matmul(ds[0], params["weight_hr"]), *ds[1:]]
    dx, dh, dprevious, dvectors = fns.backward(tuple(ds), saved.cell_saved, saved.states, vectors)
    if fns.pregate_backward is not None:
        dq = xp.matmul(xp.concat(dh, axis=-1), u[cut:, :])
        dpregates, dprevious2, dvectors2 = fns.pregate_backward(dx[:e], dq, saved.pregate_values, saved.states, vectors)
        dprevious = [_add_optional(a, b) for a, b in zip(dprevious, dprevious2, strict=True)]
        dvectors = [_add_optional(a, b) for a, b in zip(dvectors, dvectors2, strict=True)]
        dx, dh = (*dpregates, *dx[e:]), (*dpregates, *dh)
    for name, d in zip(cell.vectors, dvectors, strict=True):
        _accumulate(sums, name, xp.sum(d, axis=0, dtype=d.dtype))
    dhg = xp.concat(dh, axis=-1)
    through_product = xp.matmul(dhg[:, :cut], u[:cut, :]) if e else xp.matmul(dhg, u)
    dstates = [
        _add_optional(through_product, dprevious[0]),
        *(xp.zeros_like(s) if d is None else d for d, s in zip(dprevious[1:], saved.states[1:], strict=True)),
    ]
    return xp.concat(dx, axis=-1), dhg, dstates


def _accumulate(sums: dict[str, Array], name: str, value: Array) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _add_optional(a: Array | None, b: Array | None) -> Array | None:
    """a + b, where None stands for zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def single_step(xp: Namespace, cell: Cell, params: Params, x: Array, state: State) -> State:
    """Run one step of a stream: x (N, D) or integers (N,), and the states -> the next states."""
    xg = linear(xp, x, params["weight_ih"], params.get("bias_ih"))
    return _step(xp, cell, cell.bind(xp), _recurrent_weights(xp, cell, params), xg, state)[0]


# --- the whole sequence


def _time_order(count: int, reverse: bool) -> range:
    return range(count - 1, -1, -1) if reverse else range(count)


def _stack(xp: Namespace, steps: Sequence[Array], like: Array) -> Array:
    """Stack the arrays of all steps along a new first axis; `like` has the shape of one step, for T = 0."""
    return xp.stack(steps) if steps else zeros(xp, (0, *like.shape), like)


def reference_forward(
    cell: Cell,
    params: Params,
    x: Array,
    state: State,
    step_mask: StepMask,
    *,
    reset_state: State,
    xp: Namespace,
    reverse: bool,
    record_tape: bool,
) -> tuple[Array, State, Tape | None]:
    """Run the scan; see dispatch.forward for the arguments."""
    fns, w, count = cell.bind(xp), _recurrent_weights(xp, cell, params), x.shape[0]
    xg = linear(xp, x, params["weight_ih"], params.get("bias_ih"))
    initial_state = state
    saved: list[_SavedStep | None] = [None] * count
    after: list[Any] = [None] * count
    for t in _time_order(count, reverse):
        if step_mask.reset is not None:
            reset = step_mask.reset[t, :, None]
            state = tuple(xp.where(reset, r, s) for r, s in zip(reset_state, state, strict=True))
        new, saved_step = _step(xp, cell, fns, w, xg[t, ...], state)
        if step_mask.active is not None:
            active = step_mask.active[t, :, None]
            new = tuple(xp.where(active, n, s) for n, s in zip(new, state, strict=True))
        if record_tape:
            saved[t] = saved_step
        state = after[t] = new
    states = tuple(
        _stack(xp, [a[k] for a in after], s) if record_tape or k == 0 else s for k, s in enumerate(initial_state)
    )
    y, tape = states[0], None
    if step_mask.active is not None:
        y = xp.where(step_mask.active[..., None], y, xp.zeros_like(y))
    if record_tape:
        record = (step_mask, reverse, lambda: states, saved, config.REFERENCE_NAME)
        tape = Tape(reference_backward, xp, cell, params, x, initial_state, reset_state, *record)
    return y, state, tape


def reference_backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None]
) -> ScanGradients:
    """The adjoint of `reference_forward`; see dispatch.backward for the arguments."""
    xp, cell, mask, params, count = tape.xp, tape.cell, tape.step_mask, tape.params, tape.x.shape[0]
    fns = cell.bind(xp)
    if dy is not None and mask.active is not None:
        dy = xp.where(mask.active[..., None], dy, xp.zeros_like(dy))
    ds = [xp.zeros_like(s) if d is None else d for s, d in zip(tape.initial_state, dstate, strict=True)]
    dreset: list[Array | None] = [None] * len(ds)
    dxg: list[Any] = [None] * count
    dhg: list[Any] = [None] * count
    sums: dict[str, Array] = {}
    for t in reversed(_time_order(count, tape.reverse)):
        for k, d in enumerate(dstates):
            if d is not None:
                ds[k] = ds[k] + d[t, ...]
        if dy is not None:
            ds[0] = ds[0] + dy[t, ...]
        carried = [None] * len(ds)  # the cotangents of the inactive rows, which keep their states
        if mask.active is not None:
            active = mask.active[t, :, None]
            carried = [xp.where(active, xp.zeros_like(d), d) for d in ds]
            ds = [xp.where(active, d, xp.zeros_like(d)) for d in ds]
        dxg[t], dhg[t], ds = _step_backward(xp, cell, fns, params, tape.saved[t], ds, sums)
        ds = [_add_optional(d, c) for d, c in zip(ds, carried, strict=True)]
        if mask.reset is not None:
            reset = mask.reset[t, :, None]
            dreset = [_add_optional(r, xp.where(reset, d, xp.zeros_like(d))) for r, d in zip(dreset, ds, strict=True)]
            ds = [xp.where(reset, xp.zeros_like(d), d) for d in ds]
    dx, dparams = _weight_gradients(tape, dxg, dhg, sums)
    return dx, tuple(ds), dreset, dparams


def _weight_gradients(
    tape: Tape, dxg: list[Array], dhg: list[Array], sums: dict[str, Array]
) -> tuple[Array | None, Params]:
    """dx and the gradients of all parameters: one matrix product for each weight, over all T*N rows."""
    xp, cell, params, saved, h = tape.xp, tape.cell, tape.params, tape.saved, tape.initial_state[0]
    u, w = params["weight_hh"], params["weight_ih"]
    like = zeros(xp, (h.shape[0], w.shape[0]), w)
    dx, dw, db = linear_backward(xp, _stack(xp, dxg, like), tape.x, w, sparse=tape.sparse, active=tape.step_mask.active)
    dhg_all = flatten_leading(xp, _stack(xp, dhg, like))
    dhg_t = xp.permute_dims(dhg_all, (1, 0))
    h_previous = flatten_leading(xp, _stack(xp, [s.states[0] for s in saved], h))
    cut = _num_pregate_rows(cell, u) if cell.pregates else u.shape[0]
    du = xp.matmul(dhg_t[:cut, :], h_previous)
    if cell.pregates:
        q = flatten_leading(xp, _stack(xp, [s.gated_state for s in saved], h))
        du = xp.concat((du, xp.matmul(dhg_t[cut:, :], q)), axis=0)
    grads = {"weight_ih": dw, "weight_hh": du}
    if "bias_ih" in params:
        grads["bias_ih"] = db
        grads["bias_hh"] = xp.sum(dhg_all, axis=0, dtype=dhg_all.dtype)
    for name in params:
        if name not in grads:
            grads[name] = sums.get(name, xp.zeros_like(params[name]))
    return dx, {name: grads[name] for name in params}
