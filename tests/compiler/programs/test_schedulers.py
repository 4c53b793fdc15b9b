"""Every scheduler that diffusers exports, from saved configurations: lowered, run as a program and as the drop-in,
against diffusers' own loop.

`OTC_SCHEDULERS=write pytest tests/compiler/programs/test_schedulers.py` writes the shipped table anew; without it the
table is held to what is found.
"""

from __future__ import annotations

import copy
import inspect
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from otcache.compiler.hosts import OTCacheScheduler
from otcache.compiler.hosts.recipe import Recipe
from otcache.compiler.models.digests import plain_options
from otcache.compiler.programs import schedulers
from otcache.compiler.programs.lower import lower
from otcache.compiler.programs.schedulers import (
    NAME,
    STEPS,
    Row,
    page_with_table,
    rows,
    working_schedulers,
    write_rows,
)
from otcache.compiler.programs.solver_table import SolverTable, program_from_table
from otcache.schemas.errors import ModelError, UsageError
from otcache.schemas.manifest import Guidance, Model, Sampler
from otcache.schemas.program import Program

SHIPPED = Path(schedulers.__file__).parent / NAME
PAGE = SHIPPED.parent / "README.md"
ZEROS = "sha256:" + "0" * 64
CLASSES = sorted(
    name
    for name in dir(diffusers)
    if isinstance(kind := getattr(diffusers, name, None), type)
    and issubclass(kind, diffusers.SchedulerMixin)
    and kind is not diffusers.SchedulerMixin
)
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
VIDEO_DIFFUSION = {
    "timestep_type": "continuous",
    "prediction_type": "v_prediction",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
}
CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    {},
    STABLE_DIFFUSION,
    {**STABLE_DIFFUSION, "skip_prk_steps": True},
    {**STABLE_DIFFUSION, "timestep_spacing": "linspace", "use_karras_sigmas": True},
    {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    {"prediction_type": "sample"},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    VIDEO_DIFFUSION,
    {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    {"shift": 3.0},
    {"shift": 3.0, "shift_terminal": 0.02},
    {"shift": 3.0, "invert_sigmas": True},
    {"solver_order": 1},
    {"solver_order": 3},
    {"solver_type": "heun"},
    {"solver_type": "bh1"},
    {"predict_x0": False, "final_sigmas_type": "sigma_min"},
    {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    {"euler_at_final": True},
    {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    {"sigma_schedule": "exponential"},
    {"prediction_type": "v_prediction", "sigma_data": 1.0},
    {"final_sigmas_type": "sigma_min"},
    {"eta": 0.0},
)
"""Such as are found in public models; a class is tried with those whose options it knows."""
NEEDS: tuple[tuple[dict[str, Any], dict[str, float]], ...] = (
    ({}, {}),
    ({"clip_sample": False}, {}),
    ({}, {"eta": 0.0}),
    ({"eta": 0.0}, {}),
)
"""Options of the configuration and of the step, tried in turn until a class can be lowered with them."""
WEIGHT = torch.randn((16, 16), generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 8


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(latents: torch.Tensor, timestep: float) -> torch.Tensor:
    """A fixed nonlinear stand-in: tanh(W x) · f(t)."""
    return torch.tanh(latents @ WEIGHT.to(latents.dtype)) * (1.0 + 0.5 * np.cos(float(timestep) / 300.0))


def noise() -> torch.Tensor:
    return torch.randn((2, 4, 4, 16), generator=torch.Generator().manual_seed(5))


def sample_by(scheduler: Any, **step_options: float) -> torch.Tensor:
    """A pipeline's loop."""
    latents = noise() * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        output = model(scaled, timestep)
        latents = scheduler.step(output, timestep, latents, return_dict=False, **step_options)[0]
    return latents.double()


def sample_by_program(program: Program, initial_scale: float) -> torch.Tensor:
    latents, outputs = noise().double() * initial_scale, []
    for step in program.steps:
        outputs.append(model(step.input_scale * latents, step.timestep))
        latents = step.latent_coef * latents
        for coef, output in zip(step.output_coefs, outputs[-len(step.output_coefs) :], strict=True):
            latents = latents + coef * output
    return latents


def drop_in(scheduler: Any, table: SolverTable, program: Program) -> OTCacheScheduler:
    names = {"name": "m", "pipeline": "p", "transformer": "t", "config_digest": ZEROS, "weights_digest": ZEROS}
    recipe = Recipe(
        artifact=ZEROS,
        budget="full",
        program=program,
        sampler=Sampler(
            scheduler=type(scheduler).__name__, config=plain_options(scheduler), num_inference_steps=program.nfe
        ),
        model=Model(**names),
        guidance=Guidance(kind="none", scale=1, minimum=1, maximum=1),
        latents_shape=(4, 4, 16),
        initial_scale=table.initial_scale,
        blocks=1,
        features=0,
    )
    return OTCacheScheduler(recipe=recipe.model_dump(mode="json"))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def saved(kind: Any, options: dict[str, Any]) -> Any:
    """A scheduler as it comes back from its folder."""
    with tempfile.TemporaryDirectory() as folder:
        kind(**options).save_config(folder)
        return kind.from_config(kind.load_config(folder))


def prepared(kind: Any, options: dict[str, Any], num_steps: int) -> Any:
    """Ready to sample, or None where diffusers itself takes no such configuration or makes nothing finite of it."""
    try:
        scheduler = saved(kind, options)
        scheduler.set_timesteps(num_steps)
    except (ValueError, NotImplementedError, KeyError, TypeError):
        return None
    return scheduler


def measure(scheduler: Any, step_options: dict[str, float]) -> tuple[int, float, float] | None:
    """Evaluations and the two errors; None where diffusers' own loop does not end, or not in finite latents.

    Raises ModelError where it cannot be lowered.
    """
    try:
        expected = sample_by(copy.deepcopy(scheduler), **step_options)
    except (ValueError, NotImplementedError):
        return None
    if not torch.isfinite(expected).all():
        return None
    table = lower(scheduler, step_options=step_options)
    program = program_from_table(table)
    error = distance(sample_by_program(program, table.initial_scale), expected)
    ours = drop_in(scheduler, table, program)
    ours.set_timesteps(program.nfe)
    ours_again = distance(sample_by(ours), expected)
    if getattr(scheduler, "sigmas", None) is not None and len(scheduler.sigmas) == program.nfe + 1:
        assert torch.allclose(ours.sigmas, torch.as_tensor(scheduler.sigmas).float().cpu(), rtol=1e-6)
    assert torch.allclose(ours.timesteps.double(), scheduler.timesteps.double().cpu(), rtol=1e-6)
    return len(scheduler.timesteps), error, ours_again


def known(kind: Any, options: dict[str, Any]) -> bool:
    return set(options) <= set(inspect.signature(kind.__init__).parameters)


def reason_of(error: Exception) -> str:
    """The part of a refusal that says why."""
    text = str(error)
    return (
        text.partition("cannot be compiled: ")[2].partition("; expected")[0]
        or text.partition(": ")[2].partition(",")[0]
    )


def row_of(name: str) -> Row:
    """What is found of one class."""
    kind, reason = getattr(diffusers, name), "it cannot be made, or prepared, by a number of steps"
    if not hasattr(kind, "step"):
        return Row(scheduler=name, works=False, reason="it has no step")
    for changed, step_options in NEEDS:
        if not known(kind, changed) or not set(step_options) <= set(inspect.signature(kind.step).parameters):
            continue
        scheduler = prepared(kind, changed, STEPS[0])
        if scheduler is None:
            continue
        try:
            lower(scheduler, step_options=step_options)
        except (ModelError, UsageError) as error:
            reason = reason if "its step" in reason else reason_of(error)
            continue
        needs = [f"{key}={value}" for key, value in changed.items()]
        needs += [f"step({key}={value:g})" for key, value in step_options.items()]
        return all_configurations(Row(scheduler=name, works=True, needs=", ".join(needs)), kind, changed, step_options)
    return Row(scheduler=name, works=False, reason=reason)


def all_configurations(row: Row, kind: Any, changed: dict[str, Any], step_options: dict[str, float]) -> Row:
    refused, evaluations = [], []
    for options in CONFIGURATIONS:
        if not known(kind, options):
            continue
        counted = False
        for num_steps in STEPS:
            scheduler = prepared(kind, {**options, **changed}, num_steps)
            if scheduler is None:
                continue
            try:
                measured = measure(scheduler, step_options)
            except ModelError as error:
                refused.append(f"{options}: {reason_of(error)}")
                break
            if measured is None:
                continue
            counted = True
            if not options:
                evaluations.append(measured[0])
            row = replace(row, error=max(row.error, measured[1]), drop_in_error=max(row.drop_in_error, measured[2]))
        row = replace(row, configurations=row.configurations + counted)
    return replace(row, evaluations=tuple(evaluations), reason="; ".join(refused))


@pytest.mark.parametrize("name", CLASSES)
def test_scheduler_is_lowered_or_refused_as_the_table_says(name: str) -> None:
    row = row_of(name)
    assert row.error < 1e-4 and row.drop_in_error < 1e-4
    if os.environ.get("OTC_SCHEDULERS") == "write":
        write_rows([*(other for other in rows() if other.scheduler != name), row], SHIPPED)
        return
    shipped = next(other for other in rows() if other.scheduler == name)
    without = {"error": 0.0, "drop_in_error": 0.0}
    assert asdict(replace(row, **without)) == asdict(replace(shipped, **without))


def test_the_table_has_every_class_and_what_people_use_works() -> None:
    assert {row.scheduler for row in rows()} == set(CLASSES)
    assert {
        "DDIMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
        "EulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    } <= set(working_schedulers())


def test_the_page_shows_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with_table(page, rows())
