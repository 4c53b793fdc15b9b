"""Programs of the residual payload: exact where they must be, and their edges against direct sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from otcache.compiler.calibration.batch import Evaluator, batch_from_rows
from otcache.compiler.calibration.rollout import StagedModel, residual_gram, roll_out
from otcache.compiler.calibration.runs import Chunk, Runs, RunWriter
from otcache.compiler.graph.cut import cut
from otcache.compiler.models.load import load_model
from otcache.compiler.pipelines.call import call_options, prepare_scheduler
from otcache.compiler.pipelines.denoiser import denoiser_of
from otcache.compiler.pipelines.full_run import capture, record_full_runs
from otcache.compiler.pipelines.probe import probe
from otcache.compiler.programs.lower import lower
from otcache.compiler.programs.residual import FORECASTS, fit_coefs, residual_edge_errors, residual_program
from otcache.compiler.programs.solver_table import program_from_table
from otcache.compiler.programs.update import apply_step

CALL = {"num_inference_steps": 6, "height": 16, "width": 16, "max_sequence_length": 12}


@pytest.fixture(scope="module")
def staged(tiny_flux_folder):
    model = load_model(str(tiny_flux_folder))
    options = call_options(model.pipeline, **CALL)
    interface = probe(model.pipeline, options, 4.0, model.prompts)
    trajectory = capture(model.pipeline, interface, options, model.prompts[:3], [0, 1, 2], [4.0] * 3)
    prepare_scheduler(model.pipeline, options, model.pipeline.scheduler, 6)
    table = lower(model.pipeline.scheduler)
    denoiser = denoiser_of(model.transformer, interface, trajectory)
    stages = cut(model.transformer, denoiser.inputs(trajectory.latents[3], 500.0, 1.0), constants=interface.constants)
    return trajectory, table, denoiser, stages


@pytest.fixture(scope="module")
def batch(staged, tiny_flux_folder, tmp_path_factory):
    """The same full runs, in files."""
    trajectory, table, denoiser, stages = staged
    model = load_model(str(tiny_flux_folder))
    options = call_options(model.pipeline, **CALL)
    folder = tmp_path_factory.mktemp("runs")
    writer = RunWriter(folder, 3, 6, trajectory.latents.shape[2:])
    scales = [4.0] * 3
    conditioning = record_full_runs(
        model.pipeline, denoiser.interface, options, model.prompts[:3], [0, 1, 2], scales, writer
    )
    writer.finish(conditioning, scales)
    evaluator = Evaluator(
        transformer=denoiser.transformer,
        interface=denoiser.interface,
        device=torch.device("cpu"),
        decode=lambda latents: latents.numpy(),
        table=table,
        stages=stages,
    )
    return batch_from_rows(Runs([Chunk(folder)]), evaluator, slice(0, 3), folder)


def test_full_runs_in_files_are_those_in_memory(staged, batch):
    trajectory = staged[0]
    for index in range(7):
        assert torch.equal(batch.latents(index), trajectory.latents[index])
    assert torch.equal(batch.first_output(), trajectory.outputs[0])
    assert all(torch.equal(batch.denoiser.conditioning[name], each) for name, each in trajectory.conditioning.items())


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


def test_gram_holds_the_blocks_residuals(staged, batch):
    trajectory, table, denoiser, stages = staged
    program = program_from_table(table, payload="residual")
    gram = residual_gram(batch, program, batch.scratch).mean(axis=0)
    assert gram.shape == (6, 6) and np.allclose(gram, gram.T) and np.all(np.linalg.eigvalsh(gram) > -1e-9)
    model = StagedModel(stages, denoiser)
    model(trajectory.latents[4], program.steps[4])
    (residual,) = model.residuals[-1].values()
    assert gram[4, 4] == pytest.approx(float(residual.double().square().mean()), rel=1e-3)


@pytest.mark.parametrize("forecast", FORECASTS)
def test_programs_compute_exactly_their_schedule(staged, batch, forecast):
    trajectory, table, denoiser, stages = staged
    gram = residual_gram(batch, program_from_table(table, payload="residual"), batch.scratch).mean(axis=0)
    program = residual_program(table, (0, 2, 5), forecast, gram)
    assert program.schedule == (0, 2, 5) and program.nfe == 3 and len(program.steps) == 6
    runs: list[str] = []
    hooks = [
        stage.module.register_forward_hook(lambda module, arguments, result, name=stage.name: runs.append(name))
        for stage in stages.stages
    ]
    latents = roll_out(program, denoiser, trajectory.latents[0], stages)
    for hook in hooks:
        hook.remove()
    for stage in stages.stages:
        assert runs.count(stage.name) == (3 if stage.kind == "block" else 6), stage.name
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
