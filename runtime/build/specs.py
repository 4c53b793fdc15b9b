"""Which plans an artifact shall have for one target: a `PlanSpec` for each stage, segment and combination."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from otcache.schemas.combinations import Combination, combinations
from otcache.schemas.digest import digest_of_value
from otcache.schemas.manifest import Manifest, Stage
from otcache.schemas.segments import COMBINATIONS, Granularity, coarsen, name_of, segments

from ..artifact.reader import Artifact
from ..engines.profiles import BATCH, Profile, Range, Triple, input_shapes
from ..engines.tensorrt_library import host_platform
from .plan import BuildJob
from .segments import OnnxSegment


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Everything that the plans of one target depend on beside their sources."""

    backend: str
    version: str
    target: str
    profile: Profile
    workspace_bytes: int | None
    granularity: Granularity

    @property
    def folder(self) -> str:
        """Where the plans lie in the artifact; its name holds a digest of the choices and of this host's platform."""
        key = digest_of_value({**asdict(self), "platform": host_platform()}).removeprefix("sha256:")[:8]
        return f"engines/{self.backend}-{self.version}-{self.target}-{key}"


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """A plan that the artifact shall have."""

    name: str
    path: str
    source: Path | OnnxSegment | Combination
    sources: dict[str, tuple[str, ...]]
    """Digests of what it is built from, by stage; by its own name for a combination."""
    shapes: dict[str, Range]
    """Of the inputs whose shape varies."""

    @property
    def is_combination(self) -> bool:
        """Whether it is built from the manifest alone, and from no stage."""
        return self.name.startswith(COMBINATIONS)


def specs_from_artifact(artifact: Artifact, choices: Choices) -> dict[str, PlanSpec]:
    """Every plan of an artifact, by name; its ONNX files are verified here. Raises ArtifactError."""
    manifest = artifact.manifest
    specs = [
        *_specs_of_stages(artifact, choices),
        *(_spec_of(manifest, one, choices) for one in combinations(manifest)),
    ]
    return {spec.name: spec for spec in specs}


def job_from_spec(folder: Path, choices: Choices, spec: PlanSpec) -> BuildJob:
    """What a worker builds the plan from; the folder that the plan goes to is made here. Raises OSError."""
    output = folder.absolute() / spec.path
    output.parent.mkdir(parents=True, exist_ok=True)
    return BuildJob(
        name=spec.name,
        source=spec.source,
        backend=choices.backend,
        target=choices.target,
        shapes=spec.shapes,
        workspace_bytes=choices.workspace_bytes,
        output=output,
        timing_cache=folder.absolute() / choices.folder / ".timing.cache",
    )


def _specs_of_stages(artifact: Artifact, choices: Choices) -> list[PlanSpec]:
    manifest = artifact.manifest
    digests = {entry.path: entry.digest for entry in manifest.files}
    groups = segments(manifest, choices.granularity)
    members = {name_of(segment): segment for segment in groups}
    stages = {stage.name: stage for stage in manifest.stages}
    specs = []
    for stage in coarsen(manifest, groups).stages:
        parts = tuple(stages[name] for name in members.get(stage.name, (stage.name,)))
        rows = _rows_of_stage(manifest, stage, choices.profile[BATCH])
        specs.append(
            PlanSpec(
                name=stage.name,
                path=f"{choices.folder}/{stage.name}.plan",
                source=_source(artifact, stage, parts),
                sources={
                    part.name: tuple(digests[path] for path in (part.onnx, *part.external_data)) for part in parts
                },
                shapes=input_shapes(manifest, choices.profile, stage.inputs, rows),
            )
        )
    return specs


def _spec_of(manifest: Manifest, combination: Combination, choices: Choices) -> PlanSpec:
    rows = choices.profile[BATCH]
    if not combination.counts_samples:
        rows = _times(rows, manifest.guidance.branches)
    return PlanSpec(
        name=COMBINATIONS + combination.name,
        path=f"{choices.folder}/{COMBINATIONS}{combination.name}.plan",
        source=combination,
        sources={COMBINATIONS + combination.name: (_digest_of_combination(combination),)},
        shapes=input_shapes(manifest, choices.profile, combination.terms, rows),
    )


def _source(artifact: Artifact, stage: Stage, parts: tuple[Stage, ...]) -> Path | OnnxSegment:
    """The verified ONNX files of a stage's parts."""
    paths = tuple(artifact.engine_path(part.onnx).absolute() for part in parts)
    if len(parts) == 1:
        return paths[0]
    return OnnxSegment(parts, paths, tuple(tensor.name for tensor in stage.outputs))


def _rows_of_stage(manifest: Manifest, stage: Stage, samples: Triple) -> Triple:
    """Rows that a stage gets for so many samples: the text encoder takes every distinct text once."""
    if stage.kind == "decoder":
        return samples
    rows = _times(samples, manifest.guidance.branches)
    return (1, *rows[1:]) if stage.kind == "text_encoder" else rows


def _times(sizes: Triple, factor: int) -> Triple:
    smallest, usual, largest = sizes
    return smallest * factor, usual * factor, largest * factor


def _digest_of_combination(combination: Combination) -> str:
    tensors = [tensor.model_dump(mode="json") for tensor in (*combination.terms, combination.total)]
    facts = (combination.kind, combination.coefs, combination.branches, combination.keep_norm)
    return digest_of_value([list(facts), tensors])
