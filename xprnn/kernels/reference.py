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

from xprnn.arrays.linear import affine, affine_back, flat, zeros
from xprnn.arrays.namespace import Array, Namespace, Params
from xprnn.cells.cell import Cell, Pointwise
from xprnn.kernels import config
from xprnn.kernels.tape import State, Steps, Tape

__all__ = [
    "step_once",
]

Back = tuple[Array | None, State, Sequence[Array | None], Params]


def _gates(a: Array, count: int) -> tuple[Array, ...]:
    width = a.shape[-1] // count if count else 0
    return tuple(a[..., k * width : (k + 1) * width] for k in range(count))


class _Weights(NamedTuple):
    """The recurrent half of the parameters, turned once for a sequence and cut where the cell's early gates end."""

    ut: Array
    b: Array | None
    ut_late: Array | None
    b_late: Array | None
    hr_t: Array | None
    vectors: tuple[Array, ...]


def _weights(xp: Namespace, cell: Cell, params: Params) -> _Weights:
    ut, b = xp.permute_dims(params["weight_hh"], (1, 0)), params.get("bias_hh")
    late_ut = late_b = None
    if cell.early:
        cut = cell.early * (ut.shape[1] // cell.gates)
        ut, late_ut = ut[:, :cut], ut[:, cut:]
        if b is not None:
            b, late_b = b[:cut], b[cut:]
    hr = params.get("weight_hr")
    hr_t = None if hr is None else xp.permute_dims(hr, (1, 0))
    return _Weights(ut, b, late_ut, late_b, hr_t, tuple(params[v] for v in cell.vectors))


class _Saved(NamedTuple):
    """One step's record."""

    step: tuple[Array, ...]  # what the cell saved
    early: tuple[Array, ...]  # what its early gates saved
    q: Array | None  # what entered the late recurrent product
    raw: Array | None  # h before the projection


def _step(xp: Namespace, cell: Cell, fns: Pointwise, w: _Weights, xg: Array, state: State) -> tuple[State, _Saved]:
    """One step of all rows: the recurrent product, then the cell."""
    e, x = cell.early, _gates(xg, cell.gates)
    hg = xp.matmul(state[0], w.ut)
    hg = hg if w.b is None else hg + w.b
    early: tuple[Array, ...] = ()
    q = raw = None
    if fns.early is None:
        new, saved = fns.step(x, _gates(hg, cell.gates), state, w.vectors)
    else:
        early, q = fns.early(x[:e], _gates(hg, e), state, w.vectors)
        hg = xp.matmul(q, w.ut_late)
        hg = hg if w.b_late is None else hg + w.b_late
        new, saved = fns.step((*early[:e], *x[e:]), _gates(hg, cell.gates - e), state, w.vectors)
    if w.hr_t is not None:
        raw = new[0]
        new = (xp.matmul(raw, w.hr_t), *new[1:])
    return new, _Saved(saved, early, q, raw)


def step_once(xp: Namespace, cell: Cell, params: Params, x: Array, state: State) -> State:
    """One step for streaming: x (N, D) or integers (N,) and the state -> the next state."""
    xg = affine(xp, x, params["weight_ih"], params.get("bias_ih"))
    return _step(xp, cell, cell.over(xp), _weights(xp, cell, params), xg, state)[0]


def _order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def _stack(xp: Namespace, rows: Sequence[Array], like: Array) -> Array:
    return xp.stack(rows) if rows else zeros(xp, (0, *like.shape), like)


def _forward(
    cell: Cell,
    params: Params,
    x: Array,
    state: State,
    steps: Steps,
    *,
    home: State,
    xp: Namespace,
    reverse: bool,
    keep: bool,
) -> tuple[Array, State, Tape | None]:
    fns, w = cell.over(xp), _weights(xp, cell, params)
    xg = affine(xp, x, params["weight_ih"], params.get("bias_ih"))
    initial = state
    records: list[tuple[State, _Saved] | None] = [None] * x.shape[0]
    after: list[Any] = [None] * x.shape[0]
    for t in _order(x.shape[0], reverse):
        if steps.reset is not None:
            row = steps.reset[t, :, None]
            state = tuple(xp.where(row, i, s) for i, s in zip(home, state, strict=True))
        new, saved = _step(xp, cell, fns, w, xg[t, ...], state)
        if steps.active is not None:
            row = steps.active[t, :, None]
            new = tuple(xp.where(row, n, s) for n, s in zip(new, state, strict=True))
        if keep:
            records[t] = (state, saved)
        state = after[t] = new
    states = tuple(_stack(xp, [a[k] for a in after], s) if keep or k == 0 else s for k, s in enumerate(initial))
    y = states[0]
    if steps.active is not None:
        y = xp.where(steps.active[..., None], y, xp.zeros_like(y))
    tape = None
    if keep:
        tape = Tape(
            _backward, xp, cell, params, x, initial, home, steps, reverse, lambda: states, records, config.GENERIC
        )
    return y, state, tape


def _sum(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _backward(tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None]) -> Back:
    xp, cell, steps, params = tape.xp, tape.cell, tape.steps, tape.params
    fns = cell.over(xp)
    count = tape.x.shape[0]
    if dy is not None and steps.active is not None:
        dy = xp.where(steps.active[..., None], dy, xp.zeros_like(dy))
    ds = [xp.zeros_like(i) if d is None else d for i, d in zip(tape.initial, dstate, strict=True)]
    dhome: list[Array | None] = [None] * len(ds)
    rows: list[Any] = [None] * count
    totals: dict[str, Array] = {}
    for t in reversed(_order(count, tape.reverse)):
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
        dxg, dhg, ds = _step_back(xp, cell, fns, params, saved, before, ds, totals)
        ds = [_sum(d, p) for d, p in zip(ds, passed, strict=True)]
        if steps.reset is not None:
            row = steps.reset[t, :, None]
            dhome = [_sum(i, xp.where(row, d, xp.zeros_like(d))) for i, d in zip(dhome, ds, strict=True)]
            ds = [xp.where(row, xp.zeros_like(d), d) for d in ds]
        rows[t] = (dxg, dhg)
    dx, dparams = _weight_gradients(tape, rows, totals)
    return dx, tuple(ds), dhome, dparams


def _step_back(
    xp: Namespace,
    cell: Cell,
    fns: Pointwise,
    params: Params,
    saved: _Saved,
    before: State,
    ds: list[Array],
    totals: dict[str, Array],
) -> tuple[Array, Array, list[Array]]:
    """The adjoint of `_step`, in reverse order; adds what is summed over time to `totals`."""
    u, p = params["weight_hh"], tuple(params[v] for v in cell.vectors)
    cut = cell.early * (u.shape[0] // cell.gates)

    def add(name: str, value: Array) -> None:
        totals[name] = value if name not in totals else totals[name] + value

    if saved.raw is not None:
        add("weight_hr", xp.matmul(xp.permute_dims(ds[0], (1, 0)), saved.raw))
        ds = [xp.matmul(ds[0], params["weight_hr"]), *ds[1:]]
    dx, dh, dprev, dp = fns.back(tuple(ds), saved.step, before, p)
    if fns.early_back is not None:
        dvalues = dx[: cell.early]
        dq = xp.matmul(xp.concat(dh, axis=-1), u[cut:, :])
        dx_early, dstate_early, dp_early = fns.early_back(dvalues, dq, saved.early, before, p)
        dprev = [_sum(a, b) for a, b in zip(dprev, dstate_early, strict=True)]
        dp = [_sum(a, b) for a, b in zip(dp, dp_early, strict=True)]
        dx, dh = (*dx_early, *dx[cell.early :]), (*dx_early, *dh)
    for name, value in zip(cell.vectors, dp, strict=True):
        add(name, xp.sum(value, axis=0, dtype=value.dtype))
    dhg = xp.concat(dh, axis=-1)
    direct = xp.matmul(dhg[:, :cut], u[:cut, :]) if cell.early else xp.matmul(dhg, u)
    dprev = [
        _sum(direct, dprev[0]),
        *(xp.zeros_like(b) if d is None else d for d, b in zip(dprev[1:], before[1:], strict=True)),
    ]
    return xp.concat(dx, axis=-1), dhg, dprev


def _weight_gradients(tape: Tape, rows: list[Any], totals: dict[str, Array]) -> tuple[Array | None, Params]:
    """One GEMM for each weight, over all T*N rows at once."""
    xp, cell, params, n = tape.xp, tape.cell, tape.params, tape.initial[0].shape[0]
    u, w = params["weight_hh"], params["weight_ih"]
    blank = zeros(xp, (n, w.shape[0]), w)
    dxg = _stack(xp, [r[0] for r in rows], blank)
    dhg = flat(xp, _stack(xp, [r[1] for r in rows], blank))
    dx, dw, db = affine_back(xp, dxg, tape.x, w, sparse=tape.sparse, active=tape.steps.active)
    before = flat(xp, _stack(xp, [s[0][0] for s in tape.saved], tape.initial[0]))
    cut = cell.early * (u.shape[0] // cell.gates) if cell.early else u.shape[0]
    dhg_t = xp.permute_dims(dhg, (1, 0))
    du = xp.matmul(dhg_t[:cut, :], before)
    if cell.early:
        q = flat(xp, _stack(xp, [s[1].q for s in tape.saved], tape.initial[0]))
        du = xp.concat((du, xp.matmul(dhg_t[cut:, :], q)), axis=0)
    grads = {"weight_ih": dw, "weight_hh": du}
    if "bias_ih" in params:
        grads["bias_ih"] = db
        grads["bias_hh"] = xp.sum(dhg, axis=0, dtype=dhg.dtype)
    for name in params:
        if name not in grads:
            grads[name] = totals.get(name, xp.zeros_like(params[name]))
    return dx, {name: grads[name] for name in params}
