"""Layers without parameters: files, empty inputs, errors, streaming, and a user-defined layer."""

from __future__ import annotations

import numpy as np
import pytest

import xprnn
from xprnn import ActivationLayer, HoldLastOutput, LastStep, Masking, MergeDirections, ReverseTime, Softmax
from xprnn.layers.sequential import from_config

T, N, D = 5, 4, 4
DIRECTIONS = ("forward", "reverse", "both")
LAYERS = [
    *(kind(direction=w) for kind in (HoldLastOutput, LastStep) for w in DIRECTIONS),
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


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: str(layer.config()))
def test_config_and_file_round_trip(tmp_path, layer):
    assert from_config(layer.config()) == layer
    model = xprnn.Sequential(layer=layer)
    xprnn.save(tmp_path / "m.safetensors", model, {})
    assert xprnn.load(tmp_path / "m.safetensors") == (model, {})


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_empty_time_and_batch_axes(xp, direction):
    for layer in (HoldLastOutput(direction=direction), LastStep(direction=direction), ReverseTime()):
        for shape in ((0, 2, 4), (3, 0, 4)):
            x = xp.asarray(np.zeros(shape))
            y, _, tape = layer.forward({}, x, mask=xp.asarray(np.zeros(shape[:2], bool)))
            assert tuple(y.shape) == (shape[1:] if isinstance(layer, LastStep) else shape)
            assert tuple(layer.backward(tape, y).dx.shape) == shape


x3, x2 = np.zeros((T, N, D)), np.zeros((N, D))
INVALID = {
    "direction": (
        lambda: HoldLastOutput(direction="up"),
        r"HoldLastOutput: direction must be forward, reverse or both, found 'up'",
    ),
    "mode": (lambda: MergeDirections(2, "max"), r"MergeDirections: mode must be sum, mul, ave or pair, found 'max'"),
    "value": (lambda: Masking("0"), r"Masking: value must be a number, found '0'"),
    "activation": (lambda: ActivationLayer("glu"), r"activation: expected one of .* found 'glu'"),
    "valid_only": (lambda: LastStep(valid_only=1), r"LastStep: valid_only must be True or False"),
    "no time axis": (
        lambda: LastStep()({}, x2),
        r"LastStep\.forward: x must be \(T,N,D\), 3 axes, found shape \(4, 4\)",
    ),
    "no time axis, batch-major": (
        lambda: HoldLastOutput(batch_first=True)({}, x2),
        r"HoldLastOutput\.forward: x must be \(N,T,D\)",
    ),
    "mask": (
        lambda: HoldLastOutput()({}, x3, mask=np.ones((N, T), bool)),
        r"HoldLastOutput\.forward: mask \(T,N\) must have shape",
    ),
    "odd features": (
        lambda: MergeDirections(3)({}, x3),
        r"MergeDirections\.forward: x \(\.\.\.,2H\) must end in 6 features",
    ),
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
    "explicit mask": (
        lambda: Masking().transform_mask(x3, {"mask": x2 > 0}),
        r"Masking: mask \(as x\) must have shape",
    ),
    "step of Masking": (lambda: Masking().step({}, x2), r"Masking\.step: a step cannot be skipped"),
    "step of ReverseTime": (lambda: ReverseTime().step({}, x2), r"ReverseTime\.step: the last step comes first"),
    "user-defined activation": (
        lambda: ActivationLayer(xprnn.Activation("mine", lambda xp: None)).config(),
        r"ActivationLayer: .* no file form",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_input_raises_input_error(name):
    call, message = INVALID[name]
    with pytest.raises(xprnn.InputError, match=message):
        call()


def test_steps_equal_calls_with_a_growing_sequence(rng):
    """After t steps, LastStep gives the output of a call with the first t steps of x."""
    model = xprnn.Sequential(
        rnn=xprnn.GRU(2, 3), hold=HoldLastOutput(), last=LastStep(), head=xprnn.Linear(3, 2), out=Softmax()
    )
    params = {n: rng.normal(size=s) for n, s in model.shapes().items()}
    x, state = rng.normal(size=(T, N, 2)), None
    for t in range(T):
        y, state = model.step(params, x[t], state)
        np.testing.assert_allclose(y, model(params, x[: t + 1])[0], rtol=1e-12)


def test_user_defined_layer(rng):
    class Double(xprnn.StatelessLayer):
        def forward(self, params, x, state=None, **flags):
            return 2 * x, None, None

        def backward(self, tape, dy, dstate=None):
            return xprnn.Gradients(2 * dy, None, {})

    model = xprnn.Sequential(rnn=xprnn.RNN(2, 3), double=Double())
    params = model.init(rng, like=np.zeros(0))
    assert max(xprnn.check_layer(model, params, rng.normal(size=(3, 2, 2)), np.zeros((1, 2, 3))).values()) < 1e-6
