"""from_torch of classifiers: the last step is recognised, a mean is named; gaps in numbered layers are refused."""

from __future__ import annotations

import numpy as np
import pytest

import xprnn
from xprnn import InputError
from xprnn.interop.torch.state_dict import check_numbering

pytestmark = pytest.mark.regression


def classifier(pool, *, cell="LSTM", batch_first=True, bidirectional=False, num_layers=1):
    """A recurrent layer, `pool(outputs, final hidden state, time axis)`, a head."""
    import torch

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            options = {"batch_first": batch_first, "bidirectional": bidirectional, "num_layers": num_layers}
            self.rnn = getattr(torch.nn, cell)(3, 4, **options)
            self.out = torch.nn.Linear(8 if bidirectional else 4, 2)

        def forward(self, x):
            y, state = self.rnn(x)
            return self.out(pool(y, state[0] if cell == "LSTM" else state, 1 if batch_first else 0))

    return Classifier()


def join(h):
    import torch

    return torch.cat([h[-2], h[-1]], -1)


LAST_STEP = {
    "last output": (lambda y, h, axis: y.select(axis, -1), {}),
    "last output, time first": (lambda y, h, axis: y.select(axis, -1), {"batch_first": False, "cell": "RNN"}),
    "last output of two layers": (lambda y, h, axis: y.select(axis, -1), {"num_layers": 2, "cell": "GRU"}),
    "final state": (lambda y, h, axis: h[-1], {"num_layers": 2}),
    "last output of both directions": (lambda y, h, axis: y.select(axis, -1), {"bidirectional": True}),
    "final states of both directions": (lambda y, h, axis: join(h), {"bidirectional": True, "num_layers": 2}),
}


@pytest.mark.needs("torch")
@pytest.mark.parametrize("case", LAST_STEP)
def test_classifier_on_the_last_step_becomes_a_model_with_a_last_step(rng, case):
    import torch

    pool, options = LAST_STEP[case]
    module = classifier(pool, **options).double()
    model, params = xprnn.from_torch(module)
    assert list(model.layers) == ["rnn", "last_step", "out"]
    x = rng.normal(size=(5, 7, 3))
    with torch.no_grad():
        expected = module(torch.tensor(x)).numpy()
    np.testing.assert_allclose(model(params, x)[0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["mean", "amax"])
def test_pooling_over_time_is_named(name, batch_first):
    module = classifier(lambda y, h, axis: getattr(y, name)(axis), batch_first=batch_first)
    expected = "mean" if name == "mean" else "maximum"
    with pytest.raises(InputError, match=f"it takes the {expected} over time of the outputs of rnn, for which xprnn"):
        xprnn.from_torch(module)


@pytest.mark.needs("torch")
def test_last_step_without_a_head_is_recognised(rng):
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.last_step = torch.nn.GRU(3, 4)

        def forward(self, x):
            return self.last_step(x)[1][-1]

    module = Encoder().double()
    model, params = xprnn.from_torch(module)
    assert list(model.layers) == ["last_step", "last_step_"]
    x = rng.normal(size=(5, 2, 3))
    with torch.no_grad():
        expected = module(torch.tensor(x)).numpy()
    np.testing.assert_allclose(model(params, x)[0], expected, rtol=1e-9, atol=1e-12)


def state_dict(*names):
    """A GRU of 4 units, then matrices (4, 4)."""
    arrays = {f"{names[0]}.weight_ih_l0": np.ones((12, 4)), f"{names[0]}.weight_hh_l0": np.ones((12, 4))}
    return arrays | {f"{name}.{key}": np.ones((4, 4)[: 2 - (key == "bias")]) for name in names[1:] for key in PARTS}


PARTS = ("weight", "bias")


@pytest.mark.parametrize(
    ("names", "gap"),
    [
        (("0", "2"), "1"),
        (("0", "1", "4"), "2"),
        (("1", "2"), "0"),
        (("net.0", "net.3"), "net.1"),
        (("rnn", "head.0", "head.2"), "head.1"),
        (("layers.0.rnn", "layers.2.out"), "layers.1"),
    ],
)
def test_gap_in_numbered_layers_is_refused_unless_the_order_is_given(names, gap):
    with pytest.raises(InputError, match=rf"^from_torch: {gap} has no parameters, found layers {', '.join(names)}: "):
        xprnn.from_torch(state_dict(*names))
    model, _ = xprnn.from_torch(state_dict(*names), order=names)
    assert isinstance(model, xprnn.Sequential)


@pytest.mark.parametrize("names", [("0", "1"), ("rnn", "out"), ("net.0", "net.1", "head"), ("a.0", "b.0")])
def test_complete_numbering_is_read(names):
    assert isinstance(xprnn.from_torch(state_dict(*names))[0], xprnn.Sequential)


def test_huge_numbers_in_names_are_not_read_as_numbers():
    check_numbering("from_torch", ["9" * 10_000])
