"""The cells: what happens to each number of a state in one step and, right below, its adjoint.

A cell is purely elementwise. It has no loop, no matrix product and no array library of its own: it is a factory over a
namespace, `build(xp) -> (step, back)`, so the same lines run as array code, as in-place NumPy and as compiled loops.

    step(x, h, state, p)             -> state', saved
    back(dstate, saved, state, p)    -> dx, dh, dstate, dp

    x[k], h[k]   (N,H) gate k of the projected input  x_t W' + b_ih  and of the recurrent product  h_{t-1} U' + b_hh
    state        the state before the step, a tuple of (N,H): (h,) or (h, c); state[0] is the output
    p            the cell's own vectors, a tuple of (H,): peepholes, rates
    saved        what `back` needs, a tuple of (N,H); outputs are saved and nothing is recomputed
    dstate       in: the adjoint of state'; out: that of `state`, without what comes back through h (the scan adds it)

An entry of back's dstate may be None: no direct path. Write an adjoint as `d * (everything that needs no d)`: the
in-place kernels then compute the bracket for many steps at once.

Gate orders are torch's: LSTM i,f,g,o; GRU r,z,n.
"""

from collections.abc import Callable, Sequence
from typing import Any

from xprnn.cells.activations import Activation, activation
from xprnn.cells.cell import Cell, Pointwise, Values
from xprnn.cells.serialization import serializable

__all__ = [
    "elman",
    "gru",
    "gru_reset_before",
    "lstm",
]


def _clip_fns(xp: Any, clip: float | None) -> tuple[Callable[[Any], Any], Callable[[Any], Values]]:
    """(bound a pre-activation, what must be saved to know where it was bound)."""
    if clip is None:
        return lambda v: v, lambda v: ()
    return lambda v: xp.minimum(xp.maximum(v, -clip), clip), lambda v: (xp.where(xp.abs(v) <= clip, 1.0, 0.0 * v),)


def _clipped_derivative(saved: Values, gates: int, clip: float | None) -> Callable[[int, Any], Any]:
    """gate number, derivative -> the derivative, zero where the pre-activation was bound."""
    if clip is None:
        return lambda k, slope: slope
    inside = saved[len(saved) - gates :]
    return lambda k, slope: slope * inside[k]


@serializable
def elman(f: Activation | str = "tanh", clip: float | None = None) -> Cell:
    """The Elman (simple) cell: h' = f(x W' + b_ih + h U' + b_hh).

    >>> elman("relu").gates
    1
    """
    act = activation(f)

    def build(xp: Any) -> tuple[Any, Any]:
        fn, slope = act.build(xp)
        bound, inside = _clip_fns(xp, clip)

        def step(x: Values, h: Values, state: Values, p: Values) -> tuple[Values, Values]:
            a = x[0] + h[0]
            y = fn(bound(a))
            return (y,), (y, *inside(a))

        def back(dstate: Values, saved: Values, state: Values, p: Values) -> tuple[Values, Values, Values, Values]:
            at = _clipped_derivative(saved, 1, clip)
            da = dstate[0] * at(0, slope(saved[0]))
            return (da,), (da,), (None,), ()

        return step, back

    return Cell("elman", 1, build)


@serializable
def lstm(
    gate: Activation | str = "sigmoid",
    candidate: Activation | str = "tanh",
    output: Activation | str = "tanh",
    peepholes: bool = False,
    coupled: bool = False,
    clip: float | None = None,
) -> Cell:
    """The LSTM cell: c' = f*c + i*g, h' = o*tanh(c') (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000).

    i = s(a_i + p_i*c), f = s(a_f + p_f*c), g = tanh(a_g), o = s(a_o + p_o*c') with a = x W' + b_ih + h U' + b_hh.
    `peepholes` adds the vectors p; `coupled` sets f = 1 - i; `clip` bounds each pre-activation to [-clip, clip].

    >>> lstm().states
    ('h', 'c')
    """
    places = activation(gate), activation(candidate), activation(output)

    def build(xp: Any) -> tuple[Any, Any]:
        pairs, bound = [f.build(xp) for f in places], _clip_fns(xp, clip)
        step = _lstm_step([f for f, _ in pairs], bound, peepholes, coupled)
        return step, _lstm_backward([slope for _, slope in pairs], clip, peepholes, coupled)

    vectors = ("weight_pi", "weight_pf", "weight_po") if peepholes else ()
    return Cell("lstm", 4, build, ("h", "c"), vectors)


def _lstm_step(f: Sequence[Any], bounds: Any, peepholes: bool, coupled: bool) -> Any:
    (s, t, u), (bound, inside) = f, bounds

    def step(x: Values, h: Values, state: Values, p: Values) -> tuple[Values, Values]:
        c = state[1]
        ai, ag, ao = x[0] + h[0], x[2] + h[2], x[3] + h[3]
        af = ai if coupled else x[1] + h[1]
        if peepholes:
            ai = ai + p[0] * c
            af = ai if coupled else af + p[1] * c
        i, g = s(bound(ai)), t(bound(ag))
        f = 1.0 - i if coupled else s(bound(af))
        c_new = f * c + i * g
        if peepholes:
            ao = ao + p[2] * c_new
        o, tc = s(bound(ao)), u(c_new)
        return (o * tc, c_new), (i, f, g, o, tc, *inside(ai), *inside(af), *inside(ag), *inside(ao))

    return step


def _lstm_backward(slope: Sequence[Any], clip: float | None, peepholes: bool, coupled: bool) -> Any:
    ds, dt, du = slope

    def back(dstate: Values, saved: Values, state: Values, p: Values) -> tuple[Values, Values, Values, Values]:
        i, f, g, o, tc = saved[:5]
        (dh, dc), c, at = dstate, state[1], _clipped_derivative(saved, 4, clip)
        dao = dh * (tc * at(3, ds(o)))
        dc = dc + dh * (o * du(tc))
        if peepholes:
            dc = dc + dao * p[2]
        dag = dc * (i * at(2, dt(g)))
        if coupled:
            dai, daf = dc * ((g - c) * at(0, ds(i))), 0.0 * dc
        else:
            dai, daf = dc * (g * at(0, ds(i))), dc * (c * at(1, ds(f)))
        dc_prev = dc * f
        dp: Values = ()
        if peepholes:
            dc_prev = dc_prev + dai * p[0] + daf * p[1]
            dp = dai * c, daf * c, dao * (f * c + i * g)  # the output gate looked at c', which is f*c + i*g
        d = (dai, daf, dag, dao)
        return d, d, (None, dc_prev), dp

    return back


@serializable
def gru(gate: Activation | str = "sigmoid", candidate: Activation | str = "tanh", clip: float | None = None) -> Cell:
    """The GRU cell of torch and cuDNN, reset after the product: h' = n + z*(h - n), n = tanh(x_n + r*h_n).

    r = s(x_r + h_r), z = s(x_z + h_z), where x_k and h_k include their biases.

    >>> gru().gates
    3
    """
    gate_, candidate_ = activation(gate), activation(candidate)

    def build(xp: Any) -> tuple[Any, Any]:
        s, ds = gate_.build(xp)
        t, dt = candidate_.build(xp)
        bound, inside = _clip_fns(xp, clip)

        def step(x: Values, h: Values, state: Values, p: Values) -> tuple[Values, Values]:
            (h_prev,) = state
            ar, az = x[0] + h[0], x[1] + h[1]
            r, z = s(bound(ar)), s(bound(az))
            an = x[2] + r * h[2]
            n = t(bound(an))
            return (n + z * (h_prev - n),), (r, z, n, h[2], *inside(ar), *inside(az), *inside(an))

        def back(dstate: Values, saved: Values, state: Values, p: Values) -> tuple[Values, Values, Values, Values]:
            r, z, n, hn = saved[:4]
            at = _clipped_derivative(saved, 3, clip)
            (dh,) = dstate
            (h_prev,) = state
            dan = dh * ((1.0 - z) * at(2, dt(n)))
            daz = dh * ((h_prev - n) * at(1, ds(z)))
            dar = dan * (hn * at(0, ds(r)))
            return (dar, daz, dan), (dar, daz, dan * r), (dh * z,), ()

        return step, back

    return Cell("gru", 3, build)


@serializable
def gru_reset_before(
    gate: Activation | str = "sigmoid", candidate: Activation | str = "tanh", clip: float | None = None
) -> Cell:
    """The original GRU cell (Cho et al. 2014), reset before the product: n = tanh(x_n + (r*h) U_n' + b_hn).

    >>> gru_reset_before().early
    2
    """
    gate_, candidate_ = activation(gate), activation(candidate)

    def build(xp: Any) -> Pointwise:
        s, ds = gate_.build(xp)
        t, dt = candidate_.build(xp)
        bound, inside = _clip_fns(xp, clip)

        def early(x: Values, h: Values, state: Values, p: Values) -> tuple[Values, Any]:
            ar, az = x[0] + h[0], x[1] + h[1]
            r, z = s(bound(ar)), s(bound(az))
            return (r, z, *inside(ar), *inside(az)), r * state[0]

        def early_back(
            dvalues: Values, dq: Any, values: Values, state: Values, p: Values
        ) -> tuple[Values, Values, Values]:
            r, z = values[:2]
            at = _clipped_derivative(values, 2, clip)
            dar = dq * (state[0] * at(0, ds(r)))
            daz = dvalues[1] * at(1, ds(z))
            return (dar, daz), (dq * r,), ()

        def step(x: Values, h: Values, state: Values, p: Values) -> tuple[Values, Values]:
            z, (h_prev,) = x[1], state
            an = x[2] + h[0]
            n = t(bound(an))
            return (n + z * (h_prev - n),), (z, n, *inside(an))

        def back(dstate: Values, saved: Values, state: Values, p: Values) -> tuple[Values, Values, Values, Values]:
            z, n = saved[:2]
            (dh,), (h_prev,) = dstate, state
            dan = dh * ((1.0 - z) * _clipped_derivative(saved, 1, clip)(0, dt(n)))
            return (None, dh * (h_prev - n), dan), (dan,), (dh * z,), ()

        return Pointwise(step, back, early, early_back)

    return Cell("gru_reset_before", 3, build, pregates=2)
