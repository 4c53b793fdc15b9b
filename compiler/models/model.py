"""A loaded model, what identifies it, and what it says of itself: its prompts, and how it is called."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from otcache.schemas.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class CallDefaults:
    """How a model is meant to be called, where its pipeline's class says otherwise or nothing (`call.json` in its
    folder).
    """

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid")

    height: int | None = None
    """Pixels."""
    width: int | None = None
    num_frames: int | None = None
    max_sequence_length: int | None = None
    negative_prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded pipeline and what identifies it."""

    name: str
    folder: Path | None
    """Where it was loaded from, with its own prompts and call; None for a pipeline that the caller made."""
    pipeline: Any
    config_digest: str
    weights_digest: str
    denoiser_digest: str
    """Of the transformer as it is in memory (`identity`)."""
    live: bool = False
    """Handed over in memory by the caller: its folder, if any, need not hold the same weights."""

    @property
    def transformer(self) -> Any:
        """The network whose evaluations are counted."""
        return transformer_of(self.pipeline, self.name)

    def give_back(self) -> None:
        """Drop the memory of all weights that are mapped from files (`mapped`)."""
        import torch

        from .mapped_weights import give_back

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
