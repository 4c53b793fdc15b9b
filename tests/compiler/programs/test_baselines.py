"""Baselines: each is the sampler that its name says, at the budget that it says."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import schedulers as ds
from hypothesis import given, settings
from hypothesis import strategies as st

from otcache.compiler.programs.baselines import (
    baseline_programs,
    few_step_program,
    flow_shift,
    nearest_step_indices,
    plain_set_timesteps,
    taylor_program,
    uniform_reuse_program,
)
from otcache.compiler.programs.lower import lower
from otcache.compiler.programs.schedule import uniform_schedule
from otcache.compiler.programs.solver_table import SolverTable, program_from_table
from otcache.schemas.errors import UsageError
from otcache.schemas.program import Program

NUM_STEPS = 24
WEIGHT = torch.randn((8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 6
FLUX = ds.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
FLOW = ds.FlowMatchEulerDiscreteScheduler(shift=3.0)
DDIM = ds.DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear")
NAMES = {"euler", "dpm++2m", "unipc", "uniform reuse", "uniform taylor-1"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other on a busy host."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flux_set_timesteps(scheduler: Any, num_steps: int) -> None:
    """As FluxPipeline does."""
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=1.15)


def sigmas_set_timesteps(scheduler: Any, num_steps: int) -> None:
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps))


CASES = {
    "flux": (FLUX, flux_set_timesteps),
    "flow": (FLOW, sigmas_set_timesteps),
    "ddim": (DDIM, plain_set_timesteps),
}


def full_table(scheduler: Any, set_timesteps: Any, num_steps: int = NUM_STEPS) -> SolverTable:
    scheduler = copy.deepcopy(scheduler)
    set_timesteps(scheduler, num_steps)
    return lower(scheduler)


def model(latents: torch.Tensor, timestep: float) -> torch.Tensor:
    return torch.tanh(latents @ WEIGHT.to(latents.dtype)) * (1.0 + 0.5 * np.cos(timestep / 300.0))


def noise() -> torch.Tensor:
    return torch.randn((2, 4, 4, 8), generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def run(program: Program, initial_scale: float = 1.0) -> torch.Tensor:
    latents, outputs = noise() * initial_scale, []
    for step in program.steps:
        outputs.append(model(step.input_scale * latents, step.timestep))
        latents = step.latent_coef * latents
        for coef, output in zip(step.output_coefs, outputs[-len(step.output_coefs) :], strict=True):
            latents = latents + coef * output
    return latents


def run_scheduler(scheduler: Any) -> torch.Tensor:
    scheduler.set_begin_index(0)
    latents = (noise() * getattr(scheduler, "init_noise_sigma", 1.0)).float()
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        latents = scheduler.step(model(scaled, float(timestep)), timestep, latents, return_dict=False)[0]
    return latents.double()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@given(st.integers(1, 300), st.data())
def test_uniform_schedule(num_inference_steps: int, data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, num_inference_steps))
    schedule = uniform_schedule(budget, num_inference_steps)
    assert len(schedule) == budget and schedule[0] == 0 and schedule[-1] < num_inference_steps
    assert all(before < after for before, after in itertools.pairwise(schedule))
    exact = np.arange(budget) * num_inference_steps / budget
    assert np.abs(np.array(schedule) - exact).max() <= 0.5


@pytest.mark.parametrize("budget", [0, 11, -1])
def test_uniform_schedule_refuses_a_budget_out_of_range(budget: int) -> None:
    with pytest.raises(UsageError, match=f"budget {budget}: expected 1 … 10"):
        uniform_schedule(budget, 10)


@pytest.mark.parametrize("case", CASES)
def test_all_names_at_exactly_the_budget(case: str) -> None:
    scheduler, set_timesteps = CASES[case]
    table = full_table(scheduler, set_timesteps)
    for budget in (1, 4, 7):
        programs = baseline_programs(scheduler, table, budget, set_timesteps)
        assert set(programs) == NAMES | ({"ddim"} if case == "ddim" else set())
        for program in programs.values():
            assert program.nfe == len(program.steps) == budget
            assert program.schedule[0] == 0 and program.schedule[-1] < NUM_STEPS
            assert torch.isfinite(run(program, table.initial_scale)).all()


@pytest.mark.parametrize(
    "scheduler",
    [FLOW, DDIM, ds.UniPCMultistepScheduler(), ds.PNDMScheduler(skip_prk_steps=True), ds.HeunDiscreteScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_caches_at_the_full_budget_are_the_full_program(scheduler: Any) -> None:
    table = full_table(scheduler, plain_set_timesteps)
    steps = table.num_inference_steps
    schedule = uniform_schedule(steps, steps)
    full = program_from_table(table)
    assert uniform_reuse_program(table, schedule) == full
    assert taylor_program(table, schedule) == full
    assert taylor_program(table, schedule, order=2) == full
    assert few_step_program(scheduler, steps, timeline=table.timesteps) == full


def test_reuse_is_the_full_sampler_with_held_outputs() -> None:
    scheduler = ds.UniPCMultistepScheduler()
    scheduler.set_timesteps(NUM_STEPS)
    table = lower(scheduler)
    schedule = uniform_schedule(7, NUM_STEPS)
    latents, output = noise().float(), torch.empty(0)
    for step_index, timestep in enumerate(scheduler.timesteps):
        if step_index in schedule:
            output = model(latents, float(timestep))
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    assert relative(run(uniform_reuse_program(table, schedule)), latents.double()) < 1e-4


def test_taylor_is_the_full_sampler_with_finite_differences() -> None:
    scheduler = copy.deepcopy(FLOW)
    sigmas_set_timesteps(scheduler, NUM_STEPS)
    table = lower(scheduler)
    schedule = uniform_schedule(7, NUM_STEPS)
    latents, computed = noise().float(), []
    for step_index, timestep in enumerate(scheduler.timesteps):
        if step_index in schedule:
            computed.append((step_index, model(latents, float(timestep))))
        last, output = computed[-1]
        if len(computed) > 1:
            before, output_before = computed[-2]
            output = output + (step_index - last) / (last - before) * (output - output_before)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    assert relative(run(taylor_program(table, schedule)), latents.double()) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_own_scheduler_with_fewer_steps(case: str) -> None:
    scheduler, set_timesteps = CASES[case]
    table = full_table(scheduler, set_timesteps)
    name = "ddim" if case == "ddim" else "euler"
    program = baseline_programs(scheduler, table, 6, set_timesteps)[name]
    expected = copy.deepcopy(scheduler)
    set_timesteps(expected, 6)
    np.testing.assert_array_equal([step.timestep for step in program.steps], expected.timesteps.double().numpy())
    if case == "ddim":
        expected.set_begin_index = lambda index: None  # it keeps no index
    assert relative(run(program), run_scheduler(expected)) < 1e-4


def test_multistep_solvers_of_a_flow_model() -> None:
    table = full_table(FLOW, sigmas_set_timesteps)
    programs = baseline_programs(FLOW, table, 6, sigmas_set_timesteps)
    solvers = {"dpm++2m": ds.DPMSolverMultistepScheduler, "unipc": ds.UniPCMultistepScheduler}
    for name, solver_class in solvers.items():
        solver = solver_class.from_config(
            FLOW.config, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        )
        solver.set_timesteps(6)
        own_timesteps = solver.timesteps.double()
        solver.timesteps = solver.sigmas[:-1] * 1000.0
        assert relative(run(programs[name]), run_scheduler(solver)) < 1e-4
        timesteps = np.array([step.timestep for step in programs[name].steps])
        np.testing.assert_allclose(timesteps, 1000.0 * solver.sigmas[:-1].double().numpy(), rtol=1e-6)
        difference = timesteps - own_timesteps.numpy()  # diffusers cuts them off to integers
        assert (difference > -1e-3).all() and (difference < 1.0).all()
        assert timesteps[0] == pytest.approx(1000.0, abs=1.0) and timesteps[-1] > 100.0


def test_euler_of_an_epsilon_model_runs_on_the_pipelines_own_noise() -> None:
    table = full_table(DDIM, plain_set_timesteps)
    assert table.initial_scale == 1.0
    solver = ds.EulerDiscreteScheduler.from_config(DDIM.config)
    solver.set_timesteps(6)
    assert float(solver.init_noise_sigma) > 10
    program = baseline_programs(DDIM, table, 6)["euler"]
    assert relative(run(program), run_scheduler(solver)) < 1e-4


def test_solvers_converge_to_the_same_latents() -> None:
    for scheduler, set_timesteps in CASES.values():
        table = full_table(scheduler, set_timesteps, 100)
        expected = run(program_from_table(table), table.initial_scale)
        for name, program in baseline_programs(scheduler, table, 50, set_timesteps).items():
            assert relative(run(program, table.initial_scale), expected) < 0.1, name


def test_flow_shift_is_what_the_pipeline_uses() -> None:
    assert flow_shift(FLOW, 5, sigmas_set_timesteps) == 3.0
    assert flow_shift(FLUX, 5, flux_set_timesteps) == pytest.approx(np.exp(1.15))
    linear = ds.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    assert flow_shift(linear, 5, flux_set_timesteps) == 1.15
    wan = ds.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction")
    assert flow_shift(wan, 5) == 5.0
    s, sigma = np.exp(1.15), 0.4
    scheduler = copy.deepcopy(FLUX)
    scheduler.set_timesteps(sigmas=[1.0, sigma], mu=1.15)
    assert float(scheduler.sigmas[1]) == pytest.approx(s * sigma / (1 + (s - 1) * sigma))


def test_own_multistep_scheduler_is_listed_when_it_differs() -> None:
    wan = ds.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction")
    programs = baseline_programs(wan, full_table(wan, plain_set_timesteps), 6)
    assert set(programs) == NAMES | {"unipc (own)"}
    unipc = ds.UniPCMultistepScheduler()
    assert set(baseline_programs(unipc, full_table(unipc, plain_set_timesteps), 6)) == NAMES


def test_a_solver_that_cannot_be_built_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    mochi = ds.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    programs = baseline_programs(mochi, full_table(mochi, sigmas_set_timesteps), 6, sigmas_set_timesteps)
    assert set(programs) == NAMES - {"dpm++2m", "unipc"}
    assert "baseline unipc at budget 6 is left out" in caplog.text and "invert_sigmas" in caplog.text


@pytest.mark.parametrize(("budget", "nfe"), [(1, 1), (4, 3), (7, 7)])
def test_two_evaluations_a_step_stay_within_the_budget(budget: int, nfe: int) -> None:
    assert few_step_program(ds.HeunDiscreteScheduler(), budget).nfe == nfe


def test_step_indices_count_from_zero_without_a_timeline() -> None:
    assert few_step_program(FLOW, 4, sigmas_set_timesteps).schedule == (0, 1, 2, 3)
    with pytest.raises(UsageError, match="budget 0"):
        few_step_program(FLOW, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(0, 2**16), st.data())
def test_nearest_step_indices_are_optimal(length: int, seed: int, data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, length))
    generator = np.random.default_rng(seed)
    timeline = np.sort(generator.uniform(0, 1000, length))[::-1]
    timesteps = np.sort(generator.uniform(0, 1000, budget))[::-1]
    indices = nearest_step_indices(timesteps, timeline)
    costs = {
        (0, *rest): np.abs(timeline[[0, *rest]] - timesteps).sum()
        for rest in itertools.combinations(range(1, length), budget - 1)
    }
    assert costs[indices] == pytest.approx(min(costs.values()))


def test_nearest_step_indices_refuse_more_steps_than_the_timeline_has() -> None:
    with pytest.raises(UsageError, match="3 evaluations: expected 1 … 2"):
        nearest_step_indices([3, 2, 1], [3, 1])
