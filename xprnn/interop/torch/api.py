"""torch's networks in and out: modules, state_dicts and their files, and state_dicts for modules of torch.nn.

Sources: the documentation of torch.nn.RNN, LSTM, GRU (gates, shapes, names), and torch's notes on serialization.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xprnn.arrays.namespace import Array, InputError, Params, resolve_namespace, to_numpy
from xprnn.arrays.validation import check_param_shapes, check_params
from xprnn.interop.assemble import LazyArray, NamedLayer, assemble, infer_order, raise_all
from xprnn.interop.torch.files import lazy_arrays, read_weight_file, require_torch
from xprnn.interop.torch.modules import constructor, layer_from_module, unsupported_reasons
from xprnn.interop.torch.state_dict import check_shapes, layers_from_state_dict
from xprnn.interop.torch.verify import check_forward
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
    """A network that torch has trained, as a model of xprnn and its parameters.

    Read are nn.RNN, LSTM (with proj_size), GRU, their cells (as a layer of one), nn.Embedding, nn.Linear and the
    activations, one behind the other; nn.Dropout and nn.Identity are left out. A module that holds them may be any: its
    parts are taken to run in the order of their definition if their widths allow it, else in the only order that they
    do. Where it has a `forward` of its own, both are run once on a few random numbers, (T,N,D) = (3,2,D), and compared;
    where that cannot be run, a UserWarning says so. In a state_dict no activation can be seen: compare outputs
    once. Linear is applied to every step. Weights that are shared (tied) become two.

    Args:
        source: an nn.Module; a state_dict, name -> torch tensor or NumPy array; or the path of a `.safetensors`, `.pt`
            or `.pth` file (the last two need torch, and are read by its weights-only loader).
        like: array library, dtype and device of the parameters; None: NumPy, in the source's dtype (bfloat16, which
            NumPy has not, becomes float32).
        nonlinearity: "tanh" or "relu", for an nn.RNN whose state_dict is given: it does not say. None: tanh.
        batch_first: of the recurrent layers of a state_dict. None: False, torch's default.
        order: names of the parts as they run, where widths leave more than one order.

    Returns:
        model, params. An RNN, LSTM or GRU without a name before its parameters is that layer; anything else is a
        Sequential of the source's names. Parameters keep their names ("rnn.weight_ih_l0"); a cell's gain "_l0".

    Raises:
        InputError: modules or arrays that have no place here, all of them; parts that fit no order, or several; a
            module whose forward does something else between its parts.

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
            raise InputError(f"{where}: a module says its nonlinearity and batch_first itself: leave them out")
        parts = _layers_from_module(where, source)
        arranged = infer_order(where, parts, order, False)
        check_forward(where, source, *assemble(where, arranged, np.zeros(0)), arranged[0][1])
        return assemble(where, arranged, like)
    if isinstance(source, Mapping):
        entries, sorted_ = lazy_arrays(where, source), False
    else:
        if not isinstance(source, (str, os.PathLike)):
            raise InputError(
                f"{where}: expected a path, a state_dict (a dict) or an nn.Module, found {type(source).__name__}"
            )
        path = as_path(where, source)
        where = f"{where} {path}"
        entries, sorted_ = read_weight_file("from_torch", path)
    if nonlinearity not in (None, "tanh", "relu"):
        raise InputError(f"{where}: nonlinearity must be 'tanh' or 'relu', found {nonlinearity!r}")
    hints: dict[str, Any] = {"nonlinearity": nonlinearity or "tanh", "batch_first": batch_first or False}
    arranged = infer_order(where, layers_from_state_dict(where, entries, **hints), order, sorted_)
    if nonlinearity is not None and not any(isinstance(layer, RNN) for _, layer in arranged):
        raise InputError(f"{where}: nonlinearity is that of an nn.RNN, and there is none: leave it out")
    return assemble(where, arranged, like)


def _is_module(source: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.nn.Module)


def _layers_from_module(where: str, module: Any) -> list[NamedLayer]:
    """The parts in the order of their definition; each array of the state_dict belongs to one of them."""
    entries = lazy_arrays(where, module.state_dict())
    problems: list[str] = []
    parts, seen = [], set()
    for path, leaf in _leaf_modules(module, ""):
        lead = f"{path}." if path else ""
        own = {key: entries[lead + key] for key in leaf.state_dict()}
        seen |= {lead + key for key in own}
        try:
            parts.append(_named_layer(path, leaf, own))
        except InputError as error:
            problems.append(f"{path or 'it'} ({type(leaf).__name__}): {error}")
    problems += [f"{key} belongs to no part" for key in entries if key not in seen]
    raise_all(where, problems)
    if not parts:
        raise InputError(f"{where}: expected a module with recurrent layers, found {type(module).__name__} without any")
    return parts


def _named_layer(path: str, leaf: Any, own: dict[str, LazyArray]) -> NamedLayer:
    layer = layer_from_module(leaf)
    end = "_l0" if isinstance(leaf, sys.modules["torch"].nn.RNNCellBase) else ""
    own = {f"{key}{end}": entry for key, entry in own.items()}
    check_shapes(own, layer)
    return NamedLayer(path, (layer,), own)


def _leaf_modules(module: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Each module that has no modules inside, or is a layer; a shared one once."""
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
    """What torch needs to go on: parameters, and how to make the modules that take them."""

    state_dict: dict[str, Any]
    constructor: Any


def to_torch(model: Any, params: Params) -> TorchExport:
    """A model and its parameters for torch.

    Args:
        model: RNN, LSTM, GRU (or a Recurrent with one of their cells), Linear, Embedding, Apply, Softmax,
            or a Sequential of them.
        params: its parameters, of any array library.

    Returns:
        TorchExport(state_dict, constructor). state_dict: name -> torch tensor, copies in params' dtype. constructor: for a
        layer the name of its class in torch.nn and its arguments, dtype included; for a Sequential a dict from
        the names of its parts to such pairs, to be run one behind the other.

    Raises:
        InputError: torch is not installed; params are not the model's; or torch has no such layer, with all reasons.

    With `state_dict, (name, arguments) = to_torch(layer, params)`, the module is
    `getattr(torch.nn, name)(**arguments)`, and its `load_state_dict(state_dict)` takes the rest.

    >>> import xprnn
    >>> to_torch(xprnn.GRU(3, 4, reset_after=False, learned_state=True), {})
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: to_torch: torch has no cell gru_reset_before; torch's layers have no learned_state
    """
    where = "to_torch"
    if isinstance(model, type) or not hasattr(model, "shapes"):
        raise InputError(f"{where}: model must be a layer or Sequential, found {type(model).__name__}")
    parts = model.layers if isinstance(model, Sequential) else {"": model}
    raise_all(
        where, [f"{name}: {why}" if name else why for name, part in parts.items() for why in unsupported_reasons(part)]
    )
    check_params(where, params, model.shapes())
    resolve_namespace(where, dict(params))
    check_param_shapes(where, params, model.shapes())
    torch = require_torch(where)
    tensors = {name: _to_tensor(torch, array) for name, array in params.items()}
    dtype = next(iter(tensors.values())).dtype
    made = {name: constructor(part, dtype) for name, part in parts.items()}
    return TorchExport(tensors, made if isinstance(model, Sequential) else made[""])


def _to_tensor(torch: Any, array: Array) -> Any:
    return array.detach().clone() if isinstance(array, torch.Tensor) else torch.tensor(to_numpy(array))
