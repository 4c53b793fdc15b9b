"""The caches that diffusers itself has: FORA and TaylorSeer by intervals, FirstBlockCache and MagCache by thresholds."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .method import Bench, NotApplicable
from .pipeline_method import PipelineMethod, Setting, run_pipeline, transformer_of

WIDE = (1e-3, 10.0)
"""Range of thresholds."""


@contextlib.contextmanager
def diffusers_cache(pipeline: Any, config: Any) -> Iterator[None]:
    """While it lasts, the pipeline's transformer has one of diffusers' caches. Raises NotApplicable where diffusers
    refuses it.
    """
    transformer: Any = transformer_of(pipeline)
    if not hasattr(transformer, "enable_cache"):
        raise NotApplicable(f"diffusers has no caches for {type(transformer).__name__}")
    try:
        transformer.enable_cache(config)
    except Exception as error:
        raise NotApplicable(f"diffusers' enable_cache refuses {type(config).__name__}: {error}") from error
    try:
        yield
    finally:
        transformer.disable_cache()


LAYERS = (r".*blocks\.\d+\.(attn|ff|ff_context|img_mlp|txt_mlp|proj_mlp|proj_out)",)
"""Attention and feed-forward layers of every block: what FORA and TaylorSeer cache."""


def _intervals(order: int) -> Callable[[Bench, int], list[Setting]]:
    """Warm-ups of one to three steps with the shortest interval that keeps the budget."""

    def settings(bench: Bench, budget: int) -> list[Setting]:
        total, found = bench.table.num_inference_steps, []
        for warmup in (1, 2, 3):
            for interval in range(1, total + 1):
                computed = [step for step in range(total) if step < warmup or (step - warmup - 1) % interval == 0]
                if len(computed) <= budget:
                    text = f"interval {interval} after {warmup} steps"
                    found.append(Setting(text=text, values={"warmup": warmup, "interval": interval, "order": order}))
                    break
        return found

    return settings


def _taylor(pipeline: Any, setting: Setting) -> contextlib.AbstractContextManager[None]:
    from diffusers import TaylorSeerCacheConfig

    values = setting.values
    return diffusers_cache(
        pipeline,
        TaylorSeerCacheConfig(
            cache_interval=values["interval"],
            disable_cache_before_step=values["warmup"],
            max_order=values["order"],
            taylor_factors_dtype=torch.float32,
            cache_identifiers=list(LAYERS),
        ),
    )


def _first_block(pipeline: Any, setting: Setting) -> contextlib.AbstractContextManager[None]:
    from diffusers import FirstBlockCacheConfig

    return diffusers_cache(pipeline, FirstBlockCacheConfig(threshold=setting.threshold))


def _magcache_settings(bench: Bench, budget: int) -> list[Setting]:
    """Magnitude ratios from MagCache's own calibration run, with one, a quarter or half of the budget kept at the
    start.
    """
    from diffusers import MagCacheConfig

    total = bench.table.num_inference_steps

    def calibrate() -> list[float]:
        said = io.StringIO()
        config = MagCacheConfig(calibrate=True, num_inference_steps=total)
        with diffusers_cache(bench.pipeline, config), contextlib.redirect_stdout(said):
            run_pipeline(bench, [0], held_out=False)
        listed = re.findall(r"^\[[-\d., e]+\]$", said.getvalue(), flags=re.MULTILINE)
        return [float(value) for value in listed[0].strip("[]").split(",")] if listed else []

    ratios = bench.workspace.json("magcache", [bench.key], calibrate)
    if len(ratios) != total:
        raise NotApplicable("MagCache's calibration run printed no ratios for this model")
    return [
        Setting(text=f"{kept} steps kept", values={"ratios": ratios, "kept": kept, "total": total})
        for kept in sorted({1, max(1, budget // 4), max(1, budget // 2)})
    ]


def _magcache(pipeline: Any, setting: Setting) -> contextlib.AbstractContextManager[None]:
    from diffusers import MagCacheConfig

    values = setting.values
    return diffusers_cache(
        pipeline,
        MagCacheConfig(
            threshold=setting.threshold,
            max_skip_steps=values["total"],
            num_inference_steps=values["total"],
            retention_ratio=values["kept"] / values["total"],
            mag_ratios=list(values["ratios"]),
        ),
    )


def _no_settings(bench: Bench, budget: int) -> list[Setting]:
    return [Setting(text="", values={})]


def _taylor_method(name: str, source: str, order: int) -> PipelineMethod:
    return PipelineMethod(name=name, group="cache", source=source, settings=_intervals(order), wrap=_taylor)


METHODS = (
    _taylor_method("fora", "arXiv 2407.01425, diffusers", 0),
    _taylor_method("taylorseer-1", "arXiv 2503.06923, diffusers", 1),
    _taylor_method("taylorseer-2", "arXiv 2503.06923, diffusers", 2),
    PipelineMethod(
        name="first block",
        group="cache",
        source="FirstBlockCache, diffusers",
        settings=_no_settings,
        wrap=_first_block,
        adaptive=True,
        thresholds=WIDE,
    ),
    PipelineMethod(
        name="magcache",
        group="cache",
        source="arXiv 2506.09045, diffusers",
        settings=_magcache_settings,
        wrap=_magcache,
        thresholds=WIDE,
    ),
)
