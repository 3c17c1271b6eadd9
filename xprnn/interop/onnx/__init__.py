"""Models from ONNX and to ONNX."""
