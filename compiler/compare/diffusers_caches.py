"""Caches that diffusers itself has: FORA and TaylorSeer by intervals, FirstBlockCache and MagCache by thresholds."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch

from .cells import Range
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


_LAYER_NAMES = (
    *("attn", "attn1", "attn2", "attention", "self_attn", "cross_attn"),
    *("ff", "ffn", "ff_context", "feed_forward", "mlp", "img_mlp", "txt_mlp", "proj_mlp", "proj_out"),
)
LAYERS = (rf".*(blocks|layers)\.\d+\.({'|'.join(_LAYER_NAMES)})",)
"""Attention and feed-forward layers of every block, as diffusers' classes name them: what FORA and TaylorSeer cache."""


INTERVALS = 4
"""So many intervals are tried, the shortest ones that keep the budget."""


def interval_schedule(warmup: int, interval: int, num_inference_steps: int) -> tuple[int, ...]:
    """Computed steps as FORA and TaylorSeer release them: the first `warmup`, then every `interval`-th after the last.

    >>> interval_schedule(2, 4, 12)
    (0, 1, 5, 9)
    """
    return (*range(warmup), *range(warmup - 1 + interval, num_inference_steps, interval))


def _intervals(order: int) -> Callable[[Bench, int], list[Setting]]:
    """The shortest intervals with which the budget is kept, each with the longest warm-up that leaves room for it."""

    def settings(bench: Bench, budget: int) -> list[Setting]:
        total = bench.table.num_inference_steps
        found: dict[tuple[int, ...], Setting] = {}
        for interval in range(1, total + 1):
            kept = [
                (warmup, schedule)
                for warmup in range(1, budget + 1)
                if len(schedule := interval_schedule(warmup, interval, total)) <= budget
            ]
            if kept and len(found) < INTERVALS:
                warmup, schedule = kept[-1]
                text = f"interval {interval} after {warmup} steps"
                found.setdefault(schedule, Setting(text=text, values={"schedule": list(schedule), "order": order}))
        return list(found.values())

    return settings


@contextlib.contextmanager
def _taylor(pipeline: Any, setting: Setting) -> Iterator[None]:
    """diffusers' hook of TaylorSeer at the setting's steps.

    By itself the hook computes the step after the one that follows its warm-up, and wastes that evaluation; the papers'
    own code waits for a whole interval.
    """
    from diffusers import TaylorSeerCacheConfig
    from diffusers.hooks.taylorseer_cache import TaylorSeerCacheHook

    schedule, hooks = set(setting.values["schedule"]), cast(Any, TaylorSeerCacheHook)
    decide = hooks._measure_should_compute

    def at_steps(hook: Any) -> tuple[bool, Any]:
        state = hook.state_manager.get_state()
        state.current_step += 1
        return state.current_step in schedule, state

    config = TaylorSeerCacheConfig(
        max_order=setting.values["order"], taylor_factors_dtype=torch.float32, cache_identifiers=list(LAYERS)
    )
    with diffusers_cache(pipeline, config):
        hooks._measure_should_compute = at_steps
        try:
            yield
        finally:
            hooks._measure_should_compute = decide


def _first_block(pipeline: Any, setting: Setting) -> contextlib.AbstractContextManager[None]:
    from diffusers import FirstBlockCacheConfig

    return diffusers_cache(pipeline, FirstBlockCacheConfig(threshold=setting.threshold))


def _magcache_settings(bench: Bench, budget: int) -> list[Setting]:
    """Mean magnitude ratios of MagCache's own calibration, of all calibration prompts and both branches; with one, a
    quarter or half of the budget kept at the start.
    """
    from diffusers import MagCacheConfig

    total = bench.table.num_inference_steps

    def calibrate() -> list[float]:
        said = io.StringIO()
        config = MagCacheConfig(calibrate=True, num_inference_steps=total)
        for row in range(bench.calibration.count):
            with diffusers_cache(bench.pipeline, config), contextlib.redirect_stdout(said):
                run_pipeline(bench, [row], held_out=False)
        listed = re.findall(r"^\[[-\d., e]+\]$", said.getvalue(), flags=re.MULTILINE)  # a line for each branch
        ratios = [[float(value) for value in line.strip("[]").split(",")] for line in listed]
        if {len(line) for line in ratios} != {total}:
            raise NotApplicable("MagCache's calibration run printed no ratios for this model")
        return [float(mean) for mean in np.mean(ratios, axis=0)]

    ratios = bench.workspace.json("magcache", [bench.key], calibrate)
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


def _taylor_method(name: str, source: str, order: int, published: Range | None = None) -> PipelineMethod:
    return PipelineMethod(
        name=name, group="cache", source=source, settings=_intervals(order), wrap=_taylor, published=published
    )


TAYLORSEER_PUBLISHED = (9, 50)
"""The least that paper and release show, by an audit of the first comparison."""

METHODS = (
    _taylor_method("fora", "arXiv 2407.01425, diffusers", 0),
    _taylor_method("taylorseer-1", "arXiv 2503.06923, diffusers", 1, TAYLORSEER_PUBLISHED),
    _taylor_method("taylorseer-2", "arXiv 2503.06923, diffusers", 2, TAYLORSEER_PUBLISHED),
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
