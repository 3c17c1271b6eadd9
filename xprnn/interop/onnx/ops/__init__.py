"""ONNX operators on any array library of the Array API standard."""
