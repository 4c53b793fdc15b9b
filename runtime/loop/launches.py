"""A program as the flat list of engine launches that it is: stages and combinations, with the values they read and
write.

Consumes a manifest and one of its programs, produces a `Listing`. A value is written once, at one launch of one step,
so that lifetimes can be read off. Names of the loop's own begin with @, which no tensor of a manifest does:

    @x      latents, float32 (samples, …); number k is what step k starts from
    @v      guided outputs, float32 (samples, …), by step
    @rF     residuals of feature F, float32 (branches · samples, …), by step
    @timestep, @coefs   constants, in tables that are uploaded once
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from otcache.schemas.combinations import COEFS, TOTAL, in_float32, update_name
from otcache.schemas.manifest import Manifest, Stage, TensorInfo
from otcache.schemas.program import Program, Step

from .loop import newest


class Value(NamedTuple):
    """A tensor at one moment: name, and the step that writes it (0 for what the request brings)."""

    name: str
    step: int


GUIDANCE = Value("@guidance", 0)
"""The weights of the branches: coefficients that come with the request."""


@dataclass(frozen=True)
class Launch:
    """One run of one engine."""

    step: int
    engine: str
    """Name of a stage, or @ and that of a combination."""
    reads: dict[str, Value]
    """By the engine's own names."""
    writes: dict[str, Value]
    coefs: tuple[float, ...] = ()
    """Of a combination, unless they come with the request."""


@dataclass(frozen=True)
class Listing:
    """All launches of a program, in order."""

    launches: tuple[Launch, ...]
    tensors: dict[Value, TensorInfo]
    """Every value that lies in memory; constants do not."""
    brought: tuple[Value, ...]
    """What the request brings: what stays for all steps, and the first latents at the end."""
    final: Value
    """The final latents."""

    def is_constant(self, value: Value) -> bool:
        return value not in self.tensors

    def counts_samples(self, value: Value) -> bool:
        """Whether the value has a row for each sample, not for each branch of each."""
        return value.name in ("@x", "@v")


def list_launches(manifest: Manifest, program: Program) -> Listing:
    """The program's launches. Residuals that no later step forecasts from are not computed."""
    return _Unroller(manifest, program).listing()


class _Unroller:
    def __init__(self, manifest: Manifest, program: Program) -> None:
        self.manifest, self.program = manifest, program
        self.info = {t.name: t for stage in manifest.trunk for t in (*stage.inputs, *stage.outputs)}
        self.latents = in_float32(self.info[manifest.output])
        self.launches: list[Launch] = []
        self.tensors: dict[Value, TensorInfo] = {}
        self.now: dict[str, Value] = {}
        """The value that a trunk tensor has."""

    def listing(self) -> Listing:
        for tensor in self.manifest.steady_inputs:
            self.now[tensor.name] = self.value(tensor.name, 0, tensor)
        brought = (*self.now.values(), self.value("@x", 0, self.latents))
        forecasts = forecast_steps(self.program)
        needed = {source for sources in forecasts.values() for source in sources}
        for number, step in enumerate(self.program.steps):
            self.embed(number, step.input_scale)
            if step.compute:
                self.stages(number, "block")
                if number in needed:
                    self.residuals(number)
            else:
                self.forecast(number, forecasts[number], step.residual_coefs)
            self.stages(number, "head")
            self.update(number, step)
        return Listing(tuple(self.launches), self.tensors, brought, Value("@x", len(self.program.steps)))

    def embed(self, number: int, scale: float) -> None:
        name = self.manifest.latents_input
        total = self.trunk_value(name, number)
        self.combine(number, "spread", [Value("@x", number)], total, (scale,))
        self.now[self.manifest.timestep_input] = Value("@timestep", number)
        self.stages(number, "embed")

    def stages(self, number: int, kind: str) -> None:
        for stage in self.manifest.trunk:
            if stage.kind == kind:
                self.launch(number, stage)

    def launch(self, number: int, stage: Stage) -> None:
        reads = {tensor.name: self.now[tensor.name] for tensor in stage.inputs}
        writes = {tensor.name: self.trunk_value(tensor.name, number) for tensor in stage.outputs}
        self.launches.append(Launch(number, stage.name, reads, writes))

    def residuals(self, number: int) -> None:
        for index, feature in enumerate(self.manifest.features):
            total = self.value(f"@r{index}", number, in_float32(self.info[feature.result]))
            terms = [self.now[feature.result], self.now[feature.source]]
            self.combine(number, f"residual_{index}", terms, total, ())

    def forecast(self, number: int, sources: Iterable[int], coefs: tuple[float, ...]) -> None:
        for index, feature in enumerate(self.manifest.features):
            terms = [self.now[feature.source], *(Value(f"@r{index}", source) for source in sources)]
            total = self.trunk_value(feature.result, number)
            self.combine(number, f"forecast_{index}_{len(coefs)}", terms, total, coefs)

    def update(self, number: int, step: Step) -> None:
        guided = self.value("@v", number, self.latents)
        self.combine(number, "guide", [self.now[self.manifest.output]], guided, None)
        steps = newest(list(range(number + 1)), len(step.output_coefs))
        terms = [Value("@x", number), *(Value("@v", step) for step in steps)]
        total = self.value("@x", number + 1, self.latents)
        means = step.means
        coefs = [step.latent_coef, *step.output_coefs]
        if means is not None:
            coefs += [means.latent_coef, *means.output_coefs]
        if step.slopes is not None:
            coefs += [step.slopes.latent_coef, *step.slopes.output_coefs]
            if means is not None:
                coefs += [means.latent_slope, *means.output_slopes]
            coefs += [step.slopes.centre, step.slopes.spread]
        name = update_name("update" if step.slopes is None else "follow", means is not None, len(steps))
        self.combine(number, name, terms, total, tuple(coefs))

    def combine(
        self, number: int, name: str, terms: list[Value], total: Value, coefs: tuple[float, ...] | None
    ) -> None:
        """coefs: None for those of the request."""
        reads = {f"term_{index}": term for index, term in enumerate(terms)}
        if coefs is None:
            reads[COEFS] = GUIDANCE
        elif coefs:
            reads[COEFS] = Value("@coefs", len(self.launches))
        self.launches.append(Launch(number, "@" + name, reads, {TOTAL: total}, coefs or ()))

    def trunk_value(self, name: str, number: int) -> Value:
        self.now[name] = self.value(name, number, self.info[name])
        return self.now[name]

    def value(self, name: str, number: int, tensor: TensorInfo) -> Value:
        value = Value(name, number)
        self.tensors[value] = tensor
        return value


def forecast_steps(program: Program) -> dict[int, list[int]]:
    """Step that is not computed → positions of the steps whose residuals it is forecast from, oldest first."""
    computed: list[int] = []
    found: dict[int, list[int]] = {}
    for number, step in enumerate(program.steps):
        if step.compute:
            computed.append(number)
        else:
            found[number] = newest(computed, len(step.residual_coefs))
    return found
