"""Times of a schedule as arguments of a pipeline call, against the schedulers that read them."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest

from otcache.compiler.models.digests import plain_options
from otcache.compiler.programs.call_times import call_times
from otcache.compiler.programs.lower import lower
from otcache.compiler.programs.solver_table import program_from_table
from otcache.schemas.manifest import BudgetProgram, Manifest, Model, Sampler

SCHEDULE = (0, 3, 4, 11, 19)


def manifest_of(pipeline, scheduler, **arguments):
    """A manifest of 20 steps of a scheduler, as far as times need it."""
    scheduler.set_timesteps(20, **arguments) if "sigmas" not in arguments else scheduler.set_timesteps(**arguments)
    table = lower(scheduler)
    return Manifest.model_construct(
        model=Model.model_construct(pipeline=pipeline),
        sampler=Sampler.model_construct(scheduler=type(scheduler).__name__, config=plain_options(scheduler)),
        programs=(BudgetProgram.model_construct(budget="full", program=program_from_table(table)),),
    ), table.timesteps


@pytest.mark.parametrize(
    ("pipeline", "make", "arguments", "name", "added"),
    [
        (
            "FluxPipeline",
            lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            {"sigmas": np.linspace(1.0, 1 / 20, 20), "mu": 0.83},
            "sigmas",
            {"mu": 0.83},
        ),
        ("StableDiffusion3Pipeline", lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), {}, "sigmas", {}),
        ("PixArtSigmaPipeline", lambda: diffusers.DPMSolverMultistepScheduler(), {}, "timesteps", {}),
    ],
)
def test_the_scheduler_has_the_schedules_times(pipeline, make, arguments, name, added):
    manifest, times = manifest_of(pipeline, make(), **arguments)
    found, reason = call_times(manifest, SCHEDULE)
    assert set(found) == {"num_inference_steps", name} and found["num_inference_steps"] == 5 and not reason
    scheduler = make()
    scheduler.set_timesteps(**{name: found[name]}, **added)
    np.testing.assert_allclose(scheduler.timesteps.tolist(), np.asarray(times)[list(SCHEDULE)], atol=1e-3)


def test_a_pipeline_that_takes_no_times_says_so():
    manifest, _ = manifest_of("DiTPipeline", diffusers.DDIMScheduler(clip_sample=False))
    found, reason = call_times(manifest, SCHEDULE)
    assert found == {} and "DiTPipeline takes neither sigmas nor timesteps" in reason
    manifest, _ = manifest_of("NoSuchPipeline", diffusers.DDIMScheduler(clip_sample=False))
    assert call_times(manifest, SCHEDULE) == ({}, "times of DDIMScheduler in NoSuchPipeline are not known")
