"""Starting values of recurrent parameters, drawn on the host so that every array library gets the same numbers.

Each recipe fills one block of rows: a gate's (H, D) share of weight_ih or its (H, P) share of weight_hh.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator

from xprnn.arrays.namespace import Array, InputError, is_numpy, namespace

__all__ = ["SCHEMES", "initialize", "lookup_layout"]


def _orthogonal(rng: Generator, shape: tuple[int, int]) -> Any:
    rows, columns = shape
    q, r = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))
    q = q * np.sign(np.diag(r))  # else QR's sign convention makes the draw non-uniform (Mezzadri 2007)
    return q if rows >= columns else q.T


def _glorot(rng: Generator, shape: tuple[int, int]) -> Any:
    bound = np.sqrt(6.0 / max(1, sum(shape)))
    return rng.uniform(-bound, bound, shape)


def _spectral_radius_scaled(rng: Generator, shape: tuple[int, int], radius: float) -> Any:
    w = rng.standard_normal(shape)
    if shape[0] != shape[1] or not shape[0]:
        raise InputError(f"init: a spectral radius needs a square weight_hh, found {shape} for each gate")
    return w * (radius / np.max(np.abs(np.linalg.eigvals(w))))


# name -> what fills a block of (weight_ih, weight_hh); biases are 0.
SCHEMES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "glorot_orthogonal": (_glorot, _orthogonal),
    "glorot": (_glorot, _glorot),
    "orthogonal": (_orthogonal, _orthogonal),
    # IRNN (Le, Jaitly, Hinton 2015): a relu network that starts by remembering.
    "identity": (lambda rng, shape: 0.001 * rng.standard_normal(shape), lambda rng, shape: np.eye(*shape)),
}


def initialize(
    rng: Generator,
    name: str,
    shape: tuple[int, ...],
    gates: int,
    hidden: int,
    scheme: str,
    spectral_radius: float | None,
) -> Any:
    """One parameter in float64.

    Args:
        rng: where the numbers come from.
        name: the parameter's name.
        shape: (G*H, D), (G*H, P), (P, H) or (G*H,).
        gates, hidden: G and H.
        recipe: "uniform" (torch: U(-1/sqrt(H), 1/sqrt(H)) for all) or a key of RECIPES.
        spectral_radius: if given, each gate's block of weight_hh is Gaussian, scaled to this largest |eigenvalue|.

    Raises:
        InputError: unknown recipe.
    """
    is_hh = "weight_hh" in name
    if is_hh and spectral_radius is not None:
        number: Any = spectral_radius
        if not isinstance(number, (int, float)) or not 0 <= number < float("inf"):
            raise InputError(f"init: spectral_radius must be a number >= 0, found {spectral_radius!r}")
        return _per_gate(lambda r, s: _spectral_radius_scaled(r, s, spectral_radius), rng, shape, gates)
    if scheme == "uniform":
        bound = 1.0 / np.sqrt(max(1, hidden))
        return rng.uniform(-bound, bound, shape)
    if scheme not in SCHEMES:
        raise InputError(f"init: scheme must be one of uniform, {', '.join(SCHEMES)}, found {scheme!r}")
    if len(shape) == 1:
        return np.zeros(shape)
    if is_hh or "weight_ih" in name:
        return _per_gate(SCHEMES[scheme][is_hh], rng, shape, gates)
    return SCHEMES[scheme][0](rng, shape)


def _per_gate(fill: Callable[..., Any], rng: Generator, shape: tuple[int, ...], gates: int) -> Any:
    """Each gate's block by itself: orthogonality of the stack of four is not that of any one."""
    block = (shape[0] // gates, shape[1])
    return np.concatenate([fill(rng, block) for _ in range(gates)])


def lookup_layout(name: str, value: Any, like: Array) -> Any:
    """NumPy's weight for many classes by class, one after the other: a look-up in torch's order would touch all of it.

    >>> lookup_layout("weight_ih_l0", np.zeros((2, 9)), like=np.zeros(0)).strides
    (8, 16)
    """
    wide = name == "weight_ih_l0" and value.shape[1] > value.shape[0]
    return np.asfortranarray(value) if wide and is_numpy(namespace(like)) else value
