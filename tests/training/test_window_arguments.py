"""Arguments of windows and window_gradients for truncated back-propagation through time."""

from __future__ import annotations

import numpy as np
import pytest
from support.layer_cases import initial_params

import xprnn
from xprnn.training.truncated_bptt import window_gradients, windows

pytestmark = pytest.mark.regression


@pytest.mark.parametrize("options", [{"batch_first": True}, {"bidirectional": True}, {"reverse": True}])
def test_windows_need_a_time_major_forward_model(options):
    layer = xprnn.RNN(3, 4, **options)
    chunk = np.zeros((4, 4, 3)), np.zeros((4, 4, layer.output_size))
    (window,) = windows([chunk], 4)
    with pytest.raises(xprnn.InputError, match=rf"window_gradients: .*{next(iter(options))}=True"):
        window_gradients(layer, initial_params(layer), window, None, xprnn.mse)


def test_step_counts_may_be_numpy_integers(rng):
    layer = xprnn.RNN(3, 4)
    params, x = initial_params(layer), rng.standard_normal((9, 2, 3))
    assert layer.forward(params, x, checkpoint=np.int64(4))[2] is not None
    assert len(list(windows([(np.zeros(8), np.zeros(8))], np.int64(4)))) == 2


def test_chunks_of_another_batch_size_raise_input_error():
    chunk = np.zeros((4, 2, 3)), np.zeros((4, 2))
    for x, target in ((np.zeros((4, 3, 3)), np.zeros((4, 3))), (np.zeros((4, 2, 3)), np.zeros((4, 1)))):
        for k1 in (3, 4):  # with and without a rest of the first chunk
            with pytest.raises(xprnn.InputError, match=r"windows: (x|target) of every chunk .* found \(any, "):
                list(windows([chunk, (x, target)], k1))
    assert len(list(windows([(np.zeros((0, 2, 3)), np.zeros(0)), chunk], 2))) == 2
