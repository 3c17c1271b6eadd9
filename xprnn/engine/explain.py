"""Which kernels a recurrent layer will run on, before it runs."""

from typing import Any

from xprnn.arrays.namespace import Array, Params
from xprnn.engine import arguments, state_layout
from xprnn.kernels import dispatch

__all__ = ["explain"]


def explain(layer: Any, params: Params, x: Array, lengths: Any = None, mask: Any = None, reset: Any = None) -> str:
    """A line for each layer and direction: the kernel it will run on and, in brackets, why not on a faster one.

    Nothing is computed, and nothing is compiled but what the decision itself needs (numba's kernel, on NumPy). The
    names are those of `tape.explain()`, which says the same of a pass that has been.

    Args:
        layer: a recurrent layer.
        params: as from `init`.
        x: as `forward` gets it; its numbers don't matter.
        lengths, mask, reset: as `forward` gets them: not every kernel knows them.

    Raises:
        InputError: what `forward` would refuse too.

    >>> import numpy as np, xprnn
    >>> layer = xprnn.GRU(3, 4)
    >>> params = layer.init(np.random.default_rng(0), like=np.zeros(0, np.float16))
    >>> print(layer.explain(params, np.ones((5, 2, 3), np.float16)))
    layer 0, forward: NumPy in place (not compiled: float16 is neither float32 nor float64)
    """
    where = f"{type(layer).__name__}.explain"
    xp = arguments.check_call(where, layer, params, x, None, "NT" if layer.batch_first else "TN")
    x = state_layout.time_major(layer, xp, x)
    steps = arguments.make_step_mask(where, layer, xp, x, lengths, mask, reset)
    lines = []
    for i, own in enumerate(state_layout.params_by_layer(layer, params)):
        k, second = divmod(i, layer.num_directions)
        way = "reverse" if second or layer.reverse else "forward"
        lines.append(f"layer {k}, {way}: {dispatch.explain(xp, layer.resolved_cell, own, tuple(x.shape[:2]), steps)}")
    return "\n".join(lines)
