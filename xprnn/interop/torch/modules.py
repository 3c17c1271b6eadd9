"""Which module of torch.nn is which layer here, one at a time, and back."""

from __future__ import annotations

import sys
from typing import Any

from xprnn.arrays.namespace import InputError
from xprnn.cells.activations import Activation, activation
from xprnn.cells.serialization import cell_to_config
from xprnn.cells.standard import elman, gru, lstm
from xprnn.layers.elementwise import ActivationLayer, Softmax
from xprnn.layers.embedding import Embedding
from xprnn.layers.linear import Linear
from xprnn.layers.recurrent import Recurrent
from xprnn.layers.rnn_lstm_gru import GRU, LSTM, RNN

__all__ = ["constructor", "layer_from_module", "unsupported_reasons"]

# The classes of torch.nn without constants, and with one: (theirs, ours).
_ACTIVATIONS = {
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "ReLU": "relu",
    "Identity": "identity",
    "Softsign": "softsign",
    "Softplus": "softplus",
    "SELU": "selu",
    "ReLU6": "relu6",
    "Hardtanh": "hardtanh",
    "LogSigmoid": "logsigmoid",
    "SiLU": "silu",
    "GELU": "gelu",
    "Mish": "mish",
    "Hardswish": "hardswish",
    "Tanhshrink": "tanhshrink",
}
_PARAMETRIC_ACTIVATIONS = {
    "LeakyReLU": ("leakyrelu", "negative_slope"),
    "ELU": ("elu", "alpha"),
    "CELU": ("celu", "alpha"),
    "Softshrink": ("softshrink", "lambd"),
    "Hardshrink": ("hardshrink", "lambd"),
}


def layer_from_module(module: Any) -> Any:
    """The layer for one module.

    Raises:
        InputError: there is none.
    """
    nn = sys.modules["torch"].nn
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            raise InputError("max_norm changes the weights while it runs, which Embedding here does not")
        return Embedding(module.num_embeddings, module.embedding_dim, sparse=module.sparse)
    if isinstance(module, nn.Linear):
        return Linear(module.in_features, module.out_features, bias=module.bias is not None)
    names = {nn.RNN: RNN, nn.LSTM: LSTM, nn.GRU: GRU, nn.RNNCell: RNN, nn.LSTMCell: LSTM, nn.GRUCell: GRU}
    kind = next((ours for theirs, ours in names.items() if isinstance(module, theirs)), None)
    if kind is None:
        return _activation_layer(module)
    shared = ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "nonlinearity")
    options = {name: getattr(module, name) for name in shared if hasattr(module, name)}
    if getattr(module, "proj_size", 0):
        options["proj_size"] = module.proj_size
    if kind is not RNN:
        options.pop("nonlinearity", None)
    return kind(module.input_size, module.hidden_size, **options)


def _activation_layer(module: Any) -> Any:
    name = type(module).__name__
    if not type(module).__module__.startswith("torch.nn.modules.activation"):
        raise InputError("has no counterpart here")
    if name in ("Softmax", "LogSoftmax"):
        if module.dim not in (-1, 2):
            raise InputError(f"runs along axis {module.dim}, here it does along the last")
        return Softmax(log=name == "LogSoftmax")
    if name == "Softplus" and (module.beta, module.threshold) != (1, 20):
        raise InputError("has constants that the one here has not")
    if name == "Hardtanh" and (module.min_val, module.max_val) != (-1, 1):
        raise InputError("has constants that the one here has not")
    if name == "GELU" and module.approximate == "tanh":
        return ActivationLayer("gelutanh")
    if name in _PARAMETRIC_ACTIVATIONS:
        ours, constant = _PARAMETRIC_ACTIVATIONS[name]
        return ActivationLayer(activation(ours, getattr(module, constant)))
    if name not in _ACTIVATIONS:
        raise InputError("has no counterpart here")
    return ActivationLayer(_ACTIVATIONS[name])


_TORCH_CLASSES = {"elman": "RNN", "lstm": "LSTM", "gru": "GRU"}


def unsupported_reasons(layer: Any) -> list[str]:
    """Why torch cannot have this part."""
    if isinstance(layer, (Linear, Embedding, Softmax)):
        return []
    if isinstance(layer, ActivationLayer):
        f = activation(layer.f)
        return [] if _torch_activation(f) else [f"torch.nn has no activation {f.name}"]
    if not isinstance(layer, Recurrent):
        return [f"torch.nn has nothing that {type(layer).__name__} could become"]
    found: list[str] = []
    if layer.resolved_cell not in (elman("tanh"), elman("relu"), lstm(), gru()):
        options = cell_to_config(layer.resolved_cell) or {}
        detail = " ".join(
            f"{k}={v}" for k, v in options.items() if k != "type" and layer.resolved_cell.name != "gru_reset_before"
        )
        found.append(f"torch has no cell {layer.resolved_cell.name} {detail}".rstrip())
    if len(set(layer.hidden_sizes)) > 1:
        found.append(f"torch has one hidden_size for all layers, found {list(layer.hidden_sizes)}")
    if layer.learned_state:
        found.append("torch's layers have no learned_state")
    if layer.reverse:
        found.append("torch's layers have no reverse alone")
    return found


def _torch_activation(f: Activation) -> tuple[str, dict[str, Any]] | None:
    """The class of torch.nn for an activation, and its arguments."""
    for theirs, ours in _ACTIVATIONS.items():
        if f == activation(ours):
            return theirs, {}
    if f == activation("gelutanh"):
        return "GELU", {"approximate": "tanh"}
    for theirs, (ours, constant) in _PARAMETRIC_ACTIVATIONS.items():
        if f.name == ours and f.alpha is not None and f == activation(ours, f.alpha):
            return theirs, {constant: f.alpha}
    return None


def constructor(layer: Any, dtype: Any) -> tuple[str, dict[str, Any]]:
    """The name of the class in torch.nn that a part becomes, and its arguments."""
    if isinstance(layer, Softmax):
        return "LogSoftmax" if layer.log else "Softmax", {"dim": -1}
    if isinstance(layer, ActivationLayer) and (found := _torch_activation(activation(layer.f))):
        return found
    if not isinstance(layer, Recurrent):
        return type(layer).__name__, {k: v for k, v in layer.config().items() if k != "type"} | {"dtype": dtype}
    shared = ("num_layers", "bias", "batch_first", "dropout", "bidirectional")
    arguments = {"input_size": layer.input_size, "hidden_size": layer.hidden_sizes[0]} | {
        k: getattr(layer, k) for k in shared
    }
    if layer.resolved_cell.name == "elman":
        arguments["nonlinearity"] = "tanh" if layer.resolved_cell is elman("tanh") else "relu"
    if layer.projection_size:
        arguments["proj_size"] = layer.projection_size
    return _TORCH_CLASSES[layer.resolved_cell.name], arguments | {"dtype": dtype}
