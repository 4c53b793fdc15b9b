"""Find and load MODEL: a bundled name, a diffusers folder or a hub id.

Nothing that comes with a model is executed unless `trust_remote_code` says so: `foreign` refuses Python code, classes from
elsewhere and pickled weights before diffusers sees the folder.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from otcache.schemas.digest import digest_of_files, digest_of_value
from otcache.schemas.errors import HostError, ModelError

from .foreign import check_code, check_weights
from .lora import fuse_lora
from .workspace import default_workspace

_log = logging.getLogger(__name__)
SAFE_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
"""What is fetched from the hub; `*.py` only on request, pickled weights never."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+\Z")


@dataclass(frozen=True, kw_only=True)
class CallDefaults:
    """How a model is meant to be called, where its pipeline's class says otherwise or nothing (`call.json` in its folder)."""

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid")

    height: int | None = None
    """Pixels."""
    width: int | None = None
    num_frames: int | None = None
    max_sequence_length: int | None = None
    negative_prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded pipeline and what identifies it."""

    name: str
    folder: Path | None
    """Where it was loaded from; None for a pipeline that the caller made."""
    pipeline: Any
    config_digest: str
    weights_digest: str
    denoiser_digest: str
    """Of the transformer as it is in memory (`identity`)."""

    @property
    def transformer(self) -> Any:
        """The network whose evaluations are counted."""
        return transformer_of(self.pipeline, self.name)

    def give_back(self) -> None:
        """Drop the memory of all weights that are mapped from files (`mapped`)."""
        import torch

        from .mapped import give_back

        for component in self.pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                give_back(component)

    @property
    def prompts(self) -> list[str]:
        """The model's own prompts (`prompts.txt` in its folder), or none."""
        path = self.folder / "prompts.txt" if self.folder else None
        return read_prompts(path) if path and path.is_file() else []

    @property
    def call(self) -> CallDefaults:
        """The model's own arguments. Raises ModelError for a `call.json` that is none."""
        path = self.folder / "call.json" if self.folder else None
        if path is None or not path.is_file():
            return CallDefaults()
        names = [field.name for field in dataclasses.fields(CallDefaults)]
        try:
            return TypeAdapter(CallDefaults).validate_json(path.read_bytes())
        except ValidationError as error:
            found = error.errors()[0]
            where = ".".join(map(str, found["loc"])) or "the file"
            raise ModelError(f"{path}: {where}: {found['msg']}: expected an object of {', '.join(names)}") from error


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
    from huggingface_hub import constants, snapshot_download

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
    scratch: folder on a disk, where weights that are not stored in `dtype` are kept while they are used; by default the workspace.
    """
    folder = find_model(name, revision=revision, trust_remote_code=trust_remote_code)
    if not trust_remote_code:
        check_code(folder, name)
    check_weights(folder, name)
    _log.info("loads %s from %s", name, folder)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import diffusers
    import torch
    import transformers

    from .identity import denoiser_digest
    from .mapped import move_to_file
    from .widen import widened

    scratch = scratch or default_workspace()
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        with widened(folder, getattr(torch, dtype), scratch) as source:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                source, torch_dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
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
        name=short, folder=folder, pipeline=pipeline,
        config_digest=digest_of_value({
            str(path.relative_to(folder)): json.loads(path.read_text())
            for path in sorted(folder.rglob("*config.json")) if path.is_file()
        }),
        weights_digest=weights_digest,
        denoiser_digest=denoiser_digest(transformer_of(pipeline, f"MODEL {name!r}")),
    )  # fmt: skip


def transformer_of(pipeline: Any, subject: str) -> Any:
    """The network whose evaluations are counted: `transformer`, or `unet` in older pipelines. Raises ModelError."""
    found = getattr(pipeline, "transformer", None)
    found = getattr(pipeline, "unet", None) if found is None else found  # a compiled module has no truth value
    if found is None:
        raise ModelError(f"{subject} is a {type(pipeline).__name__}, which has neither a transformer nor a unet")
    return found


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line; blank lines are skipped. Raises ModelError when there are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"prompts file {path} cannot be read ({error}): expected UTF-8 text, one prompt a line"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ModelError(f"prompts file {path} has no prompts: expected UTF-8 text, one prompt a line")
    return prompts
