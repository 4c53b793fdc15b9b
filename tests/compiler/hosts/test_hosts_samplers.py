"""Samplers as hosts bring them: noise levels where images come in, times and noise of the user's own, guidance that
changes on the way.
"""

from __future__ import annotations

import dataclasses
import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from host_cases import CASES, STEPS, normal, stable_diffusion
from host_manifests import BUDGET

from otcache.compiler.hosts import CalibrationWarning, OTCacheScheduler
from otcache.schemas.errors import RequestError


def distance(found, expected):
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


CONTINUOUS = {
    "timestep_type": "continuous",
    "prediction_type": "v_prediction",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
}
SAMPLERS = {
    "euler, continuous": ("EulerDiscreteScheduler", CONTINUOUS),
    "euler, karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "edm euler": ("EDMEulerScheduler", {}),
    "edm dpm": ("EDMDPMSolverMultistepScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "dpm, karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc, not corrected at first": ("UniPCMultistepScheduler", {"disable_corrector": [0, 1]}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddim, betas of its own": (
        "DDIMScheduler",
        {"clip_sample": False, "trained_betas": np.linspace(0.001, 0.02, 1000).tolist()},
    ),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "tcd": ("TCDScheduler", {}),
}


def case_with(name, kind=None):
    """Case `sd` with another scheduler, from its saved configuration, and as another pipeline."""
    scheduler, options = SAMPLERS[name]

    def make():
        pipeline = stable_diffusion()
        if kind is not None:
            pipeline = kind(**pipeline.components, requires_safety_checker=False)
            pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(options)
        return pipeline

    case = dataclasses.replace(CASES["sd"], make=make)
    if kind is None:
        return case
    arguments = {**case.arguments, "image": normal(1, 3, 16, 16).clamp(0, 1), "strength": 1.0}
    if kind is StableDiffusionInpaintPipeline:
        mask = torch.zeros(1, 1, 16, 16)
        mask[..., 8:] = 1.0
        arguments |= {"mask_image": mask}
    else:
        del arguments["height"], arguments["width"]
    return dataclasses.replace(case, arguments=arguments)


@pytest.mark.parametrize("kind", [None, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_is_added_as_the_compiled_sampler_adds_it(prepare_case, name, kind):
    one = prepare_case(case_with(name, kind))
    pipeline = one.case.make()
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget="full", pipeline=pipeline)
    evaluations = len(one.tape.timesteps)
    found = one.case(pipeline, steps=evaluations)
    assert distance(found, one.case(one.case.make())) < 1e-5
    few = OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET)
    full, places = pipeline.scheduler, [step.step_index for step in few._recipe.program.steps]
    assert torch.equal(few.timesteps, full.timesteps[places])
    if few.sigmas is not None:
        assert torch.allclose(few.sigmas[:-1], full.sigmas[places])


# --- times and noise of the user's own
# -----------------------------------------------------------------------------------------


def run_with(one, budget, steps, strict=True, **arguments):
    pipeline = one.case.make()
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget=budget, strict=strict)
    return one.case(pipeline, steps=steps, **arguments)


def test_noise_levels_of_the_users_own_are_refused(prepared):
    one = prepared("flux")
    expected = run_with(one, BUDGET, BUDGET)
    with pytest.raises(
        RequestError, match=r"sigmas is \[0.9, 0.5, 0.2\]: expected none, as budget 3 of tiny has times of its"
    ):
        run_with(one, BUDGET, BUDGET, sigmas=[0.9, 0.5, 0.2])
    with pytest.warns(CalibrationWarning, match="sigmas is"):
        assert torch.equal(run_with(one, BUDGET, BUDGET, strict=False, sigmas=[0.9, 0.5, 0.2]), expected)
    own = np.linspace(1.0, 1.0 / STEPS, STEPS)
    assert torch.equal(run_with(one, "full", STEPS, sigmas=own.tolist()), run_with(one, "full", STEPS)), "the program's"


def test_times_of_the_users_own_are_refused(prepared):
    one = prepared("sd")
    own = one.tape.timesteps
    with pytest.raises(RequestError, match=r"timesteps is \[999, 500, 1\]: expected none.*leave it out"):
        run_with(one, BUDGET, BUDGET, timesteps=[999, 500, 1])
    expected = run_with(one, "full", STEPS)
    assert torch.equal(run_with(one, "full", STEPS, timesteps=own), expected), "those that were compiled"
    scheduler = OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET)
    with pytest.raises(RequestError, match="timesteps is"):
        scheduler.set_timesteps(timesteps=[999, 500, 1])
    with pytest.raises(RequestError, match="sigmas is"):
        scheduler.set_timesteps(sigmas=[9.0, 1.0, 0.1])


def test_noise_by_eta_is_refused_where_the_sampler_knows_it(prepare_case, prepared):
    one = prepare_case(case_with("ddim"))
    with pytest.raises(RequestError, match=r"eta is 0.5: expected 0, as budget 3 of tiny was compiled without noise"):
        run_with(one, BUDGET, BUDGET, eta=0.5)
    euler = prepared("sd")
    assert torch.equal(run_with(euler, BUDGET, BUDGET, eta=0.5), run_with(euler, BUDGET, BUDGET)), "as Euler itself"
    assert "eta" not in inspect.signature(euler.case.make().scheduler.step).parameters


# --- guidance that changes on the way
# -----------------------------------------------------------------------------------------


def cut_off(at):
    """A callback as diffusers' pages show it: without guidance from a step on."""

    def callback(pipeline, step, timestep, values):
        if step == at:
            pipeline._guidance_scale = 0.0
            return {name: value.chunk(2)[1] for name, value in values.items() if name != "latents"}
        return {}

    return {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "pooled_prompt_embeds"],
    }


def rescale(at, scale):
    def callback(pipeline, step, timestep, values):
        if step == at:
            pipeline._guidance_scale = scale
        return {}

    return {"callback_on_step_end": callback}


CHANGES = {
    "cut off": (
        cut_off(0),
        r"runs without guidance at step 1: expected 4 throughout.*let no callback cut guidance off",
    ),
    "rescaled": (rescale(1, 6.0), r"guidance scale is 6 at step 2: expected 4 throughout"),
    "skipped layers": (
        {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.4, "skip_layer_guidance_stop": 0.9},
        r"combines 3 branches at step \d, as with skipped layers or perturbed attention: expected 2",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_guidance_is_looked_at_in_every_step(prepared, name):
    arguments, message = CHANGES[name]
    one = prepared("sd3")
    for strict in (True, False):
        pipeline = one.case.make()
        pipeline.scheduler = OTCacheScheduler.from_artifact(
            one.artifact, budget="full", strict=strict, pipeline=pipeline
        )
        if strict:
            with pytest.raises(RequestError, match=message):
                one.case(pipeline, **arguments)
        else:
            with pytest.warns(CalibrationWarning, match=message) as caught:
                one.case(pipeline, **arguments)
            assert len([each for each in caught if each.category is CalibrationWarning]) == 1


def test_embedded_guidance_that_changes_is_noticed(prepared):
    one = prepared("flux-embedded")
    pipeline = one.case.make()
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget="full", pipeline=pipeline)
    one.case(pipeline)
    seen = []

    def before(module, args, kwargs):
        seen.append(1)
        return args, {**kwargs, "guidance": kwargs["guidance"] * (2.0 if len(seen) > 3 else 1.0)}

    pipeline.transformer.register_forward_pre_hook(before, with_kwargs=True)
    with pytest.raises(RequestError, match="guidance scale is 8 at step 3: expected 4 throughout"):
        one.case(pipeline)


def test_another_pipeline_that_shares_the_transformer_is_not_listened_to(prepared):
    one = prepared("sd3")
    pipeline, other = one.case.make(), one.case.make()
    other.transformer = pipeline.transformer
    expected = one.case(other, guidance_scale=2.0)
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget="full", pipeline=pipeline)

    def callback(running, step, timestep, values):
        if step == 1:
            assert torch.equal(one.case(other, guidance_scale=2.0), expected)
        return {}

    assert distance(one.case(pipeline, callback_on_step_end=callback), one.tape.final[0]) < 1e-5
