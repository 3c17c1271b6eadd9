"""Errors of from_torch: unsupported sources, options that do not apply, and modules with another forward."""

from __future__ import annotations

import numpy as np
import pytest

import xprnn
from xprnn import InputError

pytestmark = pytest.mark.regression

GRU_STATE_DICT = {"weight_ih_l0": np.zeros((12, 3)), "weight_hh_l0": np.zeros((12, 4))}


@pytest.mark.parametrize("source", [None, 3, np.zeros(3)])
def test_wrong_source_error_lists_the_accepted_types(source):
    with pytest.raises(InputError, match=r"expected a path, a state_dict \(a dict\) or an nn.Module, found"):
        xprnn.from_torch(source)


@pytest.mark.needs("torch")
def test_pickled_module_error_says_how_to_save_a_state_dict(tmp_path):
    import torch

    torch.save(torch.nn.GRU(3, 4), tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"torch\.save\(model\.state_dict\(\), path\)$") as error:
        xprnn.from_torch(tmp_path / "m.pt")
    assert "\x1b" not in str(error.value)
    assert "weights_only" not in str(error.value)


def test_options_that_do_not_apply_raise_input_error():
    with pytest.raises(InputError, match="the source is a single layer: leave order out"):
        xprnn.from_torch(GRU_STATE_DICT, order=["a", "b"])
    with pytest.raises(InputError, match=r"nonlinearity applies to nn\.RNN only, and the source has none"):
        xprnn.from_torch(GRU_STATE_DICT, nonlinearity="relu")


@pytest.mark.needs("torch")
def test_module_with_another_forward_raises_input_error():
    import torch

    class Net(torch.nn.Module):
        def __init__(self, forward_function):
            super().__init__()
            self.rnn, self.head, self.forward_function = torch.nn.GRU(4, 4), torch.nn.Linear(4, 4), forward_function

        def forward(self, x):
            return self.forward_function(self, x)

    in_order = Net(lambda m, x: (m.head(m.rnn(x)[0]), None))
    rng_state = torch.get_rng_state()
    xprnn.from_torch(in_order)
    assert in_order.training
    assert bool((torch.get_rng_state() == rng_state).all())
    for forward in (
        lambda m, x: m.head(m.rnn(x)[0].relu()),
        lambda m, x: m.head(m.rnn(x)[0] + x),
        lambda m, x: m.head(m.rnn(x)[0][0]),
        lambda m, x: m.rnn(m.head(x))[0],
    ):
        with pytest.raises(InputError, match="outputs differ from those of its layers"):
            xprnn.from_torch(Net(forward))
    xprnn.from_torch(Net(lambda m, x: m.rnn(m.head(x))[0]), order=["head", "rnn"])
    with pytest.warns(UserWarning, match="its outputs were not compared"):
        xprnn.from_torch(Net(lambda m, x: x.nothing))
