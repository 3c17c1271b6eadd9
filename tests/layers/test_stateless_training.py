"""The parts that learn nothing: their files, their edges, their errors, a part of your own."""

from __future__ import annotations

import numpy as np
import pytest

import xprnn
from xprnn import Apply, Flip, Hold, Last, Masking, Merge, Softmax
from xprnn.layers.sequential import from_config

T, N, D = 5, 4, 4
WALKS = ("forward", "reverse", "both")
ALL = [
    *(kind(walk=w) for kind in (Hold, Last) for w in WALKS),
    Last(valid=False, batch_first=True),
    Flip(),
    Flip(flags=False, batch_first=True),
    *(Merge(2, mode) for mode in ("sum", "mul", "ave", "pair")),
    Apply("tanh"),
    Apply(xprnn.activation("leakyrelu", 0.3)),
    Softmax(),
    Softmax(log=True),
    Masking(2.5),
]


@pytest.mark.parametrize("part", ALL, ids=lambda part: str(part.config()))
def test_config_and_files(tmp_path, part):
    assert from_config(part.config()) == part
    model = xprnn.Sequential(part=part)
    xprnn.save(tmp_path / "m.safetensors", model, {})
    assert xprnn.load(tmp_path / "m.safetensors") == (model, {})


@pytest.mark.parametrize("walk", WALKS)
def test_no_steps_and_no_rows(xp, walk):
    for part in (Hold(walk=walk), Last(walk=walk), Flip()):
        for shape in ((0, 2, 4), (3, 0, 4)):
            x = xp.asarray(np.zeros(shape))
            y, _, tape = part.forward({}, x, mask=xp.asarray(np.zeros(shape[:2], bool)))
            assert tuple(y.shape) == (shape[1:] if isinstance(part, Last) else shape)
            assert tuple(part.backward(tape, y).dx.shape) == shape


x3, x2 = np.zeros((T, N, D)), np.zeros((N, D))
BAD = {
    "walk": (lambda: Hold(walk="up"), r"Hold: walk must be forward, reverse or both, found 'up'"),
    "mode": (lambda: Merge(2, "max"), r"Merge: mode must be sum, mul, ave or pair, found 'max'"),
    "value": (lambda: Masking("0"), r"Masking: value must be a number, found '0'"),
    "activation": (lambda: Apply("glu"), r"activation: expected one of .* found 'glu'"),
    "valid": (lambda: Last(valid=1), r"Last: valid must be True or False"),
    "no time": (lambda: Last()({}, x2), r"Last\.forward: x must be \(T,N,D\), 3 axes, found shape \(4, 4\)"),
    "no time, batch first": (lambda: Hold(batch_first=True)({}, x2), r"Hold\.forward: x must be \(N,T,D\)"),
    "mask": (lambda: Hold()({}, x3, mask=np.ones((N, T), bool)), r"Hold\.forward: mask \(T,N\) must have shape"),
    "halves": (lambda: Merge(3)({}, x3), r"Merge\.forward: x \(\.\.\.,2H\) must end in 6 features"),
    "params": (lambda: Apply("tanh")({"w": x2}, x3), r"Apply\.forward: params: unexpected w"),
    "integers": (lambda: Apply("tanh")({}, np.zeros(3, int)), r"x must be of a real floating dtype, found int64"),
    "dy": (lambda: Last().backward(Last().forward({}, x3)[2], x3), r"Last\.backward: dy .* must have shape \(4, 4\)"),
    "dy none": (lambda: Apply("tanh").backward(x3, None), r"Apply\.backward: dy must be an array, found None"),
    "pair": (lambda: Merge(2, "pair").backward(x3, x3), r"dy must be a pair, one for each direction, found ndarray"),
    "mask beside": (lambda: Masking().following(x3, {"mask": x2 > 0}), r"Masking: mask \(as x\) must have shape"),
    "masked step": (lambda: Masking().step({}, x2), r"Masking\.step: a step cannot be skipped"),
    "turned step": (lambda: Flip().step({}, x2), r"Flip\.step: the last step comes first"),
    "own activation": (lambda: Apply(xprnn.Activation("mine", lambda xp: None)).config(), r"Apply: .* no file form"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    build, message = BAD[name]
    with pytest.raises(xprnn.InputError, match=message):
        build()


def test_a_stream_through_parts(rng):
    """Step by step: the last output so far, as the whole sequence cut there gives it."""
    model = xprnn.Sequential(rnn=xprnn.GRU(2, 3), hold=Hold(), last=Last(), head=xprnn.Linear(3, 2), out=Softmax())
    params = {n: rng.normal(size=s) for n, s in model.shapes().items()}
    x, state = rng.normal(size=(T, N, 2)), None
    for t in range(T):
        y, state = model.step(params, x[t], state)
        np.testing.assert_allclose(y, model(params, x[: t + 1])[0], rtol=1e-12)


def test_a_part_of_your_own(rng):
    class Double(xprnn.Part):
        def forward(self, params, x, state=None, **flags):
            return 2 * x, None, None

        def backward(self, tape, dy, dstate=None):
            return xprnn.Gradients(2 * dy, None, {})

    model = xprnn.Sequential(rnn=xprnn.RNN(2, 3), double=Double())
    params = model.init(rng, like=np.zeros(0))
    assert max(xprnn.check_layer(model, params, rng.normal(size=(3, 2, 2)), np.zeros((1, 2, 3))).values()) < 1e-6
