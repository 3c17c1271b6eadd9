"""Models with layers that no single ONNX operator expresses, and the user-defined cells and activations in them."""

import xprnn
from xprnn import (
    ActivationLayer,
    ContextShift,
    Embedding,
    HoldLastOutput,
    LastStep,
    Linear,
    Masking,
    MergeDirections,
    ReverseTime,
    Sequential,
    cells,
)


def leaky_cell(xp):
    """A cell with a parameter vector, two states, and functions that are not ONNX operators. It has no adjoint."""

    def step(x, h, state, p):
        (v, w), (rate,) = state, p
        f = xp.expm1(-xp.abs(x[0] + h[0])) + xp.where(x[1] > h[1], 0.5 * w, xp.square(xp.tanh(h[1])) / 2.0)
        return (v + rate * (f - v), xp.minimum(xp.log1p(xp.square(w)) - f, 1.0)), ()

    return step, lambda *_: None


def swish_functions(xp):
    return (lambda v: v * xp.sigmoid(v) if hasattr(xp, "sigmoid") else v / (1.0 + xp.exp(-v))), lambda y: y


SWISH = xprnn.Activation("swish", swish_functions)
LEAKY_CELL = xprnn.Cell("leaky", 2, leaky_cell, states=("h", "w"), vectors=("rate",))
PEEPHOLE_LSTM = cells.lstm("hardsigmoid", peepholes=True, clip=0.7)
BATCH_FIRST = {"batch_first": True}
COMPOSITE_MODELS = {
    "projected": xprnn.LSTM(3, 5, proj_size=2),
    "projected, bidirectional": xprnn.LSTM(3, 5, 2, proj_size=2, bidirectional=True, learned_state=True),
    "projected, reverse": xprnn.LSTM(3, (5, 4), 2, proj_size=2, reverse=True, batch_first=True, bias=False),
    "projected, peephole cell": xprnn.LSTM(3, 4, proj_size=3, cell=PEEPHOLE_LSTM, bidirectional=True),
    "user-defined cell": xprnn.Recurrent(3, 4, 2, cell=LEAKY_CELL, bidirectional=True),
    "user-defined activation": xprnn.RNN(3, 4, nonlinearity=SWISH, reverse=True),
    "user-defined activation, gru reset before": xprnn.GRU(
        3, 4, cell=cells.gru_reset_before(candidate=SWISH), **BATCH_FIRST
    ),
    "nested": Sequential(
        low=Sequential(a=xprnn.RNN(3, 4), b=Sequential(c=xprnn.LSTM(4, 4), d=ActivationLayer("tanh"))),
        head=Linear(4, 2),
    ),
    "reversed time": Sequential(
        a=ReverseTime(), b=xprnn.GRU(3, 4), c=ReverseTime(), d=xprnn.LSTM(4, 4, bidirectional=True)
    ),
    "reversed time, mask not reversed": Sequential(
        a=ReverseTime(reverse_mask=False), b=xprnn.GRU(3, 4, reverse=True), c=LastStep(direction="reverse")
    ),
    "reversed time, batch first": Sequential(
        a=xprnn.RNN(3, 4, **BATCH_FIRST), b=ReverseTime(**BATCH_FIRST), c=xprnn.RNN(4, 2, **BATCH_FIRST)
    ),
    "masked": Sequential(a=Masking(), b=xprnn.GRU(3, 4, 2, learned_state=True), c=HoldLastOutput(), d=Linear(4, 3)),
    "masked by nan": Sequential(
        a=Masking(float("nan")), b=xprnn.RNN(3, 4, reverse=True), c=HoldLastOutput(direction="reverse")
    ),
    "masked, bidirectional": Sequential(
        a=Masking(),
        b=xprnn.LSTM(3, 4, 2, bidirectional=True, **BATCH_FIRST),
        c=HoldLastOutput(direction="both", **BATCH_FIRST),
        d=xprnn.Softmax(),
        e=LastStep(direction="both", **BATCH_FIRST),
    ),
    "masked, reversed time": Sequential(
        a=Masking(),
        b=ReverseTime(),
        c=xprnn.LSTM(3, 4),
        d=HoldLastOutput(),
        e=ReverseTime(),
        f=xprnn.RNN(4, 4, reverse=True),
        g=LastStep(),
    ),
    "masked, projected": Sequential(
        a=Masking(),
        b=xprnn.LSTM(3, 4, proj_size=2, bidirectional=True),
        c=HoldLastOutput(direction="both"),
        d=MergeDirections(2, "mul"),
    ),
    "masked twice": Sequential(a=Masking(), b=Linear(3, 3, bias=False), c=Masking(), d=xprnn.GRU(3, 4), e=LastStep()),
    "masked ids": Sequential(
        a=Masking(0), b=Embedding(7, 3), c=xprnn.GRU(3, 4, bidirectional=True), d=LastStep(direction="both")
    ),
    "context shift": Sequential(a=xprnn.RNN(3, 4, bidirectional=True), b=ContextShift(4), c=Linear(8, 2)),
    "held outputs": Sequential(
        a=xprnn.RNN(3, 4), b=HoldLastOutput(), c=ActivationLayer("relu"), d=LastStep(valid_only=False)
    ),
    "last step of linear": Sequential(
        a=xprnn.RNN(3, 4), b=Linear(4, 4), c=LastStep(direction="reverse"), d=Linear(4, 2)
    ),
    "last step of activation": Sequential(
        a=xprnn.LSTM(3, 4, **BATCH_FIRST), b=ActivationLayer(SWISH), c=LastStep(direction="both", **BATCH_FIRST)
    ),
}
