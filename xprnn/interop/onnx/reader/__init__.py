"""Recognition of ONNX graphs that are models of xprnn."""
