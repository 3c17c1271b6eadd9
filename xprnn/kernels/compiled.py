"""The scan with its time loop compiled by numba: what is prepared before the loop, and what is done after it.

One matrix product before the loop and those of the weight gradients after it stay NumPy's; between them source.py's
kernel walks all steps without coming back to Python. The recurrent product of a step is a loop of the kernel's own
where that is quicker than a call, else SciPy's gemm.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xprnn.affine import affine_back, flat
from xprnn.arrays import Array, Params
from xprnn.cells import Cell
from xprnn.kernels import library
from xprnn.kernels.plan import plan_of
from xprnn.kernels.ragged import Rows
from xprnn.kernels.source import Sources, sources_of
from xprnn.kernels.walk import Walk, project
from xprnn.tape import State, Steps, Tape

__all__ = ["find"]

_LOOPS = 16384  # up to this many multiplications in a step's product, loops are quicker than a call of gemm


def find(cell: Cell, params: Params) -> Callable[..., Any] | None:
    """`forward` where the cell can be compiled and numba is there, else None."""
    bits = {"float32": 32, "float64": 64}.get(params["weight_hh"].dtype.name, 0)
    if not bits or "weight_hr" in params or not library.available() or sources_of(cell, bits) is None:
        return None
    return forward


class _Kept(NamedTuple):
    """What backward needs; (T, N, .) each, rows in walking order."""

    sources: Sources
    rows: Rows
    x: Array
    gates: Array  # the projection, overwritten by the first saved values
    spare: dict[str, Array]  # the other saved values
    before: State
    after: State


def _address(a: Array | None) -> int:
    return 0 if a is None else int(a.__array_interface__["data"][0])


def _call(source: str, table: Sequence[str], given: Mapping[str, int | Array | None]) -> None:
    """Run a kernel; every array in `given` lives until it is done."""
    entries = [given.get(name, 0) for name in table]
    numbers = [e if isinstance(e, int) else _address(e) for e in entries]
    library.compiled(source)(np.array(numbers, np.int64))


def _common(rows: Rows, u: Array, turned: bool, shape: tuple[int, ...]) -> dict[str, Any]:
    """The table's first entries, for a step's product (n, K) (K, J) with u (K, J)."""
    count, n, hidden, width = shape
    multiplications = n * u.size
    blas = 0 if multiplications <= _LOOPS else library.blas(u.dtype)
    common: dict[str, Any] = {"T": count, "N": n, "H": hidden, "W": width, "turned": int(turned), "U": u}
    common |= {"loops": int(blas == 0), "blas": blas}
    if rows.active is not None:
        counts = np.zeros(count, np.int64)
        for t0, t1, k in rows.runs:
            counts[t0:t1] = k
        common |= {"some": 1, "counts": counts, "active": np.ascontiguousarray(rows.active)}
    if rows.reset is not None:
        common |= {"resets": 1, "reset": np.ascontiguousarray(rows.reset)}
    return common


def forward(
    cell: Cell, params: Params, x: Array, state: State, steps: Steps, *, home: State, xp: Any, reverse: bool, keep: bool
) -> tuple[Array, State, Tape | None]:
    """See xprnn.scan.forward, which is the specification."""
    u = params["weight_hh"]
    sources, plan, rows = sources_of(cell, 8 * u.itemsize), plan_of(cell), Rows.of(x.shape[:2], steps)
    assert sources is not None
    assert plan is not None
    given, x, initial = x, rows.sort(x, 1), tuple(rows.sort(s, 0) for s in state)
    count, n = x.shape[:2]
    hidden = u.shape[0] // cell.gates
    memory = [np.empty((count + 1 if keep or k == 0 else 1, n, hidden), u.dtype) for k in range(len(initial))]
    for m, s in zip(memory, initial, strict=True):
        m[-1 if reverse else 0] = s
    after = tuple(m[:-1] if reverse else m[1:] for m in memory)
    single = cell.gates == sources.added == 1 and sources.slots in ((), ("M0",))
    xg = project(Walk(plan, cell, params, rows, reverse, home), None, x, after[0] if single else None)
    before = tuple(m[1:] if reverse else m[:-1] for m in memory)
    if rows.reset is not None:
        before = tuple(np.empty((count if keep else 1, n, hidden), u.dtype) for _ in initial)
    spare = {s: np.empty((count if keep else 1, n, hidden), u.dtype) for s in sources.slots if s[0] == "V"}
    kept = _Kept(sources, rows, x, xg, spare, before, after)
    final = _run(kept, cell, params, (initial, tuple(rows.sort(s, 0) for s in home)), reverse, keep)
    y = rows.unsort(after[0].view(), 1)
    final = tuple(rows.unsort(s, 0) for s in final)
    if not keep:
        return y, final, None
    if rows.active is not None:
        y = np.where(np.asarray(steps.active)[..., None], y, 0)
    if np.may_share_memory(y, after[0]):
        y.flags.writeable = False  # the tape lives in this memory

    def states() -> State:
        return tuple(rows.unsort(a, 1) for a in after)

    tape = Tape(backward, np, cell, params, given, state, home, steps, reverse, states, kept, "compiled by numba")
    return y, final, tape


def _run(
    kept: _Kept, cell: Cell, params: Params, states: tuple[State, State], reverse: bool, keep: bool
) -> tuple[Array, ...]:
    """The time loop: fills what is kept and returns the states after the last step."""
    u, rows, (initial, home) = params["weight_hh"], kept.rows, states
    count, n, width = kept.gates.shape
    hidden, item = width // cell.gates, kept.gates.itemsize
    running = np.empty((len(initial), n, hidden), u.dtype)
    for k, s in enumerate(initial):
        running[k] = s
    given = _common(rows, np.ascontiguousarray(u.T), reverse, (count, n, hidden, width))
    late = np.zeros(width, u.dtype)
    cut = kept.sources.added * hidden
    if "bias_hh" in params:
        late[cut:] = params["bias_hh"][cut:]
    step = n * hidden if keep else 0
    given |= {"blank": int(not keep), "v0": step, "X": kept.gates, "B": np.empty((n, width), u.dtype), "L": late}
    for k in range(len(initial)):
        given |= {f"C{k}": _address(running) + k * n * hidden * item, f"M{k}": kept.after[k] if keep else None}
        given |= {f"m{k}": step}
        if not keep:
            given[f"M{k}"] = kept.after[0] if k == 0 else np.empty((n, hidden), u.dtype)
            given[f"m{k}"] = n * hidden if k == 0 else 0
        if rows.reset is not None:
            given |= {f"E{k}": np.ascontiguousarray(home[k]), f"S{k}": kept.before[k]}
    given |= kept.spare | {f"p{k}": np.ascontiguousarray(params[name]) for k, name in enumerate(cell.vectors)}
    _call(kept.sources.forward, kept.sources.forward_table, given)
    return tuple(running)


def backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None]
) -> tuple[Array | None, State, Sequence[Array | None], Params]:
    """See xprnn.scan.backward."""
    kept: _Kept = tape.saved
    params, rows, cell, n = tape.params, kept.rows, tape.cell, kept.x.shape[1]
    pairs = zip(tape.initial, dstate, strict=True)
    # In C order whatever the caller's, and never the caller's own.
    ds = [np.zeros(i.shape, i.dtype) if d is None else np.array(rows.sort(d, 0), order="C") for i, d in pairs]
    injected = [None if d is None else rows.sort(d, 1) for d in (*dstates, *[None] * (len(ds) - len(dstates)))]
    if dy is not None:
        dy = rows.sort(dy, 1)
        dy = dy if rows.active is None else np.where(rows.active[..., None], dy, 0)
        injected[0] = dy if injected[0] is None else injected[0] + dy
    make = np.empty if rows.active is None else np.zeros  # a row that sits a step out sends nothing back
    dxg = make(kept.gates.shape, kept.gates.dtype)
    dhg = dxg if kept.sources.same else make(dxg.shape, dxg.dtype)
    sums = [np.zeros((n, ds[0].shape[-1]), dxg.dtype) for _ in cell.vectors]
    dhome = _run_back(tape, ds, injected, (dxg, dhg), sums)
    dx, dw, db = affine_back(np, dxg, kept.x, params["weight_ih"])
    grads = {"weight_ih": dw, "weight_hh": np.dot(flat(np, dhg).T, flat(np, kept.before[0]))}
    if "bias_ih" in params:
        grads |= {"bias_ih": db, "bias_hh": db.copy() if dhg is dxg else flat(np, dhg).sum(axis=0)}
    grads |= {name: d.sum(axis=0) for name, d in zip(cell.vectors, sums, strict=True)}
    back = [None if d is None else rows.unsort(d, 0) for d in (*ds, *dhome)]
    dx = None if dx is None else rows.unsort(dx, 1)
    return dx, tuple(back[: len(ds)]), back[len(ds) :], {name: grads[name] for name in params}


def _run_back(
    tape: Tape, ds: list[Array], injected: Sequence[Array | None], sent: tuple[Array, Array], sums: list[Array]
) -> list[Array | None]:
    """The time loop, in reverse order: leaves the adjoint of the first states in `ds`, returns the home states'."""
    kept: _Kept = tape.saved
    params, (count, n, width), hidden, item = tape.params, sent[0].shape, ds[0].shape[-1], ds[0].itemsize
    u = np.ascontiguousarray(params["weight_hh"])
    given = _common(kept.rows, u, tape.reverse, (count, n, hidden, width))
    given |= {"X": sent[0], "Y": sent[1], "B": (product := np.zeros_like(ds[0])), "R": ds[0], "G": kept.gates}
    nothing = np.zeros(hidden, u.dtype)
    dhome: list[Array | None] = [None if kept.rows.reset is None else np.zeros_like(d) for d in ds]
    for k, d in enumerate(injected):
        if d is not None and d.strides[-1] != item:
            d = np.ascontiguousarray(d)
        steps, rows = (0, 0) if d is None else (d.strides[0] // item, d.strides[1] // item)
        given |= {f"I{k}": nothing if d is None else d, f"a{k}": steps, f"b{k}": rows}
        given |= {f"D{k}": ds[k], f"E{k}": dhome[k], f"M{k}": kept.after[k], f"S{k}": kept.before[k]}
    given |= kept.spare | {f"P{k}": a for k, a in enumerate(sums)}
    given |= {f"p{k}": np.ascontiguousarray(params[name]) for k, name in enumerate(tape.cell.vectors)}
    _call(kept.sources.backward, kept.sources.backward_table, given)
    ds[0] += product
    return dhome
