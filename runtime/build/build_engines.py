"""`otc build-engines`: an artifact's ONNX files → plans for one backend and some targets, added to its manifest.

Needs neither torch nor the model. Plans are written one by one to where they will be listed, each with a record beside
it, so that an interrupted build goes on where it stopped; the manifest comes last, in one rename, and keeps its other
engines. A folder's name holds a digest of everything that plans depend on beside their source.

Nothing that a signature covers may change under it: a signed artifact is refused unless `unsign` is given.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from otcache.schemas.combinations import Combination, combinations
from otcache.schemas.digest import digest_of_file, digest_of_value
from otcache.schemas.errors import ArtifactError, HostError
from otcache.schemas.manifest import (
    SCHEMA_MINOR,
    SCHEMA_VERSION,
    SIGNATURE_NAME,
    Engine,
    FileEntry,
    Manifest,
    Measurement,
    Stage,
)
from otcache.schemas.manifest_file import read_manifest, seal, write_manifest
from otcache.schemas.messages import one_line
from otcache.schemas.segments import Granularity, coarsened, name_of, segments
from otcache.schemas.whole_files import write_whole

from ..artifact.reader import Artifact
from ..engines.profiles import BATCH, Profile, Range, Triple, input_shapes, profile_for
from ..engines.tensorrt_library import choose_targets, host_platform, library
from .plan import BuildJob, Built
from .segments import OnnxSegment, check_onnx
from .workers import build_all

BUILD_TIME = "build_s/"
"""Measurements of the manifest with this prefix say how long a plan took: build_s/<backend>/<target>/<name>."""
COMBINATIONS = "combinations/"
"""What a combination's name has before it, where stages are named beside it; no stage's name has a slash."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A plan is there."""

    target: str
    name: str
    done: int
    total: int
    reused: bool
    build_s: float


@dataclass(frozen=True, kw_only=True)
class TargetResult:
    """What was built for one target."""

    backend: str
    version: str
    target: str
    folder: str
    plans: int
    reused: int
    """Plans that an earlier build had finished."""
    size_bytes: int
    build_s: float
    """Of the plans built now, one after the other."""


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """A plan that the artifact shall have."""

    name: str
    path: str
    source: Path | OnnxSegment | Combination
    sources: dict[str, tuple[str, ...]]
    """Digests of what it is built from, by stage; by its own name for a combination."""
    shapes: dict[str, Range]


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What stands beside a plan that is finished and that no manifest names yet."""

    sources: dict[str, tuple[str, ...]]
    built: Built


_RECORD = TypeAdapter(_Record)


@dataclass(frozen=True, kw_only=True)
class _Choices:
    backend: str
    version: str
    target: str
    profile: Profile
    workspace_bytes: int | None
    granularity: Granularity

    @property
    def folder(self) -> str:
        key = digest_of_value({**asdict(self), "platform": host_platform()}).removeprefix("sha256:")[:8]
        return f"engines/{self.backend}-{self.version}-{self.target}-{key}"


def build_engines(
    folder: Path,
    *,
    backend: str,
    targets: tuple[str, ...] = (),
    profile: Profile | None = None,
    workspace_bytes: int | None = None,
    granularity: Granularity = "block",
    jobs: int = 1,
    unsign: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[TargetResult, ...]:
    """Build a plan for each stage and combination, for each target, and list them in the manifest.

    backend: `tensorrt` or `tensorrt-rtx`. targets: such as `sm_89`; none takes this host's GPU. granularity: how many
    blocks a plan holds (`otcache.schemas.segments`). jobs: plans built at once. profile: `batch` and axes that shall
    not be as `profile_for` has them, which is up to four samples and every size that the artifact serves. Raises
    ArtifactError, HostError (with the layer that cannot be built), UsageError.
    """
    artifact = Artifact.open(folder)
    trt = library(backend)
    chosen = choose_targets(backend, trt, targets)
    if (folder / SIGNATURE_NAME).exists() and not unsign:
        raise ArtifactError(
            f"{folder} is signed, and the signature would not cover new engines: expected an unsigned artifact: "
            "remove it with --unsign, and sign again with otc sign"
        )
    whole = profile_for(artifact.manifest, profile or {})
    if granularity != "block":
        check_onnx()
    results = []
    for target in chosen:
        choices = _Choices(
            backend=backend,
            version=trt.__version__,
            target=target,
            profile=whole,
            workspace_bytes=workspace_bytes,
            granularity=granularity,
        )
        try:
            results.append(_build_target(artifact, choices, jobs, unsign, progress or (lambda _: None)))
        except OSError as error:
            raise HostError(
                f"{folder}: plans for {target} cannot be written: {one_line(error.strerror or error)}: make room, or copy the "
                "artifact to where it can be written; what is finished is kept"
            ) from None
    return tuple(results)


def check_build(backend: str, targets: tuple[str, ...]) -> None:
    """Raise HostError or UsageError if plans of the backend cannot be built here for the targets."""
    choose_targets(backend, library(backend), targets)


def _build_target(
    artifact: Artifact, choices: _Choices, jobs: int, unsign: bool, progress: Callable[[Progress], None]
) -> TargetResult:
    wanted = {plan.name: plan for plan in _wanted(artifact, choices)}
    done = {name: built for name, plan in wanted.items() if (built := _finished(artifact, choices, plan)) is not None}
    reused, total = len(done), len(wanted)
    for number, (name, built) in enumerate(done.items(), start=1):
        progress(
            Progress(target=choices.target, name=name, done=number, total=total, reused=True, build_s=built.build_s)
        )
    todo = [_job(artifact.folder, choices, plan) for name, plan in wanted.items() if name not in done]

    def finished(job: BuildJob, built: Built) -> None:
        plan = wanted[job.name]
        record = _RECORD.dump_json(_Record(sources=plan.sources, built=built))
        write_whole(_record_path(artifact.folder, plan), record, alone=True)
        done[job.name] = built
        progress(
            Progress(
                target=choices.target, name=job.name, done=len(done), total=total, reused=False, build_s=built.build_s
            )
        )

    build_all(todo, jobs, finished)
    _publish(artifact, choices, wanted, done, unsign=unsign)
    for plan in wanted.values():
        _record_path(artifact.folder, plan).unlink(missing_ok=True)
    if todo:
        todo[0].timing_cache.unlink(missing_ok=True)
    return TargetResult(
        backend=choices.backend,
        version=choices.version,
        target=choices.target,
        folder=choices.folder,
        plans=total,
        reused=reused,
        size_bytes=sum(built.size_bytes for built in done.values()),
        build_s=round(sum(done[job.name].build_s for job in todo), 3),
    )


# --- what to build
# -------------------------------------------------------------------------------------------------------


def _wanted(artifact: Artifact, choices: _Choices) -> list[_Wanted]:
    """Every plan of the artifact; its ONNX files are verified here."""
    manifest = artifact.manifest
    digests = {entry.path: entry.digest for entry in manifest.files}
    held = segments(manifest, choices.granularity)
    members = {name_of(segment): segment for segment in held}
    stages = {stage.name: stage for stage in manifest.stages}
    plans = []
    for stage in coarsened(manifest, held).stages:
        parts = tuple(stages[name] for name in members.get(stage.name, (stage.name,)))
        plans.append(
            _Wanted(
                name=stage.name,
                path=f"{choices.folder}/{stage.name}.plan",
                source=_source(artifact, stage, parts),
                sources={
                    part.name: tuple(digests[path] for path in (part.onnx, *part.external_data)) for part in parts
                },
                shapes=input_shapes(
                    manifest, choices.profile, stage.inputs, _stage_rows(manifest, stage, choices.profile[BATCH])
                ),
            )
        )
    for combination in combinations(manifest):
        rows = choices.profile[BATCH]
        if not combination.counts_samples:
            rows = _times(rows, manifest.guidance.branches)
        plans.append(
            _Wanted(
                name=COMBINATIONS + combination.name,
                path=f"{choices.folder}/{COMBINATIONS}{combination.name}.plan",
                source=combination,
                sources={COMBINATIONS + combination.name: (_digest_of(combination),)},
                shapes=input_shapes(manifest, choices.profile, combination.terms, rows),
            )
        )
    return plans


def _source(artifact: Artifact, stage: Stage, parts: tuple[Stage, ...]) -> Path | OnnxSegment:
    """The verified ONNX files of a stage's parts."""
    paths = tuple(artifact.engine_path(part.onnx).absolute() for part in parts)
    if len(parts) == 1:
        return paths[0]
    return OnnxSegment(parts, paths, tuple(tensor.name for tensor in stage.outputs))


def _stage_rows(manifest: Manifest, stage: Stage, samples: Triple) -> Triple:
    """Rows that a stage gets for so many samples: the text encoder takes every distinct text once."""
    if stage.kind == "decoder":
        return samples
    rows = _times(samples, manifest.guidance.branches)
    return (1, *rows[1:]) if stage.kind == "text_encoder" else rows


def _times(sizes: Triple, factor: int) -> Triple:
    smallest, usual, largest = sizes
    return smallest * factor, usual * factor, largest * factor


def _digest_of(combination: Combination) -> str:
    tensors = [tensor.model_dump(mode="json") for tensor in (*combination.terms, combination.total)]
    facts = (combination.kind, combination.coefs, combination.branches, combination.keep_norm)
    return digest_of_value([list(facts), tensors])


def _job(folder: Path, choices: _Choices, plan: _Wanted) -> BuildJob:
    output = folder.absolute() / plan.path
    output.parent.mkdir(parents=True, exist_ok=True)
    return BuildJob(
        name=plan.name,
        source=plan.source,
        backend=choices.backend,
        target=choices.target,
        shapes=plan.shapes,
        workspace_bytes=choices.workspace_bytes,
        output=output,
        timing_cache=folder.absolute() / choices.folder / ".timing.cache",
    )


# --- what is there already
# -------------------------------------------------------------------------------------------------


def _record_path(folder: Path, plan: _Wanted) -> Path:
    path = folder / plan.path
    return path.with_name(f".{path.name}.json")


def _finished(artifact: Artifact, choices: _Choices, plan: _Wanted) -> Built | None:
    """A plan of the same source that is there whole: listed by the manifest, or left by an interrupted build."""
    return _listed(artifact, choices, plan) or _recorded(artifact.folder, plan)


def _listed(artifact: Artifact, choices: _Choices, plan: _Wanted) -> Built | None:
    manifest = artifact.manifest
    entry = next((entry for entry in manifest.files if entry.path == plan.path), None)
    engine = _engine(manifest, choices)
    if entry is None or engine is None:
        return None
    try:
        artifact.path(plan.path)
    except ArtifactError:
        return None
    name = f"{BUILD_TIME}{choices.backend}/{choices.target}/{plan.name}"
    seconds = [measurement.value for measurement in manifest.measurements if measurement.name == name]
    layers = engine.layers.get(plan.name, {})
    return Built(size_bytes=entry.size_bytes, digest=entry.digest, build_s=sum(seconds[-1:]), layers=layers)


def _recorded(folder: Path, plan: _Wanted) -> Built | None:
    try:
        record = _RECORD.validate_json(_record_path(folder, plan).read_bytes())
        same = record.sources == plan.sources and digest_of_file(folder / plan.path) == record.built.digest
    except (OSError, ValueError):
        return None
    return record.built if same else None


def _engine(manifest: Manifest, choices: _Choices) -> Engine | None:
    """The manifest's entry of the same backend and target."""
    return next((e for e in manifest.engines if (e.backend, e.target) == (choices.backend, choices.target)), None)


# --- the manifest
# --------------------------------------------------------------------------------------------------------


def _publish(
    artifact: Artifact, choices: _Choices, wanted: Mapping[str, _Wanted], done: Mapping[str, Built], *, unsign: bool
) -> None:
    """List the plans in the manifest as it is now, in the place of those of the same backend and target."""
    folder = artifact.folder
    read = read_manifest(folder)
    if read.manifest.stages != artifact.manifest.stages:
        raise ArtifactError(f"{folder}: it has changed while its engines were built: build them again")
    value, old = read.migrated, _engine(read.manifest, choices)
    replaced = set() if old is None else {*old.stages.values(), *old.combinations.values()}
    entries = [
        FileEntry(path=wanted[name].path, size_bytes=built.size_bytes, digest=built.digest)
        for name, built in done.items()
    ]
    prefix = f"{BUILD_TIME}{choices.backend}/{choices.target}/"
    times = [Measurement(name=prefix + name, value=round(built.build_s, 3), unit="s") for name, built in done.items()]
    changed = {
        **value,
        "schema_version": _at_least_ours(value["schema_version"]),
        "engines": [
            *_without(value.get("engines", []), choices),
            _describe(choices, wanted, done).model_dump(mode="json"),
        ],
        "files": sorted(
            [*(entry for entry in value["files"] if entry["path"] not in replaced), *(e.model_dump() for e in entries)],
            key=lambda entry: str(entry["path"]),
        ),
        "measurements": [
            *(entry for entry in value.get("measurements", []) if not entry["name"].startswith(prefix)),
            *(time.model_dump() for time in times),
        ],
    }
    if unsign:
        (folder / SIGNATURE_NAME).unlink(missing_ok=True)
    write_manifest(folder, seal(changed))
    _remove(folder, replaced - {entry.path for entry in entries})


def _describe(choices: _Choices, wanted: Mapping[str, _Wanted], done: Mapping[str, Built]) -> Engine:
    """The manifest's entry of the plans."""
    of_stages = {
        stage: plan for name, plan in wanted.items() if not name.startswith(COMBINATIONS) for stage in plan.sources
    }
    return Engine.model_validate(
        {
            "backend": choices.backend,
            "version": choices.version,
            "target": choices.target,
            "platform": host_platform(),
            "profile": dict(choices.profile),
            "workspace_bytes": choices.workspace_bytes,
            "stages": {stage: plan.path for stage, plan in of_stages.items()},
            "combinations": {
                name.removeprefix(COMBINATIONS): plan.path
                for name, plan in wanted.items()
                if name.startswith(COMBINATIONS)
            },
            "sources": {stage: plan.sources[stage] for stage, plan in of_stages.items()},
            "layers": {name: built.layers for name, built in done.items()},
        }
    )


def _at_least_ours(version: str) -> str:
    """Fields of a newer minor version have a meaning only if the manifest states it."""
    return version if int(version.partition(".")[2]) > SCHEMA_MINOR else SCHEMA_VERSION


def _without(engines: list[dict[str, Any]], choices: _Choices) -> list[dict[str, Any]]:
    same = (choices.backend, choices.target)
    return [entry for entry in engines if (entry["backend"], entry["target"]) != same]


def _remove(folder: Path, paths: set[str]) -> None:
    """Plans that no manifest names any more, and the folders that were theirs alone."""
    for path in paths:
        (folder / path).unlink(missing_ok=True)
    for parent in {(folder / path).parent for path in paths}:
        if not any(parent.rglob("*.plan")):
            with suppress(OSError):
                shutil.rmtree(parent)
