"""Networks from elsewhere and back: torch, Keras, ONNX.

Every `from_...(source, like=array)` returns `model, params`, as `xprnn.load` does. What comes back has one rule:

- A source that is one recurrent layer (or one stack of layers of the same kind, as torch's `num_layers`) is that layer:
  RNN, LSTM or GRU, its parameters under its own names.
- A source with parts around it is a Sequential, in the order in which they run, under the source's own names.
- An ONNX graph that is neither is a Graph, which runs on every array library and says why it does not learn.

`like` gives array library, dtype and device; without it the parameters are NumPy arrays in the source's dtype.
What a system has and the other cannot say is refused, all reasons at once, before anything runs.

`conventions` holds the gate orders and layouts, and nothing else does. The optional libraries are imported by the
function that needs them: importing this room imports none.
"""

from xprnn.interop.keras.api import from_keras
from xprnn.interop.onnx.api import from_onnx, to_onnx
from xprnn.interop.torch.api import TorchExport, from_torch, to_torch

__all__ = ["TorchExport", "from_keras", "from_onnx", "from_torch", "to_onnx", "to_torch"]
