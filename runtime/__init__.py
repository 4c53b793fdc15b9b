"""Serving: loads an artifact and samples from it. Imports no torch, POT, Optuna, onnx or diffusers."""
