"""Recognition of recurrent layers in an ONNX graph."""
