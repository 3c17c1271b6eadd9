"""Whether a module of torch computes what its parts in a row do: both are run once, on a few random numbers."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np

from xprnn.arrays.namespace import InputError, Params
from xprnn.layers.embedding import Embedding

__all__ = ["check_forward"]


def check_forward(where: str, module: Any, model: Any, params: Params, first_layer: Any) -> None:
    """Compare the outputs, if the module or one inside has a forward of its own.

    Args:
        where: for errors.
        module: an nn.Module; its training mode and torch's random numbers stay as they are.
        model, params: what was made of it, in float64.
        first: its first layer.

    Raises:
        InputError: the outputs differ.
    """
    nn = sys.modules["torch"].nn
    plain = (nn.Module.forward, nn.Sequential.forward)
    own = [m for m in module.modules() if next(m.children(), None) is not None and type(m).forward not in plain]
    if not own or type(module).forward is nn.Module.forward:
        return
    rng, width = np.random.default_rng(0), getattr(first_layer, "input_size", getattr(first_layer, "in_features", 4))
    rows = isinstance(first_layer, Embedding)
    x = rng.integers(0, first_layer.num_embeddings, (3, 2)) if rows else rng.standard_normal((3, 2, width))
    try:
        found, exact = _run_module(module, x)
    except Exception as error:  # whatever a forward of other arguments does
        warnings.warn(
            f"{where}: the module could not be run on an array of shape {x.shape} ({type(error).__name__}), so its"
            " outputs were not compared: compare them once",
            UserWarning,
            stacklevel=4,
        )
        return
    wanted = model(params, x)[0]
    tolerance = 1e-3 if exact else 5e-2
    if found.shape != wanted.shape or not np.allclose(found, wanted, tolerance, tolerance, equal_nan=True):
        raise InputError(
            f"{where}: the module's forward does something else between its parts than running them one behind the"
            " other: its outputs differ; say order=[names as they run], or, to go on with the parts alone,"
            " give module.state_dict()"
        )


def _run_module(module: Any, x: Any) -> tuple[Any, bool]:
    """The output of a module in eval mode, and whether it is in float32 or finer."""
    torch = sys.modules["torch"]
    weight = next(module.parameters())
    given = torch.tensor(x, device=weight.device, dtype=None if x.dtype.kind == "i" else weight.dtype)
    modes = {m: m.training for m in module.modules()}
    try:
        module.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            y = module(given)
    finally:
        for m, mode in modes.items():
            m.training = mode
    y = y[0] if isinstance(y, (tuple, list)) else y
    return y.double().cpu().numpy(), weight.dtype in (torch.float32, torch.float64)
