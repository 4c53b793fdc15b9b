"""SeaCache (arXiv 2602.18993) through diffusers' `enable_cache`, and why FasterCache has no column.

diffusers wires SeaCache into the pipelines of Wan and Cosmos only. What it asks of others is added here: the step and
its sigma in the pipeline's `cache_context`, and the latents as frames.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .diffusers_caches import diffusers_cache
from .method import Bench, Built, NotApplicable, ProgramMethod
from .pipeline_method import PipelineMethod, Setting, transformer_of

MODEST = (1e-3, 100.0)
"""Range of the threshold."""


def _settings(bench: Bench, budget: int) -> list[Setting]:
    """Residuals reused or extrapolated; no limit to how many steps in a row, which would keep it from small budgets."""
    transformer = transformer_of(bench.pipeline)
    if not hasattr(transformer, "cache_context"):
        raise NotApplicable(f"{type(transformer).__name__} has no cache_context")
    size = {"height": bench.call.height, "width": bench.call.width}
    return [Setting(text="extrapolated" if order else "reused", values={"order": order, **size}) for order in (0, 1)]


@contextlib.contextmanager
def _seacache(pipeline: Any, setting: Setting) -> Iterator[None]:
    from diffusers import SeaCacheConfig

    def frames(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        return frames_of(pipeline, kwargs["hidden_states"], setting.values["height"], setting.values["width"])

    config = SeaCacheConfig(
        threshold=setting.threshold,
        residual_order=setting.values["order"],
        max_consecutive_cached=0,
        raw_vision_callback=frames,
    )
    with diffusers_cache(pipeline, config), _said_where(pipeline):
        yield


@contextlib.contextmanager
def _said_where(pipeline: Any) -> Iterator[None]:
    """While it lasts, `cache_context` says which step of the pipeline's scheduler a branch is at."""
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    original, calls = transformer.cache_context, Counter[str]()

    def cache_context(name: str, **kwargs: Any) -> Any:
        total = len(scheduler.timesteps)
        index = calls[name] % total
        calls[name] += 1
        added = {"step_index": index, "sigma": float(scheduler.sigmas[index]), "num_inference_steps": total}
        return original(name, **{**added, **kwargs})  # some pipelines say it themselves

    transformer.cache_context = cache_context
    try:
        yield
    finally:
        del transformer.cache_context


def frames_of(pipeline: Any, latents: Tensor, height: int, width: int) -> list[Tensor]:
    """Each sample's latents as (channels, frames, height, width); packed ones are unpacked by the pipeline itself."""
    if latents.ndim == 3:
        latents = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
    if latents.ndim == 4:
        latents = latents.unsqueeze(2)
    return list(latents.unbind(0))


def _faster_cache(bench: Bench, budget: int) -> Built:
    raise NotApplicable(
        "it caches attention and a branch of guidance: the blocks' other layers run at every step, so that there is no number "
        "of evaluations to compare at; diffusers' form takes both branches in one call only"
    )


METHODS = (
    PipelineMethod(
        name="seacache",
        group="cache",
        source="arXiv 2602.18993, diffusers",
        settings=_settings,
        wrap=_seacache,
        adaptive=True,
        thresholds=MODEST,
    ),
    ProgramMethod(name="fastercache", group="cache", source="arXiv 2410.19355, diffusers", build=_faster_cache),
)
