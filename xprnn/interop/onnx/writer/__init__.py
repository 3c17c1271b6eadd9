"""Export of models of xprnn as ONNX graphs."""
