"""Models of what no single operator of ONNX says, and the cells and activations of one's own in them."""

import xprnn
from xprnn import Apply, Around, Embedding, Flip, Hold, Last, Linear, Masking, Merge, Sequential, cells


def leaky(xp):
    """An own cell with a vector to learn, two states, and functions that ONNX has not by name."""

    def step(x, h, state, p):
        (v, w), (rate,) = state, p
        f = xp.expm1(-xp.abs(x[0] + h[0])) + xp.where(x[1] > h[1], 0.5 * w, xp.square(xp.tanh(h[1])) / 2.0)
        return (v + rate * (f - v), xp.minimum(xp.log1p(xp.square(w)) - f, 1.0)), ()

    return step, lambda *_: None


def swish(xp):
    return (lambda v: v * xp.sigmoid(v) if hasattr(xp, "sigmoid") else v / (1.0 + xp.exp(-v))), lambda y: y


SWISH = xprnn.Activation("swish", swish)
OWN = xprnn.Cell("leaky", 2, leaky, states=("h", "w"), vectors=("rate",))
PEEP = cells.lstm("hardsigmoid", peepholes=True, clip=0.7)
FIRST = {"batch_first": True}
MODELS = {
    "projected": xprnn.LSTM(3, 5, proj_size=2),
    "projected, both ways": xprnn.LSTM(3, 5, 2, proj_size=2, bidirectional=True, learned_state=True),
    "projected backwards": xprnn.LSTM(3, (5, 4), 2, proj_size=2, reverse=True, batch_first=True, bias=False),
    "projected, of another cell": xprnn.LSTM(3, 4, proj_size=3, cell=PEEP, bidirectional=True),
    "own cell": xprnn.Recurrent(3, 4, 2, cell=OWN, bidirectional=True),
    "own activation": xprnn.RNN(3, 4, nonlinearity=SWISH, reverse=True),
    "own activation before the product": xprnn.GRU(3, 4, cell=cells.gru_reset_before(candidate=SWISH), **FIRST),
    "one inside another": Sequential(
        low=Sequential(a=xprnn.RNN(3, 4), b=Sequential(c=xprnn.LSTM(4, 4), d=Apply("tanh"))), head=Linear(4, 2)
    ),
    "flipped": Sequential(a=Flip(), b=xprnn.GRU(3, 4), c=Flip(), d=xprnn.LSTM(4, 4, bidirectional=True)),
    "flipped, lengths left": Sequential(a=Flip(flags=False), b=xprnn.GRU(3, 4, reverse=True), c=Last(walk="reverse")),
    "flipped, batch first": Sequential(a=xprnn.RNN(3, 4, **FIRST), b=Flip(**FIRST), c=xprnn.RNN(4, 2, **FIRST)),
    "masked": Sequential(a=Masking(), b=xprnn.GRU(3, 4, 2, learned_state=True), c=Hold(), d=Linear(4, 3)),
    "masked by nan": Sequential(a=Masking(float("nan")), b=xprnn.RNN(3, 4, reverse=True), c=Hold(walk="reverse")),
    "masked, both ways": Sequential(
        a=Masking(), b=xprnn.LSTM(3, 4, 2, bidirectional=True, **FIRST), c=Hold(walk="both", **FIRST),
        d=xprnn.Softmax(), e=Last(walk="both", **FIRST)
    ),
    "masked and flipped": Sequential(
        a=Masking(), b=Flip(), c=xprnn.LSTM(3, 4), d=Hold(), e=Flip(), f=xprnn.RNN(4, 4, reverse=True), g=Last()
    ),
    "masked and projected": Sequential(
        a=Masking(), b=xprnn.LSTM(3, 4, proj_size=2, bidirectional=True), c=Hold(walk="both"), d=Merge(2, "mul")
    ),
    "masked twice": Sequential(a=Masking(), b=Linear(3, 3, bias=False), c=Masking(), d=xprnn.GRU(3, 4), e=Last()),
    "masked words": Sequential(a=Masking(0), b=Embedding(7, 3), c=xprnn.GRU(3, 4, bidirectional=True),
                               d=Last(walk="both")),
    "moved apart": Sequential(a=xprnn.RNN(3, 4, bidirectional=True), b=Around(4), c=Linear(8, 2)),
    "held lengths": Sequential(a=xprnn.RNN(3, 4), b=Hold(), c=Apply("relu"), d=Last(valid=False)),
    "last of anything": Sequential(a=xprnn.RNN(3, 4), b=Linear(4, 4), c=Last(walk="reverse"), d=Linear(4, 2)),
    "last of both ways of anything": Sequential(a=xprnn.LSTM(3, 4, **FIRST), b=Apply(SWISH),
                                                c=Last(walk="both", **FIRST)),
}  # fmt: skip
