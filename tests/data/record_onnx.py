"""Script that writes onnx_files/: small networks exported by torch and Keras, with inputs and outputs.

    python tests/data/record_onnx.py torch     # needs torch, onnx, onnxscript
    python tests/data/record_onnx.py keras     # needs tensorflow, keras, tf2onnx, onnx

Each .onnx file is one network. The .npz file of the same name has inputs (in0, in1, ...) and the outputs of the
exporting framework (out0, out1, ...) in the order of the outputs of the graph.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import numpy as np

FILES = Path(__file__).parent / "onnx_files"


def save_arrays(name, inputs, outputs):
    arrays = {f"in{k}": np.asarray(a) for k, a in enumerate(inputs)}
    arrays |= {f"out{k}": np.asarray(a) for k, a in enumerate(outputs)}
    np.savez(FILES / f"{name}.npz", **arrays)


def remove_metadata(path):
    """Delete metadata from a file; the new exporter of torch stores stack traces, with paths of the local machine."""
    import onnx

    model = onnx.load(path)
    for message in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output, model.graph):
        del message.metadata_props[:]
        message.doc_string = ""
    del model.metadata_props[:]
    onnx.save(model, path)


# name -> (class in torch.nn, its arguments, other features of the network)
TORCH_CASES = {
    "rnn": ("RNN", {}, {}),
    "rnn_relu_2_layers_bidirectional": ("RNN", {"nonlinearity": "relu", "num_layers": 2, "bidirectional": True}, {}),
    "lstm_2_layers_bidirectional": ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}, {}),
    "lstm_states": ("LSTM", {"num_layers": 2}, {"states": True}),
    "lstm_lengths": ("LSTM", {}, {"lengths": True}),
    "gru_embedding": ("GRU", {"bias": False}, {"embedding": True}),
    "gru_last_softmax": ("GRU", {"batch_first": True}, {"last": True}),
}


def torch_network(class_name, options, extra):
    import torch

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(11, 3) if "embedding" in extra else None
            self.rnn = getattr(torch.nn, class_name)(3, 4, **options)
            self.head = torch.nn.Linear(8 if options.get("bidirectional") else 4, 2)

        def forward(self, x, *more):
            x = x if self.embed is None else self.embed(x)
            if "lengths" in extra:
                x = torch.nn.utils.rnn.pack_padded_sequence(x, more[0], enforce_sorted=False)
                return self.head(torch.nn.utils.rnn.pad_packed_sequence(self.rnn(x)[0])[0])
            y, final = self.rnn(x, more) if "states" in extra else self.rnn(x)
            if "last" in extra:
                return torch.softmax(self.head(y[:, -1]), -1)
            return (self.head(y), *final) if "states" in extra else self.head(y)

    torch.manual_seed(1)
    return Network().eval()


def torch_inputs(options, extra):
    import torch

    rng = np.random.default_rng(1)
    shape = (2, 6) if options.get("batch_first") else (6, 2)
    if "embedding" in extra:
        return (torch.tensor(rng.integers(0, 11, shape)),)
    x = torch.tensor(rng.standard_normal((*shape, 3)), dtype=torch.float32)
    if "lengths" in extra:
        return (x, torch.tensor([3, 6]))
    if "states" in extra:
        return (x, *(torch.tensor(rng.standard_normal((2, 2, 4)), dtype=torch.float32) for _ in "hc"))
    return (x,)


def export(module, args, path, *, new):
    """Export with the new exporter (dynamo, static shapes) or the old one (dynamic axes, except with lengths)."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation warnings of the exporters
        if new:
            torch.onnx.export(module, args, path, dynamo=True, verbose=False, external_data=False)
            return
        names = ["x", "h", "c"][: len(args)]
        axes = {"x": {0: "a", 1: "b"}} | {n: {1: "b"} for n in names[1:]}
        axes = axes if args[-1].dtype.is_floating_point or len(args) == 1 else None
        torch.onnx.export(module, args, path, dynamo=False, input_names=names, dynamic_axes=axes)


def record_torch():
    import torch

    for name, (class_name, options, extra) in TORCH_CASES.items():
        module, args = torch_network(class_name, options, extra), torch_inputs(options, extra)
        with torch.no_grad():
            outputs = module(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for new in (True, False):
            if new and "lengths" in extra:
                continue  # the new exporter does not support packed sequences
            label = f"torch_{'new' if new else 'old'}_{name}"
            path = str(FILES / f"{label}.onnx")
            export(module, args, path, new=new)
            remove_metadata(path)
            save_arrays(label, [a.numpy() for a in args], [a.numpy() for a in outputs])


def keras_networks(layers):
    bidirectional = layers.Bidirectional
    return {
        "simple_rnn": [layers.SimpleRNN(4, return_sequences=True), layers.SimpleRNN(3)],
        "lstm_dense": [layers.LSTM(4, return_sequences=True), layers.Dense(2)],
        "lstm_last": [layers.LSTM(4), layers.Dense(2, activation="softmax")],
        "gru": [layers.GRU(4, return_sequences=True)],
        "gru_reset_before": [layers.GRU(4, reset_after=False)],
        "gru_backwards": [layers.GRU(4, go_backwards=True, return_sequences=True)],
        "bidirectional": [
            bidirectional(layers.LSTM(4, return_sequences=True)),
            bidirectional(layers.GRU(3, return_sequences=True)),
        ],
        "masking_lstm": [layers.Masking(), layers.LSTM(4, return_sequences=True)],
        "embedding_mask_gru": [layers.Embedding(11, 3, mask_zero=True), layers.GRU(4)],
    }


def record_keras():
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow"}
    import keras

    for name, stack in keras_networks(keras.layers).items():
        keras.utils.set_random_seed(1)
        ids = "embedding" in name
        module = keras.Sequential([keras.Input((None,), dtype="int32") if ids else keras.Input((None, 3)), *stack])
        rng = np.random.default_rng(2)
        x = rng.integers(0, 4, (2, 5)).astype("int32") if ids else rng.standard_normal((2, 5, 3)).astype("float32")
        if "masking" in name:
            x[0, 3:] = x[1, 1] = 0
        y = module.predict(x, verbose=0)
        module.export(str(FILES / f"keras_{name}.onnx"), format="onnx", verbose=False)
        save_arrays(f"keras_{name}", [x], [y])


if __name__ == "__main__":
    {"torch": record_torch, "keras": record_keras}[sys.argv[1]]()
