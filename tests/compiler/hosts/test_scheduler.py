"""The drop-in scheduler inside diffusers' own pipelines: the compiled sampler's latents, and the runtime's."""

from __future__ import annotations

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from host_cases import CASES, STEPS
from host_manifests import BUDGET

from otcache.compiler.hosts import CalibrationWarning, OTCacheScheduler
from otcache.compiler.pipelines.record import record
from otcache.runtime.loop import loop
from otcache.schemas.errors import ArtifactError, ModelError, RequestError
from otcache.schemas.manifest_file import read_manifest

FLOAT32 = 3e-6
"""Relative: a handful of float32 roundings."""


def distance(found, expected):
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


class Replayed:
    """A model for the runtime's loop that answers with the outputs of a recorded run and keeps what it was given."""

    def __init__(self, outputs):
        self.outputs, self.latents, self.times = iter(outputs), [], []

    def embed(self, x, timestep):
        self.latents.append(x.copy())
        self.times.append(timestep)

    def blocks(self):
        pass

    def head(self):
        return next(self.outputs).numpy()[None]


@pytest.mark.parametrize("name", CASES)
def test_full_budget_is_the_compiled_sampler(prepared, name):
    one = prepared(name)
    pipeline = one.case.make()
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget="full", pipeline=pipeline)
    with record(pipeline, keep_calls=0) as tape:
        one.case(pipeline)
    assert tape.timesteps == one.tape.timesteps
    for found, expected in zip([*tape.samples, *tape.final], [*one.tape.samples, *one.tape.final], strict=True):
        assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_latents_are_the_runtimes(prepared, name):
    """The runtime's loop, given the same model outputs, reads and makes the same latents at every step."""
    one = prepared(name)
    pipeline = one.case.make()
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET, pipeline=pipeline)
    with record(pipeline, keep_calls=0) as tape:
        one.case(pipeline, steps=BUDGET)
    assert len(tape.samples) == BUDGET
    program = read_manifest(one.artifact).manifest.program(BUDGET).program
    model = Replayed(tape.guided)
    final = loop.sample(model, program, tape.samples[0].numpy(), guidance_weights=(1.0,))
    assert distance(final, tape.final[0]) < FLOAT32
    assert model.times == [step.timestep for step in program.steps] and np.allclose(model.times, tape.timesteps)
    scales = [step.input_scale if name != "dit" else 1.0 for step in program.steps]
    for found, expected, scale in zip(model.latents, tape.samples, scales, strict=True):
        assert distance(found, scale * expected) < FLOAT32
    assert distance(tape.final[0], one.tape.final[0]) < 1.0, "three steps are not far from six"


@pytest.mark.parametrize("name", CASES)
def test_the_model_reads_scaled_latents(prepared, name):
    one = prepared(name)
    pipeline = one.case.make()
    seen = []

    def listen(module, args, kwargs):
        seen.append(kwargs.get("hidden_states", args[0] if args else None))

    for scheduler in (None, OTCacheScheduler.from_artifact(one.artifact, budget="full")):
        pipeline.scheduler = scheduler or pipeline.scheduler
        handle = (getattr(pipeline, "transformer", None) or pipeline.unet).register_forward_pre_hook(
            listen, with_kwargs=True
        )
        one.case(pipeline)
        handle.remove()
    for found, expected in zip(seen[len(seen) // 2 :], seen, strict=False):
        assert distance(found, expected) < 1e-5


# --- refusals
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_another_guidance_is_refused_once_the_pipeline_is_known(prepared, name):
    one = prepared(name)
    pipeline = one.case.make()
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET, pipeline=pipeline)
    argument, offset = one.case.guidance_argument, one.case.offset
    seven, four = (rf" \(here called {scale + offset:g}\)" if offset else "" for scale in (7, 4))
    with pytest.raises(
        RequestError,
        match=rf"guidance scale is 7(\.0\d)?{seven}: expected 4{four}, which budget 3 of tiny was calibrated for",
    ):
        one.case(pipeline, steps=BUDGET, **{argument: 7.0 + offset})
    with pytest.raises(RequestError, match=r"(runs without guidance|guidance scale is 1): expected 4"):
        one.case(pipeline, steps=BUDGET, **{argument: 1.0 + offset})
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET, strict=False, pipeline=pipeline)
    with pytest.warns(CalibrationWarning, match="guidance scale is 7"):
        one.case(pipeline, steps=BUDGET, **{argument: 7.0 + offset})


def test_another_number_of_steps_is_refused(prepared):
    one = prepared("sd3")
    pipeline = one.case.make()
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET)
    with pytest.raises(
        RequestError, match=r"num_inference_steps is 6: expected 3, the evaluations of budget 3 of tiny"
    ):
        one.case(pipeline, steps=STEPS)
    expected = one.case(pipeline, steps=BUDGET)
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET, strict=False)
    with pytest.warns(CalibrationWarning, match="num_inference_steps is 6: expected 3"):
        found = one.case(pipeline, steps=STEPS)
    assert torch.equal(found, expected), "the program runs as it is"


def test_another_size_is_refused(prepared):
    one = prepared("sd3")
    pipeline = one.case.make()
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET)
    with pytest.raises(RequestError, match=r"latents are \(1, 4, 4, 8\): expected \(n, 4, 8, 8\), the size that"):
        one.case(pipeline, steps=BUDGET, height=8)


def test_a_start_in_the_middle_is_refused(prepared):
    one = prepared("flux-img2img")
    pipeline = one.case.make()
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget="full")
    with pytest.raises(RequestError, match=r"the request starts at step 3 of 6: expected the first.*use strength = 1"):
        one.case(pipeline, strength=0.5)
    own = one.case.make()
    expected = one.case(own, strength=0.5)
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget="full", strict=False)
    with pytest.warns(CalibrationWarning, match="starts at step 3"):
        found = one.case(pipeline, strength=0.5)
    assert distance(found, expected) < 1e-5, "an Euler step needs no history: the compiled sampler's own result"


def test_outputs_that_a_late_start_lacks_are_replaced_by_the_oldest(prepared):
    scheduler = OTCacheScheduler.from_artifact(prepared("sd3").artifact, budget=BUDGET, strict=False)
    scheduler.set_timesteps(BUDGET)
    with pytest.warns(CalibrationWarning, match="starts at step 1"):
        scheduler.set_begin_index(1)
    x, v = torch.randn(2, 1, 4, 8, 8)
    step = scheduler._recipe.program.steps[1]
    assert len(step.output_coefs) == 2
    found = scheduler.step(v, scheduler.timesteps[1], x).prev_sample
    means = (step.means.latent_coef * x + sum(step.means.output_coefs) * v).mean((-2, -1), keepdim=True)
    assert distance(found, step.latent_coef * x + sum(step.output_coefs) * v + means) < FLOAT32


def test_another_model_is_refused(prepared):
    one = prepared("sd3")
    pipeline = one.case.make()
    scheduler = OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET)
    scheduler.check(pipeline)
    with pytest.raises(
        ModelError, match=r"SD3Transformer2DModel has digest sha256:\w+: expected sha256:\w+, weights and options"
    ):
        scheduler.check(_changed(one.case.make()))
    with pytest.raises(ModelError, match="model is a PixArtTransformer2DModel: expected a SD3Transformer2DModel"):
        other = CASES["pixart-sigma"].make()
        other.scheduler = pipeline.scheduler
        scheduler.check(other)
    pipeline = one.case.make()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    with pytest.raises(
        ModelError, match=r"EulerDiscreteScheduler\(shift=2.0\): expected FlowMatchEulerDiscreteScheduler\(shift=3.0\)"
    ):
        OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET, pipeline=pipeline)
    with pytest.warns(CalibrationWarning, match="scheduler is"):
        OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET, strict=False, pipeline=pipeline)


def _changed(pipeline):
    next(pipeline.transformer.parameters()).view(-1)[0] += 1.0
    return pipeline


def test_precision_is_no_other_model(prepared):
    one = prepared("sd3")
    pipeline = one.case.make().to(torch.bfloat16)
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET, pipeline=pipeline)
    embeds = {key: value.bfloat16() for key, value in one.case.arguments.items() if isinstance(value, torch.Tensor)}
    found = one.case(pipeline, steps=BUDGET, **embeds)
    pipeline = one.case.make()
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET)
    assert found.dtype == torch.bfloat16 and distance(found.float(), one.case(pipeline, steps=BUDGET)) < 0.05


def test_what_the_artifact_does_not_hold_is_refused(prepared, tmp_path):
    artifact = prepared("sd3").artifact
    with pytest.raises(RequestError, match="budget is '5': expected one of 3, full"):
        OTCacheScheduler.from_artifact(artifact, budget=5)
    with pytest.raises(ArtifactError, match="is no artifact: found no manifest"):
        OTCacheScheduler.from_artifact(tmp_path, budget=5)
    value = json.loads((artifact / "manifest.json").read_text())
    value["sampler"]["scheduler"] = "FluxPipeline"
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match=r"found digest .* as it states"):
        OTCacheScheduler.from_artifact(tmp_path, budget=BUDGET)
    recipe = OTCacheScheduler.from_artifact(artifact, budget=BUDGET).config["recipe"]
    with pytest.raises(ArtifactError, match=r"sampler.scheduler is 'FluxPipeline': expected a scheduler of diffusers"):
        OTCacheScheduler(recipe={**recipe, "sampler": value["sampler"]})
    with pytest.raises(ArtifactError, match="its configuration is no recipe"):
        OTCacheScheduler(recipe={})


# --- diffusers' conventions
# ------------------------------------------------------------------------------------------------


def test_saved_and_loaded(prepared, tmp_path):
    one = prepared("sd")
    pipeline = one.case.make()
    scheduler = OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET, strict=False)
    pipeline.scheduler = scheduler
    expected = one.case(pipeline, steps=BUDGET)
    scheduler.save_pretrained(tmp_path)
    loaded = OTCacheScheduler.from_pretrained(tmp_path)
    assert loaded.config["strict"] is False and loaded.config["recipe"] == scheduler.config["recipe"]
    for other in (loaded, OTCacheScheduler.from_config(scheduler.config), copy.deepcopy(scheduler)):
        pipeline.scheduler = other
        assert torch.equal(one.case(pipeline, steps=BUDGET), expected)


def test_a_pipeline_is_saved_and_loaded_with_it(prepared, tmp_path):
    one = prepared("flux")
    pipeline = one.case.make()
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET)
    expected = one.case(pipeline, steps=BUDGET)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is OTCacheScheduler
    assert torch.equal(one.case(loaded, steps=BUDGET), expected)


def test_other_schedulers_are_made_of_its_configuration(prepared):
    scheduler = OTCacheScheduler.from_artifact(prepared("sd3").artifact, budget=BUDGET)
    assert scheduler.config.shift == 3.0 and scheduler.config.get("base_image_seq_len") == 256
    assert FlowMatchEulerDiscreteScheduler.from_config(scheduler.config).config.shift == 3.0
    assert len(scheduler) == 1000 and scheduler.order == 1


@pytest.mark.parametrize("name", ["sd3", "dit", "sd", "pixart-sigma", "wan"])
def test_times_and_noise_levels_are_the_compiled_samplers(prepared, name):
    one = prepared(name)
    source = one.case.make().scheduler
    source.set_timesteps(STEPS)
    scheduler = OTCacheScheduler.from_artifact(one.artifact, budget="full")
    scheduler.set_timesteps(STEPS)
    assert torch.allclose(scheduler.timesteps.double(), source.timesteps.double())
    if source.timesteps.is_floating_point() and name == "sd3":
        assert scheduler.timesteps.dtype == source.timesteps.dtype
    if hasattr(source, "sigmas"):
        assert scheduler.sigmas.shape == source.sigmas.shape
        assert torch.allclose(scheduler.sigmas, source.sigmas, rtol=2e-3, atol=1e-3)
    assert float(scheduler.init_noise_sigma) == pytest.approx(float(source.init_noise_sigma)) if name != "sd3" else True


@pytest.mark.parametrize(("name", "method"), [("dit", "add_noise"), ("sd", "add_noise"), ("pixart-sigma", "add_noise")])
def test_noise_is_added_as_the_compiled_sampler_adds_it(prepared, name, method):
    one = prepared(name)
    source = one.case.make().scheduler
    scheduler = OTCacheScheduler.from_artifact(one.artifact, budget="full")
    picture, noise = torch.randn(2, 2, 4, 8, 8)
    results = []
    for each in (source, scheduler):
        each.set_timesteps(STEPS)
        results.append(getattr(each, method)(picture, noise, each.timesteps[2:3].repeat(2)))
    assert distance(*results) < 1e-5
    assert not hasattr(scheduler, "scale_noise") and not hasattr(source, "scale_noise")


def test_a_request_begins_anew(prepared):
    one = prepared("pixart-sigma")
    pipeline = one.case.make()
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET)
    expected = one.case(pipeline, steps=BUDGET)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        one.case(pipeline, steps=BUDGET, callback=stop, callback_steps=2)
    assert torch.equal(one.case(pipeline, steps=BUDGET), expected)
    with pytest.raises(RequestError, match="has taken all of its 3 steps: call set_timesteps first"):
        pipeline.scheduler.step(expected, 0, expected)


def test_no_warning_on_the_way(prepared):
    one = prepared("sd")
    pipeline = one.case.make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET, pipeline=pipeline)
        one.case(pipeline, steps=BUDGET)
    assert DDIMScheduler.from_config(pipeline.scheduler.config).config.beta_schedule == "scaled_linear"


# --- what hosts do to their models
# -----------------------------------------------------------------------------------------


def run(one, change=lambda pipeline: None, check=True):
    pipeline = one.case.make()
    pipeline.scheduler = OTCacheScheduler.from_artifact(
        one.artifact, budget=BUDGET, pipeline=pipeline if check else None
    )
    change(pipeline)
    return one.case(pipeline, steps=BUDGET)


def test_compiled_models(prepared):
    one = prepared("sd3")
    expected = run(one)

    def compiled(pipeline):
        pipeline.transformer = torch.compile(pipeline.transformer, backend="aot_eager")

    assert distance(run(one, compiled), expected) < 1e-5
    assert distance(run(one, lambda pipeline: pipeline.transformer.compile(backend="aot_eager")), expected) < 1e-5


def test_offloaded_models(prepared):
    one = prepared("flux")
    assert distance(run(one, lambda pipeline: pipeline.enable_model_cpu_offload(device="cpu")), run(one)) < FLOAT32


def lora(pipeline):
    from peft import LoraConfig

    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")


def test_models_with_lora(prepared):
    """It runs as any; as the artifact was calibrated without, `check` says so."""
    one = prepared("sd3")
    found = run(one, lora, check=False)
    assert torch.isfinite(found).all() and distance(found, run(one)) > 1e-3
    pipeline = one.case.make()
    lora(pipeline)
    scheduler = OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET)
    with pytest.raises(ModelError, match="has LoRA style: expected none, as budget 3 of tiny was calibrated without"):
        scheduler.check(pipeline)


def test_controlnet_has_a_say(prepared):
    one = prepared("flux-controlnet")
    pipeline = one.case.make()
    pipeline.scheduler = OTCacheScheduler.from_artifact(one.artifact, budget=BUDGET, pipeline=pipeline)
    with_control = one.case(pipeline, steps=BUDGET)
    without = one.case(pipeline, steps=BUDGET, controlnet_conditioning_scale=0.0)
    assert distance(with_control, without) > 1e-3
