"""What `otc compare` asks of a method: scores of its pictures for the same prompts and seeds, and what they cost.

Shapes: n samples of a set, m of a batch, T steps of the full sampler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from otcache.schemas.program import Program

from ..calibration.batch import Batch
from ..calibration.rollout import StagedModel, roll_out
from ..calibration.samples import Rows, Samples
from ..calibration.scoring import scores_from_latents, scores_of
from ..calibration.trials import Calibration
from ..graph.stages import Stages
from ..pipelines.call import CallOptions
from ..pipelines.interface import Interface
from ..programs.solver_table import SolverTable
from ..workspace.workspace import Workspace
from .cells import Group, Range

TUNING_PROMPTS = 8
"""Calibration prompts on which all of a method's settings are tried, and thresholds are searched."""
FINALISTS = 4
"""So many of the best settings are tried on all calibration prompts, as many as the default is calibrated on."""

T = TypeVar("T")


class NotApplicable(Exception):
    """A method cannot run on this model or at this budget; the text says why, and reports show it."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every method is given: the model, its full sampler, a calibration set, held-out prompts with full runs."""

    pipeline: Any
    call: CallOptions
    interface: Interface
    table: SolverTable
    calibration: Calibration
    evaluation: Samples
    """Held-out prompts."""
    prompts: tuple[str, ...]
    """Of `evaluation`, in the order of its samples."""
    seeds: tuple[int, ...]
    calibration_prompts: tuple[str, ...]
    calibration_seeds: tuple[int, ...]
    guidance_scale: float
    workspace: Workspace
    key: list[Any]
    """What everything above depends on, for the workspace."""
    set_timesteps: Callable[[Any, int], None]
    seed: int = 0
    measured: tuple[str, ...] = ()
    """What is measured of pictures beside PSNR and SSIM: cells depend on it, and what methods prepare does not."""
    stages: Stages | None = None
    """Of the cut, where there is one."""
    own: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """The default's own schedules by budget, for libraries that take any (`uses_own`)."""

    @property
    def count(self) -> int:
        """Held-out prompts."""
        return len(self.prompts)

    @property
    def tuning(self) -> slice:
        """The first calibration samples, on which all settings are tried."""
        return slice(min(TUNING_PROMPTS, self.calibration.count))

    def calibrated_psnr_db(self, answer: Callable[[Batch], Rows], rows: slice) -> float:
        """Mean PSNR of what `answer` comes to on some calibration samples."""
        return float(self.calibration.samples.map(answer, rows)["psnr_db"].mean())

    def check_residuals(self) -> None:
        """Raises NotApplicable where the model has no residuals to cache."""
        if not self.calibration.samples.caches_residuals:
            raise NotApplicable("the blocks turn no tensor into one of its shape: there is no residual to reuse")


def choose(bench: Bench, candidates: Sequence[T], score: Callable[[T, slice], float]) -> T:
    """The candidate with the highest score on calibration samples: all are tried on the first, `FINALISTS` on all.

    Args:
        bench: says which samples those are.
        candidates: at least one.
        score: of a candidate on the samples of a slice.
    """
    ranked = sorted(candidates, key=lambda each: -score(each, bench.tuning)) if len(candidates) > 1 else candidates
    everything = slice(bench.calibration.count)
    if len(ranked) == 1 or bench.tuning == everything:
        return ranked[0]
    return max(ranked[:FINALISTS], key=lambda each: score(each, everything))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One method at one budget, on the held-out prompts."""

    scores: Rows
    """`scoring.scores_from_latents`, (n,) each."""
    nfe: np.ndarray
    """Full runs of the blocks for each prompt, float64 (n,)."""
    blocks: np.ndarray
    """The blocks that were run for each prompt, in full runs of all of them, float64 (n,)."""
    setting: str
    """What was chosen for this budget: a schedule, a threshold."""
    seconds: float
    """Wall time of one picture's sampling alone, batch 1: the median of two."""
    full_runs: float = 0.0
    """Model evaluations that preparing this budget took, in full runs per prompt that it used; searches only."""


class Method(Protocol):
    """A way to sample with about `budget` evaluations instead of all."""

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> Group: ...

    @property
    def source(self) -> str:
        """Paper or library."""

    @property
    def adaptive(self) -> bool:
        """Whether evaluations differ between prompts."""

    @property
    def uses_own(self) -> bool:
        """Whether it is given the default's own schedules."""

    @property
    def published(self) -> Range | None:
        """The fewest evaluations that its paper or its release shows; None where that is not known here."""

    def run(self, bench: Bench, budget: int) -> Outcome:
        """Raises NotApplicable."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A method's program at a budget, and how it was come by."""

    program: Program
    setting: str = ""
    """What to show; a schedule by default."""
    full_runs: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ProgramMethod:
    """A method that comes down to coefficients."""

    name: str
    group: Group
    source: str
    build: Callable[[Bench, int], Built]
    """(bench, budget) → program. Raises NotApplicable."""
    model: type[StagedModel] = StagedModel
    """Runs a residual program, if not the usual one."""
    adaptive: bool = False
    uses_own: bool = False
    published: Range | None = None
    """See `Method`."""
    made_of: Mapping[int, Program] = field(default_factory=dict)
    """Programs by budget, of a method that depends on more than the bench."""

    def run(self, bench: Bench, budget: int) -> Outcome:
        """See `Method`."""
        built = self.build(bench, budget)
        program = built.program
        scores = bench.evaluation.map(staged_scores_of(program, self.model))
        singles = [
            bench.evaluation.map(seconds_of(program, self.model), slice(row, row + 1))["seconds"][0]
            for row in range(min(2, bench.count))
        ]
        return Outcome(
            scores=scores,
            nfe=np.full(bench.count, float(program.nfe)),
            blocks=np.full(bench.count, float(program.nfe)),
            setting=built.setting or schedule_text(program.schedule),
            seconds=float(np.median(singles)),
            full_runs=built.full_runs,
        )


def choose_program(bench: Bench, candidates: Sequence[Built], model: type[StagedModel] = StagedModel) -> Built:
    """The program that is best on calibration samples (`choose`)."""

    def score(built: Built, rows: slice) -> float:
        def compute() -> float:
            return bench.calibrated_psnr_db(staged_scores_of(built.program, model), rows)

        key = [bench.key, built.program.model_dump(mode="json"), model.__name__, rows.stop]
        return float(bench.workspace.json("tune", key, compute))

    return choose(bench, candidates, score)


def staged_scores_of(program: Program, model: type[StagedModel]) -> Callable[[Batch], Rows]:
    """Scores of a program on a batch; one of residuals is run by `model`."""
    if program.payload != "residual" or model is StagedModel:
        return scores_of(program)

    def answer(batch: Batch) -> Rows:
        return scores_from_latents(batch, _roll_out(program, batch, model))

    return answer


def seconds_of(program: Program, model: type[StagedModel] = StagedModel) -> Callable[[Batch], Rows]:
    """`seconds` (m,) that sampling with a program takes, all its evaluations made, with the whole batch at once."""

    def answer(batch: Batch) -> Rows:
        start = time.perf_counter()
        _roll_out(program, batch, model).cpu()  # waits for the device
        return {"seconds": np.full(batch.count, time.perf_counter() - start)}

    return answer


def _roll_out(program: Program, batch: Batch, model: type[StagedModel]) -> Any:
    staged = None
    if program.payload == "residual":
        assert batch.evaluator.stages is not None
        staged = model(batch.evaluator.stages, batch.denoiser)
    return roll_out(program, batch.denoiser, batch.latents(0), staged=staged)


def schedule_text(schedule: tuple[int, ...]) -> str:
    """A schedule as reports show it.

    >>> schedule_text((0, 3, 7))
    '0 3 7'
    """
    return " ".join(map(str, schedule))
