"""Errors of to_onnx, and the reason that from_onnx states for a graph that is not a layer."""

from __future__ import annotations

import pytest
from support.layer_cases import initial_params
from support.paths import DATA

import xprnn

pytestmark = [pytest.mark.needs("onnx"), pytest.mark.regression]


def test_export_to_a_directory_raises_input_error():
    layer = xprnn.RNN(3, 4)
    for path in (".", "", "/"):
        with pytest.raises(xprnn.InputError, match="cannot be written"):
            xprnn.to_onnx(layer, initial_params(layer), path)


def test_reason_for_a_graph_that_sorts_rows_by_length():
    model, _ = xprnn.from_onnx(DATA / "onnx_files" / "torch_old_lstm_lengths.onnx")
    assert model.reason == "Shape '/Shape' computes with lengths or states ('/Cast_output_0')"
