"""`from_torch` and `to_torch`: conversion between torch's modules, state_dicts or files and xprnn's models.

Sources: the documentation of torch.nn.RNN, LSTM, GRU (gates, shapes, names), and torch's notes on serialization.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from xprnn.arrays.namespace import Array, InputError, Params, resolve_namespace, to_numpy
from xprnn.arrays.validation import check_param_shapes, check_params
from xprnn.interop.assemble import LazyArray, NamedLayer, assemble, infer_order, raise_all
from xprnn.interop.torch.files import lazy_arrays, read_weight_file, require_torch
from xprnn.interop.torch.modules import constructor, layer_from_module, unsupported_reasons
from xprnn.interop.torch.state_dict import check_numbering, check_shapes, layers_from_state_dict
from xprnn.interop.torch.verify import match_forward
from xprnn.io.archive import as_path
from xprnn.layers.rnn_lstm_gru import RNN
from xprnn.layers.sequential import Sequential

__all__ = ["TorchExport", "from_torch", "to_torch"]


def from_torch(
    source: Any,
    like: Array | None = None,
    *,
    nonlinearity: str | None = None,
    batch_first: bool | None = None,
    order: Sequence[str] | None = None,
) -> tuple[Any, Params]:
    """Convert a trained torch network to an xprnn model and its parameters.

    Supported are chains of nn.RNN, LSTM (with proj_size), GRU, RNNCell, LSTMCell and GRUCell (each cell becomes a layer
    with num_layers=1), nn.Embedding, nn.Linear and the activations of torch.nn. nn.Dropout and nn.Identity are dropped.
    The layers may be submodules of any module.

    The layers are assumed to run in the order of their definition, if their widths match in that order; otherwise in
    the only order in which they match. If the module's class defines `forward`, the module and the converted model are
    both run once on random input (T,N,D) = (3,2,D), and their outputs are compared. A module that passes the last step
    of its recurrent layers on, y[-1] or the final hidden states of both directions, becomes a model with a LastStep. If
    the module cannot be run on that input, a UserWarning says that the outputs were not compared.

    A state_dict contains no activations between layers: compare the outputs once. If its names are numbered, as those
    of nn.Sequential, and a number is missing, `order` must confirm that the layer there has no effect. A Linear is
    applied to every time step. A weight that two layers share (tied weights) becomes two independent parameters.

    Args:
        source: an nn.Module; a state_dict (name -> torch tensor or NumPy array); or the path of a `.safetensors`, `.pt`
            or `.pth` file. `.pt` and `.pth` files need torch and are read by its weights-only loader.
        like: an array that selects array library, dtype and device of the parameters. None: NumPy arrays in the
            source's dtype (bfloat16 becomes float32, because NumPy has no bfloat16).
        nonlinearity: "tanh" or "relu", for the nn.RNN layers of a state_dict, which does not record it. None: "tanh".
        batch_first: for the recurrent layers of a state_dict, which does not record it. None: False, torch's default.
        order: the layers' names in execution order. Needed if the widths match in more than one order.

    Returns:
        model, params. If the parameter names have no prefix, the model is a single layer. Otherwise it is a Sequential
        under the source's names. Parameters keep their names ("rnn.weight_ih_l0"); those of an RNNCell, LSTMCell or
        GRUCell get the suffix "_l0".

    Raises:
        InputError: modules or arrays without an equivalent in xprnn (all are listed); layers that match in no order or
            in several; numbered layers with a gap; a module whose outputs differ from those of its layers run one after
            the other.

    >>> import numpy as np
    >>> trained = {"rnn.weight_ih_l0": np.ones((8, 3)), "rnn.weight_hh_l0": np.ones((8, 2))}
    >>> model, params = from_torch(trained | {"out.weight": np.ones((5, 2))})
    >>> model.layers["rnn"].hidden_size, model.layers["out"].out_features, sorted(params)
    (2, 5, ['out.weight', 'rnn.weight_hh_l0', 'rnn.weight_ih_l0'])
    """
    where = "from_torch"
    if like is not None:
        resolve_namespace(where, {}, {"like": like})
    if _is_module(source):
        if nonlinearity is not None or batch_first is not None:
            raise InputError(f"{where}: nonlinearity and batch_first are read from the module: leave them out")
        module_layers = _layers_from_module(where, source)
        layers = infer_order(where, module_layers, order, False)
        return assemble(where, match_forward(where, source, layers), like)
    if isinstance(source, Mapping):
        arrays, ignore_source_order = lazy_arrays(where, source), False
    else:
        if not isinstance(source, (str, os.PathLike)):
            raise InputError(
                f"{where}: expected a path, a state_dict (a dict) or an nn.Module, found {type(source).__name__}"
            )
        path = as_path(where, source)
        where = f"{where} {path}"
        arrays, ignore_source_order = read_weight_file("from_torch", path)
    if nonlinearity not in (None, "tanh", "relu"):
        raise InputError(f"{where}: nonlinearity must be 'tanh' or 'relu', found {nonlinearity!r}")
    hints: dict[str, Any] = {"nonlinearity": nonlinearity or "tanh", "batch_first": batch_first or False}
    named_layers = layers_from_state_dict(where, arrays, **hints)
    if order is None:
        check_numbering(where, [layer.name for layer in named_layers])
    layers = infer_order(where, named_layers, order, ignore_source_order)
    if nonlinearity is not None and not any(isinstance(layer, RNN) for _, layer in layers):
        raise InputError(f"{where}: nonlinearity applies to nn.RNN only, and the source has none: leave it out")
    return assemble(where, layers, like)


def _is_module(source: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.nn.Module)


def _layers_from_module(where: str, module: Any) -> list[NamedLayer]:
    """Convert the leaf modules in the order of their definition; every array of the state_dict must belong to one."""
    arrays = lazy_arrays(where, module.state_dict())
    problems: list[str] = []
    layers, used = [], set()
    for path, leaf in _leaf_modules(module, ""):
        prefix = f"{path}." if path else ""
        leaf_arrays = {key: arrays[prefix + key] for key in leaf.state_dict()}
        used |= {prefix + key for key in leaf_arrays}
        try:
            layers.append(_named_layer(path, leaf, leaf_arrays))
        except InputError as error:
            problems.append(f"{path or 'the module'} ({type(leaf).__name__}): {error}")
    problems += [f"{key} belongs to no supported layer" for key in arrays if key not in used]
    raise_all(where, problems)
    if not layers:
        raise InputError(f"{where}: expected a module with recurrent layers, found {type(module).__name__} without any")
    return layers


def _named_layer(path: str, leaf: Any, arrays: dict[str, LazyArray]) -> NamedLayer:
    layer = layer_from_module(leaf)
    suffix = "_l0" if isinstance(leaf, sys.modules["torch"].nn.RNNCellBase) else ""
    arrays = {f"{key}{suffix}": array for key, array in arrays.items()}
    check_shapes(arrays, layer)
    return NamedLayer(path, (layer,), arrays)


def _leaf_modules(module: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (path, module) of each module without submodules and of each recurrent module; a shared module once."""
    children = [(name, child) for name, child in module.named_children() if not _is_ignored(child)]
    if not children or _is_recurrent(module):
        yield path, module
        return
    for name, child in children:
        yield from _leaf_modules(child, f"{path}.{name}" if path else name)


def _is_ignored(module: Any) -> bool:
    return type(module).__name__ in ("Dropout", "Identity") and type(module).__module__.startswith("torch.nn.modules.")


def _is_recurrent(module: Any) -> bool:
    nn = sys.modules["torch"].nn
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase))


class TorchExport(NamedTuple):
    """The result of `to_torch`: parameters, and the arguments from which torch.nn builds the modules for them."""

    state_dict: dict[str, Any]
    constructor: Any


def to_torch(model: Any, params: Params) -> TorchExport:
    """Convert a model and its parameters to a torch state_dict and the constructor arguments of torch.nn modules.

    With `state_dict, (name, arguments) = to_torch(layer, params)`, build the torch module with
    `module = getattr(torch.nn, name)(**arguments)` and load the parameters with `module.load_state_dict(state_dict)`.

    Args:
        model: RNN, LSTM, GRU (or a Recurrent with one of their cells), Linear, Embedding, ActivationLayer, Softmax,
            or a Sequential of these.
        params: the model's parameters, arrays of any library.

    Returns:
        TorchExport(state_dict, constructor). state_dict: name -> torch tensor, a copy in the dtype of params.
        constructor: for a layer the pair (class name in torch.nn, dict of arguments, dtype included); for a Sequential
        a dict from layer name to such a pair, in execution order.

    Raises:
        InputError: torch is not installed; params do not fit the model; or torch cannot represent the model (all
            reasons are listed).

    >>> import xprnn
    >>> to_torch(xprnn.GRU(3, 4, reset_after=False, learned_state=True), {})
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: to_torch: torch has no cell gru_reset_before; torch has no learned_state
    """
    where = "to_torch"
    if isinstance(model, type) or not hasattr(model, "shapes"):
        raise InputError(f"{where}: model must be a layer or Sequential, found {type(model).__name__}")
    layers = model.layers if isinstance(model, Sequential) else {"": model}
    raise_all(
        where,
        [
            f"{name}: {reason}" if name else reason
            for name, layer in layers.items()
            for reason in unsupported_reasons(layer)
        ],
    )
    check_params(where, params, model.shapes())
    resolve_namespace(where, dict(params))
    check_param_shapes(where, params, model.shapes())
    torch = require_torch(where)
    tensors = {name: _to_tensor(torch, array) for name, array in params.items()}
    dtype = next(iter(tensors.values())).dtype
    constructors = {name: constructor(layer, dtype) for name, layer in layers.items()}
    return TorchExport(tensors, constructors if isinstance(model, Sequential) else constructors[""])


def _to_tensor(torch: Any, array: Array) -> Any:
    return array.detach().clone() if isinstance(array, torch.Tensor) else torch.tensor(to_numpy(array))
