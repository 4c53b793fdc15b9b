"""A LoRA fused into the weights of a pipeline before anything else sees them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from otcache.schemas.digest import digest_of_file
from otcache.schemas.errors import HostError, ModelError


def fuse_lora(pipeline: Any, folder: Path) -> str:
    """Fuse the one safetensors file of a folder at full strength; returns the file's digest. Raises ModelError,
    HostError.
    """
    name, files = type(pipeline).__name__, sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ModelError(f"--lora {folder} has {len(files)} safetensors files: expected a folder with one")
    if not hasattr(pipeline, "load_lora_weights"):
        raise ModelError(f"--lora: {name} takes no LoRA: leave it out")
    if importlib.util.find_spec("peft") is None:
        raise HostError("--lora needs a package that is not installed (peft): run pip install peft")
    try:
        pipeline.load_lora_weights(str(folder), weight_name=files[0].name, local_files_only=True, use_safetensors=True)
        if not pipeline.get_active_adapters():
            raise ModelError(
                f"--lora {files[0]} has no weights for {name}: expected one that was trained on this model"
            )
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"--lora {files[0]} could not be fused into {name}: {error}") from error
    return digest_of_file(files[0])
