"""ONNX Runtime, TensorRT and TensorRT-RTX behind the protocol of `loop.backend`, and the choice among them."""
