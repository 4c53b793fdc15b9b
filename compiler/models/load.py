"""Load a model that was found, with code that is checked first, and identify it by digests of what was loaded."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from otcache.schemas.digest import digest_of_files, digest_of_value
from otcache.schemas.errors import HostError, ModelError

from ..workspace.workspace import default_workspace
from .digests import denoiser_digest
from .files import INDEX, components_without, files_in, read_config, weight_files
from .find import HUB_ID, bundled_models, find_model, first_line
from .lora import fuse_lora
from .mapped_weights import move_to_file
from .model import Model, transformer_of
from .recast import recast_folder
from .untrusted import check_code, check_weights

_log = logging.getLogger(__name__)


def load_model(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    lora: Path | None = None,
    scratch: Path | None = None,
) -> Model:
    """Load a pipeline with its weights in `dtype` on the CPU.

    Args:
        name: a bundled name, a diffusers folder or a hub id.
        revision: branch, tag or commit of a hub model.
        variant: which of the weights are loaded where several are stored, such as fp16.
        dtype: of all weights, whatever they are stored in.
        trust_remote_code: run Python that comes with the model. Without it such a model is refused unread.
        lora: folder of a LoRA that is fused into the weights, and part of their digest.
        scratch: folder on a disk, where weights that are not stored in `dtype` are kept while they are used; by default
            the workspace.

    Raises:
        ModelError: the model was not found, is refused, or diffusers cannot load it.
        HostError: the scratch folder is of no use.
    """
    folder = find_model(name, revision=revision, variant=variant, trust_remote_code=trust_remote_code)
    if not trust_remote_code:
        check_code(folder, name)
    check_weights(folder, name, variant)
    _log.info("loads %s from %s", name, folder)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    scratch = scratch or default_workspace()
    pipeline = _load(folder, name, variant, getattr(torch, dtype), trust_remote_code, scratch)
    weights = digest_of_files(folder, weight_files(folder))
    if variant is not None:
        weights = digest_of_value([weights, {"variant": variant}])
    if lora is not None:
        weights = digest_of_value([weights, fuse_lora(pipeline, lora)])
        move_to_file(transformer_of(pipeline, f"MODEL {name!r}"), scratch)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    named = name in bundled_models() or (HUB_ID.match(name) and not Path(name).exists())
    return Model(
        name=name if named else folder.resolve().name,
        folder=folder,
        pipeline=pipeline,
        config_digest=_digest_of_configs(folder, name),
        weights_digest=weights,
        denoiser_digest=denoiser_digest(transformer_of(pipeline, f"MODEL {name!r}")),
    )


def _load(
    folder: Path, name: str, variant: str | None, dtype: torch.dtype, trust_remote_code: bool, scratch: Path
) -> Any:
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        with recast_folder(folder, dtype, scratch) as source:
            return diffusers.DiffusionPipeline.from_pretrained(
                source,
                torch_dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                **({"variant": variant} if variant else {}),
                **dict.fromkeys(components_without(read_config(folder / INDEX, f"MODEL {name!r}"))),
            )
    except HostError:
        raise
    except Exception as error:
        raise ModelError(f"MODEL {name!r} could not be loaded by diffusers: {first_line(error)}") from error


def _digest_of_configs(folder: Path, name: str) -> str:
    """Digest of the pipeline's own options (`model_index.json`) and of all `*config.json` files, as JSON values."""
    paths = [path for path in files_in(folder) if path.name.endswith("config.json") or path == folder / INDEX]
    return digest_of_value({str(path.relative_to(folder)): read_config(path, f"MODEL {name!r}") for path in paths})
