"""The build host: from a diffusers pipeline to an artifact. May import torch, diffusers, POT and Optuna."""
