"""The article's five functions, with its names, arguments, dictionary keys, array shapes and return values.

The article is "Building a Recurrent Neural Network from Scratch in Python". Its arrays have the features first: x is
(n_x, m, T_x). That is the library's time-major (T, N, D) with the axes reversed. The functions return views, and do not
copy arguments that are Fortran-ordered. The article omits the gradients of the output layer; the keyword argument
`dlogits` of both backward functions adds them.

    a<t> = tanh(Wax x<t> + Waa a<t-1> + ba)        y<t> = softmax(Wya a<t> + by)
"""

from collections.abc import Iterator, Sequence
from typing import Any, overload

from xprnn.arrays.linear import linear, linear_backward
from xprnn.arrays.namespace import Array, InputError, Namespace, Params, check_shape, resolve_namespace
from xprnn.cells.standard import elman
from xprnn.kernels import dispatch, reference
from xprnn.kernels.tape import StepMask, UnpicklableTape
from xprnn.training.losses import softmax, softmax_unchecked

__all__ = ["CellCaches", "rnn_backward", "rnn_cell_backward", "rnn_cell_forward", "rnn_forward", "softmax"]

Cache = tuple[Array, Array, Array, Params]
_PARAMETER_NAMES = ("Wax", "Waa", "Wya", "ba", "by")


class CellCaches(UnpicklableTape, Sequence[Cache]):
    """Sequence of the caches (a_next, a_prev, xt, parameters) of the T_x steps; each one is created when it is indexed.


    >>> import numpy as np
    >>> p = dict(Wax=np.ones((2, 3)), Waa=np.ones((2, 2)), Wya=np.ones((1, 2)), ba=np.ones((2, 1)), by=np.ones((1, 1)))
    >>> a, y_pred, (cells, x) = rnn_forward(np.ones((3, 1, 5)), np.zeros((2, 1)), p)
    >>> len(cells), len(cells[1:3]), cells[-1][0].shape
    (5, 2, (2, 1))
    """

    def __init__(self, a: Array, a0: Array, x: Array, parameters: Params, tape: Any, steps: range) -> None:
        self._a, self._a0, self._x, self.parameters, self.tape, self.steps = a, a0, x, parameters, tape, steps

    @property
    def is_prefix(self) -> bool:
        """True if these are the first len(self) steps of the sequence, in order."""
        return self.steps == range(len(self.steps))

    def __len__(self) -> int:
        return len(self.steps)

    @overload
    def __getitem__(self, index: int) -> Cache: ...
    @overload
    def __getitem__(self, index: slice) -> "CellCaches": ...
    def __getitem__(self, index: int | slice) -> "Cache | CellCaches":
        if isinstance(index, slice):
            return CellCaches(self._a, self._a0, self._x, self.parameters, self.tape, self.steps[index])
        t = self.steps[index]
        a_prev = self._a[:, :, t - 1] if t else self._a0
        return self._a[:, :, t], a_prev, self._x[:, :, t], self.parameters

    def __iter__(self) -> Iterator[Cache]:
        return (self[k] for k in range(len(self)))


def _check_arguments(where: str, parameters: Any, **arrays: Array) -> Namespace:
    """Check parameters and arrays against each other, and return their array namespace."""
    if not isinstance(parameters, dict):
        raise InputError(f"{where}: parameters must be a dict, found {type(parameters).__name__}")
    missing = [k for k in _PARAMETER_NAMES if k not in parameters]
    if missing:
        raise InputError(f"{where}: parameters has no {', '.join(missing)} (expected {', '.join(_PARAMETER_NAMES)})")
    named = arrays | {k: parameters[k] for k in _PARAMETER_NAMES}
    if absent := [k for k, a in named.items() if a is None]:
        raise InputError(f"{where}: {absent[0]} must be an array, found None")
    xp = resolve_namespace(where, named)
    n_a, n_x = (*parameters["Wax"].shape, 0, 0)[:2]
    n_y = (*parameters["Wya"].shape, 0)[0]
    shapes = {"Wax": (n_a, n_x), "Waa": (n_a, n_a), "Wya": (n_y, n_a), "ba": (n_a, 1), "by": (n_y, 1)}
    letters = {"Wax": "(n_a,n_x)", "Waa": "(n_a,n_a)", "Wya": "(n_y,n_a)", "ba": "(n_a,1)", "by": "(n_y,1)"}
    for name, shape in shapes.items():
        check_shape(where, name, letters[name], parameters[name], shape)
    return xp


def _reverse_axes(xp: Namespace, a: Array) -> Array:
    """Return a view with the axes reversed: (features, m, T) <-> (T, m, features), (features, m) <-> (m, features)."""
    return xp.permute_dims(a, tuple(range(a.ndim))[::-1])


def _core_params(parameters: Params) -> Params:
    """Rename the article's parameters of the recurrent layer to those of an elman cell."""
    return {"weight_ih": parameters["Wax"], "weight_hh": parameters["Waa"], "bias_ih": parameters["ba"][:, 0]}


def rnn_cell_forward(xt: Array, a_prev: Array, parameters: Params) -> tuple[Array, Array, Cache]:
    """Compute one step: a_next = tanh(Wax xt + Waa a_prev + ba), yt_pred = softmax(Wya a_next + by).

    Args:
        xt: (n_x, m), the input of this step.
        a_prev: (n_a, m), the hidden state before this step.
        parameters: dict of Wax (n_a, n_x), Waa (n_a, n_a), Wya (n_y, n_a), ba (n_a, 1) and by (n_y, 1), of one real
            floating dtype.

    Returns:
        a_next (n_a, m); yt_pred (n_y, m), whose columns sum to 1; cache = (a_next, a_prev, xt, parameters).

    Raises:
        InputError: shapes, dtypes, array libraries or keys do not fit.

    >>> import numpy as np
    >>> p = dict(Wax=np.ones((2, 3)), Waa=np.ones((2, 2)), Wya=np.ones((1, 2)), ba=np.ones((2, 1)), by=np.ones((1, 1)))
    >>> a_next, yt_pred, cache = rnn_cell_forward(np.zeros((3, 4)), np.zeros((2, 4)), p)
    >>> a_next[:, 0].round(4), yt_pred.shape
    (array([0.7616, 0.7616]), (1, 4))
    """
    where = "rnn_cell_forward"
    xp = _check_arguments(where, parameters, xt=xt, a_prev=a_prev)
    n_a, n_x = parameters["Wax"].shape
    check_shape(where, "xt", "(n_x,m)", xt, (n_x, None))
    check_shape(where, "a_prev", "(n_a,m)", a_prev, (n_a, xt.shape[1]))
    (h,) = reference.single_step(
        xp, elman(), _core_params(parameters), _reverse_axes(xp, xt), (_reverse_axes(xp, a_prev),)
    )
    logits = linear(xp, h, parameters["Wya"], parameters["by"][:, 0])
    a_next = _reverse_axes(xp, h)
    return a_next, _reverse_axes(xp, softmax_unchecked(xp, logits, -1)), (a_next, a_prev, xt, parameters)


def rnn_forward(x: Array, a0: Array, parameters: Params) -> tuple[Array, Array, tuple[CellCaches, Array]]:
    """Run `rnn_cell_forward` for all T_x steps; one GEMM computes the input projections of all steps.

    Args:
        x: (n_x, m, T_x), the inputs.
        a0: (n_a, m), the initial hidden state.
        parameters: as for rnn_cell_forward.

    Returns:
        a (n_a, m, T_x), all hidden states; y_pred (n_y, m, T_x), whose columns sum to 1; caches = (CellCaches of the
        T_x steps, x). With NumPy, `a` is a read-only view of the memory that the backward pass reads: copy it before
        you change it.

    Raises:
        InputError: shapes, dtypes, array libraries or keys do not fit.

    >>> import numpy as np
    >>> p = dict(Wax=np.ones((2, 3)), Waa=np.ones((2, 2)), Wya=np.ones((1, 2)), ba=np.ones((2, 1)), by=np.ones((1, 1)))
    >>> a, y_pred, caches = rnn_forward(np.zeros((3, 4, 5)), np.zeros((2, 4)), p)
    >>> a.shape, y_pred.shape, len(caches[0])
    ((2, 4, 5), (1, 4, 5), 5)
    """
    where = "rnn_forward"
    xp = _check_arguments(where, parameters, x=x, a0=a0)
    n_a, n_x = parameters["Wax"].shape
    check_shape(where, "x", "(n_x,m,T_x)", x, (n_x, None, None))
    check_shape(where, "a0", "(n_a,m)", a0, (n_a, x.shape[1]))
    core, steps = _core_params(parameters), StepMask()
    h, _, tape = dispatch.forward(
        elman(), core, _reverse_axes(xp, x), (_reverse_axes(xp, a0),), steps, xp=xp, reverse=False, record_tape=True
    )
    logits = linear(xp, h, parameters["Wya"], parameters["by"][:, 0])
    a = _reverse_axes(xp, h)
    caches = CellCaches(a, a0, x, parameters, tape, range(x.shape[2]))
    return a, _reverse_axes(xp, softmax_unchecked(xp, logits, -1)), (caches, x)


def _head_backward(xp: Namespace, parameters: Params, dlogits: Array, h: Array) -> tuple[Array, Params]:
    """Backward of the output layer: dlogits (..., n_y) -> the cotangent of h, and {dWya, dby}."""
    dh, dw, db = linear_backward(xp, dlogits, h, parameters["Wya"])
    assert dh is not None
    return dh, {"dWya": dw, "dby": db[:, None]}


def _check_cotangents(
    where: str, parameters: Params, shape: tuple[int, ...], da: Any, dlogits: Any, name: str
) -> Namespace:
    """Check the cotangents `name` and dlogits against the shape (m,) or (m, T_x) of the forward pass."""
    if da is None and dlogits is None:
        raise InputError(f"{where}: {name} or dlogits must be given")
    cotangents = {k: v for k, v in ((name, da), ("dlogits", dlogits)) if v is not None}
    xp = _check_arguments(where, parameters, **cotangents)
    axes = "m,T" if len(shape) > 1 else "m"
    for key, letter, size in ((name, "n_a", "Waa"), ("dlogits", "n_y", "Wya")):
        if key in cotangents:
            expected = (parameters[size].shape[0], shape[0], *((None,) if len(shape) > 1 else ()))
            check_shape(where, key, f"({letter},{axes})", cotangents[key], expected)
    lengths = {k: v.shape[2] for k, v in cotangents.items()} if len(shape) > 1 else {}
    for key, steps in lengths.items():
        if steps > shape[1]:
            raise InputError(f"{where}: {key} has {steps} time steps but the forward pass had {shape[1]}")
    if len(set(lengths.values())) > 1:
        raise InputError(f"{where}: {name} has {lengths[name]} time steps but dlogits has {lengths['dlogits']}")
    return xp


def rnn_cell_backward(da_next: Array | None, cache: Cache, *, dlogits: Array | None = None) -> dict[str, Array]:
    """Compute the gradients of one step.

    dz = da_next (1 - a_next^2);  dxt = Wax^T dz;  da_prev = Waa^T dz;  dWax = dz xt^T;  dWaa = dz a_prev^T;
    dba = sum of dz over m

    Args:
        da_next: (n_a, m), the gradient of the loss with respect to a_next; None means zero and needs dlogits.
        cache: from rnn_cell_forward, or one of the cell caches of rnn_forward.
        dlogits: (n_y, m), the gradient with respect to Wya a_next + by, as cross_entropy(..., axis=0) returns it.

    Returns:
        dict of dxt (n_x, m), da_prev (n_a, m), and dWax, dWaa, dba with the shapes of the parameters; with dlogits,
        dWya and dby too.

    Raises:
        InputError: shapes, dtypes or array libraries do not fit.

    >>> import numpy as np
    >>> p = dict(Wax=np.ones((2, 3)), Waa=np.ones((2, 2)), Wya=np.ones((1, 2)), ba=np.ones((2, 1)), by=np.ones((1, 1)))
    >>> a_next, yt_pred, cache = rnn_cell_forward(np.zeros((3, 4)), np.zeros((2, 4)), p)
    >>> sorted(rnn_cell_backward(np.ones((2, 4)), cache))
    ['dWaa', 'dWax', 'da_prev', 'dba', 'dxt']
    """
    where = "rnn_cell_backward"
    try:
        a_next, a_prev, xt, parameters = cache
    except (TypeError, ValueError):
        raise InputError(f"{where}: cache must be (a_next, a_prev, xt, parameters) from rnn_cell_forward") from None
    resolve_namespace(where, {"a_next in cache": a_next, "a_prev in cache": a_prev, "xt in cache": xt})
    check_shape(where, "a_next in cache", "(n_a,m)", a_next, (None, None))
    xp = _check_cotangents(where, parameters, (a_next.shape[1],), da_next, dlogits, "da_next")
    h = _reverse_axes(xp, a_next)
    head_grads: Params = {}
    dh = None if da_next is None else _reverse_axes(xp, da_next)
    if dlogits is not None:
        dh_head, head_grads = _head_backward(xp, parameters, _reverse_axes(xp, dlogits), h)
        dh = dh_head if dh is None else dh + dh_head
    _, cell_backward = elman().bind(xp)[:2]
    (dz,), _, _, _ = cell_backward((dh,), (h,), (), ())
    dx, dw, db = linear_backward(xp, dz, _reverse_axes(xp, xt), parameters["Wax"])
    dh_prev, du, _ = linear_backward(xp, dz, _reverse_axes(xp, a_prev), parameters["Waa"])
    return {
        "dxt": _reverse_axes(xp, dx),
        "da_prev": _reverse_axes(xp, dh_prev),
        "dWax": dw,
        "dWaa": du,
        "dba": db[:, None],
    } | head_grads


def rnn_backward(
    da: Array | None, caches: tuple[Sequence[Cache], Array], *, dlogits: Array | None = None
) -> dict[str, Array]:
    """Compute the gradients of the whole sequence by back-propagation through time.

    Args:
        da: (n_a, m, T), the gradient of the loss with respect to each hidden state; None means zero and needs dlogits.
            If T < T_x, only the first T steps are back-propagated, as in the article's loop.
        caches: from rnn_forward, or (list of T_x cell caches, x).
        dlogits: (n_y, m, T), the gradient with respect to Wya a + by, as cross_entropy(..., axis=0) returns it.

    Returns:
        dict of dx (n_x, m, T), da0 (n_a, m), and dWax, dWaa, dba with the shapes of the parameters; with dlogits, dWya
        and dby too.

    Raises:
        InputError: shapes, dtypes or array libraries do not fit.

    >>> import numpy as np
    >>> p = dict(Wax=np.ones((2, 3)), Waa=np.ones((2, 2)), Wya=np.ones((1, 2)), ba=np.ones((2, 1)), by=np.ones((1, 1)))
    >>> a, y_pred, caches = rnn_forward(np.zeros((3, 4, 5)), np.zeros((2, 4)), p)
    >>> {k: v.shape for k, v in rnn_backward(np.ones((2, 4, 5)), caches).items()}
    {'dx': (3, 4, 5), 'da0': (2, 4), 'dWax': (2, 3), 'dWaa': (2, 2), 'dba': (2, 1)}
    """
    where = "rnn_backward"
    try:
        cells, x = caches
        parameters = cells.parameters if isinstance(cells, CellCaches) else cells[0][3]
        check_shape(where, "x in caches", "(n_x,m,T_x)", x, (None, None, None))
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: caches must be (cell caches, x) from rnn_forward, at least one step") from None
    xp = _check_cotangents(where, parameters, (x.shape[1], len(cells)), da, dlogits, "da")
    cotangent: Array = dlogits if da is None else da
    steps = cotangent.shape[2]
    if not isinstance(cells, CellCaches) or not cells.is_prefix:
        return _backward_from_caches(xp, da, dlogits, cells[:steps])
    tape = cells.tape if steps == x.shape[2] else _truncate_tape(cells.tape, steps)
    head_grads: Params = {}
    dy = None if da is None else _reverse_axes(xp, da)
    if dlogits is not None:
        dh_head, head_grads = _head_backward(xp, parameters, _reverse_axes(xp, dlogits), tape.states()[0])
        dy = dh_head if dy is None else dy + dh_head
    dx, (da0,), _, d = dispatch.backward(tape, dy, (None,))
    return {
        "dx": _reverse_axes(xp, dx),
        "da0": _reverse_axes(xp, da0),
        "dWax": d["weight_ih"],
        "dWaa": d["weight_hh"],
        "dba": d["bias_ih"][:, None],
    } | head_grads


def _truncate_tape(tape: Any, steps: int) -> Any:
    """Return the tape of the first `steps` steps, from a new forward pass over them."""
    return dispatch.forward(
        tape.cell,
        tape.params,
        tape.x[:steps, ...],
        tape.initial_state,
        StepMask(),
        xp=tape.xp,
        reverse=False,
        record_tape=True,
    )[2]


def _backward_from_caches(
    xp: Namespace, da: Array | None, dlogits: Array | None, cells: Sequence[Cache]
) -> dict[str, Array]:
    """The article's backward loop, for a list of cell caches or a part of CellCaches."""
    if not len(cells):
        raise InputError("rnn_backward: caches must hold at least one cell cache")
    da_prev, dx = None, []
    param_grads: Params = {}
    for t in range(len(cells) - 1, -1, -1):
        da_t = da_prev if da is None else da[:, :, t] if da_prev is None else da[:, :, t] + da_prev
        grads = rnn_cell_backward(da_t, cells[t], dlogits=None if dlogits is None else dlogits[:, :, t])
        da_prev = grads.pop("da_prev")
        dx.append(grads.pop("dxt"))
        param_grads = {k: v + param_grads[k] if param_grads else v for k, v in grads.items()}
    return {"dx": xp.stack(dx[::-1], axis=-1), "da0": da_prev} | param_grads
