"""`otc build-engines`: an artifact's ONNX files → plans for one backend and some targets, added to its manifest.

Needs neither torch nor the model. Plans are written one by one to where they will be listed, each with a record beside
it, so that an interrupted build goes on where it stopped; the manifest comes last, in one rename, and keeps its other
engines. A folder's name holds a digest of everything that plans depend on beside their source.

Nothing that a signature covers may change under it: a signed artifact is refused unless `unsign` is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from otcache.schemas.errors import ArtifactError, UsageError
from otcache.schemas.manifest import MANIFEST_NAME, SIGNATURE_NAME
from otcache.schemas.messages import one_line
from otcache.schemas.places import check_writable
from otcache.schemas.segments import Granularity

from ..artifact.reader import Artifact
from ..engines.choose import check_engines
from ..engines.profiles import Profile, profile_for
from ..engines.tensorrt_library import choose_targets, library
from .finished import find_finished, remove_record, write_record
from .listing import list_plans
from .plan import BuildJob, BuiltPlan
from .segments import check_onnx
from .specs import Choices, job_from_spec, specs_from_artifact
from .workers import build_all


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
    progress: Callable[[Progress], None] = lambda event: None,
) -> tuple[TargetResult, ...]:
    """Build a plan for each stage and combination, for each target, and list them in the manifest.

    Args:
        folder: the artifact's.
        backend: `tensorrt` or `tensorrt-rtx`.
        targets: compute capabilities such as `sm_89`; none takes this host's GPU.
        profile: `batch` and axes that shall not be as `profile_for` has them, which is up to four samples and every
            size that the artifact serves.
        workspace_bytes: most memory of one layer; None for the library's own limit.
        granularity: how many blocks a plan holds (`otcache.schemas.segments`).
        jobs: plans built at once.
        unsign: whether to remove the signature of a signed artifact, which is refused else.
        progress: called when a plan is there.

    Raises ArtifactError, HostError (with the layer that cannot be built), UsageError.
    """
    artifact = Artifact.open(folder)
    check_engines(artifact.manifest)
    trt = library(backend)
    chosen = choose_targets(backend, trt, targets)
    if (folder / SIGNATURE_NAME).exists() and not unsign:
        raise ArtifactError(
            f"{folder} is signed, and the signature would not cover new engines: expected an unsigned artifact: "
            "remove it with --unsign, and sign again with otc sign"
        )
    check_writable(folder / MANIFEST_NAME, "ARTIFACT")
    whole = profile_for(artifact.manifest, profile or {})
    if granularity != "block":
        check_onnx()
    results = []
    for target in chosen:
        choices = Choices(
            backend=backend,
            version=trt.__version__,
            target=target,
            profile=whole,
            workspace_bytes=workspace_bytes,
            granularity=granularity,
        )
        try:
            results.append(_build_target(artifact, choices, jobs, unsign, progress))
        except OSError as error:
            raise UsageError(
                f"ARTIFACT is {folder}: plans for {target} cannot be written: {one_line(error.strerror or error)}: "
                "make room, or copy it to where it can be written; what is finished is kept"
            ) from None
    return tuple(results)


def check_build(backend: str, targets: tuple[str, ...]) -> None:
    """Raise HostError or UsageError if plans of the backend cannot be built here for the targets."""
    choose_targets(backend, library(backend), targets)


def _build_target(
    artifact: Artifact, choices: Choices, jobs: int, unsign: bool, progress: Callable[[Progress], None]
) -> TargetResult:
    """Build what is missing of one target's plans, and list all of them."""
    specs = specs_from_artifact(artifact, choices)
    done = {name: plan for name, spec in specs.items() if (plan := find_finished(artifact, choices, spec)) is not None}
    reused = len(done)

    def report(name: str, number: int, plan: BuiltPlan) -> None:
        is_reused = number <= reused
        progress(
            Progress(
                target=choices.target,
                name=name,
                done=number,
                total=len(specs),
                reused=is_reused,
                build_s=plan.build_s,
            )
        )

    def keep(job: BuildJob, plan: BuiltPlan) -> None:
        write_record(artifact.folder, specs[job.name], plan)
        done[job.name] = plan
        report(job.name, len(done), plan)

    for number, (name, plan) in enumerate(done.items(), start=1):
        report(name, number, plan)
    todo = [job_from_spec(artifact.folder, choices, spec) for name, spec in specs.items() if name not in done]
    build_all(todo, jobs, keep)
    list_plans(artifact, choices, specs, done, unsign=unsign)
    for spec in specs.values():
        remove_record(artifact.folder, spec)
    if todo:
        todo[0].timing_cache.unlink(missing_ok=True)
    return TargetResult(
        backend=choices.backend,
        version=choices.version,
        target=choices.target,
        folder=choices.folder,
        plans=len(specs),
        reused=reused,
        size_bytes=sum(plan.size_bytes for plan in done.values()),
        build_s=round(sum(done[job.name].build_s for job in todo), 3),
    )
