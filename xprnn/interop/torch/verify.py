"""Comparison of a torch module with the converted model: both are run once on the same random input."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from xprnn.arrays.namespace import InputError
from xprnn.interop.assemble import NamedLayer, assemble
from xprnn.layers.embedding import Embedding
from xprnn.layers.masking import LastStep
from xprnn.layers.recurrent import Recurrent

__all__ = ["match_forward"]

NamedLayers = list[tuple[NamedLayer, Any]]


def match_forward(where: str, module: Any, layers: NamedLayers) -> NamedLayers:
    """Compare the outputs of a module with those of its layers, if a class of the module defines `forward`.

    If they differ, and agree with a LastStep after the last recurrent layer, the LastStep is added. If the module
    cannot be run on the input, a UserWarning says that the outputs were not compared.

    Args:
        where: prefix of error messages.
        module: an nn.Module. Its training mode and torch's random state are unchanged afterwards.
        layers: pairs (source layer, layer) in execution order.

    Returns:
        The layers, with a LastStep if the module selects the last step.

    Raises:
        InputError: the outputs differ.
    """
    first_layer = layers[0][1]
    nn = sys.modules["torch"].nn
    base_forwards = (nn.Module.forward, nn.Sequential.forward)
    custom_modules = [
        m for m in module.modules() if next(m.children(), None) is not None and type(m).forward not in base_forwards
    ]
    if not custom_modules or type(module).forward is nn.Module.forward:
        return layers
    rng, width = np.random.default_rng(0), getattr(first_layer, "input_size", getattr(first_layer, "in_features", 4))
    takes_ids = isinstance(first_layer, Embedding)
    x = rng.integers(0, first_layer.num_embeddings, (3, 2)) if takes_ids else rng.standard_normal((3, 2, width))
    try:
        y, is_float32_or_finer = _run_module(module, x)
    except Exception as error:  # a user-defined forward may take other arguments and raise any error
        warnings.warn(
            f"{where}: the module could not be run on an array of shape {x.shape} ({type(error).__name__}), so its"
            " outputs were not compared with the model's: compare them once",
            UserWarning,
            stacklevel=4,
        )
        return layers
    tolerance = 1e-3 if is_float32_or_finer else 5e-2
    for variant in (layers, *_with_last_step(layers)):
        model, params = assemble(where, variant, np.zeros(0))
        if _agree(model(params, x)[0], y, tolerance):
            return variant
    raise InputError(
        f"{where}: the module's outputs differ from those of its layers run one after the other"
        f"{_pooling_hint(where, layers, x, y, tolerance)}. If the layers run in another order, pass order=[names in"
        " execution order]. To convert only the layers, pass module.state_dict() and compute the rest of its forward"
        " on their outputs"
    )


def _agree(a: Any, b: Any, tolerance: float) -> bool:
    return a.shape == b.shape and np.allclose(a, b, tolerance, tolerance, equal_nan=True)


def _last_recurrent(layers: NamedLayers) -> int | None:
    """Return the position of the last recurrent layer."""
    return next((k for k in reversed(range(len(layers))) if isinstance(layers[k][1], Recurrent)), None)


def _with_last_step(layers: NamedLayers) -> Iterator[NamedLayers]:
    """Yield the layers with a LastStep after the last recurrent one: y[-1], or the final hidden states."""
    position = _last_recurrent(layers)
    if position is None:
        return
    name, layer = "last_step", layers[position][1]
    while name in {source.name for source, _ in layers}:
        name += "_"
    for direction in ("forward", "both") if layer.bidirectional else ("forward",):
        last = LastStep(batch_first=layer.batch_first, direction=direction)
        yield [*layers[: position + 1], (NamedLayer(name, (last,), {}), last), *layers[position + 1 :]]


def _pooling_hint(where: str, layers: NamedLayers, x: Any, y: Any, tolerance: float) -> str:
    """Return a part of a sentence if the module takes the mean or maximum over time after its recurrent layers."""
    position = _last_recurrent(layers)
    if position is None:
        return ""
    model, params = assemble(where, layers[: position + 1], np.zeros(0))
    outputs, axis = model(params, x)[0], 1 if layers[position][1].batch_first else 0
    for text, pooled in (("mean", outputs.mean(axis)), ("maximum", outputs.max(axis))):
        rest = layers[position + 1 :]
        if rest:
            head, head_params = assemble(where, rest, np.zeros(0))
            result = head(head_params, pooled[None])[0][0]
        else:
            result = pooled
        if _agree(result, y, tolerance):
            name = layers[position][0].name
            return f": it takes the {text} over time of the outputs of {name}, for which xprnn has no layer"
    return ""


def _run_module(module: Any, x: Any) -> tuple[Any, bool]:
    """Return the output of a module in eval mode, and True if its dtype is float32 or float64."""
    torch = sys.modules["torch"]
    weight = next(module.parameters())
    torch_x = torch.tensor(x, device=weight.device, dtype=None if x.dtype.kind == "i" else weight.dtype)
    modes = {submodule: submodule.training for submodule in module.modules()}
    try:
        module.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            y = module(torch_x)
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode
    y = y[0] if isinstance(y, (tuple, list)) else y
    return y.double().cpu().numpy(), weight.dtype in (torch.float32, torch.float64)
