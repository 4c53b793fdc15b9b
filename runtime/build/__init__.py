"""An artifact's ONNX files → TensorRT plans on the host that serves, listed in its manifest."""
