"""The linear combinations between the stages of a step, as small engines of their own.

`schemas/README.md`, "Combinations", is their specification.

A backend that keeps latents, residuals and outputs on its device needs an engine for each, because no host is there to
add arrays up. They follow from the manifest alone: which ones there are, and what each reads and writes.

    spread          latents_input ← coefs₀ · x, once for every branch of guidance
    residual_F      r ← result − source of feature F
    forecast_F_M    result of feature F ← source + Σ coefs_m · r_m over M residuals
    guide           v ← Σ coefs_b · output of branch b; with `cfg_norm`, as long as the last branch's
    update_M        x ← coefs₀ · x + Σ coefs_{m+1} · v_m over M outputs
    follow_M        the same with coefs_i + s · coefs_{i+M+1} instead of coefs_i, where s, of each sample, is how far
                    it is from the others in what its last two outputs differ (`Slopes`); centre and spread are the
                    last two coefs
    update_means_M  as update_M, plus the mean over positions of a second such sum, with the next M+1 coefs (`Means`)
    follow_means_M  the same of follow_M: 2 · (M+1) coefs, as many slopes in the same order, centre and spread

Coefficients are an input, `coefs`, so that all steps and budgets share one engine. Terms are called `term_0`, `term_1`,
… from the oldest to the newest after the tensor that the sum is added to; what is written is called `total`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .structure import Structure, TensorInfo

Kind = Literal["spread", "residual", "forecast", "guide", "update", "follow"]
COEFS, TOTAL = "coefs", "total"


@dataclass(frozen=True)
class Combination:
    """A linear combination of tensors. Sums are float32; terms and total have the types that the stages have."""

    name: str
    kind: Kind
    coefs: int
    """How many coefficients it reads; 0 for a residual."""
    terms: tuple[TensorInfo, ...]
    total: TensorInfo
    branches: int
    keep_norm: bool = False
    means: bool = False
    """Whether an update weighs means apart."""

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """`coefs`, if it has any, then the terms."""
        vector = self.total.model_copy(
            update={"name": COEFS, "dtype": "float32", "shape": (self.coefs,), "symbols": ()}
        )
        return (vector, *self.terms) if self.coefs else self.terms

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """What it writes: `total` alone."""
        return (self.total,)

    @property
    def counts_samples(self) -> bool:
        """Whether `batch` of the terms is the number of samples; else it is that of branches times samples."""
        return self.kind in ("spread", "update", "follow")


def combinations(manifest: Structure) -> tuple[Combination, ...]:
    """The combinations that an artifact's programs need, at all its sizes, in the order of a step."""
    tensors = {tensor.name: tensor for stage in manifest.trunk for tensor in (*stage.inputs, *stage.outputs)}
    output, branches = tensors[manifest.output], manifest.guidance.branches
    steps = [step for entry in manifest.all_programs for step in entry.program.steps]
    forecasts = sorted({len(step.residual_coefs) for step in steps if not step.compute})
    updates = sorted({(step.slopes is not None, step.means is not None, len(step.output_coefs)) for step in steps})

    def make(
        name: str, kind: Kind, coefs: int, terms: list[TensorInfo], total: TensorInfo, means: bool = False
    ) -> Combination:
        named = tuple(term.model_copy(update={"name": f"term_{index}"}) for index, term in enumerate(terms))
        keep_norm = kind == "guide" and manifest.guidance.kind == "cfg_norm"
        return Combination(
            name,
            kind,
            coefs,
            named,
            total.model_copy(update={"name": TOTAL}),
            branches,
            keep_norm=keep_norm,
            means=means,
        )

    x = in_float32(output)
    found = [make("spread", "spread", 1, [x], tensors[manifest.latents_input])]
    for index, feature in enumerate(manifest.features if forecasts else ()):
        source, result = tensors[feature.source], tensors[feature.result]
        residual = in_float32(result)
        found.append(make(f"residual_{index}", "residual", 0, [result, source], residual))
        found += [
            make(f"forecast_{index}_{count}", "forecast", count, [source, *[residual] * count], result)
            for count in forecasts
        ]
    found.append(make("guide", "guide", branches, [output], x))
    for followed, means, count in updates:
        kind: Kind = "follow" if followed else "update"
        coefs = (1 + count) * (2 if means else 1)
        coefs = 2 * coefs + 2 if followed else coefs
        found.append(make(update_name(kind, means, count), kind, coefs, [x] * (1 + count), x, means))
    return tuple(found)


def update_name(kind: Kind, means: bool, count: int) -> str:
    """The name of the combination that updates the latents from `count` outputs.

    >>> update_name("follow", True, 3)
    'follow_means_3'
    """
    return f"{kind}_means_{count}" if means else f"{kind}_{count}"


def in_float32(tensor: TensorInfo) -> TensorInfo:
    """The same tensor in float32, in which latents, guided outputs and residuals are kept."""
    return tensor.model_copy(update={"dtype": "float32"})
