"""The solver table against diffusers' own loop, its refusals, and the algebra of jumps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import schedulers as ds
from hypothesis import given, settings
from hypothesis import strategies as st

from otcache.compiler.programs import lower as lower_module
from otcache.compiler.programs.lower import lower
from otcache.compiler.programs.solver_table import (
    SolverTable,
    extrapolated_jump,
    jump,
    program_from_table,
    trim_coefs,
)
from otcache.schemas.errors import ModelError, UsageError
from otcache.schemas.program import Program

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def _dpm(**options: Any) -> Any:
    return ds.DPMSolverMultistepScheduler(**options)


SCHEDULERS: dict[str, Any] = {
    "flow euler": ds.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow heun": ds.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "ddim": ds.DDIMScheduler(clip_sample=False),
    "ddim v zero snr": ds.DDIMScheduler(
        clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "ddim sample": ds.DDIMScheduler(clip_sample=False, prediction_type="sample"),
    "euler": ds.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    "euler karras v": ds.EulerDiscreteScheduler(
        use_karras_sigmas=True, prediction_type="v_prediction", timestep_spacing="trailing"
    ),
    "heun": ds.HeunDiscreteScheduler(),
    "kdpm2": ds.KDPM2DiscreteScheduler(),
    "lms": ds.LMSDiscreteScheduler(),
    "pndm": ds.PNDMScheduler(),
    "plms": ds.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
    "deis": ds.DEISMultistepScheduler(),
    "dpm singlestep": ds.DPMSolverSinglestepScheduler(),
    "dpm++1": _dpm(solver_order=1),
    "dpm++2": _dpm(solver_order=2),
    "dpm++3": _dpm(solver_order=3),
    "dpm++2 v": _dpm(prediction_type="v_prediction"),
    "dpm++2 heun": _dpm(solver_type="heun"),
    "dpm++2 flow": _dpm(**FLOW),
    "dpm++3 flow": _dpm(solver_order=3, **FLOW),
    "dpm1": _dpm(solver_order=1, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    "dpm2": _dpm(solver_order=2, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    "dpm3": _dpm(solver_order=3, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    "unipc": ds.UniPCMultistepScheduler(),
    "unipc3": ds.UniPCMultistepScheduler(solver_order=3),
    "unipc flow": ds.UniPCMultistepScheduler(**FLOW),
    "unipc noise": ds.UniPCMultistepScheduler(predict_x0=False, final_sigmas_type="sigma_min"),
}
WEIGHT = torch.randn((16, 16), generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 8


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other on a busy host."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prepared(name: str, num_steps: int) -> Any:
    scheduler = copy.deepcopy(SCHEDULERS[name])
    scheduler.set_timesteps(num_steps)
    return scheduler


def model(latents: torch.Tensor, timestep: float) -> torch.Tensor:
    """A fixed nonlinear stand-in: tanh(W x) · f(t)."""
    return torch.tanh(latents @ WEIGHT.to(latents.dtype)) * (1.0 + 0.5 * np.cos(timestep / 300.0))


def noise() -> torch.Tensor:
    return torch.randn((2, 4, 4, 16), generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def sample_by_scheduler(scheduler: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A pipeline's loop."""
    scheduler = copy.deepcopy(scheduler)
    latents = (noise() * getattr(scheduler, "init_noise_sigma", 1.0)).to(dtype)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        latents = scheduler.step(model(scaled, float(timestep)), timestep, latents, return_dict=False)[0]
    return latents.double()


def sample_by_program(program: Program, initial_scale: float) -> torch.Tensor:
    """The runtime's loop, for outputs."""
    latents, outputs = noise() * initial_scale, []
    for step in program.steps:
        outputs.append(model(step.input_scale * latents, step.timestep))
        latents = step.latent_coef * latents
        for coef, output in zip(step.output_coefs, outputs[-len(step.output_coefs) :], strict=True):
            latents = latents + coef * output
    return latents


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("num_steps", [1, 5, 22])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_compiled_table_repeats_the_scheduler(name: str, num_steps: int) -> None:
    if num_steps == 1 and name == "pndm":
        num_steps = 4  # diffusers itself needs four steps for its Runge–Kutta warm-up
    scheduler = prepared(name, num_steps)
    table = lower(scheduler)
    program = program_from_table(table)
    assert program.nfe == len(scheduler.timesteps)
    found = sample_by_program(program, table.initial_scale)
    assert torch.isfinite(found).all()
    assert relative(found, sample_by_scheduler(scheduler)) < 1e-4


@pytest.mark.parametrize("name", ["ddim", "dpm++2 flow", "unipc flow"])
def test_float64_loop_agrees_to_the_precision_of_the_schedulers_own_numbers(name: str) -> None:
    scheduler = prepared(name, 20)
    table = lower(scheduler)
    found = sample_by_program(program_from_table(table), table.initial_scale)
    assert relative(found, sample_by_scheduler(scheduler, torch.float64)) < 3e-6


@pytest.mark.parametrize(
    ("name", "memory"), [("flow euler", 1), ("ddim", 1), ("heun", 2), ("dpm2", 2), ("dpm++2 flow", 10), ("unipc", 20)]
)
def test_memory_is_small(name: str, memory: int) -> None:
    assert program_from_table(lower(prepared(name, 50))).output_memory <= memory


@pytest.mark.parametrize("name", ["unipc", "plms", "heun", "lms", "dpm singlestep", "dpm++3 flow"])
def test_a_used_scheduler_lowers_like_a_fresh_one_and_is_left_untouched(name: str) -> None:
    scheduler = prepared(name, 6)
    expected = lower(scheduler)
    latents = noise()
    for timestep in scheduler.timesteps[:3]:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(latents, timestep, latents, return_dict=False)[0]
    before = scheduler.step_index if hasattr(scheduler, "step_index") else scheduler.counter
    found = lower(scheduler)
    np.testing.assert_array_equal(found.latent_coefs, expected.latent_coefs)
    np.testing.assert_array_equal(found.output_coefs, expected.output_coefs)
    assert (scheduler.step_index if hasattr(scheduler, "step_index") else scheduler.counter) == before


def test_flow_euler_in_closed_form() -> None:
    scheduler = ds.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 10, 10), mu=1.1)
    table = lower(scheduler)
    sigmas = scheduler.sigmas.double().numpy()
    np.testing.assert_allclose(table.output_coefs, np.diag(np.diff(sigmas)), rtol=1e-6)
    np.testing.assert_array_equal(table.latent_coefs, 1.0)
    np.testing.assert_array_equal(table.sigmas, sigmas)
    np.testing.assert_allclose(table.timesteps, 1000 * sigmas[:-1], rtol=1e-6)
    assert (table.initial_scale, table.prediction_type, table.order) == (1.0, "flow_prediction", 1)
    with pytest.raises(ValueError, match="read-only"):
        table.timesteps[0] = 0.0


def test_euler_scales_input_and_noise() -> None:
    scheduler = prepared("euler", 7)
    table = lower(scheduler)
    sigmas = scheduler.sigmas.double().numpy()
    np.testing.assert_allclose(table.input_scales, 1 / np.sqrt(sigmas[:-1] ** 2 + 1), rtol=1e-5)
    assert table.initial_scale == pytest.approx(float(scheduler.init_noise_sigma))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (ds.EulerAncestralDiscreteScheduler(), "EulerAncestralDiscreteScheduler.*random noise"),
        (ds.KDPM2AncestralDiscreteScheduler(), "random noise"),
        (ds.LCMScheduler(clip_sample=False), "LCMScheduler.*random noise"),
        (ds.DDPMScheduler(clip_sample=False), "DDPMScheduler.*random noise"),
        (ds.SASolverScheduler(), "SASolverScheduler.*random noise"),
        (ds.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling=True"),
        (_dpm(algorithm_type="sde-dpmsolver++"), "algorithm_type='sde-dpmsolver\\+\\+'.*'dpmsolver\\+\\+'"),
        (_dpm(thresholding=True), "thresholding=True"),
        (ds.UniPCMultistepScheduler(thresholding=True), "thresholding=True"),
        (ds.DDIMScheduler(), "clip_sample=True.*clip_sample=False"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_refusals_name_the_class_the_option_and_what_works(scheduler: Any, message: str) -> None:
    scheduler.set_timesteps(5)
    with pytest.raises(ModelError, match=message) as caught:
        lower(scheduler)
    assert "FlowMatchEulerDiscreteScheduler" in str(caught.value)


def test_noise_by_step_option_is_refused() -> None:
    with pytest.raises(ModelError, match=r"eta=0\.5"):
        lower(prepared("ddim", 5), step_options={"eta": 0.5})
    with pytest.raises(ModelError, match=r"random noise.*s_churn"):
        lower(prepared("euler", 5), step_options={"s_churn": 10.0})
    assert lower(prepared("ddim", 5), step_options={"eta": 0.0}).num_inference_steps == 5


@pytest.mark.parametrize(
    ("scheduler", "option"),
    [(_dpm(thresholding=True), "thresholding"), (ds.DDIMScheduler(), "clip_sample")],
    ids=["thresholding", "clipping"],
)
def test_nonlinear_steps_are_found_by_behaviour(scheduler: Any, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_module, "_refuse_options", lambda *arguments: None)
    scheduler.set_timesteps(5)
    with pytest.raises(ModelError, match=f"differs from the linear table.*{option}=True"):
        lower(scheduler)


def test_options_of_another_class_have_no_effect() -> None:
    scheduler = ds.EulerDiscreteScheduler.from_config(ds.DDIMScheduler(clip_sample=True, thresholding=True).config)
    scheduler.set_timesteps(4)
    assert lower(scheduler).num_inference_steps == 4


@pytest.mark.parametrize("name", ["flow euler", "ddim", "unipc"])
def test_unprepared_scheduler_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="set_timesteps"):
        lower(SCHEDULERS[name])


def test_failing_step_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = prepared("ddim", 4)
    monkeypatch.setattr(type(scheduler), "step", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ModelError, match=r"DDIMScheduler.*ZeroDivisionError"):
        lower(scheduler)


def table_of(num_steps: int, memory: int = 3, seed: int = 0, sigmas: bool = True) -> SolverTable:
    """A made-up table with descending sigmas."""
    generator = np.random.default_rng(seed)
    coefs = np.tril(generator.normal(size=(num_steps, num_steps)))
    coefs = np.triu(coefs, 1 - memory)
    levels = np.append(np.sort(generator.uniform(0.05, 1.0, num_steps))[::-1], 0.0)
    return SolverTable(
        timesteps=1000 * levels[:-1],
        input_scales=np.ones(num_steps),
        initial_scale=1.0,
        latent_coefs=generator.uniform(0.5, 1.1, num_steps),
        output_coefs=coefs,
        sigmas=levels if sigmas else None,
    )


def walk(table: SolverTable, latents: float, outputs: np.ndarray, i: int, j: int) -> float:
    for step_index in range(i, j):
        latents = table.latent_coefs[step_index] * latents + table.output_coefs[step_index] @ outputs
    return latents


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**16), st.data())
def test_jump_is_the_walk_and_composes(num_steps: int, seed: int, data: st.DataObject) -> None:
    table = table_of(num_steps, memory=4, seed=seed)
    i, j, k = sorted(data.draw(st.lists(st.integers(0, num_steps), min_size=3, max_size=3)))
    outputs = np.random.default_rng(seed + 1).normal(size=num_steps)
    latent, coefs = jump(table, i, k)
    assert latent * 0.7 + coefs @ outputs == pytest.approx(walk(table, 0.7, outputs, i, k))
    first, second = jump(table, i, j), jump(table, j, k)
    assert latent == pytest.approx(second[0] * first[0])
    np.testing.assert_allclose(coefs, second[0] * first[1] + second[1], atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2), st.integers(0, 2**16), st.sampled_from(["sigma", "index"]), st.data())
def test_extrapolation_is_exact_on_polynomials(order: int, seed: int, coordinate: Any, data: st.DataObject) -> None:
    num_steps = 10
    table = table_of(num_steps, memory=1, seed=seed)
    computed = sorted({0, *data.draw(st.sets(st.integers(1, 6), min_size=order, max_size=4))})
    position = table.sigmas[:-1] if coordinate == "sigma" else np.arange(num_steps)
    outputs = np.polynomial.Polynomial(np.random.default_rng(seed).normal(size=order + 1))(position)
    latent, coefs = extrapolated_jump(table, computed, num_steps, order, coordinate=coordinate)
    expected = walk(table, 0.3, outputs, computed[-1], num_steps)
    assert latent * 0.3 + coefs @ outputs[computed] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_order_zero_holds_history_as_well() -> None:
    table = table_of(8, memory=8)
    outputs = np.random.default_rng(2).normal(size=8)
    computed = [0, 3, 5]
    held = outputs[[0, 0, 0, 3, 3, 5, 5, 5]]
    latent, coefs = extrapolated_jump(table, computed, 8, 0)
    assert latent + coefs @ outputs[computed] == pytest.approx(walk(table, 1.0, held, 5, 8))


def test_extrapolation_falls_back_to_the_index_without_distinct_sigmas() -> None:
    table = lower(prepared("heun", 5))
    assert table.sigmas is not None and table.sigmas[1] == table.sigmas[2]
    found = extrapolated_jump(table, [0, 1, 2], 5, 1)
    expected = extrapolated_jump(table, [0, 1, 2], 5, 1, coordinate="index")
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("computed", [[], [1, 2], [0, 2, 2], [0, 3, 1], [0, 8]])
def test_bad_schedules_are_refused(computed: list[int]) -> None:
    with pytest.raises(UsageError, match="start at 0, increase strictly and stay below 8"):
        extrapolated_jump(table_of(8), computed, 8, 0)


def test_bad_jumps_are_refused() -> None:
    table = table_of(8)
    with pytest.raises(UsageError, match="jump from step 5 to step 4"):
        jump(table, 5, 4)
    with pytest.raises(UsageError, match="order is -1"):
        extrapolated_jump(table, [0], 8, -1)
    with pytest.raises(UsageError, match="expected an end in"):
        extrapolated_jump(table, [0, 4], 3, 0)


def test_trimmed_keeps_at_least_the_newest() -> None:
    assert trim_coefs([0.0, 0.0]) == (0.0,)
    assert trim_coefs([1e-9, 0.0, 1.0]) == (1.0,)
    assert trim_coefs([1.0, 0.0, 0.0]) == (1.0, 0.0, 0.0)


def test_too_long_a_memory_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="weighs 65 outputs"):
        program_from_table(table_of(65, memory=65))


def test_table_checks_its_arrays() -> None:
    good = {"input_scales": [1.0], "initial_scale": 1.0, "latent_coefs": [1.0], "output_coefs": [[1.0]]}
    with pytest.raises(ModelError, match=r"input_scales has shape \(1,\)"):
        SolverTable(timesteps=[1.0, 0.0], **good)
    with pytest.raises(ModelError, match="not finite"):
        SolverTable(timesteps=[np.inf], **good)
    with pytest.raises(ModelError, match="lower triangular"):
        SolverTable(
            timesteps=[1.0, 0.0],
            input_scales=[1.0, 1.0],
            initial_scale=1.0,
            latent_coefs=[1.0, 1.0],
            output_coefs=[[1.0, 1.0], [0.0, 1.0]],
        )


def test_program_starts_from_latents_of_another_scale() -> None:
    table = lower(prepared("euler", 5))
    expected = sample_by_program(program_from_table(table), table.initial_scale)
    found = sample_by_program(program_from_table(table, initial_scale=1.0), 1.0)
    assert relative(found, expected) < 1e-12
