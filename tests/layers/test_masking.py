"""Masking by NaN: padding has no influence, integers are never masked, and files keep the value."""

from __future__ import annotations

import numpy as np
import pytest
from support.layer_cases import initial_params

import xprnn

pytestmark = pytest.mark.regression


def test_nan_padding_equals_an_explicit_mask(rng, xp):
    model = xprnn.Sequential(mask=xprnn.Masking(float("nan")), rnn=xprnn.GRU(3, 4))
    params, x = initial_params(model), rng.standard_normal((6, 2, 3))
    valid = np.ones((6, 2), bool)
    valid[4:, 0] = valid[1, 1] = False
    zero_padded = xp.asarray(np.where(valid[..., None], x, 0.0))
    nan_padded = xp.asarray(np.where(valid[..., None], x, np.nan))
    rnn_params = {name.removeprefix("rnn."): xp.asarray(a) for name, a in params.items()}
    rnn = model.layers["rnn"]
    y, final, tape = model.forward({name: xp.asarray(a) for name, a in params.items()}, nan_padded)
    expected_y, expected_final, expected_tape = rnn.forward(rnn_params, zero_padded, mask=xp.asarray(valid))
    xp.assert_close(y, expected_y, condition=0)
    xp.assert_close(final, expected_final, condition=0)
    dx, _, dparams = model.backward(tape, y)
    expected = rnn.backward(expected_tape, expected_y)
    xp.assert_close(dx, expected.dx, condition=0)
    xp.assert_close({name.removeprefix("rnn."): d for name, d in dparams.items()}, expected.dparams, condition=0)


def test_values_that_no_integer_equals_mask_no_integers():
    x = np.asarray([[1, 0]])
    for value in (float("nan"), float("inf"), 0.5):
        assert xprnn.Masking(value).transform_mask(x, {})["mask"].all()


def test_model_file_keeps_a_nan_value(tmp_path):
    model = xprnn.Sequential(mask=xprnn.Masking(float("nan")), rnn=xprnn.GRU(3, 4))
    xprnn.save(tmp_path / "m.safetensors", model, initial_params(model))
    assert np.isnan(xprnn.load(tmp_path / "m.safetensors")[0].layers["mask"].value)
