"""torch modules for the tests: recurrent layers drawn by hypothesis, and user-defined modules that contain them."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

property_settings = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def recurrent_layers(draw):
    """Strategy for (class name in torch.nn, constructor arguments)."""
    name = draw(st.sampled_from(["RNN", "LSTM", "GRU"]))
    hidden, layers = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    arguments = {
        "input_size": draw(st.integers(1, 4)),
        "hidden_size": hidden,
        "num_layers": layers,
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.25])) if layers > 1 else 0.0,
    }
    if name == "RNN":
        arguments["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if name == "LSTM":
        arguments["proj_size"] = draw(st.integers(0, hidden - 1))
    return name, arguments


def build_layer(name, arguments, seed=0):
    """Build the layer in float64 with weights from the seed."""
    import torch

    torch.manual_seed(seed)
    return getattr(torch.nn, name)(**arguments, dtype=torch.float64)


def build_network(rnn, embedding=0, outputs=0, bias=True):
    """Build a user-defined module: Embedding, the recurrent layer, Dropout, Linear; 0 omits the Embedding or Linear."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            if embedding:
                self.embed = torch.nn.Embedding(embedding, rnn.input_size, dtype=torch.float64)
            self.rnn = rnn
            self.dropout = torch.nn.Dropout(0.5)
            if outputs:
                width = (1 + rnn.bidirectional) * (rnn.proj_size or rnn.hidden_size)
                self.head = torch.nn.Linear(width, outputs, bias=bias, dtype=torch.float64)

        def forward(self, x, state=None):
            y, state = self.rnn(self.embed(x) if embedding else x, state)
            return (self.head(y) if outputs else y), state

    return Network().eval()
