"""What a host that keeps torch takes from a manifest: the program of one budget, and what it was calibrated for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from otcache.schemas.errors import RequestError
from otcache.schemas.manifest import Guidance, Manifest, Model, Sampler
from otcache.schemas.manifest_file import read_manifest
from otcache.schemas.program import Coefficient, Frozen, Program
from otcache.schemas.shapes import Axis, AxisName, Symbol, describe_size
from otcache.schemas.sized import manifest_at, own_size


class SizeRecipe(Frozen):
    """One of the sizes that an artifact lists."""

    size: dict[AxisName, int]
    latents_shape: tuple[int, ...]
    program: Program | None = None
    """None where the artifact's holds here as well."""


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
    blocks: int | None
    """None of an artifact of programs alone, whose compile has seen to it that one feature follows the blocks."""
    features: int
    sizes: tuple[SizeRecipe, ...] = ()
    """Where the artifact lists sizes, all of them, its own first."""
    axes: tuple[Axis, ...] = ()
    """Where it serves ranges of sizes, those that the latents' shape follows, through the next."""
    symbols: tuple[Symbol | None, ...] = ()
    """Of each dimension of the latents."""

    def __str__(self) -> str:
        return f"budget {self.budget} of {self.model.name}"

    def program_at(self, size: Mapping[str, Any]) -> Program:
        """The program of the listed size that has these values on its axes, else the artifact's own.

        size: of a request; what it leaves out does not matter, nor do names that are no axes and the length of the
        text,
            which no sampler looks at.
        """
        for entry in self.sizes:
            axes = {name: value for name, value in entry.size.items() if name != "max_sequence_length"}
            if all(size.get(name, value) in (value, None) for name, value in axes.items()):
                return entry.program or self.program
        return self.program

    def takes(self, shape: tuple[int, ...], program: Program) -> bool:
        """Whether one sample's latents of this shape are of a size that the program is for."""
        if self.sizes:
            shapes = [entry.latents_shape for entry in self.sizes if (entry.program or self.program) == program]
            return shape in shapes
        if self.axes and len(shape) == len(self.symbols):
            return self._in_range(shape)
        return len(shape) == len(self.latents_shape) and all(
            isinstance(size, str) or size == given for size, given in zip(self.latents_shape, shape, strict=True)
        )

    def _in_range(self, shape: tuple[int, ...]) -> bool:
        """Whether a request within the axes' ranges has latents of this shape."""
        values = [range(axis.minimum, axis.maximum + 1, axis.step) for axis in self.axes]
        places = list(zip(self.symbols, self.latents_shape, shape, strict=True))
        if any(symbol is None and size != given for symbol, size, given in places):
            return False
        return any(
            all(_has_size(symbol, dict(zip(names, point, strict=True)), given) for symbol, _, given in places if symbol)
            for names in [[axis.name for axis in self.axes]]
            for point in itertools.product(*values)
        )

    @property
    def served(self) -> str:
        """Shapes of latents (n, …) that are served, for messages."""
        shapes = dict.fromkeys([self.latents_shape, *(entry.latents_shape for entry in self.sizes)])
        named = [f"(n, {', '.join(map(str, shape))})" for shape in shapes]
        return " or ".join(named) + (", or another size within its ranges" if self.axes else "")


def recipe_from_artifact(folder: str | Path, budget: int | str) -> Recipe:
    """Read the manifest and nothing else. Raises ArtifactError; RequestError for a budget that it does not hold."""
    return recipe_from_manifest(read_manifest(folder).manifest, budget)


def recipe_from_manifest(manifest: Manifest, budget: int | str) -> Recipe:
    """The recipe of one budget. Raises RequestError when there is none."""
    entry = manifest.program(budget)
    if entry is None:
        raise RequestError(
            f"budget is {str(budget)[:40]!r}: expected one of {', '.join(manifest.budgets)}: choose one, or compile "
            "the artifact for it"
        )
    axes, symbols = _ranges(manifest)
    return Recipe(
        artifact=manifest.digest,
        budget=entry.budget,
        program=entry.program,
        sampler=manifest.sampler,
        model=manifest.model,
        guidance=manifest.guidance,
        latents_shape=manifest.latents.shape,
        initial_scale=manifest.latents.initial_scale,
        blocks=None if manifest.programs_alone else sum(stage.kind == "block" for stage in manifest.stages),
        features=1 if manifest.programs_alone else len(manifest.features),
        sizes=_sizes(manifest, budget),
        axes=axes,
        symbols=symbols,
    )


def _sizes(manifest: Manifest, budget: int | str) -> tuple[SizeRecipe, ...]:
    """The listed sizes that have a program of the budget, the artifact's own first."""
    own, sizes = describe_size(own_size(manifest)), []
    for entry in manifest.shapes.sizes if manifest.shapes else ():
        here = manifest_at(manifest, entry.size)
        program = here.program(budget)
        if program is not None:
            kept = program.program if entry.programs else None
            sizes.append(SizeRecipe(size=dict(entry.size), latents_shape=here.latents.shape, program=kept))
    return tuple(sorted(sizes, key=lambda entry: describe_size(entry.size) != own))


def _ranges(manifest: Manifest) -> tuple[tuple[Axis, ...], tuple[Symbol | None, ...]]:
    """Axes that the latents' shape follows, and of each dimension the symbol; both empty where sizes are listed."""
    shapes, followed = manifest.shapes, manifest.latents.shape_symbols
    if shapes is None or shapes.sizes or not any(followed):
        return (), ()
    known = {symbol.name: symbol for symbol in shapes.symbols}
    symbols = tuple(None if name is None else known[name] for name in followed)
    names = {name for symbol in symbols if symbol for term in symbol.terms for name in term.axes}
    return tuple(axis for axis in shapes.axes if axis.name in names), symbols


def _has_size(symbol: Symbol, request: dict[AxisName, int], size: int) -> bool:
    try:
        return symbol.size(request) == size
    except ValueError:
        return False
