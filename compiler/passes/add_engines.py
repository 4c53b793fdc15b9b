"""`otc export`: engines for an artifact of programs alone, from the model that it was compiled from, without
calibrating.

Consumes the artifact's manifest and the model; produces the artifact with engines in its place. Weights have to be the
same.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from otcache.schemas import manifest as schema
from otcache.schemas.arithmetic import latents_from_noise
from otcache.schemas.errors import ArtifactError, ModelError, UsageError
from otcache.schemas.manifest_file import read_manifest

from ..calibration.rollout import StagedModel, residual_memory, roll_out
from ..models.model import Model
from ..options import CompileOptions, DTypeName
from ..pipelines.call import short_call
from ..pipelines.denoiser import Denoiser, denoiser_of
from ..pipelines.full_run import capture, conditioning_of
from ..report.evidence import read_evidence
from ..report.page import ATTACHMENTS, FOLDER
from ..workspace.progress import Reporter
from .emit import check_target, emit
from .engines import Engines, exportable_from_session
from .export import Exportable, export_parts, serve_trunk
from .golden import golden_record, rounding_of, tolerance_of
from .manifest import engine_fields, latents_with_engines
from .session import begin


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `otc export`."""

    artifact: Path
    model: str
    output: Path | None = None
    """Where the artifact with engines goes; by default in the place of the one without."""
    dtype: DTypeName = "float32"
    """Of the transformer's stages."""
    revision: str | None = None
    variant: str | None = None
    trust_remote_code: bool = False
    lora: Path | None = None
    threads: int | None = None
    workspace: Path | None = None
    force: bool = False
    """Replace engines that are there, or what is at `output`."""


def export_engines(
    options: ExportOptions, reporter: Reporter, live: Model | None = None
) -> tuple[Path, schema.Manifest]:
    """Export the engines of an artifact. Returns its folder and new manifest.

    Raises ArtifactError, UsageError, HostError, and ModelError for a model that it was not compiled from.
    """
    read = read_manifest(options.artifact)
    manifest = read.manifest
    if not manifest.programs_alone and not options.force:
        raise UsageError(f"{options.artifact} has engines: give --force to export them again")
    target = options.output or options.artifact
    check_target(target, force=options.force or options.output is None)
    session, prompts, _ = begin(compile_options(options, manifest), reporter, live)
    _check_weights(options, manifest, session.model)
    scale = session.options.nominal_scale
    few = capture(
        session.model.pipeline,
        session.interface,
        short_call(session.model.pipeline, session.call),
        (prompts * 2)[:2],
        [0, 1],
        [scale] * 2,
    )
    denoiser = denoiser_of(session.model.transformer, session.interface, few)
    source = exportable_from_session(session, denoiser.inputs(few.latents[1], few.timesteps[1], 1.0))
    engines = _make_engines(source, options.artifact, manifest)
    latents = latents_with_engines(read.migrated["latents"], source, engines.exported)
    fields = {
        **read.migrated,
        **engines.fields,
        "latents": latents,
        "conditions": {**read.migrated["conditions"], "dtype": options.dtype},
        "guidance": {**read.migrated["guidance"], "negative_zeros": session.negative_zeros},
    }
    fields["schema_version"] = schema.SCHEMA_VERSION

    def fill(folder: Path) -> None:
        engines.write(folder)
        for entry in manifest.attachments:
            if (options.artifact / entry.path).is_file():
                (folder / entry.path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(options.artifact / entry.path, folder / entry.path)

    with reporter.on("emit", str(target)):
        force = options.force or options.output is None
        return target, emit(target, fill, fields, force=force, attachments=ATTACHMENTS)


def compile_options(options: ExportOptions, manifest: schema.Manifest) -> CompileOptions:
    """The options with which the artifact was compiled, as far as an export asks for them."""
    conditions, guidance = manifest.conditions, manifest.guidance
    return CompileOptions(
        model=options.model,
        budgets=tuple(sorted(int(each) for each in manifest.budgets if each != schema.FULL)),
        num_inference_steps=manifest.sampler.num_inference_steps,
        guidance_scale=(guidance.minimum, guidance.maximum),
        negative_prompt=guidance.negative_prompt,
        height=conditions.height,
        width=conditions.width,
        num_frames=conditions.num_frames,
        max_sequence_length=conditions.max_sequence_length,
        dtype=options.dtype,
        device="cpu",
        micro_batch=1,
        revision=options.revision,
        variant=options.variant,
        trust_remote_code=options.trust_remote_code,
        lora=options.lora,
        threads=options.threads,
        workspace=options.workspace,
        **sizes_from_manifest(manifest),
    )


def sizes_from_manifest(manifest: schema.Manifest) -> dict[str, Any]:
    """`sizes`, `frame_counts` and `text_lengths`, as the options take them, of what an artifact serves."""
    shapes = manifest.shapes
    if shapes is None:
        return {}
    axes = {axis.name: axis for axis in shapes.axes}
    groups = {"sizes": ("height", "width"), "frame_counts": ("num_frames",), "text_lengths": ("max_sequence_length",)}
    found: dict[str, Any] = {}
    for option, names in groups.items():
        free = [name for name in names if name in axes]
        if not free:
            continue
        own = {name: getattr(manifest.conditions, name) for name in names}
        if shapes.sizes:
            points = [{**own, **entry.size} for entry in shapes.sizes]
            found[option] = ",".join(dict.fromkeys("x".join(str(point[name]) for name in names) for point in points))
        else:
            ends = [{**own, **{name: getattr(axes[name], end) for name in free}} for end in ("minimum", "maximum")]
            step = axes[free[0]].step  # type: ignore[index]
            found[option] = ":".join([*("x".join(str(point[name]) for name in names) for point in ends), str(step)])
    return found


def _check_weights(options: ExportOptions, manifest: schema.Manifest, model: Model) -> None:
    for name in ("weights_digest", "config_digest"):
        stated, found = getattr(manifest.model, name), getattr(model, name)
        if stated != found:
            raise ModelError(
                f"MODEL {options.model!r} has {name.replace('_', ' ')} {found[:19]}…, but {options.artifact} was "
                f"compiled from {stated[:19]}…: give the model that it was compiled from, or compile it again"
            )


def _make_engines(source: Exportable, artifact: Path, manifest: schema.Manifest) -> Engines:
    """Export everything, with a golden request of the first prompt that the artifact's evidence names."""
    trunk = functools.cache(partial(serve_trunk, source))
    exported = export_parts(source, trunk)
    own = (
        {} if manifest.shapes is None else {_place(entry.size): list(entry.programs) for entry in manifest.shapes.sizes}
    )
    golden, latents = None, None
    request = _first_request(artifact)
    if source.session.encoders is not None and request is not None:
        prompt, seed = request
        budget = min(int(each) for each in manifest.budgets if each != schema.FULL)
        entry = manifest.program(budget)
        assert entry is not None
        denoiser, first = _golden_start(source, prompt, seed, manifest.latents)
        staged = StagedModel(source.stages, denoiser, keep=residual_memory(entry.program))
        latents = roll_out(entry.program, denoiser, first, staged=staged).numpy()[0]
        rounding = None
        if source.session.options.dtype != "float32":
            rounding = rounding_of(trunk(), entry.program, denoiser, first, latents)
        golden = golden_record(
            prompt=prompt,
            budget=budget,
            seed=seed,
            guidance_scale=source.session.options.nominal_scale if source.session.interface.guided else None,
            max_relative_error=tolerance_of(exported.max_relative_error, rounding),
        )
    return Engines(
        source=source,
        exported=exported,
        golden=latents,
        fields=engine_fields(source, exported, golden, own),
    )


def _place(size: Mapping[Any, int]) -> str:
    from otcache.schemas.shapes import describe_size

    return describe_size(dict(size))


def _first_request(artifact: Path) -> tuple[str, int] | None:
    """Prompt and seed of the first held-out sample; None where the report is gone."""
    with contextlib.suppress(ArtifactError, KeyError):
        evidence = read_evidence(artifact / FOLDER)
        return evidence.prompts[0], evidence.seeds[0]
    return None


def _golden_start(source: Exportable, prompt: str, seed: int, layout: schema.Latents) -> tuple[Denoiser, torch.Tensor]:
    """The denoiser of one request, and its first latents float32 (1, …)."""
    session = source.session
    scale = session.options.nominal_scale
    conditioning = conditioning_of(session.model.pipeline, session.interface, session.call, scale, [prompt])
    denoiser = Denoiser(
        transformer=session.model.transformer,
        interface=session.interface,
        conditioning=conditioning,
        guidance=torch.tensor([scale]),
    )
    noise = torch.randn(1, *layout.noise_shape, generator=torch.Generator().manual_seed(seed))
    arranged = latents_from_noise(noise, layout.split, layout.permutation).reshape(1, *layout.shape)
    return denoiser, torch.from_numpy(np.float32(layout.initial_scale) * arranged.numpy())
