"""RNN, LSTM and GRU: the recurrent layer with their cells, and torch's names and shapes for what they hold."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from xprnn.arrays.namespace import InputError
from xprnn.cells.activations import Activation
from xprnn.cells.cell import Cell
from xprnn.cells.serialization import activation_to_config
from xprnn.cells.standard import elman, gru, gru_reset_before, lstm
from xprnn.layers.recurrent import Recurrent, validate_positive

__all__ = ["GRU", "LSTM", "RNN"]


@dataclass(frozen=True, init=False)
class RNN(Recurrent):
    """Elman layers: h_t = f(W x_t + b_ih + U h_{t-1} + b_hh).

    Args:
        nonlinearity: "tanh", "relu", "identity", any name of xprnn.activation, or an Activation of your own.
        (the others): see Recurrent.

    >>> RNN(3, 4, nonlinearity="relu").output_size
    4
    """

    nonlinearity: Any = "tanh"

    def __init__(
        self,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        nonlinearity: str | Activation = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        reverse: bool = False,
        learned_state: bool = False,
        sparse: bool = False,
        cell: Cell | None = None,
    ) -> None:
        # Written out for torch's order, where the nonlinearity stands in the middle of what all layers share.
        if isinstance(nonlinearity, Activation) and isinstance(name := activation_to_config(nonlinearity), str):
            nonlinearity = name  # one way to say it, so that layers compare equal
        object.__setattr__(self, "nonlinearity", nonlinearity)
        shared = (bias, batch_first, dropout, bidirectional)
        named: dict[str, Any] = {"reverse": reverse, "learned_state": learned_state, "sparse": sparse, "cell": cell}
        super().__init__(input_size, hidden_size, num_layers, *shared, **named)

    @property
    def resolved_cell(self) -> Cell:
        """The cell."""
        return self.cell or elman(self.nonlinearity)

    def config(self) -> dict[str, Any]:
        """The configuration as JSON-able data; `from_config` reads it back."""
        form = activation_to_config(self.nonlinearity)
        if form is None:
            raise InputError("RNN: a nonlinearity of your own has no file form: keep its code")
        return super().config() | {"nonlinearity": form}


@dataclass(frozen=True)
class LSTM(Recurrent):
    """LSTM layers, torch's gate order i,f,g,o: c' = f*c + i*g, h' = o*tanh(c').

    Args:
        proj_size: 0, or P: h is projected to P features by weight_hr (Sak et al. 2014).
        (the others): see Recurrent.

    >>> LSTM(3, 4, bidirectional=True).output_size
    8
    """

    proj_size: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_positive(self, "proj_size", minimum=0)
        if self.proj_size and self.proj_size >= min(self.hidden_sizes):
            raise InputError(
                f"LSTM: proj_size must be smaller than hidden_size {min(self.hidden_sizes)}, found {self.proj_size}"
            )

    @property
    def projection_size(self) -> int:
        """P where h is projected to fewer features, else 0."""
        return self.proj_size

    @property
    def resolved_cell(self) -> Cell:
        """The cell."""
        return self.cell or lstm()


@dataclass(frozen=True)
class GRU(Recurrent):
    """GRU layers, torch's gate order r,z,n: h' = (1-z)*n + z*h.

    Args:
        reset_after: True (torch, cuDNN, Keras): n = tanh(x_n + r*(U_n h + b_hn)); False (Cho et al. 2014, ONNX):
            n = tanh(x_n + U_n (r*h) + b_hn).
        (the others): see Recurrent.

    >>> GRU(3, 4, reset_after=False).shapes()["weight_hh_l0"]
    (12, 4)
    """

    reset_after: bool = field(default=True, kw_only=True)

    @property
    def resolved_cell(self) -> Cell:
        """The cell."""
        return self.cell or (gru() if self.reset_after else gru_reset_before())
