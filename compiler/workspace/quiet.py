"""Keep the libraries' notices off the terminal: what a user has to know is said by otcache itself."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Silence notices of the libraries unless OTC_LOG is `debug`."""
    if os.environ.get("OTC_LOG", "").lower() == "debug":
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    for name in ("transformers", "diffusers", "torch.onnx", "onnxscript", "onnx_ir", "optuna", "torch.export"):
        logging.getLogger(name).setLevel(logging.ERROR)


def asks_for_lines() -> bool:
    """Whether OTC_LOG (info or debug) asks for a line per pass."""
    return os.environ.get("OTC_LOG", "").lower() in ("info", "debug")
