"""The contract that vLLM-Omni holds an injected scheduler to, without the package: it needs a GPU."""

from __future__ import annotations

import copy
import importlib.metadata
import inspect

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from host_manifests import BUDGET

from otcache.compiler.hosts import CalibrationWarning
from otcache.compiler.hosts.omni import OmniScheduler
from otcache.schemas.errors import ModelError, RequestError, UsageError


@pytest.fixture
def model(prepared, tmp_path):
    """A model's folder, as far as the engine reads it here, and its artifact."""
    one = prepared("sd3")
    one.case.make().scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    return tmp_path / "model", one.artifact


def injected(model, **more):
    """As the engine makes it, of `diffusion_scheduler` and `diffusion_scheduler_kwargs`."""
    folder, artifact = model
    (entry,) = importlib.metadata.entry_points(group="vllm_omni.schedulers", name="otcache")
    kwargs = {"artifact": str(artifact), "budget": BUDGET, **more}
    return entry.load().from_pretrained(str(folder), subfolder="scheduler", local_files_only=True, **kwargs)


def denoise(scheduler, latents, output, steps=BUDGET):
    """The engine's loop; `output` stands for the guided model."""
    scheduler.set_timesteps(steps, device="cpu")
    scheduler.set_begin_index(0)
    for time in scheduler.timesteps:
        found = scheduler.step(output(latents, time), time, latents, return_dict=False, generator=torch.Generator())
        latents = found[0]
        yield latents


def final(*arguments, **more):
    return list(denoise(*arguments, **more))[-1]


def field(latents, time):
    return (latents * 0.5 + time / 1000).to(latents.dtype)


@pytest.mark.filterwarnings("error")
def test_signatures(model):
    """The noise levels that flow pipelines pass are their own, as in diffusers."""
    scheduler = injected(model, strict=True)
    assert isinstance(scheduler, OmniScheduler) and isinstance(scheduler.config.num_train_timesteps, int)
    assert {"sigmas", "timesteps", "device"} <= inspect.signature(scheduler.set_timesteps).parameters.keys()
    assert {"return_dict", "generator"} <= inspect.signature(scheduler.step).parameters.keys()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / BUDGET, BUDGET).tolist(), device="cpu")
    assert len(scheduler.timesteps) == BUDGET


def test_two_requests_in_turn_have_copies_of_their_own(model):
    scheduler = injected(model)
    starts = [torch.full((1, 4, 8, 8), value) for value in (1.0, -2.0)]
    alone = [final(copy.deepcopy(scheduler), start, field) for start in starts]
    in_turn = list(zip(*(denoise(copy.deepcopy(scheduler), start, field) for start in starts), strict=True))[-1]
    assert all(torch.equal(found, expected) for found, expected in zip(in_turn, alone, strict=True))
    assert scheduler.step_index is None, "the one that was copied has not moved"


def test_bfloat16_latents_stay_bfloat16(model):
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = final(injected(model), start.bfloat16(), field)
    expected = final(injected(model), start, field)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.02 * expected.norm()


def test_a_warm_up_of_one_step_runs_the_program_with_a_warning(model):
    start = torch.ones(1, 4, 8, 8)
    with pytest.warns(CalibrationWarning, match=f"num_inference_steps is 1: expected {BUDGET}"):
        found = final(injected(model), start, field, steps=1)
    assert torch.equal(found, final(injected(model), start, field))
    with pytest.raises(RequestError, match="num_inference_steps is 1"):
        final(injected(model, strict=True), start, field, steps=1)


def test_what_it_is_not_told_and_other_models_are_refused(model, tmp_path):
    with pytest.raises(UsageError, match=r"artifact is None, budget 3.*diffusion_scheduler_kwargs"):
        injected(model, artifact=None)
    FlowMatchEulerDiscreteScheduler(shift=7.0).save_pretrained(tmp_path / "other" / "scheduler")
    with pytest.raises(ModelError, match=r"other has the scheduler FlowMatchEulerDiscreteScheduler.*differs in shift"):
        injected((tmp_path / "other", model[1]))
