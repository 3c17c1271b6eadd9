"""The parts that learn nothing: their files, their edges, their errors, a part of your own."""

from __future__ import annotations

import numpy as np
import pytest

import xprnn
from xprnn import ActivationLayer, HoldLastOutput, LastStep, Masking, MergeDirections, ReverseTime, Softmax
from xprnn.layers.sequential import from_config

T, N, D = 5, 4, 4
WALKS = ("forward", "reverse", "both")
ALL = [
    *(kind(direction=w) for kind in (HoldLastOutput, LastStep) for w in WALKS),
    LastStep(valid_only=False, batch_first=True),
    ReverseTime(),
    ReverseTime(reverse_mask=False, batch_first=True),
    *(MergeDirections(2, mode) for mode in ("sum", "mul", "ave", "pair")),
    ActivationLayer("tanh"),
    ActivationLayer(xprnn.activation("leakyrelu", 0.3)),
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
    for part in (HoldLastOutput(direction=walk), LastStep(direction=walk), ReverseTime()):
        for shape in ((0, 2, 4), (3, 0, 4)):
            x = xp.asarray(np.zeros(shape))
            y, _, tape = part.forward({}, x, mask=xp.asarray(np.zeros(shape[:2], bool)))
            assert tuple(y.shape) == (shape[1:] if isinstance(part, LastStep) else shape)
            assert tuple(part.backward(tape, y).dx.shape) == shape


x3, x2 = np.zeros((T, N, D)), np.zeros((N, D))
BAD = {
    "walk": (
        lambda: HoldLastOutput(direction="up"),
        r"HoldLastOutput: direction must be forward, reverse or both, found 'up'",
    ),
    "mode": (lambda: MergeDirections(2, "max"), r"MergeDirections: mode must be sum, mul, ave or pair, found 'max'"),
    "value": (lambda: Masking("0"), r"Masking: value must be a number, found '0'"),
    "activation": (lambda: ActivationLayer("glu"), r"activation: expected one of .* found 'glu'"),
    "valid": (lambda: LastStep(valid_only=1), r"LastStep: valid_only must be True or False"),
    "no time": (lambda: LastStep()({}, x2), r"LastStep\.forward: x must be \(T,N,D\), 3 axes, found shape \(4, 4\)"),
    "no time, batch first": (
        lambda: HoldLastOutput(batch_first=True)({}, x2),
        r"HoldLastOutput\.forward: x must be \(N,T,D\)",
    ),
    "mask": (
        lambda: HoldLastOutput()({}, x3, mask=np.ones((N, T), bool)),
        r"HoldLastOutput\.forward: mask \(T,N\) must have shape",
    ),
    "halves": (lambda: MergeDirections(3)({}, x3), r"MergeDirections\.forward: x \(\.\.\.,2H\) must end in 6 features"),
    "params": (lambda: ActivationLayer("tanh")({"w": x2}, x3), r"ActivationLayer\.forward: params: unexpected w"),
    "integers": (
        lambda: ActivationLayer("tanh")({}, np.zeros(3, int)),
        r"x must be of a real floating dtype, found int64",
    ),
    "dy": (
        lambda: LastStep().backward(LastStep().forward({}, x3)[2], x3),
        r"LastStep\.backward: dy .* must have shape \(4, 4\)",
    ),
    "dy none": (
        lambda: ActivationLayer("tanh").backward(x3, None),
        r"ActivationLayer\.backward: dy must be an array, found None",
    ),
    "pair": (
        lambda: MergeDirections(2, "pair").backward(x3, x3),
        r"dy must be a pair, one for each direction, found ndarray",
    ),
    "mask beside": (lambda: Masking().transform_mask(x3, {"mask": x2 > 0}), r"Masking: mask \(as x\) must have shape"),
    "masked step": (lambda: Masking().step({}, x2), r"Masking\.step: a step cannot be skipped"),
    "turned step": (lambda: ReverseTime().step({}, x2), r"ReverseTime\.step: the last step comes first"),
    "own activation": (
        lambda: ActivationLayer(xprnn.Activation("mine", lambda xp: None)).config(),
        r"ActivationLayer: .* no file form",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    build, message = BAD[name]
    with pytest.raises(xprnn.InputError, match=message):
        build()


def test_a_stream_through_parts(rng):
    """Step by step: the last output so far, as the whole sequence cut there gives it."""
    model = xprnn.Sequential(
        rnn=xprnn.GRU(2, 3), hold=HoldLastOutput(), last=LastStep(), head=xprnn.Linear(3, 2), out=Softmax()
    )
    params = {n: rng.normal(size=s) for n, s in model.shapes().items()}
    x, state = rng.normal(size=(T, N, 2)), None
    for t in range(T):
        y, state = model.step(params, x[t], state)
        np.testing.assert_allclose(y, model(params, x[: t + 1])[0], rtol=1e-12)


def test_a_part_of_your_own(rng):
    class Double(xprnn.StatelessLayer):
        def forward(self, params, x, state=None, **flags):
            return 2 * x, None, None

        def backward(self, tape, dy, dstate=None):
            return xprnn.Gradients(2 * dy, None, {})

    model = xprnn.Sequential(rnn=xprnn.RNN(2, 3), double=Double())
    params = model.init(rng, like=np.zeros(0))
    assert max(xprnn.check_layer(model, params, rng.normal(size=(3, 2, 2)), np.zeros((1, 2, 3))).values()) < 1e-6
