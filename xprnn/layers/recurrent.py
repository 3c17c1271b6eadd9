"""A recurrent layer of any cell: stacks and directions of scans, on parameters that the caller keeps.

A layer is a frozen configuration. Parameters are a flat dict with torch's state_dict names and shapes; states are
torch's (L*directions, N, H), the LSTM's a pair (h, c), of layers with sizes of their own (directions, N, H_l) for each.
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
from xprnn.engine.call_cache import FastPaths
from xprnn.engine.layer import CallsForward
from xprnn.engine.stack import StackTape
from xprnn.engine.state_layout import parameter_shapes
from xprnn.kernels.tape import Gradients
from xprnn.layers.initializers import initialize, lookup_layout

__all__ = ["Recurrent", "validate_positive"]

LayerState = Any


@dataclass(frozen=True)
class Recurrent(FastPaths, CallsForward):
    """A stack of one cell, in one or two directions. RNN, LSTM and GRU are this with their cells.

    Args:
        input_size: D >= 1, features of x, or the number of classes where x is integer.
        hidden_size: H >= 1, or one for each layer.
        num_layers: L >= 1.
        bias: whether bias_ih and bias_hh exist.
        batch_first: x and y are (N, T, .) instead of (T, N, .); states never are.
        dropout: probability 0 <= p < 1 of zeroing each output of every layer but the last, in `forward` with an `rng`.
        bidirectional: a second direction in every layer; y is the two side by side.
        reverse: walk each row from its last valid step to its first: y stays in time order, the final state is the
            one at step 0, and parameter names have no suffix. Not together with bidirectional.
        learned_state: the state that `state=None` stands for is a parameter, "initial_h" (and "initial_c"),
            (L*directions, H), instead of zero.
        sparse: where x is integer, the gradient of layer 0's weight_ih (of both directions) is a SparseGradient of the
            classes that occur, where it is dense otherwise; that of features is always dense.
        cell: what happens in a step; RNN, LSTM and GRU choose their own.

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
    explain = engine_explain.explain  # a method: its first argument is the layer

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
        """The cell."""
        if self.cell is None:
            raise InputError(f"{type(self).__name__}: a cell is needed: cell=xprnn.cells.lstm(), or your own")
        return self.cell

    @property
    def projection_size(self) -> int:
        """P where h is projected to fewer features, else 0."""
        return 0

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """H of each layer."""
        h = self.hidden_size
        return (h,) * self.num_layers if isinstance(h, int) else tuple(h)

    @property
    def num_directions(self) -> int:
        """1 or 2."""
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """Features of y: directions * H of the last layer, or directions * proj_size."""
        return self.num_directions * (self.projection_size or self.hidden_sizes[-1])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter, in torch's order."""
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
        """Starting parameters.

        Args:
            rng: a numpy.random.Generator; every array library gets the same numbers.
            like: an array whose library, dtype and device the parameters take.
            scheme: "uniform" (torch's), "glorot", "orthogonal", "glorot_orthogonal" (Keras's), "identity" (IRNN).
            spectral_radius: largest |eigenvalue| of each gate's recurrent block.
            forget_bias: the sum of an LSTM's two forget-gate biases.

        Returns:
            dict of arrays, `shapes()` says which.

        Raises:
            InputError: unknown scheme, or a forget_bias without a forget gate and biases.

        >>> import numpy as np, xprnn
        >>> sorted(xprnn.RNN(2, 3).init(np.random.default_rng(0), like=np.zeros(0)))
        ['bias_hh_l0', 'bias_ih_l0', 'weight_hh_l0', 'weight_ih_l0']
        """
        where = f"{type(self).__name__}.init"
        check_init(where, rng, like)
        if forget_bias is not None and (self.resolved_cell.name != "lstm" or not self.bias):
            raise InputError(f"{where}: forget_bias needs an LSTM with biases")
        every = (scheme, spectral_radius, forget_bias)
        return {
            name: from_numpy(lookup_layout(name, self._init_parameter(rng, name, *every), like), like)
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
        """Inference: as `forward`, but nothing is kept and nothing is dropped out. Returns y and the final state."""
        plain = lengths is None and mask is None and reset is None
        if plain and (done := self._infer(params, x, state)) is not None:
            return done
        y, final, _ = stack.forward(self, params, x, state, lengths=lengths, mask=mask, reset=reset, record_tape=False)
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
        """Run the layer and keep what `backward` needs.

        Args:
            params: as from `init`.
            x: (T, N, D), or (N, T, D) if batch_first; or integers (T, N) that stand for one-hot vectors.
            state: (L*directions, N, H), for the LSTM a pair; None: zero, or the learned one.
            lengths: (N,) integers 0 to T, in any order, an array or a host sequence. y is 0 past the end, the final
                state is the one at each row's last valid step, the reverse direction runs inside each row's own length.
            mask: (T, N) boolean, (N, T) if batch_first; a False step is skipped: the state is carried, y is 0, and no
                gradient flows into x there.
            reset: like mask; where True, the row's state is its initial state again before that step (in the order
                in which a direction walks), and the gradient goes to the initial state.
            rng: a numpy.random.Generator for dropout; None: no dropout.
            checkpoint: how to bound the tape: keep the state of every k-th step only (k, an int), of about sqrt(T) / 2
                steps ("sqrt"; less than 4 MiB is not cut), or what fits a number of bytes ("64MiB"), and run the rest
                again in `backward`.

        Returns:
            y (T, N, directions*H), the final state shaped like `state`, and the tape for `backward`. The tape refers to
            x, params and state: replace them (as the optimisers do), but write into none before `backward`.

        Raises:
            InputError: shapes, dtypes, libraries or devices that don't fit; says which, expected and found.

        >>> import numpy as np, xprnn
        >>> layer = xprnn.RNN(3, 4)
        >>> params = layer.init(np.random.default_rng(0), like=np.zeros(0))
        >>> y, state, tape = layer.forward(params, np.ones((5, 2, 3)))
        >>> dx, dstate, dparams = layer.backward(tape, np.ones_like(y))
        >>> dx.shape, dstate.shape, dparams["weight_hh_l0"].shape
        ((5, 2, 3), (1, 2, 4), (4, 4))
        """
        plain = lengths is None and mask is None and reset is None and rng is None and checkpoint is None
        if plain and (done := self._fast_forward(params, x, state)) is not None:
            return done
        y, final, tape = stack.forward(
            self,
            params,
            x,
            state,
            lengths=lengths,
            mask=mask,
            reset=reset,
            record_tape=True,
            rng=rng,
            checkpoint=checkpoint,
        )
        assert tape is not None
        return y, final, tape

    def backward(
        self, tape: StackTape, dy: Array | None, dstate: LayerState = None, *, dstates: Sequence[Any] | None = None
    ) -> Gradients:
        """The exact adjoint of `forward`: back-propagation through time over the whole sequence.

        Args:
            tape: what forward returned; it can be used again.
            dy: the adjoint of y, or None.
            dstate: the adjoint of the final state, shaped like it, or None.
            dstates: adjoints of `tape.states()`, in the same structure, each entry an array or None.

        Returns:
            Gradients(dx, dstate, dparams): dx like x (None if x is integer); dstate, the adjoint of the initial state;
            dparams keyed like params.

        Raises:
            InputError: an adjoint whose shape, dtype, library or device is not that of what it belongs to.
        """
        return self._fast_backward(tape, dy, dstate, dstates) or stack.backward(self, tape, dy, dstate, dstates)

    def step(self, params: Params, x: Array, state: LayerState = None) -> tuple[Array, LayerState]:
        """Streaming: one time step, the same numbers as the whole sequence.

        Args:
            params: as from `init`.
            x: (N, D) or integers (N,).
            state: the state so far, or None at the start.

        Returns:
            y (N, H) and the next state.

        Raises:
            InputError: a bidirectional or reverse layer, which needs the whole sequence; or what doesn't fit.

        >>> import numpy as np, xprnn
        >>> layer = xprnn.RNN(3, 4)
        >>> params = layer.init(np.random.default_rng(0), like=np.zeros(0))
        >>> y, state = layer.step(params, np.ones((2, 3)))
        >>> y.shape
        (2, 4)
        """
        done = self._fast_step(params, x, state)
        return stack.step(self, params, x, state) if done is None else done

    def config(self) -> dict[str, Any]:
        """The configuration as JSON-able data; `from_config` reads it back."""
        form = None if self.cell is None else cell_to_config(self.cell)
        if self.cell is not None and form is None:
            raise InputError(f"{type(self).__name__}: a layer with a cell of your own has no file form: keep its code")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "cell"}
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        return {"type": type(self).__name__} | plain | ({} if form is None else {"cell": form})
