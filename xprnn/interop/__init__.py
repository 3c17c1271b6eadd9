"""Conversion of trained networks: from torch, Keras and ONNX, and to torch and ONNX.

Every `from_...(source, like=array)` returns `model, params`, like `xprnn.load`. The source decides the type of `model`:

- One recurrent layer, or one stack of layers of the same kind (torch's `num_layers`), becomes that layer: an RNN, LSTM
  or GRU. The parameters have the layer's names.
- Several layers become a Sequential, in execution order, under the source's names.
- Any other ONNX graph becomes a GraphModel. It runs on every array library but cannot be trained: `backward` raises an
  error with the reason.

`like` selects the array library, dtype and device of the parameters. Without it they are NumPy arrays in the source's
dtype. If a network cannot be represented in the target system, the converter raises one InputError with all reasons
and converts nothing.

The module `conventions` is the only place that defines gate orders and weight layouts. Each function imports the
optional library that it needs, so importing this package imports no optional library.
"""

from xprnn.interop.keras.api import from_keras
from xprnn.interop.onnx.api import from_onnx, to_onnx
from xprnn.interop.torch.api import TorchExport, from_torch, to_torch

__all__ = ["TorchExport", "from_keras", "from_onnx", "from_torch", "to_onnx", "to_torch"]
