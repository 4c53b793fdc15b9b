"""SeaCache (arXiv 2602.18993) through diffusers' `enable_cache`, and why FasterCache has no column.

diffusers wires SeaCache into the pipelines of Wan and Cosmos only, and filters the latents. What it asks of others is
added here: the step and its sigma in the pipeline's `cache_context`, and the latents as frames. The paper filters the
first block's modulated input, TeaCache's indicator: that is here as well, with diffusers' filter.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .diffusers_caches import diffusers_cache
from .method import Bench, Built, NotApplicable, ProgramMethod
from .pipeline_method import PipelineMethod, Setting, branches_apart, transformer_of
from .teacache import Indicator, TeaCache

MODEST = (1e-3, 100.0)
"""Range of the threshold."""
PICTURE_POWER, VIDEO_POWER = 2.0, 3.0
"""Exponents of the spectrum of clean pictures and videos."""


def _settings(bench: Bench, budget: int) -> list[Setting]:
    """As published, on TeaCache's indicator; and diffusers' form of it, residuals reused or extrapolated.

    No limit to how many steps in a row, which would keep it from small budgets.
    """
    transformer = transformer_of(bench.pipeline)
    video = bench.call.num_frames is not None
    common = {"power": VIDEO_POWER if video else PICTURE_POWER}
    found = []
    if (grid := token_grid(bench)) is not None:
        values = {"grid": list(grid), "shares": noise_shares(bench), "branches": 2 if branches_apart(bench) else 1}
        found.append(Setting(text="of the modulated input", values={**values, **common}))
    if hasattr(transformer, "cache_context"):
        size = {"height": bench.call.height, "width": bench.call.width}
        found += [
            Setting(text=f"of the latents, {text}", values={"order": order, **size, **common})
            for order, text in enumerate(("reused", "extrapolated"))
        ]
    if not found:
        raise NotApplicable(f"{type(transformer).__name__} has no cache_context, and its latents no grid that is known")
    return found


def token_grid(bench: Bench) -> tuple[int, int, int] | None:
    """Frames, rows and columns of the latents in proportion: tokens are as many, or fewer by whole patches."""
    shape = bench.interface.latents_shape
    if len(shape) == 4:
        return shape[1], shape[2], shape[3]
    if len(shape) == 3:
        return 1, shape[1], shape[2]
    return None if bench.call.num_frames is not None else (1, bench.call.height, bench.call.width)


def noise_shares(bench: Bench) -> list[float]:
    """σ of x = (1 − σ) · signal + σ · noise at each step, up to scale."""
    table, scheduler = bench.table, bench.pipeline.scheduler
    if table.prediction_type == "flow_prediction" and table.sigmas is not None:
        return [float(sigma) for sigma in table.sigmas[:-1]]
    if not hasattr(scheduler, "alphas_cumprod"):
        raise NotApplicable(f"{table.scheduler} does not say how much of its latents is noise")
    signal = np.interp(table.timesteps, np.arange(len(scheduler.alphas_cumprod)), np.sqrt(scheduler.alphas_cumprod))
    noise = np.sqrt(1.0 - np.square(signal))
    return [float(share) for share in noise / (signal + noise)]


def sea_indicator(grid: Sequence[int], shares: Sequence[float], power: float) -> Indicator:
    """The modulated input (m, tokens, d) on its grid of tokens, filtered by diffusers' own SEA filter.

    Raises NotApplicable where the tokens are no such grid, as those of a block that takes texts as well.
    """
    from diffusers.hooks.sea_cache import _apply_sea_filter

    def indicator(hidden: Tensor, step: int) -> Tensor:
        if hidden.ndim == 4:  # (m, d, rows, columns)
            hidden = hidden.flatten(2).transpose(1, 2)
        frames, rows, columns = grid
        per_frame = hidden.shape[1] / frames
        height = round(math.sqrt(per_frame * rows / columns))
        width = round(per_frame / max(height, 1))
        if frames * height * width != hidden.shape[1]:
            raise NotApplicable(f"{hidden.shape[1]} tokens are no grid of {frames} frames of {rows} : {columns}")
        samples = hidden.unflatten(1, (frames, height, width)).unbind(0)
        return torch.stack([_apply_sea_filter(each, sigma=shares[step], power_exp=power) for each in samples])

    return indicator


@contextlib.contextmanager
def _seacache(pipeline: Any, setting: Setting) -> Iterator[None]:
    from diffusers import SeaCacheConfig

    if "grid" in setting.values:
        with _published(pipeline, setting):
            yield
        return

    def frames(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        return frames_of(pipeline, kwargs["hidden_states"], setting.values["height"], setting.values["width"])

    config = SeaCacheConfig(
        threshold=setting.threshold,
        residual_order=setting.values["order"],
        max_consecutive_cached=0,
        power_exp=setting.values["power"],
        raw_vision_callback=frames,
    )
    with diffusers_cache(pipeline, config), _said_where(pipeline):
        yield


def _published(pipeline: Any, setting: Setting) -> contextlib.AbstractContextManager[None]:
    """TeaCache's mechanics: changes of the filtered indicator are accumulated as they are, residuals are reused."""
    values = setting.values
    cache = TeaCache(
        pipeline,
        np.array([1.0, 0.0]),
        float(setting.threshold or 0.0),
        len(values["shares"]),
        values["branches"],
        sea_indicator(values["grid"], values["shares"], values["power"]),
    )
    return cache.installed()


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
        "it caches attention and a branch of guidance: the blocks' other layers run at every step, so that there is no "
        "number of evaluations to compare at; diffusers' form takes both branches in one call only"
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
