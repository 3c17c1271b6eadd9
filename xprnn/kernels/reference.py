"""One layer in one direction over a whole sequence, forward and backward: the specification of every kernel.

    xg = x W' + b_ih  for all steps at once              (one GEMM, affine.py)
    for each t:   hg = h U' + b_hh;   state', saved = step(xg[t], hg, state)

and backwards, line by line in reverse, ending in one GEMM for each weight gradient. This loop runs on any namespace of
the Array API standard, immutable arrays included; `kernels` holds faster sentences of the same meaning, chosen once for
a sequence. `reverse` walks t from T-1 to 0. A row that is not active in a step keeps its state (so the reverse
direction starts inside each row's own length by itself), puts out 0 and receives no gradient. P is H, or the
projected size.
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


def _split_gates(a: Array, count: int) -> tuple[Array, ...]:
    width = a.shape[-1] // count if count else 0
    return tuple(a[..., k * width : (k + 1) * width] for k in range(count))


class _RecurrentWeights(NamedTuple):
    """The recurrent half of the parameters, turned once for a sequence and cut where the cell's early gates end."""

    weight_hh_t: Array
    bias_hh: Array | None
    main_weight_hh_t: Array | None
    main_bias_hh: Array | None
    weight_hr_t: Array | None
    vectors: tuple[Array, ...]


def _recurrent_weights(xp: Namespace, cell: Cell, params: Params) -> _RecurrentWeights:
    ut, b = xp.permute_dims(params["weight_hh"], (1, 0)), params.get("bias_hh")
    late_ut = late_b = None
    if cell.pregates:
        cut = cell.pregates * (ut.shape[1] // cell.gates)
        ut, late_ut = ut[:, :cut], ut[:, cut:]
        if b is not None:
            b, late_b = b[:cut], b[cut:]
    hr = params.get("weight_hr")
    hr_t = None if hr is None else xp.permute_dims(hr, (1, 0))
    return _RecurrentWeights(ut, b, late_ut, late_b, hr_t, tuple(params[v] for v in cell.vectors))


class _SavedStep(NamedTuple):
    """One step's record."""

    cell_saved: tuple[Array, ...]  # what the cell saved
    pregate_saved: tuple[Array, ...]  # what its early gates saved
    gated_state: Array | None  # what entered the late recurrent product
    unprojected_h: Array | None  # h before the projection


def _step(
    xp: Namespace, cell: Cell, fns: Pointwise, w: _RecurrentWeights, xg: Array, state: State
) -> tuple[State, _SavedStep]:
    """One step of all rows: the recurrent product, then the cell."""
    e, x = cell.pregates, _split_gates(xg, cell.gates)
    hg = xp.matmul(state[0], w.weight_hh_t)
    hg = hg if w.bias_hh is None else hg + w.bias_hh
    early: tuple[Array, ...] = ()
    q = raw = None
    if fns.pregate is None:
        new, saved = fns.step(x, _split_gates(hg, cell.gates), state, w.vectors)
    else:
        early, q = fns.pregate(x[:e], _split_gates(hg, e), state, w.vectors)
        hg = xp.matmul(q, w.main_weight_hh_t)
        hg = hg if w.main_bias_hh is None else hg + w.main_bias_hh
        new, saved = fns.step((*early[:e], *x[e:]), _split_gates(hg, cell.gates - e), state, w.vectors)
    if w.weight_hr_t is not None:
        raw = new[0]
        new = (xp.matmul(raw, w.weight_hr_t), *new[1:])
    return new, _SavedStep(saved, early, q, raw)


def single_step(xp: Namespace, cell: Cell, params: Params, x: Array, state: State) -> State:
    """One step for streaming: x (N, D) or integers (N,) and the state -> the next state."""
    xg = linear(xp, x, params["weight_ih"], params.get("bias_ih"))
    return _step(xp, cell, cell.bind(xp), _recurrent_weights(xp, cell, params), xg, state)[0]


def _time_order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def _stack(xp: Namespace, rows: Sequence[Array], like: Array) -> Array:
    return xp.stack(rows) if rows else zeros(xp, (0, *like.shape), like)


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
    fns, w = cell.bind(xp), _recurrent_weights(xp, cell, params)
    xg = linear(xp, x, params["weight_ih"], params.get("bias_ih"))
    initial = state
    records: list[tuple[State, _SavedStep] | None] = [None] * x.shape[0]
    after: list[Any] = [None] * x.shape[0]
    for t in _time_order(x.shape[0], reverse):
        if step_mask.reset is not None:
            row = step_mask.reset[t, :, None]
            state = tuple(xp.where(row, i, s) for i, s in zip(reset_state, state, strict=True))
        new, saved = _step(xp, cell, fns, w, xg[t, ...], state)
        if step_mask.active is not None:
            row = step_mask.active[t, :, None]
            new = tuple(xp.where(row, n, s) for n, s in zip(new, state, strict=True))
        if record_tape:
            records[t] = (state, saved)
        state = after[t] = new
    states = tuple(_stack(xp, [a[k] for a in after], s) if record_tape or k == 0 else s for k, s in enumerate(initial))
    y = states[0]
    if step_mask.active is not None:
        y = xp.where(step_mask.active[..., None], y, xp.zeros_like(y))
    tape = None
    if record_tape:
        tape = Tape(
            reference_backward,
            xp,
            cell,
            params,
            x,
            initial,
            reset_state,
            step_mask,
            reverse,
            lambda: states,
            records,
            config.REFERENCE_NAME,
        )
    return y, state, tape


def _add_optional(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def reference_backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None]
) -> ScanGradients:
    xp, cell, steps, params = tape.xp, tape.cell, tape.step_mask, tape.params
    fns = cell.bind(xp)
    count = tape.x.shape[0]
    if dy is not None and steps.active is not None:
        dy = xp.where(steps.active[..., None], dy, xp.zeros_like(dy))
    ds = [xp.zeros_like(i) if d is None else d for i, d in zip(tape.initial_state, dstate, strict=True)]
    dhome: list[Array | None] = [None] * len(ds)
    rows: list[Any] = [None] * count
    totals: dict[str, Array] = {}
    for t in reversed(_time_order(count, tape.reverse)):
        before, saved = tape.saved[t]
        for k, injected in enumerate(dstates):
            if injected is not None:
                ds[k] = ds[k] + injected[t, ...]
        if dy is not None:
            ds[0] = ds[0] + dy[t, ...]
        passed = [None] * len(ds)
        if steps.active is not None:
            row = steps.active[t, :, None]
            passed = [xp.where(row, xp.zeros_like(d), d) for d in ds]
            ds = [xp.where(row, d, xp.zeros_like(d)) for d in ds]
        dxg, dhg, ds = _step_backward(xp, cell, fns, params, saved, before, ds, totals)
        ds = [_add_optional(d, p) for d, p in zip(ds, passed, strict=True)]
        if steps.reset is not None:
            row = steps.reset[t, :, None]
            dhome = [_add_optional(i, xp.where(row, d, xp.zeros_like(d))) for i, d in zip(dhome, ds, strict=True)]
            ds = [xp.where(row, xp.zeros_like(d), d) for d in ds]
        rows[t] = (dxg, dhg)
    dx, dparams = _weight_gradients(tape, rows, totals)
    return dx, tuple(ds), dhome, dparams


def _step_backward(
    xp: Namespace,
    cell: Cell,
    fns: Pointwise,
    params: Params,
    saved: _SavedStep,
    before: State,
    ds: list[Array],
    totals: dict[str, Array],
) -> tuple[Array, Array, list[Array]]:
    """The adjoint of `_step`, in reverse order; adds what is summed over time to `totals`."""
    u, p = params["weight_hh"], tuple(params[v] for v in cell.vectors)
    cut = cell.pregates * (u.shape[0] // cell.gates)

    def add(name: str, value: Array) -> None:
        totals[name] = value if name not in totals else totals[name] + value

    if saved.unprojected_h is not None:
        add("weight_hr", xp.matmul(xp.permute_dims(ds[0], (1, 0)), saved.unprojected_h))
        ds = [xp.matmul(ds[0], params["weight_hr"]), *ds[1:]]
    dx, dh, dprev, dp = fns.backward(tuple(ds), saved.cell_saved, before, p)
    if fns.pregate_backward is not None:
        dvalues = dx[: cell.pregates]
        dq = xp.matmul(xp.concat(dh, axis=-1), u[cut:, :])
        dx_early, dstate_early, dp_early = fns.pregate_backward(dvalues, dq, saved.pregate_saved, before, p)
        dprev = [_add_optional(a, b) for a, b in zip(dprev, dstate_early, strict=True)]
        dp = [_add_optional(a, b) for a, b in zip(dp, dp_early, strict=True)]
        dx, dh = (*dx_early, *dx[cell.pregates :]), (*dx_early, *dh)
    for name, value in zip(cell.vectors, dp, strict=True):
        add(name, xp.sum(value, axis=0, dtype=value.dtype))
    dhg = xp.concat(dh, axis=-1)
    direct = xp.matmul(dhg[:, :cut], u[:cut, :]) if cell.pregates else xp.matmul(dhg, u)
    dprev = [
        _add_optional(direct, dprev[0]),
        *(xp.zeros_like(b) if d is None else d for d, b in zip(dprev[1:], before[1:], strict=True)),
    ]
    return xp.concat(dx, axis=-1), dhg, dprev


def _weight_gradients(tape: Tape, rows: list[Any], totals: dict[str, Array]) -> tuple[Array | None, Params]:
    """One GEMM for each weight, over all T*N rows at once."""
    xp, cell, params, n = tape.xp, tape.cell, tape.params, tape.initial_state[0].shape[0]
    u, w = params["weight_hh"], params["weight_ih"]
    blank = zeros(xp, (n, w.shape[0]), w)
    dxg = _stack(xp, [r[0] for r in rows], blank)
    dhg = flatten_leading(xp, _stack(xp, [r[1] for r in rows], blank))
    dx, dw, db = linear_backward(xp, dxg, tape.x, w, sparse=tape.sparse, active=tape.step_mask.active)
    before = flatten_leading(xp, _stack(xp, [s[0][0] for s in tape.saved], tape.initial_state[0]))
    cut = cell.pregates * (u.shape[0] // cell.gates) if cell.pregates else u.shape[0]
    dhg_t = xp.permute_dims(dhg, (1, 0))
    du = xp.matmul(dhg_t[:cut, :], before)
    if cell.pregates:
        q = flatten_leading(xp, _stack(xp, [s[1].gated_state for s in tape.saved], tape.initial_state[0]))
        du = xp.concat((du, xp.matmul(dhg_t[cut:, :], q)), axis=0)
    grads = {"weight_ih": dw, "weight_hh": du}
    if "bias_ih" in params:
        grads["bias_ih"] = db
        grads["bias_hh"] = xp.sum(dhg, axis=0, dtype=dhg.dtype)
    for name in params:
        if name not in grads:
            grads[name] = totals.get(name, xp.zeros_like(params[name]))
    return dx, {name: grads[name] for name in params}
