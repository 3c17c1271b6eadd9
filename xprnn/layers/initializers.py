"""Initial values of recurrent parameters, drawn with NumPy so that every array library gets the same numbers.

A scheme fills the rows of one gate at a time: (H, D) of weight_ih or (H, P) of weight_hh, where P is H or proj_size.
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
    q = q * np.sign(np.diag(r))  # without it the draw is not uniform, by QR's sign convention (Mezzadri 2007)
    return q if rows >= columns else q.T


def _glorot(rng: Generator, shape: tuple[int, int]) -> Any:
    bound = np.sqrt(6.0 / max(1, sum(shape)))
    return rng.uniform(-bound, bound, shape)


def _spectral_radius_scaled(rng: Generator, shape: tuple[int, int], radius: float) -> Any:
    w = rng.standard_normal(shape)
    if shape[0] != shape[1] or not shape[0]:
        raise InputError(f"init: a spectral radius needs a square weight_hh, found {shape} for each gate")
    return w * (radius / np.max(np.abs(np.linalg.eigvals(w))))


# name -> (function that fills the rows of a gate in weight_ih, the same for weight_hh); biases are 0.
SCHEMES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "glorot_orthogonal": (_glorot, _orthogonal),
    "glorot": (_glorot, _glorot),
    "orthogonal": (_orthogonal, _orthogonal),
    # IRNN (Le, Jaitly, Hinton 2015): at first, a relu network carries its state unchanged.
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
    """Draw one parameter in float64.

    Args:
        rng: a numpy.random.Generator.
        name: name of the parameter, as in torch's state_dict.
        shape: (G*H, D), (G*H, P), (P, H) or (G*H,).
        gates: G.
        hidden: H.
        scheme: "uniform" (torch: U(-1/sqrt(H), 1/sqrt(H)) for all parameters) or a key of SCHEMES.
        spectral_radius: None, or a number >= 0: the rows of each gate in weight_hh are Gaussian, scaled so that their
            largest |eigenvalue| is this number.

    Returns:
        A NumPy array of `shape`.

    Raises:
        InputError: an unknown scheme, a spectral radius that is not a number >= 0, or one for a weight_hh that is not
            square for each gate.
    """
    is_hh = "weight_hh" in name
    if is_hh and spectral_radius is not None:
        radius: Any = spectral_radius  # for the type checker, which rules out the case that is tested here
        if not isinstance(radius, (int, float)) or not 0 <= radius < float("inf"):
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
    """Fill the rows of each gate separately, because the gates of an orthogonal (G*H, D) matrix are not orthogonal."""
    gate_shape = (shape[0] // gates, shape[1])
    return np.concatenate([fill(rng, gate_shape) for _ in range(gates)])


def lookup_layout(name: str, value: Any, like: Array) -> Any:
    """Return weight_ih_l0 in Fortran order if it is wider than high and `like` is a NumPy array.

    A look-up by class number reads a column, which is contiguous in Fortran order. In torch's order it would touch a
    cache line of every row. The values are the same.

    >>> lookup_layout("weight_ih_l0", np.zeros((2, 9)), like=np.zeros(0)).strides
    (8, 16)
    """
    wide = name == "weight_ih_l0" and value.shape[1] > value.shape[0]
    return np.asfortranarray(value) if wide and is_numpy(namespace(like)) else value
