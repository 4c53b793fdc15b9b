"""A model's folder → its pipeline without weights, from its configs alone: what can be asked before anything is loaded.

Its networks are on torch's meta device, where they have shapes and no memory; its tokenizers are left out.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from .files import INDEX, components_of, read_config

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}

_log = logging.getLogger(__name__)


def hollow_pipeline(folder: Path, name: str) -> Any | None:
    """The pipeline without weights and tokenizers; None where configs do not say enough, such as one with own code.

    name: of the model, for messages. Raises ModelError where the index is no JSON.
    """
    index = read_config(folder / INDEX, f"MODEL {name!r}")
    try:
        of_networks: dict[str, Any] = {key: _component(folder / key, *index[key][:2]) for key in components_of(index)}
        plain = {key: each for key, each in index.items() if not key.startswith("_") and not isinstance(each, list)}
        missing = {key: None for key, each in index.items() if isinstance(each, list) and key not in of_networks}
        kind = getattr(diffusers, index["_class_name"])
        if not issubclass(kind, diffusers.DiffusionPipeline):
            raise TypeError(f"{kind.__name__} is no pipeline")  # the index is a stranger's
        return kind(**of_networks, **missing, **plain)
    except Exception as error:
        _log.debug("%s has no pipeline without weights: %s: %s", name, type(error).__name__, error)
        return None


def weight_bytes(pipeline: Any, dtype: torch.dtype) -> dict[str, int]:
    """Of each network of a pipeline, what its weights take in a type."""
    networks = {name: each for name, each in pipeline.components.items() if isinstance(each, torch.nn.Module)}
    counts = {name: sum(each.numel() for each in network.parameters()) for name, network in networks.items()}
    return {name: count * dtype.itemsize for name, count in counts.items()}


def _component(folder: Path, library: str, kind: str) -> Any:
    made = getattr(LIBRARIES[library], kind)
    if issubclass(made, diffusers.SchedulerMixin):
        return made.from_pretrained(folder)
    if issubclass(made, diffusers.ModelMixin):
        with torch.device("meta"):
            return made.from_config(made.load_config(folder))
    if issubclass(made, transformers.PreTrainedModel):
        with torch.device("meta"):
            return made(made.config_class.from_pretrained(folder))
    return None
