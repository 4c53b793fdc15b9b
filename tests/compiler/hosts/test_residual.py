"""Residual programs in torch: the runtime's latents, and requests that never see each other's state."""

from __future__ import annotations

import copy
import gc
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from host_cases import CASES, FLUX, flux
from host_manifests import full_run, write_manifest

from otcache.compiler.graph.cut import cut
from otcache.compiler.hosts import OTCacheScheduler, apply_residual_cache, remove_residual_cache
from otcache.compiler.hosts.blocks import block_lists
from otcache.compiler.models.model import transformer_of
from otcache.compiler.pipelines.record import record
from otcache.compiler.programs.residual import residual_program
from otcache.compiler.programs.update import apply_step
from otcache.runtime import Sampler
from otcache.schemas.errors import ModelError, RequestError, UsageError
from otcache.schemas.manifest_file import read_manifest

GOLDEN = Path(__file__).parents[2] / "golden" / "1.2" / "artifact"
"""Compiled from `cases.flux`; its numbered budgets are residual programs of six steps."""
BUDGETS = ("2", "3")
STEPS = 6


def distance(found, expected):
    return float(np.linalg.norm(np.asarray(found) - np.asarray(expected)) / np.linalg.norm(np.asarray(expected)))


def draw(pipeline, prompt="a red ring", seed=0, **changed):
    arguments = {**FLUX, "prompt": prompt, "true_cfg_scale": 4.0, "output_type": "latent", **changed}
    generator = torch.Generator().manual_seed(seed)
    return pipeline(num_inference_steps=STEPS, generator=generator, **arguments)[0]


def components(pipeline, scheduler):
    """Those of a pipeline with another scheduler, and tokenizers of its own: transformers' set their padding at every
    call, so that threads that share one pad each other's prompts.
    """
    own = {name: copy.deepcopy(pipeline.components[name]) for name in ("tokenizer", "tokenizer_2")}
    return {**pipeline.components, **own, "scheduler": scheduler}


def sharing(pipeline):
    """Another pipeline with the same components and a scheduler of its own."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    other = FluxPipeline(**components(pipeline, scheduler))
    other.set_progress_bar_config(disable=True)
    return other


@pytest.fixture
def pipelines():
    """Two pipelines that share everything but the scheduler, one for each budget."""
    first = flux()
    second = sharing(first)
    for pipeline, budget in zip((first, second), BUDGETS, strict=True):
        apply_residual_cache(pipeline, GOLDEN, budget)
    return first, second


@pytest.fixture(scope="module")
def expected():
    """Latents of budget, prompt and seed from the runtime."""
    with Sampler.load(GOLDEN, threads=1) as sampler:
        assert {sampler.manifest.program(budget).program.payload for budget in BUDGETS} == {"residual"}

        def of(budget, prompt="a red ring", seed=0):
            return sampler.sample(sampler.encode([prompt]), budget=budget, seed=seed)

        yield of


def test_latents_are_the_runtimes(pipelines, expected):
    for pipeline, budget in zip(pipelines, BUDGETS, strict=True):
        for prompt, seed in (("a red ring", 0), ("a blue star", 1)):
            assert distance(draw(pipeline, prompt, seed), expected(budget, prompt, seed)) < 3e-6
    assert distance(expected("2"), expected("3")) > 1e-3


def test_blocks_run_at_computed_steps_only(pipelines):
    runs = []
    blocks = [block for blocks in block_lists(pipelines[0].transformer) for block in blocks]
    for block in blocks:
        own = block.norm if hasattr(block, "norm") else block.norm1
        own.register_forward_hook(lambda *_: runs.append(1))
    draw(pipelines[0])
    assert len(runs) == 2 * 2 * len(blocks), "two computed steps of two branches"


# --- one request's state is its own
# ----------------------------------------------------------------------------------------


def test_consecutive_calls(pipelines, expected):
    first, second = pipelines
    for pipeline, budget, prompt in (
        (first, "2", "a red ring"),
        (second, "3", "a blue star"),
        (first, "2", "a blue star"),
    ):
        assert distance(draw(pipeline, prompt), expected(budget, prompt)) < 3e-6


def test_a_call_after_one_that_failed(pipelines, expected):
    first, second = pipelines
    plain = draw(flux())

    def fail(pipeline, step, time, tensors):
        if step == 3:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        draw(first, "a blue star", callback_on_step_end=fail)
    assert torch.equal(draw(sharing(flux_of(second))), plain), "a pipeline without a program runs as ever"
    assert distance(draw(second), expected("3")) < 3e-6
    assert distance(draw(first), expected("2")) < 3e-6


def flux_of(pipeline):
    """The pipeline as it was before `apply_residual_cache`, with the same transformer."""
    other = FluxPipeline(**components(pipeline, pipeline.scheduler.replaced))
    other.set_progress_bar_config(disable=True)
    return other


def test_two_threads_in_lockstep(pipelines, expected):
    """Two pipelines on one transformer, step by step in turn; a third without a program beside them."""
    plain = draw(flux())
    third = flux_of(pipelines[0])
    barrier = threading.Barrier(3, timeout=60)
    found = {}

    def meet(pipeline, step, time, tensors):
        barrier.wait()
        return {}

    def work(name, pipeline, prompt):
        with torch.no_grad():
            found[name] = draw(pipeline, prompt, callback_on_step_end=meet)

    jobs = [("2", pipelines[0], "a red ring"), ("3", pipelines[1], "a blue star"), ("plain", third, "a red ring")]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert distance(found["2"], expected("2", "a red ring")) < 3e-6
    assert distance(found["3"], expected("3", "a blue star")) < 3e-6
    assert distance(found["plain"], plain) < 3e-6


def test_a_call_within_a_call(pipelines, expected):
    first, second = pipelines
    within = []

    def nested(pipeline, step, time, tensors):
        if step in (1, 3):
            within.append((draw(second, "a blue star"), draw(flux_of(second))))
        return {}

    assert distance(draw(first, callback_on_step_end=nested), expected("2")) < 3e-6
    plain = draw(flux())
    for inner, unhooked in within:
        assert distance(inner, expected("3", "a blue star")) < 3e-6 and distance(unhooked, plain) < 3e-6
    assert len(within) == 2


def test_a_call_that_failed_within_a_call(pipelines, expected):
    """Both would go on at the same step."""
    first, second = pipelines

    def fail(pipeline, step, time, tensors):
        if step == 1:
            raise KeyboardInterrupt
        return {}

    def nested(pipeline, step, time, tensors):
        if step == 1:
            with pytest.raises(KeyboardInterrupt):
                draw(second, "a blue star", callback_on_step_end=fail)
        return {}

    assert distance(draw(first, callback_on_step_end=nested), expected("2")) < 3e-6
    assert distance(draw(second), expected("3")) < 3e-6


def test_hooks_go_with_their_last_user(pipelines, expected):
    first, second = pipelines
    first.enable_model_cpu_offload(device="cpu")
    remove_residual_cache(first)
    assert distance(draw(second), expected("3")) < 3e-6
    remove_residual_cache(second)
    assert not any(
        module._diffusers_hook.hooks for module in first.transformer.modules() if hasattr(module, "_diffusers_hook")
    )
    assert distance(draw(first), draw(flux())) < 3e-6


def test_nothing_is_kept_after_a_call(pipelines):
    first, _ = pipelines
    draw(first)
    gc.collect()
    live = [one for one in gc.get_objects() if type(one).__name__ in ("Request", "Branch")]
    assert not live


# --- other models, other hosts
# ---------------------------------------------------------------------------------------------


def residual_artifact(folder, case, forecast="taylor-1", schedule=(0, 2, 3)):
    pipeline = case.make()
    tape, table = full_run(case, pipeline)
    program = residual_program(table, schedule, forecast, np.empty(0))
    return write_manifest(folder / "artifact", case, pipeline, tape, table, {str(program.nfe): program})


def test_branches_in_one_batch_as_the_cut_stages_do_it(tmp_path):
    """SD3, whose branches come in one call: against the stages that `cut` makes of the same transformer."""
    case = CASES["sd3"]
    artifact = residual_artifact(tmp_path, case)
    pipeline = case.make()
    with record(pipeline) as tape:
        case(pipeline)
    call = {name: value for name, value in tape.calls[0][0].items() if value is not None}
    tensors = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    constants = {name: value for name, value in call.items() if name not in tensors}
    stages = cut(pipeline.transformer, tensors, constants=constants)
    ((source, result),) = stages.features
    latents, outputs, residuals = tape.samples[0], [], []
    program = read_manifest(artifact).manifest.programs[0].program
    for step in program.steps:
        values = {**tensors, "hidden_states": latents.repeat(2, 1, 1, 1), "timestep": torch.full((2,), step.timestep)}
        for stage in stages.stages:
            if stage.kind == "block" and not step.compute:
                continue
            if stage.kind == "head" and step.compute:
                residuals.append(values[result] - values[source])
            elif stage.kind == "head":
                recent = residuals[-len(step.residual_coefs) :]
                values[result] = values[source] + sum(c * r for c, r in zip(step.residual_coefs, recent, strict=True))
            values.update(stage.run(values))
        negative, positive = values[stages.output].chunk(2)
        outputs.append(negative + case.guidance * (positive - negative))
        latents = apply_step(step, latents, outputs)
    apply_residual_cache(pipeline, artifact, 3)
    assert distance(case(pipeline), latents) < 3e-6
    assert distance(tape.final[0], latents) > 1e-4


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma", "qwen-image", "wan", "flux-controlnet"])
def test_all_steps_computed_is_the_pipeline_itself(name, tmp_path):
    case = CASES[name]
    expected = case(case.make())
    artifact = residual_artifact(tmp_path, case, schedule=range(STEPS))
    pipeline = case.make()
    apply_residual_cache(pipeline, artifact, STEPS)
    assert distance(case(pipeline), expected) < 1e-5
    artifact = residual_artifact(tmp_path / "few", case)
    apply_residual_cache(pipeline, artifact, 3)
    assert 1e-6 < distance(case(pipeline), expected) < 0.5
    remove_residual_cache(pipeline)
    assert distance(case(pipeline), expected) < 1e-5


def test_a_controlnets_samples_are_added_once(tmp_path):
    """What it adds between blocks is in the residual: after the last block the hidden states are source + residual."""
    case = CASES["flux-controlnet"]
    artifact = residual_artifact(tmp_path, case, forecast="reuse", schedule=(0,))
    pipeline = case.make()
    seen = []
    pipeline.transformer.x_embedder.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    last_block = pipeline.transformer.single_transformer_blocks[-1]
    last_block.register_forward_hook(lambda module, args, output: seen.append(output[1].clone()))
    apply_residual_cache(pipeline, artifact, 1)
    case(pipeline)
    embedded, last = seen[0::2], seen[1::2]  # of two branches in turn, at six steps
    for branch in (0, 1):
        residuals = [after - before for before, after in zip(embedded[branch::2], last[branch::2], strict=True)]
        assert len(residuals) == STEPS and all(distance(found, residuals[0]) < 1e-5 for found in residuals)


def test_compiled_models(expected):
    pipeline = flux()
    pipeline.transformer = torch.compile(pipeline.transformer, backend="aot_eager")
    apply_residual_cache(pipeline, GOLDEN, "2")
    for _ in range(2):
        assert distance(draw(pipeline), expected("2")) < 1e-5


def test_offloaded_models(expected):
    for before in (True, False):
        pipeline = flux()
        if before:
            pipeline.enable_model_cpu_offload(device="cpu")
        apply_residual_cache(pipeline, GOLDEN, "2")
        if not before:
            pipeline.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert distance(draw(pipeline), expected("2")) < 3e-6


def test_what_cannot_be_is_refused(tmp_path):
    pipeline = flux()
    with pytest.raises(RequestError, match="budget full of tiny has payload 'output': expected 'residual' here"):
        apply_residual_cache(pipeline, GOLDEN, "full")
    with pytest.raises(
        RequestError, match="budget 2 of tiny has payload 'residual': expected 'output' or 'adaptive' or 'banded' here"
    ):
        OTCacheScheduler.from_artifact(GOLDEN, "2")
    with pytest.raises(
        UsageError, match="scheduler is a FlowMatchEulerDiscreteScheduler: expected that of apply_residual"
    ):
        remove_residual_cache(pipeline)
    before = pipeline.scheduler
    pipeline.transformer.single_transformer_blocks.append(pipeline.transformer.single_transformer_blocks[0])
    with pytest.raises(ModelError, match="has 3 blocks here and 1 tensors after them: expected 2"):
        apply_residual_cache(pipeline, GOLDEN, "2", check=False)
    assert pipeline.scheduler is before and not hasattr(transformer_of(pipeline, ""), "_diffusers_hook")
    pipeline = flux()
    apply_residual_cache(pipeline, GOLDEN, "2")
    pipeline.transformer._diffusers_hook.remove_hook("otcache_residual")
    with pytest.raises(
        ModelError, match="step 0 of budget 2 of tiny had no call of the transformer from the pipeline's own"
    ):
        draw(pipeline)
    unet = CASES["sd"].make()
    with pytest.raises(ModelError, match="UNet2DConditionModel has no list of blocks"):
        apply_residual_cache(unet, GOLDEN, "2", check=False)
