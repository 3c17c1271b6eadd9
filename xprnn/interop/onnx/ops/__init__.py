"""ONNX operators on any array library."""
