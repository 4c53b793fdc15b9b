"""Find a model by name, folder or hub id, and load it with code that is checked first."""

from __future__ import annotations

import json
import os
import re
from importlib import resources
from pathlib import Path

import diffusers
import torch
import transformers
from huggingface_hub import constants, snapshot_download

from otcache.schemas.digest import digest_of_files, digest_of_value
from otcache.schemas.errors import HostError, ModelError

from ..workspace.workspace import default_workspace
from .lora import fuse_lora
from .model import Model, _log, transformer_of
from .untrusted import check_code, check_weights

SAFE_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
"""What is fetched from the hub; `*.py` only on request, pickled weights never."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+\Z")


def bundled_folder() -> Path:
    """Folder of the models that come with otcache."""
    return Path(str(resources.files("otcache.artifacts"))) / "models"


def bundled_models() -> list[str]:
    """Names of the models that come with otcache."""
    return sorted(path.parent.name for path in bundled_folder().glob("*/model_index.json"))


def complete_models(incomplete: str) -> list[str]:
    """Bundled names that begin so, for the shell's completion."""
    return [name for name in bundled_models() if name.startswith(incomplete)]


def find_model(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """Folder of a bundled model, the folder itself, or a hub snapshot's (at `revision`: a branch, tag or commit).

    Raises ModelError when `name` is none of these or the hub cannot be reached.
    """
    if revision is not None and (name in bundled_models() or Path(name).exists()):
        raise ModelError(f"--revision is {revision!r}, but MODEL {name!r} is no hub id: leave --revision out")
    if name in bundled_models():
        return bundled_folder() / name
    folder = Path(name)
    if (folder / "model_index.json").is_file():
        return folder
    known = ", ".join(bundled_models()) or "none"
    expected = f"expected a bundled name ({known}), a folder with model_index.json, or a hub id such as org/name"
    if folder.exists():
        raise ModelError(f"MODEL {name!r} has no model_index.json: {expected}")
    if not HUB_ID.match(name):
        raise ModelError(f"MODEL {name!r} was not found: {expected}")
    return _fetch(name, revision, trust_remote_code, expected)


def _fetch(name: str, revision: str | None, trust_remote_code: bool, expected: str) -> Path:

    patterns = [*SAFE_FILES, *(["*.py"] if trust_remote_code else [])]
    at = f" at revision {revision!r}" if revision else ""
    _log.info("looks for %s%s on the hub%s", name, at, ", offline" if constants.HF_HUB_OFFLINE else "")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        if constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"MODEL {name!r}{at} is not in the local hub cache, and HF_HUB_OFFLINE forbids fetching it: "
                "unset HF_HUB_OFFLINE, or give a folder"
            ) from error
        raise ModelError(
            f"MODEL {name!r}{at} is not here and could not be fetched from the hub ({_reason(error)}): {expected}"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error, or its name."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    lora: Path | None = None,
    scratch: Path | None = None,
) -> Model:
    """Load a pipeline with its weights in `dtype` on the CPU. Raises ModelError with the reason, HostError.

    trust_remote_code: run Python that comes with the model. Without it such a model is refused unread.
    lora: folder of a LoRA that is fused into the weights, and part of their digest.
    scratch: folder on a disk, where weights that are not stored in `dtype` are kept while they are used; by default the
    workspace.
    """
    folder = find_model(name, revision=revision, trust_remote_code=trust_remote_code)
    if not trust_remote_code:
        check_code(folder, name)
    check_weights(folder, name)
    _log.info("loads %s from %s", name, folder)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from .digests import denoiser_digest
    from .mapped_weights import move_to_file
    from .recast import widened

    scratch = scratch or default_workspace()
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        with widened(folder, getattr(torch, dtype), scratch) as source:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                source,
                torch_dtype=getattr(torch, dtype),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
            )
    except HostError:
        raise
    except Exception as error:
        raise ModelError(f"MODEL {name!r} could not be loaded by diffusers: {_reason(error)}") from error
    weights_digest = digest_of_files(folder, [p for p in folder.rglob("*.safetensors") if p.is_file()])
    if lora is not None:
        weights_digest = digest_of_value([weights_digest, fuse_lora(pipeline, lora)])
        move_to_file(transformer_of(pipeline, f"MODEL {name!r}"), scratch)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    short = (
        name
        if name in bundled_models()
        else (name if HUB_ID.match(name) and not Path(name).exists() else folder.resolve().name)
    )
    return Model(
        name=short,
        folder=folder,
        pipeline=pipeline,
        config_digest=digest_of_value(
            {
                str(path.relative_to(folder)): json.loads(path.read_text())
                for path in sorted(folder.rglob("*config.json"))
                if path.is_file()
            }
        ),
        weights_digest=weights_digest,
        denoiser_digest=denoiser_digest(transformer_of(pipeline, f"MODEL {name!r}")),
    )
