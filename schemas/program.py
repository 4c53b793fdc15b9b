"""Schedules and programs: what is decided at compile time and executed at run time."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Payload = Literal["output", "residual", "adaptive", "banded"]
Coefficient = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
MAX_STEPS = 4096
FARTHEST = 2.5
"""How many spreads from the centre of the calibrated samples a sample counts as at most."""
TINY = 1e-30
"""What is divided by, or has its logarithm taken, counts as this if it is less."""


class Frozen(BaseModel):
    """Base of all schema models: immutable, finite numbers only, unknown fields ignored (a newer minor version)."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Slopes(Frozen):
    """How a step's coefficients follow the sample that they are for, in straight lines.

        s = clip((ln(‖v_new − v_old‖ / ‖v_new‖) − centre) / spread, ±FARTHEST)

    says how much the guided output v changed since the step before (norms over all elements of one sample), compared
    with calibration's samples. Coefficients are those of the step plus s times these.
    """

    centre: Coefficient
    spread: Annotated[float, Field(ge=1e-6, le=1e6)]
    latent_coef: Coefficient
    output_coefs: tuple[Coefficient, ...] = Field(min_length=2, max_length=64)
    """As many as the step has."""


def position_axes(rank: int) -> tuple[int, ...]:
    """The axes of latents (n, …) of a rank along which positions lie.

    They are 1 of packed tokens (n, tokens, channels), the last two of (n, …, height, width), and none of a lower rank.

    >>> position_axes(3), position_axes(4), position_axes(5), position_axes(2)
    ((1,), (2, 3), (3, 4), ())
    """
    return () if rank < 3 else (1,) if rank == 3 else (rank - 2, rank - 1)


class Means(Frozen):
    """What a step adds to all positions of a channel alike, so that means and what is around them are weighed apart.

        m(latent_coef · x + Σ output_coefs · v),       m the mean over `position_axes`

    Where the step has slopes, coefficients are these plus s times `latent_slope` and `output_slopes`.
    """

    latent_coef: Coefficient
    output_coefs: tuple[Coefficient, ...] = Field(min_length=1, max_length=64)
    """As many as the step has."""
    latent_slope: Coefficient = 0.0
    """0 where the step has no slopes."""
    output_slopes: tuple[Coefficient, ...] = Field(default=(), max_length=64)
    """As many as the step has where that has slopes, else none."""


class Step(Frozen):
    """One step of a program.

    With x the latents, v the guided model outputs of all steps so far and r the blocks' residuals of all computed
    steps so far (both newest last), a step is

        v_new = model(input_scale · x, timestep)           blocks run if `compute`, else forecast Σ residual_coefs · r
        x     = latent_coef · x + Σ output_coefs · v       the newest output last, v_new included
    """

    step_index: int = Field(ge=0, lt=MAX_STEPS)
    """Index on the timeline of the full sampler, 0-based."""
    timestep: Coefficient
    """Time in the scheduler's own units, before the model's `timestep_scale`."""
    input_scale: Coefficient = 1.0
    compute: bool = True
    """Whether the blocks run."""
    residual_coefs: tuple[Coefficient, ...] = Field(default=(), max_length=16)
    """Forecast of the blocks' residual from the computed ones, newest last; empty at a computed step."""
    latent_coef: Coefficient
    output_coefs: tuple[Coefficient, ...] = Field(max_length=64)
    """Weights of the latest outputs, newest last."""
    slopes: Slopes | None = None
    """Of `latent_coef` and `output_coefs`, in an adaptive or banded program."""
    means: Means | None = None
    """In a banded program."""


class Program(Frozen):
    """A sampler as data: what the runtime executes, and nothing else decides.

    `residual` programs walk every step of the full sampler and skip the blocks at some; the others have computed steps
    only, with everything in between folded into the coefficients. In `adaptive` programs these follow each sample where
    a step has `slopes`; in `banded` ones a step may also weigh `means` apart.
    """

    payload: Payload
    steps: tuple[Step, ...] = Field(min_length=1, max_length=MAX_STEPS, fail_fast=True)

    @model_validator(mode="after")
    def _consistent(self) -> Program:
        computed = 0
        previous = -1
        for position, step in enumerate(self.steps):
            if step.step_index <= previous:
                raise ValueError(f"steps[{position}].step_index is {step.step_index}: expected more than {previous}")
            previous = step.step_index
            computed += step.compute
            if fault := self._fault_of_sums(step, position, computed) or self._fault_of_slopes(step):
                raise ValueError(f"steps[{position}] {fault}")
        if not self.steps[0].compute:
            raise ValueError("steps[0] must be computed")
        return self

    def _fault_of_sums(self, step: Step, position: int, computed: int) -> str | None:
        """What a step weighs that is not there, or the payload does not have; None if nothing is wrong.

        computed: how many steps were, this one among them.
        """
        if step.compute == bool(step.residual_coefs):
            return "must either compute the blocks or forecast their residual"
        if not step.compute and self.payload != "residual":
            return f"is not computed: an {self.payload} program has computed steps only"
        if len(step.residual_coefs) > computed:
            return f"forecasts from more residuals than were computed ({computed})"
        if len(step.output_coefs) > position + 1:
            return f"weighs more outputs than there are ({position + 1})"
        return None

    def _fault_of_slopes(self, step: Step) -> str | None:
        """What slopes and means of a step do not fit to; None if nothing is wrong."""
        slopes, means, count = step.slopes, step.means, len(step.output_coefs)
        if slopes is not None and self.payload not in ("adaptive", "banded"):
            return f"has slopes: only an adaptive or a banded program has, and this one is {self.payload}"
        if means is not None and self.payload != "banded":
            return f"has means: only a banded program has, and this one is {self.payload}"
        if slopes is not None and len(slopes.output_coefs) != count:
            return f"has slopes of {len(slopes.output_coefs)} output_coefs: expected {count}, as many as it weighs"
        if means is None:
            return None
        found, expected = (len(means.output_coefs), len(means.output_slopes)), (count, count if slopes else 0)
        if found != expected:
            return (
                f"has means of {found[0]} output_coefs and {found[1]} output_slopes: expected {expected[0]}, as many "
                f"as it weighs, and {expected[1]}"
            )
        if means.latent_slope and slopes is None:
            return "has means with a latent_slope, and no slopes: expected 0"
        return None

    @property
    def nfe(self) -> int:
        """The number of function evaluations: full runs of the blocks."""
        return sum(step.compute for step in self.steps)

    @property
    def schedule(self) -> tuple[int, ...]:
        """Increasing indices of the computed steps."""
        return tuple(step.step_index for step in self.steps if step.compute)

    @property
    def output_memory(self) -> int:
        """How many outputs have to be kept."""
        return max(len(step.output_coefs) for step in self.steps)

    @property
    def residual_memory(self) -> int:
        """How many residuals have to be kept; 0 for an output program."""
        return max(len(step.residual_coefs) for step in self.steps)
