"""Conversion of one torch.nn module to an xprnn layer, and of one layer to the constructor call of a module."""

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

# Class in torch.nn -> name of the xprnn activation.
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
# Class in torch.nn -> name of the xprnn activation, and the argument of the class that is its constant.
_PARAMETRIC_ACTIVATIONS = {
    "LeakyReLU": ("leakyrelu", "negative_slope"),
    "ELU": ("elu", "alpha"),
    "CELU": ("celu", "alpha"),
    "Softshrink": ("softshrink", "lambd"),
    "Hardshrink": ("hardshrink", "lambd"),
}


def layer_from_module(module: Any) -> Any:
    """Return the xprnn layer for one torch.nn module.

    Raises:
        InputError: xprnn has no equivalent layer.
    """
    nn = sys.modules["torch"].nn
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            raise InputError("max_norm is not supported: it would change the weights during the forward pass")
        return Embedding(module.num_embeddings, module.embedding_dim, sparse=module.sparse)
    if isinstance(module, nn.Linear):
        return Linear(module.in_features, module.out_features, bias=module.bias is not None)
    layer_classes = {nn.RNN: RNN, nn.LSTM: LSTM, nn.GRU: GRU, nn.RNNCell: RNN, nn.LSTMCell: LSTM, nn.GRUCell: GRU}
    layer_type = next(
        (layer_class for torch_class, layer_class in layer_classes.items() if isinstance(module, torch_class)), None
    )
    if layer_type is None:
        return _activation_layer(module)
    option_names = ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "nonlinearity")
    options = {name: getattr(module, name) for name in option_names if hasattr(module, name)}
    if getattr(module, "proj_size", 0):
        options["proj_size"] = module.proj_size
    if layer_type is not RNN:
        options.pop("nonlinearity", None)
    return layer_type(module.input_size, module.hidden_size, **options)


def _activation_layer(module: Any) -> Any:
    name = type(module).__name__
    if not type(module).__module__.startswith("torch.nn.modules.activation"):
        raise InputError("has no equivalent in xprnn")
    if name in ("Softmax", "LogSoftmax"):
        if module.dim not in (-1, 2):
            raise InputError(f"dim={module.dim} is not supported, only the last axis (-1 or 2)")
        return Softmax(log=name == "LogSoftmax")
    if name == "Softplus" and (module.beta, module.threshold) != (1, 20):
        raise InputError(f"expected beta=1, threshold=20, found beta={module.beta}, threshold={module.threshold}")
    if name == "Hardtanh" and (module.min_val, module.max_val) != (-1, 1):
        raise InputError(f"expected min_val=-1, max_val=1, found min_val={module.min_val}, max_val={module.max_val}")
    if name == "GELU" and module.approximate == "tanh":
        return ActivationLayer("gelutanh")
    if name in _PARAMETRIC_ACTIVATIONS:
        activation_name, attribute = _PARAMETRIC_ACTIVATIONS[name]
        return ActivationLayer(activation(activation_name, getattr(module, attribute)))
    if name not in _ACTIVATIONS:
        raise InputError("has no equivalent in xprnn")
    return ActivationLayer(_ACTIVATIONS[name])


_TORCH_CLASSES = {"elman": "RNN", "lstm": "LSTM", "gru": "GRU"}


def unsupported_reasons(layer: Any) -> list[str]:
    """List the reasons why torch.nn has no equivalent of the layer; empty if it has one."""
    if isinstance(layer, (Linear, Embedding, Softmax)):
        return []
    if isinstance(layer, ActivationLayer):
        f = activation(layer.f)
        return [] if _torch_activation(f) else [f"torch.nn has no activation {f.name}"]
    if not isinstance(layer, Recurrent):
        return [f"torch.nn has no equivalent of {type(layer).__name__}"]
    reasons: list[str] = []
    if layer.resolved_cell not in (elman("tanh"), elman("relu"), lstm(), gru()):
        options = cell_to_config(layer.resolved_cell) or {}
        option_text = " ".join(
            f"{key}={value}"
            for key, value in options.items()
            if key != "type" and layer.resolved_cell.name != "gru_reset_before"
        )
        reasons.append(f"torch has no cell {layer.resolved_cell.name} {option_text}".rstrip())
    if len(set(layer.hidden_sizes)) > 1:
        reasons.append(f"torch has one hidden_size for all layers, found {list(layer.hidden_sizes)}")
    if layer.learned_state:
        reasons.append("torch has no learned_state")
    if layer.reverse:
        reasons.append("torch has no reverse=True without bidirectional")
    return reasons


def _torch_activation(f: Activation) -> tuple[str, dict[str, Any]] | None:
    """Return the class name in torch.nn of an activation, and its arguments; None if torch.nn has none."""
    for torch_class, activation_name in _ACTIVATIONS.items():
        if f == activation(activation_name):
            return torch_class, {}
    if f == activation("gelutanh"):
        return "GELU", {"approximate": "tanh"}
    for torch_class, (activation_name, argument) in _PARAMETRIC_ACTIVATIONS.items():
        if f.name == activation_name and f.alpha is not None and f == activation(activation_name, f.alpha):
            return torch_class, {argument: f.alpha}
    return None


def constructor(layer: Any, dtype: Any) -> tuple[str, dict[str, Any]]:
    """Return the class name in torch.nn that is equivalent to a supported layer, and its arguments."""
    if isinstance(layer, Softmax):
        return "LogSoftmax" if layer.log else "Softmax", {"dim": -1}
    if isinstance(layer, ActivationLayer) and (torch_activation := _torch_activation(activation(layer.f))):
        return torch_activation
    if not isinstance(layer, Recurrent):
        return type(layer).__name__, {key: value for key, value in layer.config().items() if key != "type"} | {
            "dtype": dtype
        }
    option_names = ("num_layers", "bias", "batch_first", "dropout", "bidirectional")
    arguments = {"input_size": layer.input_size, "hidden_size": layer.hidden_sizes[0]} | {
        key: getattr(layer, key) for key in option_names
    }
    if layer.resolved_cell.name == "elman":
        arguments["nonlinearity"] = "tanh" if layer.resolved_cell is elman("tanh") else "relu"
    if layer.projection_size:
        arguments["proj_size"] = layer.projection_size
    return _TORCH_CLASSES[layer.resolved_cell.name], arguments | {"dtype": dtype}
