"""Prompts → conditioning, as the pipeline itself makes it, for artifacts that have no text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from otcache.schemas.errors import ModelError
from otcache.schemas.manifest_file import read_manifest
from otcache.schemas.places import unwritable
from otcache.schemas.whole_files import whole_file

from ..models.load import load_model
from ..pipelines.call import call_options
from ..pipelines.full_run import conditioning_of
from ..pipelines.probe import probe
from ..workspace.progress import Reporter


def encode(
    output: Path,
    *,
    model: str,
    artifact: Path,
    prompts: Sequence[str],
    negative_prompt: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    trust_remote_code: bool = False,
    lora: Path | None = None,
    reporter: Reporter | None = None,
) -> dict[str, list[int]]:
    """Write the conditioning of n prompts to a safetensors file: each tensor (branches, n, …). Returns their shapes.

    Sizes, lengths and guidance are the artifact's. Raises ModelError for a model that it was not compiled from, and
    ArtifactError.
    """
    manifest = read_manifest(artifact).manifest
    reporter = reporter or Reporter()
    with reporter.on("load", model):
        loaded = load_model(model, revision=revision, variant=variant, trust_remote_code=trust_remote_code, lora=lora)
    if loaded.weights_digest != manifest.model.weights_digest:
        raise ModelError(
            f"MODEL {model!r} has weights {loaded.weights_digest[:19]}…, but {artifact} was compiled from "
            f"{manifest.model.weights_digest[:19]}…: give the model that it was compiled from, or compile it again"
        )
    conditions, scale = manifest.conditions, manifest.guidance.scale
    options = call_options(
        loaded.pipeline,
        num_inference_steps=manifest.sampler.num_inference_steps,
        height=conditions.height,
        width=conditions.width,
        num_frames=conditions.num_frames,
        max_sequence_length=conditions.max_sequence_length,
        negative_prompt=manifest.guidance.negative_prompt if negative_prompt is None else negative_prompt,
    )
    with reporter.on("encode", f"{len(prompts)} prompts"):
        interface = probe(loaded.pipeline, options, scale, loaded.prompts or prompts)
        tensors = conditioning_of(loaded.pipeline, interface, options, scale, prompts)
    try:
        with whole_file(output) as part:
            save_file({name: value.contiguous() for name, value in tensors.items()}, part)
    except (OSError, SafetensorError) as error:
        raise unwritable(output, "-o", error) from None
    return {name: list(value.shape) for name, value in tensors.items()}
