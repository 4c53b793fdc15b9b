"""Plans in the manifest: their entry of `engines`, their files, and how long each took to build."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from otcache.schemas.errors import ArtifactError
from otcache.schemas.manifest import (
    SCHEMA_MINOR,
    SCHEMA_VERSION,
    SIGNATURE_NAME,
    Engine,
    FileEntry,
    Manifest,
    Measurement,
)
from otcache.schemas.manifest_file import read_manifest, seal, write_manifest
from otcache.schemas.segments import COMBINATIONS

from ..artifact.reader import Artifact
from ..engines.tensorrt_library import host_platform
from .plan import BuiltPlan
from .specs import Choices, PlanSpec

BUILD_TIME = "build_s/"
"""Measurements of the manifest with this prefix say how long a plan took: build_s/<backend>/<target>/<name>."""


def measurement_name(choices: Choices, plan: str) -> str:
    """What the build time of a plan is called in the manifest."""
    return f"{BUILD_TIME}{choices.backend}/{choices.target}/{plan}"


def engine_of(manifest: Manifest, choices: Choices) -> Engine | None:
    """The manifest's entry of the same backend and target."""
    return next((e for e in manifest.engines if (e.backend, e.target) == (choices.backend, choices.target)), None)


def list_plans(
    artifact: Artifact,
    choices: Choices,
    specs: Mapping[str, PlanSpec],
    built: Mapping[str, BuiltPlan],
    *,
    unsign: bool,
) -> None:
    """List plans in the manifest as it is now, in the place of those of the same backend and target.

    The manifest is then of this version at least, because fields of plans have a meaning only if it states so. Plans
    that it named before and names no more are removed.

    Args:
        artifact: as it was when the build began.
        choices: what the plans were built for.
        specs: every plan, by name.
        built: the same plans, each on the disk.
        unsign: whether to remove the signature, which cannot cover new engines.

    Raises ArtifactError for one that has changed meanwhile, OSError.
    """
    folder = artifact.folder
    read = read_manifest(folder)
    if read.manifest.stages != artifact.manifest.stages:
        raise ArtifactError(f"{folder}: it has changed while its engines were built: build them again")
    value, old = read.migrated, engine_of(read.manifest, choices)
    dropped = set() if old is None else {*old.stages.values(), *old.combinations.values()}
    files = [
        FileEntry(path=specs[name].path, size_bytes=plan.size_bytes, digest=plan.digest).model_dump(mode="json")
        for name, plan in built.items()
    ]
    times = [
        Measurement(name=measurement_name(choices, name), value=round(plan.build_s, 3), unit="s").model_dump()
        for name, plan in built.items()
    ]
    engine = _engine_from_plans(choices, specs, built).model_dump(mode="json")
    same = (choices.backend, choices.target)
    changed = {
        **value,
        "schema_version": _at_least_ours(value["schema_version"]),
        "engines": [*(e for e in value.get("engines", []) if (e["backend"], e["target"]) != same), engine],
        "files": sorted(
            [*(entry for entry in value["files"] if entry["path"] not in dropped), *files],
            key=lambda entry: str(entry["path"]),
        ),
        "measurements": [
            *(e for e in value.get("measurements", []) if not e["name"].startswith(measurement_name(choices, ""))),
            *times,
        ],
    }
    if unsign:
        (folder / SIGNATURE_NAME).unlink(missing_ok=True)
    write_manifest(folder, seal(changed))
    _remove(folder, dropped - {spec.path for spec in specs.values()})


def _engine_from_plans(choices: Choices, specs: Mapping[str, PlanSpec], built: Mapping[str, BuiltPlan]) -> Engine:
    """The manifest's entry of the plans."""
    of_stages = {stage: spec for spec in specs.values() if not spec.is_combination for stage in spec.sources}
    fields: dict[str, Any] = {
        "backend": choices.backend,
        "version": choices.version,
        "target": choices.target,
        "platform": host_platform(),
        "profile": dict(choices.profile),
        "workspace_bytes": choices.workspace_bytes,
        "stages": {stage: spec.path for stage, spec in of_stages.items()},
        "combinations": {
            name.removeprefix(COMBINATIONS): spec.path for name, spec in specs.items() if spec.is_combination
        },
        "sources": {stage: spec.sources[stage] for stage, spec in of_stages.items()},
        "layers": {name: plan.layers for name, plan in built.items()},
    }
    return Engine.model_validate(fields)


def _at_least_ours(version: str) -> str:
    """Fields of a newer minor version have a meaning only if the manifest states it."""
    return version if int(version.partition(".")[2]) > SCHEMA_MINOR else SCHEMA_VERSION


def _remove(folder: Path, paths: set[str]) -> None:
    """Remove plans that no manifest names any more, and the folders that were theirs alone."""
    for path in paths:
        (folder / path).unlink(missing_ok=True)
    for parent in {(folder / path).parent for path in paths}:
        if not any(parent.rglob("*.plan")):
            with suppress(OSError):
                shutil.rmtree(parent)
