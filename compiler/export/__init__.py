"""Stages, text encoders and decoder → ONNX files that were checked against torch, and plans of them."""
