"""The build host: from a diffusers pipeline to an artifact. May import torch, diffusers, POT and Optuna."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime's own builds send what they run to their maker
