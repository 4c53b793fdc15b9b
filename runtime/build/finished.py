"""Plans that are there already: listed by the manifest, or left by a build that was interrupted.

A plan that no manifest names yet has a record beside it, `.<name>.plan.json`, which says what it was built from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from otcache.schemas.digest import digest_of_file
from otcache.schemas.errors import ArtifactError
from otcache.schemas.whole_files import write_whole

from ..artifact.reader import Artifact
from .listing import engine_of, measurement_name
from .plan import BuiltPlan
from .specs import Choices, PlanSpec


@dataclass(frozen=True, kw_only=True)
class Record:
    """What stands beside a plan that is finished and that no manifest names."""

    sources: dict[str, tuple[str, ...]]
    built: BuiltPlan


_JSON = TypeAdapter(Record)


def find_finished(artifact: Artifact, choices: Choices, spec: PlanSpec) -> BuiltPlan | None:
    """A plan of the same source that is there whole, or None."""
    return _find_listed(artifact, choices, spec) or _find_recorded(artifact.folder, spec)


def write_record(folder: Path, spec: PlanSpec, built: BuiltPlan) -> None:
    """Keep a plan that was built for a build that goes on where this one stops. Raises OSError."""
    write_whole(_record_path(folder, spec), _JSON.dump_json(Record(sources=spec.sources, built=built)), alone=True)


def remove_record(folder: Path, spec: PlanSpec) -> None:
    """Forget what stood beside a plan, now that the manifest lists it. Raises OSError."""
    _record_path(folder, spec).unlink(missing_ok=True)


def _record_path(folder: Path, spec: PlanSpec) -> Path:
    path = folder / spec.path
    return path.with_name(f".{path.name}.json")


def _find_listed(artifact: Artifact, choices: Choices, spec: PlanSpec) -> BuiltPlan | None:
    manifest = artifact.manifest
    entry = next((entry for entry in manifest.files if entry.path == spec.path), None)
    engine = engine_of(manifest, choices)
    if entry is None or engine is None:
        return None
    try:
        artifact.path(spec.path)
    except ArtifactError:
        return None
    name = measurement_name(choices, spec.name)
    seconds = [measurement.value for measurement in manifest.measurements if measurement.name == name]
    layers = engine.layers.get(spec.name, {})
    return BuiltPlan(size_bytes=entry.size_bytes, digest=entry.digest, build_s=sum(seconds[-1:]), layers=layers)


def _find_recorded(folder: Path, spec: PlanSpec) -> BuiltPlan | None:
    try:
        record = _JSON.validate_json(_record_path(folder, spec).read_bytes())
        same = record.sources == spec.sources and digest_of_file(folder / spec.path) == record.built.digest
    except (OSError, ValueError):
        return None
    return record.built if same else None
