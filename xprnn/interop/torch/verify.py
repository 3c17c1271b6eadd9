"""Comparison of a torch module with the converted model: both are run once on the same random input."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np

from xprnn.arrays.namespace import InputError, Params
from xprnn.layers.embedding import Embedding

__all__ = ["check_forward"]


def check_forward(where: str, module: Any, model: Any, params: Params, first_layer: Any) -> None:
    """Compare the outputs of a module with those of the model, if a class of the module defines `forward`.

    If the module cannot be run on the input, a UserWarning says that the outputs were not compared.

    Args:
        where: prefix of error messages.
        module: an nn.Module. Its training mode and torch's random state are unchanged afterwards.
        model: the converted model.
        params: its parameters, in float64.
        first_layer: the first layer of the model, which determines the input.

    Raises:
        InputError: the outputs differ.
    """
    nn = sys.modules["torch"].nn
    base_forwards = (nn.Module.forward, nn.Sequential.forward)
    custom_modules = [
        m for m in module.modules() if next(m.children(), None) is not None and type(m).forward not in base_forwards
    ]
    if not custom_modules or type(module).forward is nn.Module.forward:
        return
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
        return
    expected = model(params, x)[0]
    tolerance = 1e-3 if is_float32_or_finer else 5e-2
    if y.shape != expected.shape or not np.allclose(y, expected, tolerance, tolerance, equal_nan=True):
        raise InputError(
            f"{where}: the module's outputs differ from those of its layers run one after the other. If the layers run"
            " in another order, pass order=[names in execution order]; to convert only the layers, pass"
            " module.state_dict()"
        )


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
