"""Embedding: a trainable table whose rows are looked up by class number."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from numpy.random import Generator

from xprnn.arrays.linear import flatten_leading
from xprnn.arrays.namespace import (
    Array,
    InputError,
    Namespace,
    Params,
    as_index,
    check_index_bounds,
    check_shape,
    from_numpy,
    is_integer,
    is_numpy,
    resolve_namespace,
)
from xprnn.arrays.segment_sum import segment_sum
from xprnn.arrays.sparse_gradient import SegmentSum, sparse_lookup_gradient
from xprnn.arrays.validation import (
    check_bool,
    check_init,
    check_param_shapes,
    check_params,
    require_array,
    validate_positive,
)
from xprnn.engine.fast_steps import make_embedding_step
from xprnn.engine.layer import FastStep, Steppable
from xprnn.kernels.jit.applies import jit_applies
from xprnn.kernels.tape import Gradients
from xprnn.layers.base import check_tape

__all__ = [
    "Embedding",
]


@dataclass(frozen=True)
class Embedding(Steppable):
    """Look up rows of a (V, D) weight: y[...] = weight[x[...]] for integers x in 0..V-1.

    Args:
        num_embeddings: V >= 1, the number of classes.
        embedding_dim: D >= 1, features of y.
        sparse: True: the gradient of the weight is a SparseGradient of the rows that were looked up; False: it is
            dense.

    >>> import numpy as np
    >>> table = Embedding(5, 2)
    >>> params = table.init(np.random.default_rng(0), like=np.zeros(0))
    >>> table(params, np.asarray([[1, 4]]))[0].shape
    (1, 2, 2)
    """

    num_embeddings: int
    embedding_dim: int
    sparse: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        validate_positive(self, "num_embeddings", "embedding_dim")
        check_bool("Embedding", "sparse", self.sparse)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter by name."""
        return {"weight": (self.num_embeddings, self.embedding_dim)}

    def init(self, rng: Generator, like: Array) -> Params:
        """Draw the weight from the standard normal distribution, as torch does."""
        check_init("Embedding.init", rng, like)
        return {"weight": from_numpy(rng.standard_normal(self.shapes()["weight"]), like)}

    def __call__(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None]:
        """Return y (..., D) for integers x (...), and None."""
        y, _, _ = self.forward(params, x)
        return y, None

    def forward(self, params: Params, x: Array, state: None = None, **flags: Any) -> tuple[Array, None, Any]:
        """Return y (..., D), None, and the tape, for integers x (...)."""
        where = "Embedding.forward"
        check_params(where, params, self.shapes())
        require_array(where, "x", x)
        xp = resolve_namespace(where, dict(params), {"x": x})
        check_param_shapes(where, params, self.shapes())
        if not is_integer(xp, x):
            raise InputError(f"{where}: x must be integers in 0..{self.num_embeddings - 1}, found {x.dtype}")
        check_index_bounds(where, "x", x, self.num_embeddings)
        table = params["weight"]
        rows = xp.take(table, as_index(xp, xp.reshape(x, (-1,))), axis=0)
        return xp.reshape(rows, (*x.shape, self.embedding_dim)), None, (xp, table, x)

    def backward(self, tape: Any, dy: Array, dstate: None = None) -> Gradients:
        """Return the gradient of the weight for the cotangent dy (..., D); dx is None, as x is integer."""
        xp, table, x = check_tape("Embedding.backward", tape)
        require_array("Embedding.backward", "dy", dy)
        resolve_namespace("Embedding.backward", {"params": table, "dy": dy})
        check_shape("Embedding.backward", "dy", "(the shape of y)", dy, (*x.shape, self.embedding_dim))
        ids, rows, sum_segments = (
            as_index(xp, xp.reshape(x, (-1,))),
            flatten_leading(xp, dy),
            _segment_sum(xp, dy.dtype),
        )
        if self.sparse:
            dw = sparse_lookup_gradient(xp, ids, rows, tuple(table.shape), segment_sum_fn=sum_segments)
            return Gradients(None, None, {"weight": dw})
        return Gradients(None, None, {"weight": sum_segments(ids, rows, self.num_embeddings)})

    def step(self, params: Params, x: Array, state: None = None) -> tuple[Array, None]:
        """Compute one time step: y (N, D) for integers x (N,)."""
        result = self._fast_step(params, x, state)
        return self(params, x) if result is None else result

    def make_fast_step(self, prefix: str, count: int) -> FastStep:
        """Return the fast path of `step` for parameters named `prefix` + name in a dict of `count` parameters."""
        return make_embedding_step(self, prefix, count)

    def config(self) -> dict[str, Any]:
        """Return the configuration as data that JSON can hold."""
        sizes = {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}
        return {"type": "Embedding"} | sizes | {"sparse": self.sparse}


def _segment_sum(xp: Namespace, dtype: Any) -> SegmentSum:
    """Return the segment sum for arrays of a dtype: compiled on NumPy arrays with numba, else by array functions."""
    if not is_numpy(xp) or not jit_applies(dtype):
        return partial(segment_sum, xp)
    from xprnn.kernels.jit import segment_sum as compiled  # imports numba

    return compiled.segment_sum
