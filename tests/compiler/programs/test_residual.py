"""Programs of the residual payload: exact where they must be, and their edges against direct sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from otcache.compiler.calibration.rollout import StagedModel, roll_out
from otcache.compiler.graph.cut import cut
from otcache.compiler.models.load import load_model
from otcache.compiler.pipelines.call import call_options, prepare_scheduler
from otcache.compiler.pipelines.denoiser import denoiser_of
from otcache.compiler.pipelines.full_run import capture
from otcache.compiler.pipelines.probe import probe
from otcache.compiler.programs.lower import lower
from otcache.compiler.programs.residual import FORECASTS, fit_coefs, residual_edge_errors, residual_program
from otcache.compiler.programs.solver_table import program_from_table
from otcache.compiler.programs.update import apply_step


@pytest.fixture(scope="module")
def staged(tiny_flux_folder):
    model = load_model(str(tiny_flux_folder))
    options = call_options(model.pipeline, num_inference_steps=6, height=16, width=16, max_sequence_length=12)
    interface = probe(model.pipeline, options, 4.0, model.prompts)
    trajectory = capture(model.pipeline, interface, options, model.prompts[:3], [0, 1, 2], [4.0] * 3)
    prepare_scheduler(model.pipeline, options, model.pipeline.scheduler, 6)
    table = lower(model.pipeline.scheduler)
    denoiser = denoiser_of(model.transformer, interface, trajectory)
    stages = cut(model.transformer, denoiser.inputs(trajectory.latents[3], 500.0, 1.0), constants=interface.constants)
    return trajectory, table, denoiser, stages


def test_stages_run_apart_give_the_pipelines_trajectory(staged):
    trajectory, table, denoiser, stages = staged
    for payload in ("output", "residual"):
        latents = roll_out(program_from_table(table, payload=payload), denoiser, trajectory.latents[0], stages)
        assert torch.allclose(latents, trajectory.latents[-1], atol=2e-5)


def test_each_branch_of_guidance_has_a_cache_of_its_own(staged):
    """Both branches in one batch give what two models give, one for each branch, that know nothing of each other."""
    trajectory, table, denoiser, stages = staged
    program = residual_program(table, (0, 2), "reuse", np.eye(6))
    alone = [
        StagedModel(stages, replace(denoiser, interface=replace(denoiser.interface, guided=False), conditioning=own))
        for own in (
            {name: value[branch : branch + 1] for name, value in denoiser.conditioning.items()} for branch in (0, 1)
        )
    ]
    latents, outputs = trajectory.latents[0], []
    with torch.no_grad():
        for step in program.steps:
            negative, positive = (model(latents, step) for model in alone)
            outputs.append(negative + 4.0 * (positive - negative))
            latents = apply_step(step, latents, outputs)
    found = roll_out(program, denoiser, trajectory.latents[0], stages)
    assert torch.allclose(found, latents, atol=2e-5)
    assert all(
        not torch.allclose(one, other) for one, other in zip(*(m.residuals[0].values() for m in alone), strict=True)
    )


def gram_of(staged):
    """Inner products (T, T) of the blocks' residuals along the full run."""
    trajectory, table, denoiser, stages = staged
    model, rows = StagedModel(stages, denoiser), []
    for index, step in enumerate(program_from_table(table, payload="residual").steps):
        model(trajectory.latents[index], step)
        rows.append(torch.cat([residual.flatten() for residual in model.residuals[-1].values()]).double().numpy())
    return np.stack(rows) @ np.stack(rows).T / len(rows[0])


@pytest.mark.parametrize("forecast", FORECASTS)
def test_programs_compute_exactly_their_schedule(staged, forecast):
    trajectory, table, denoiser, stages = staged
    gram = gram_of(staged)
    program = residual_program(table, (0, 2, 5), forecast, gram)
    assert program.schedule == (0, 2, 5) and program.nfe == 3 and len(program.steps) == 6
    latents = roll_out(program, denoiser, trajectory.latents[0], stages)
    assert torch.isfinite(latents).all()
    everything = residual_program(table, range(6), forecast, gram)
    assert everything == program_from_table(table, payload="residual")


def test_fitted_weights_are_the_best_for_what_lies_in_the_span():
    random = np.random.default_rng(0)
    residuals = random.normal(size=(4, 30))
    residuals[3] = 0.5 * residuals[0] + 2.0 * residuals[2]
    coefs = fit_coefs(residuals @ residuals.T / 30, [0, 1, 2], 3)
    assert coefs == pytest.approx([0.5, 0.0, 2.0], abs=1e-2)


def test_edges_sum_the_errors_of_skipped_residuals(staged):
    table = staged[1]
    residuals = np.random.default_rng(1).normal(size=(6, 20))
    errors = residual_edge_errors(table, residuals @ residuals.T)
    expected = sum(table.output_coefs[s, s] ** 2 * np.sum((residuals[s] - residuals[1]) ** 2) for s in (2, 3, 4))
    assert errors[1, 5] == pytest.approx(expected)
    assert errors[2, 3] == 0 and np.isinf(errors[3, 3])
