"""What a host that keeps torch takes from a manifest: the program of one budget, and what it was calibrated for."""

from __future__ import annotations

from pathlib import Path

from otcache.schemas.errors import RequestError
from otcache.schemas.manifest import Guidance, Manifest, Model, Sampler
from otcache.schemas.manifest_file import read_manifest
from otcache.schemas.program import Coefficient, Frozen, Program


class Recipe(Frozen):
    """A program with its conditions; a JSON value of it is a scheduler's configuration."""

    artifact: str
    """Digest of the artifact."""
    budget: str
    program: Program
    sampler: Sampler
    """The scheduler that the program was lowered from."""
    model: Model
    guidance: Guidance
    latents_shape: tuple[int | str, ...]
    """Of one sample, as the scheduler sees them; text stands for a size that may vary."""
    initial_scale: Coefficient
    blocks: int
    features: int

    def __str__(self) -> str:
        return f"budget {self.budget} of {self.model.name}"


def recipe_from_artifact(folder: str | Path, budget: int | str) -> Recipe:
    """Read the manifest and nothing else. Raises ArtifactError; RequestError for a budget that it does not hold."""
    return recipe_from_manifest(read_manifest(folder).manifest, budget)


def recipe_from_manifest(manifest: Manifest, budget: int | str) -> Recipe:
    """The recipe of one budget. Raises RequestError when there is none."""
    entry = manifest.program(budget)
    if entry is None:
        raise RequestError(
            f"budget is {str(budget)[:40]!r}: expected one of {', '.join(manifest.budgets)}: choose one, or compile the "
            "artifact for it"
        )
    return Recipe(
        artifact=manifest.digest,
        budget=entry.budget,
        program=entry.program,
        sampler=manifest.sampler,
        model=manifest.model,
        guidance=manifest.guidance,
        latents_shape=manifest.latents.shape,
        initial_scale=manifest.latents.initial_scale,
        blocks=sum(stage.kind == "block" for stage in manifest.stages),
        features=len(manifest.features),
    )
