"""Report which kernels a recurrent layer will run on, before it runs."""

from typing import Any

from xprnn.arrays.namespace import Array, Params
from xprnn.engine import arguments, state_layout
from xprnn.engine.layer import RecurrentLayer
from xprnn.kernels import dispatch

__all__ = ["explain"]


def explain(
    layer: RecurrentLayer, params: Params, x: Array, lengths: Any = None, mask: Any = None, reset: Any = None
) -> str:
    """Return one line for each layer and direction: its kernel and, in brackets, why each faster kernel does not apply.

    Nothing is computed. On NumPy arrays numba compiles the kernel, because the choice depends on whether it can. After
    a pass, `tape.explain()` uses the same kernel names.

    Args:
        layer: a recurrent layer.
        params: as from `init`.
        x: as for `forward`; its values are not used.
        lengths, mask, reset: as for `forward`; some kernels do not support them.

    Returns:
        The lines, joined by newlines.

    Raises:
        InputError: for the same arguments as `forward`.

    >>> import numpy as np, xprnn
    >>> layer = xprnn.GRU(3, 4)
    >>> params = layer.init(np.random.default_rng(0), like=np.zeros(0, np.float16))
    >>> print(layer.explain(params, np.ones((5, 2, 3), np.float16)))
    layer 0, forward: NumPy in place (not compiled: float16 is neither float32 nor float64)
    """
    where = f"{type(layer).__name__}.explain"
    xp = arguments.check_call(where, layer, params, x, None, "NT" if layer.batch_first else "TN")
    x = state_layout.time_major(layer, xp, x)
    step_mask = arguments.make_step_mask(where, layer, xp, x, lengths, mask, reset)
    shape, cell, lines = tuple(x.shape[:2]), layer.resolved_cell, []
    for i, scan_params in enumerate(state_layout.params_by_layer(layer, params)):
        k, second = divmod(i, layer.num_directions)
        direction = "reverse" if second or layer.reverse else "forward"
        lines.append(f"layer {k}, {direction}: {dispatch.explain(xp, cell, scan_params, shape, step_mask)}")
    return "\n".join(lines)
