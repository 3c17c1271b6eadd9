"""The Elman, LSTM and GRU cells: the step of each and, right below it, its adjoint.

The functions follow the contract of `xprnn.cells.cell.Cell`. The order of gates is that of torch: i, f, g, o in the
LSTM and r, z, n in the GRU. Each factory takes activations by name or as `Activation`, and returns the same object for
the same options.
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
    """Return two functions of a pre-activation: its clipped value, and the mask (1 inside, 0 outside) to save."""
    if clip is None:
        return lambda v: v, lambda v: ()
    return lambda v: xp.minimum(xp.maximum(v, -clip), clip), lambda v: (xp.where(xp.abs(v) <= clip, 1.0, 0.0 * v),)


def _clipped_derivative(saved: Values, gates: int, clip: float | None) -> Callable[[int, Any], Any]:
    """Return a function of gate number and derivative: the derivative, or 0 where the gate was clipped."""
    if clip is None:
        return lambda k, derivative: derivative
    masks = saved[len(saved) - gates :]
    return lambda k, derivative: derivative * masks[k]


@serializable
def elman(f: Activation | str = "tanh", clip: float | None = None) -> Cell:
    """Return the Elman (simple recurrent) cell (Elman 1990).

        h' = f(x W' + b_ih + h U' + b_hh)

    Args:
        f: activation.
        clip: bounds the pre-activation to [-clip, clip], as the ONNX operator does; None: no bound.

    Returns:
        A cell with 1 gate and the state h.

    Raises:
        InputError: an unknown activation, one whose derivative needs its input, or clip not above 0.

    >>> elman("relu").gates
    1
    """
    act = activation(f)

    def build(xp: Any) -> tuple[Any, Any]:
        fn, derivative = act.build(xp)
        clipped, clip_mask = _clip_fns(xp, clip)

        def step(x: Values, h: Values, state: Values, p: Values) -> tuple[Values, Values]:
            a = x[0] + h[0]
            y = fn(clipped(a))
            return (y,), (y, *clip_mask(a))

        def backward(dstate: Values, saved: Values, state: Values, p: Values) -> tuple[Values, Values, Values, Values]:
            unless_clipped = _clipped_derivative(saved, 1, clip)
            da = dstate[0] * unless_clipped(0, derivative(saved[0]))
            return (da,), (da,), (None,), ()

        return step, backward

    return Cell("elman", 1, build, gate_names=("a",))


@serializable
def lstm(
    gate: Activation | str = "sigmoid",
    candidate: Activation | str = "tanh",
    output: Activation | str = "tanh",
    peepholes: bool = False,
    coupled: bool = False,
    clip: float | None = None,
) -> Cell:
    """Return the LSTM cell (Hochreiter & Schmidhuber 1997; forget gate: Gers, Schmidhuber & Cummins 2000).

        a_k = row block k of  x W' + b_ih + h U' + b_hh,  k = i, f, g, o
        i = s(a_i + p_i*c),  f = s(a_f + p_f*c),  g = t(a_g)
        c' = f*c + i*g
        o = s(a_o + p_o*c'),  h' = o*u(c')

    Args:
        gate: activation s of the gates i, f and o.
        candidate: activation t of the candidate g.
        output: activation u of the new cell state.
        peepholes: adds the parameters weight_pi, weight_pf and weight_po (H,), p in the equations; without, p = 0.
        coupled: f = 1 - i; the rows of f in the weights are kept but have no influence.
        clip: bounds each pre-activation to [-clip, clip], as the ONNX operator does; None: no bound.

    Returns:
        A cell with 4 gates and the states h and c.

    Raises:
        InputError: an unknown activation, one whose derivative needs its input, a flag that is not a bool, or clip not
            above 0.

    >>> lstm().states
    ('h', 'c')
    >>> lstm(peepholes=True).vectors
    ('weight_pi', 'weight_pf', 'weight_po')
    """
    functions = activation(gate), activation(candidate), activation(output)

    def build(xp: Any) -> tuple[Any, Any]:
        pairs, clip_fns = [f.build(xp) for f in functions], _clip_fns(xp, clip)
        step = _lstm_step([f for f, _ in pairs], clip_fns, peepholes, coupled)
        return step, _lstm_backward([derivative for _, derivative in pairs], clip, peepholes, coupled)

    vectors = ("weight_pi", "weight_pf", "weight_po") if peepholes else ()
    return Cell("lstm", 4, build, ("h", "c"), vectors, gate_names=("i", "f", "g", "o"))


def _lstm_step(functions: Sequence[Any], clip_fns: Any, peepholes: bool, coupled: bool) -> Any:
    """Return the LSTM's step for activations (gate, candidate, output) over one namespace."""
    (s, t, u), (clipped, clip_mask) = functions, clip_fns

    def step(x: Values, h: Values, state: Values, p: Values) -> tuple[Values, Values]:
        c = state[1]
        ai, ag, ao = x[0] + h[0], x[2] + h[2], x[3] + h[3]
        af = ai if coupled else x[1] + h[1]
        if peepholes:
            ai = ai + p[0] * c
            af = ai if coupled else af + p[1] * c
        i, g = s(clipped(ai)), t(clipped(ag))
        f = 1.0 - i if coupled else s(clipped(af))
        c_new = f * c + i * g
        if peepholes:
            ao = ao + p[2] * c_new
        o, tc = s(clipped(ao)), u(c_new)
        return (o * tc, c_new), (i, f, g, o, tc, *clip_mask(ai), *clip_mask(af), *clip_mask(ag), *clip_mask(ao))

    return step


def _lstm_backward(derivatives: Sequence[Any], clip: float | None, peepholes: bool, coupled: bool) -> Any:
    """Return the adjoint of `_lstm_step` for the derivatives of its activations."""
    ds, dt, du = derivatives

    def backward(dstate: Values, saved: Values, state: Values, p: Values) -> tuple[Values, Values, Values, Values]:
        i, f, g, o, tc = saved[:5]
        (dh, dc), c, unless_clipped = dstate, state[1], _clipped_derivative(saved, 4, clip)
        dao = dh * (tc * unless_clipped(3, ds(o)))
        dc = dc + dh * (o * du(tc))
        if peepholes:
            dc = dc + dao * p[2]
        dag = dc * (i * unless_clipped(2, dt(g)))
        if coupled:
            dai, daf = dc * ((g - c) * unless_clipped(0, ds(i))), 0.0 * dc
        else:
            dai, daf = dc * (g * unless_clipped(0, ds(i))), dc * (c * unless_clipped(1, ds(f)))
        dc_prev = dc * f
        dp: Values = ()
        if peepholes:
            dc_prev = dc_prev + dai * p[0] + daf * p[1]
            dp = dai * c, daf * c, dao * (f * c + i * g)  # the peephole of o sees c' = f*c + i*g
        d = (dai, daf, dag, dao)
        return d, d, (None, dc_prev), dp

    return backward


@serializable
def gru(gate: Activation | str = "sigmoid", candidate: Activation | str = "tanh", clip: float | None = None) -> Cell:
    """Return the GRU cell of torch and cuDNN, which resets after the recurrent product (Cho et al. 2014, variant).

        x_k, h_k = row block k of  x W' + b_ih  and of  h U' + b_hh,  k = r, z, n
        r = s(x_r + h_r),  z = s(x_z + h_z)
        n = t(x_n + r*h_n)
        h' = (1 - z)*n + z*h,  computed as n + z*(h - n)

    Args:
        gate: activation s of the gates r and z.
        candidate: activation t of the candidate n.
        clip: bounds each pre-activation to [-clip, clip], as the ONNX operator does; None: no bound.

    Returns:
        A cell with 3 gates and the state h.

    Raises:
        InputError: an unknown activation, one whose derivative needs its input, or clip not above 0.

    >>> gru().gates
    3
    """
    gate_, candidate_ = activation(gate), activation(candidate)

    def build(xp: Any) -> tuple[Any, Any]:
        s, ds = gate_.build(xp)
        t, dt = candidate_.build(xp)
        clipped, clip_mask = _clip_fns(xp, clip)

        def step(x: Values, h: Values, state: Values, p: Values) -> tuple[Values, Values]:
            (h_prev,) = state
            ar, az = x[0] + h[0], x[1] + h[1]
            r, z = s(clipped(ar)), s(clipped(az))
            an = x[2] + r * h[2]
            n = t(clipped(an))
            return (n + z * (h_prev - n),), (r, z, n, h[2], *clip_mask(ar), *clip_mask(az), *clip_mask(an))

        def backward(dstate: Values, saved: Values, state: Values, p: Values) -> tuple[Values, Values, Values, Values]:
            r, z, n, hn = saved[:4]
            unless_clipped = _clipped_derivative(saved, 3, clip)
            (dh,) = dstate
            (h_prev,) = state
            dan = dh * ((1.0 - z) * unless_clipped(2, dt(n)))
            daz = dh * ((h_prev - n) * unless_clipped(1, ds(z)))
            dar = dan * (hn * unless_clipped(0, ds(r)))
            return (dar, daz, dan), (dar, daz, dan * r), (dh * z,), ()

        return step, backward

    return Cell("gru", 3, build, gate_names=("r", "z", "n"))


@serializable
def gru_reset_before(
    gate: Activation | str = "sigmoid", candidate: Activation | str = "tanh", clip: float | None = None
) -> Cell:
    """Return the original GRU cell, which resets before the recurrent product of the candidate (Cho et al. 2014).

        r, z and h' as in `gru`,  n = t(x_n + (r*h) U_n' + b_hn)

    The gates r and z are pregates: they act before the product with U_n, see `Cell`.

    Args:
        gate: activation s of the gates r and z.
        candidate: activation t of the candidate n.
        clip: bounds each pre-activation to [-clip, clip], as the ONNX operator does; None: no bound.

    Returns:
        A cell with 3 gates, of which 2 are pregates, and the state h.

    Raises:
        InputError: an unknown activation, one whose derivative needs its input, or clip not above 0.

    >>> gru_reset_before().pregates
    2
    """
    gate_, candidate_ = activation(gate), activation(candidate)

    def build(xp: Any) -> Pointwise:
        s, ds = gate_.build(xp)
        t, dt = candidate_.build(xp)
        clipped, clip_mask = _clip_fns(xp, clip)

        def pregate(x: Values, h: Values, state: Values, p: Values) -> tuple[Values, Any]:
            ar, az = x[0] + h[0], x[1] + h[1]
            r, z = s(clipped(ar)), s(clipped(az))
            return (r, z, *clip_mask(ar), *clip_mask(az)), r * state[0]

        def pregate_backward(
            dvalues: Values, dq: Any, values: Values, state: Values, p: Values
        ) -> tuple[Values, Values, Values]:
            r, z = values[:2]
            unless_clipped = _clipped_derivative(values, 2, clip)
            dar = dq * (state[0] * unless_clipped(0, ds(r)))
            daz = dvalues[1] * unless_clipped(1, ds(z))
            return (dar, daz), (dq * r,), ()

        def step(x: Values, h: Values, state: Values, p: Values) -> tuple[Values, Values]:
            z, (h_prev,) = x[1], state
            an = x[2] + h[0]
            n = t(clipped(an))
            return (n + z * (h_prev - n),), (z, n, *clip_mask(an))

        def backward(dstate: Values, saved: Values, state: Values, p: Values) -> tuple[Values, Values, Values, Values]:
            z, n = saved[:2]
            (dh,), (h_prev,) = dstate, state
            dan = dh * ((1.0 - z) * _clipped_derivative(saved, 1, clip)(0, dt(n)))
            return (None, dh * (h_prev - n), dan), (dan,), (dh * z,), ()

        return Pointwise(step, backward, pregate, pregate_backward)

    return Cell("gru_reset_before", 3, build, pregates=2, gate_names=("r", "z", "n"))
