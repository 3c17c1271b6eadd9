"""Recurrent: layers and directions of any cell, the base class of RNN, LSTM and GRU.

Parameters are a flat dict with torch's state_dict names and shapes. A state is an array (L*directions, N, H) as in
torch, for an LSTM a pair (h, c) of them. With a hidden_size for each layer, the array is replaced by a tuple of arrays
(directions, N, H_l), one for each layer l.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.random import Generator

from xprnn.arrays.namespace import Array, InputError, Params, from_numpy
from xprnn.arrays.validation import check_bool, check_init, check_probability, positive_int, validate_positive
from xprnn.cells.cell import Cell
from xprnn.cells.serialization import cell_to_config
from xprnn.engine import explain as engine_explain
from xprnn.engine import stack
from xprnn.engine.call_cache import CachedCalls
from xprnn.engine.layer import CallsForward
from xprnn.engine.stack import StackTape
from xprnn.engine.state_layout import parameter_shapes
from xprnn.kernels.tape import Gradients
from xprnn.layers.initializers import initialize, lookup_layout

__all__ = ["Recurrent"]

LayerState = Any


@dataclass(frozen=True)
class Recurrent(CachedCalls, CallsForward):
    """Stack of recurrent layers of one cell, in one or two directions.

    RNN, LSTM and GRU are subclasses that set the cell.

    Args:
        input_size: D >= 1, features of x, or the number of classes if x is integer.
        hidden_size: H >= 1, or a sequence of L of them, one for each layer.
        num_layers: L >= 1.
        bias: True: there are parameters bias_ih and bias_hh.
        batch_first: True: x and y are (N, T, ...); False: (T, N, ...). States have the same shape in both cases.
        dropout: probability 0 <= p < 1. `forward` with an `rng` sets each output of every layer but the last to zero
            with this probability and scales the others by 1/(1-p).
        bidirectional: True: every layer has a second direction; y is the concatenation of both.
        reverse: True: process each row from its last valid step to its first. y stays in time order, the final state
            is the one at step 0, and parameter names have no suffix. It cannot be combined with bidirectional.
        learned_state: True: the initial state for `state=None` is a parameter, "initial_h" (and "initial_c") of shape
            (L*directions, H); False: it is zero.
        sparse: True: if x is integer, the gradient of weight_ih of layer 0 is a SparseGradient of the classes that
            occur in x. False, or x of a floating dtype: it is dense.
        cell: the computation of one time step; None in RNN, LSTM and GRU selects their standard cell.

    Raises:
        InputError: an option out of range.

    >>> import numpy as np, xprnn
    >>> layer = Recurrent(3, 4, cell=xprnn.cells.elman("relu"))
    >>> params = layer.init(np.random.default_rng(0), like=np.zeros(0))
    >>> y, state = layer(params, np.ones((5, 2, 3)))
    >>> y.shape, state.shape
    ((5, 2, 4), (1, 2, 4))
    """

    input_size: int
    hidden_size: int | Sequence[int]
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    reverse: bool = field(default=False, kw_only=True)
    learned_state: bool = field(default=False, kw_only=True)
    sparse: bool = field(default=False, kw_only=True)
    cell: Cell | None = field(default=None, kw_only=True)
    explain = engine_explain.explain  # becomes a method: its first argument is the layer

    def __post_init__(self) -> None:
        where = type(self).__name__
        validate_positive(self, "input_size", "num_layers")
        if isinstance(self.hidden_size, (tuple, list)):
            sizes = tuple(positive_int(where, "hidden_size", size) for size in self.hidden_size)
            object.__setattr__(self, "hidden_size", sizes)
            if len(sizes) != self.num_layers:
                raise InputError(f"{where}: hidden_size has {len(sizes)} entries but num_layers is {self.num_layers}")
        else:
            validate_positive(self, "hidden_size")
        check_probability(where, "dropout", self.dropout)
        for name in ("bias", "batch_first", "bidirectional", "reverse", "learned_state", "sparse"):
            check_bool(where, name, getattr(self, name))
        if self.reverse and self.bidirectional:
            raise InputError(f"{where}: reverse is one direction and bidirectional is both: choose one of them")
        if not isinstance(self.resolved_cell, Cell):
            raise InputError(f"{where}: cell must be an xprnn.Cell, found {type(self.resolved_cell).__name__}")

    @property
    def resolved_cell(self) -> Cell:
        """The cell of the layer."""
        if self.cell is None:
            raise InputError(
                f"{type(self).__name__}: a cell is needed: cell=xprnn.cells.lstm(), or a user-defined Cell"
            )
        return self.cell

    @property
    def projection_size(self) -> int:
        """P if h is projected to P features, else 0."""
        return 0

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """H of every layer."""
        h = self.hidden_size
        return (h,) * self.num_layers if isinstance(h, int) else tuple(h)

    @property
    def num_directions(self) -> int:
        """Number of directions of every layer: 1 or 2."""
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """Features of y: directions * H of the last layer, or directions * P."""
        return self.num_directions * (self.projection_size or self.hidden_sizes[-1])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter by name, in torch's order."""
        return parameter_shapes(self)

    def init(
        self,
        rng: Generator,
        like: Array,
        *,
        scheme: str = "uniform",
        spectral_radius: float | None = None,
        forget_bias: float | None = None,
    ) -> Params:
        """Draw initial parameters.

        Args:
            rng: a numpy.random.Generator; every array library gets the same numbers.
            like: an array whose library, dtype and device the parameters take.
            scheme: "uniform" (torch's), "glorot", "orthogonal", "glorot_orthogonal" (Keras's), "identity" (IRNN).
            spectral_radius: None, or the largest |eigenvalue| of each gate's rows in weight_hh.
            forget_bias: None, or the sum of the two forget-gate biases of an LSTM.

        Returns:
            dict of arrays with the names and shapes of `shapes()`.

        Raises:
            InputError: an unknown scheme, a spectral_radius for a weight_hh that is not square for each gate, or a
                forget_bias for a layer without a forget gate or without biases.

        >>> import numpy as np, xprnn
        >>> sorted(xprnn.RNN(2, 3).init(np.random.default_rng(0), like=np.zeros(0)))
        ['bias_hh_l0', 'bias_ih_l0', 'weight_hh_l0', 'weight_ih_l0']
        """
        where = f"{type(self).__name__}.init"
        check_init(where, rng, like)
        if forget_bias is not None and (self.resolved_cell.name != "lstm" or not self.bias):
            raise InputError(f"{where}: forget_bias needs an LSTM with biases")
        options = (scheme, spectral_radius, forget_bias)
        return {
            name: from_numpy(lookup_layout(name, self._init_parameter(rng, name, *options), like), like)
            for name in self.shapes()
        }

    def _init_parameter(
        self, rng: Generator, name: str, scheme: str, radius: float | None, forget_bias: float | None
    ) -> Any:
        shape = self.shapes()[name]
        if name.startswith("initial_"):
            return np.zeros(shape)
        hidden = self.hidden_sizes[int(name.rpartition("_l")[2].partition("_")[0])]
        value = initialize(rng, name, shape, self.resolved_cell.gates, hidden, scheme, radius)
        if forget_bias is not None and name.startswith("bias_"):
            value[hidden : 2 * hidden] = forget_bias if name.startswith("bias_ih") else 0.0
        return value

    def __call__(
        self,
        params: Params,
        x: Array,
        state: LayerState = None,
        lengths: Any = None,
        mask: Any = None,
        reset: Any = None,
    ) -> tuple[Array, LayerState]:
        """Run the layer for inference: return y and the final state, without tape and dropout.

        Args:
            params: as from `init`.
            x: input, as in `forward`.
            state: initial state, as in `forward`.
            lengths: as in `forward`.
            mask: as in `forward`.
            reset: as in `forward`.

        Raises:
            InputError: as `forward`.
        """
        y, final, _ = self._run(params, x, state, record_tape=False, lengths=lengths, mask=mask, reset=reset)
        return y, final

    def forward(
        self,
        params: Params,
        x: Array,
        state: LayerState = None,
        lengths: Any = None,
        mask: Any = None,
        reset: Any = None,
        *,
        rng: Generator | None = None,
        checkpoint: int | str | None = None,
    ) -> tuple[Array, LayerState, StackTape]:
        """Run the layer over a sequence and record the tape for `backward`.

        Args:
            params: as from `init`.
            x: (T, N, D), or (N, T, D) if batch_first; or integers (T, N) in 0..D-1 that stand for one-hot vectors.
            state: initial state (L*directions, N, H), for the LSTM a pair; None: zero, or the learned state.
            lengths: (N,) integers 0..T, in any order, as an array or a Python sequence. y is 0 after the end of a row,
                the final state is the one at its last valid step, and the reverse direction starts there.
            mask: boolean (T, N), or (N, T) if batch_first. A step where it is False is skipped: the state is carried,
                y is 0, and dx is 0 there.
            reset: boolean, of the shape of mask. Where it is True, the state of the row is set to its initial state
                before that step, in the order of the direction, and the gradient flows to the initial state.
            rng: a numpy.random.Generator for dropout; None: no dropout.
            checkpoint: bound of the memory of the tape; None: no bound. The forward pass stores the state of every k-th
                step only, and `backward` computes the steps between them again. An int is k; "sqrt" sets k to
                2*sqrt(T), or more if k steps of tape are smaller than 4 MiB; "64MiB" is a number of bytes that the
                tape and the states must fit.

        Returns:
            y (T, N, directions*H), or (N, T, directions*H) if batch_first; the final state, shaped like `state`; and
            the tape. The tape refers to x, params and state. Until `backward` is done, do not write into these arrays.
            Replacing them by new arrays, as the optimisers do, is safe.

        Raises:
            InputError: a shape, dtype, library or device that does not fit; the message names both sides.

        >>> import numpy as np, xprnn
        >>> layer = xprnn.RNN(3, 4)
        >>> params = layer.init(np.random.default_rng(0), like=np.zeros(0))
        >>> y, state, tape = layer.forward(params, np.ones((5, 2, 3)))
        >>> dx, dstate, dparams = layer.backward(tape, np.ones_like(y))
        >>> dx.shape, dstate.shape, dparams["weight_hh_l0"].shape
        ((5, 2, 3), (1, 2, 4), (4, 4))
        """
        options = {"mask": mask, "reset": reset, "rng": rng, "checkpoint": checkpoint}
        y, final, tape = self._run(params, x, state, record_tape=True, lengths=lengths, **options)
        assert tape is not None
        return y, final, tape

    def backward(
        self, tape: StackTape, dy: Array | None, dstate: LayerState = None, *, dstates: Sequence[Any] | None = None
    ) -> Gradients:
        """Compute all gradients by back-propagation through time over the whole sequence.

        Args:
            tape: the tape that `forward` returned; it can be used several times.
            dy: cotangent of y, or None for zero.
            dstate: cotangent of the final state, in its structure, or None for zero.
            dstates: cotangents of `tape.states()`, in the same structure; each entry is an array or None for zero.

        Returns:
            Gradients(dx, dstate, dparams): dx has the shape of x and is None if x is integer; dstate is the gradient of
            the initial state; dparams has the keys of params.

        Raises:
            InputError: a cotangent whose shape, dtype, library or device differs from that of its output.
        """
        return self._calls.backward(tape, dy, dstate, dstates) or stack.backward(self, tape, dy, dstate, dstates)

    def step(self, params: Params, x: Array, state: LayerState = None) -> tuple[Array, LayerState]:
        """Compute one time step of a stream; the results equal those of a call with the whole sequence.

        Args:
            params: as from `init`.
            x: (N, D), or integers (N,) in 0..D-1.
            state: the state that the previous step returned, or None at the start.

        Returns:
            y (N, H) and the next state.

        Raises:
            InputError: the layer is bidirectional or reverse and needs the whole sequence, or an argument does not fit.

        >>> import numpy as np, xprnn
        >>> layer = xprnn.RNN(3, 4)
        >>> params = layer.init(np.random.default_rng(0), like=np.zeros(0))
        >>> y, state = layer.step(params, np.ones((2, 3)))
        >>> y.shape
        (2, 4)
        """
        result = self._fast_step(params, x, state)
        return stack.step(self, params, x, state) if result is None else result

    def config(self) -> dict[str, Any]:
        """Return the configuration as data that JSON can hold; `from_config` reads it.

        Raises:
            InputError: the cell is user-defined; a file cannot hold its code.
        """
        cell_config = None if self.cell is None else cell_to_config(self.cell)
        if self.cell is not None and cell_config is None:
            raise InputError(f"{type(self).__name__}: a layer with a user-defined cell has no file form: keep its code")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "cell"}
        options = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        return {"type": type(self).__name__} | options | ({} if cell_config is None else {"cell": cell_config})
