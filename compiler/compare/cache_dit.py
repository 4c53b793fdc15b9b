"""cache-dit, the library, with its static step masks and with its dynamic decisions (DBCache)."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np

from .diffusers_caches import WIDE
from .method import Bench, NotApplicable
from .pipeline_method import PipelineMethod, Setting, branches_apart, transformer_of


def _needs_cache_dit() -> None:
    if importlib.util.find_spec("cache_dit") is None:
        raise NotApplicable("cache-dit is not installed: pip install 'otcache[compare]'")


@contextlib.contextmanager
def _cache_dit(pipeline: Any, calibrator: int | None, *, apart: bool, **options: Any) -> Iterator[None]:
    _needs_cache_dit()
    transformer_of(pipeline)
    import cache_dit

    config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, enable_separate_cfg=apart, **options)
    taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=calibrator) if calibrator else None
    # cache-dit rearranges the transformer and patches the pipeline's class, and does not take all of that back.
    kept, call = (pipeline.transformer, pipeline.scheduler), type(pipeline).__call__
    pipeline.transformer = copy.deepcopy(pipeline.transformer)
    try:
        cache_dit.enable_cache(pipeline, cache_config=config, calibrator_config=taylor)
        yield
    finally:
        with contextlib.suppress(Exception):
            cache_dit.disable_cache(pipeline)
        pipeline.transformer, pipeline.scheduler = kept
        type(pipeline).__call__ = call


def masks(budget: int, num_inference_steps: int) -> dict[str, list[int]]:
    """Step masks of cache-dit's kind with exactly `budget` computed steps, by name.

    Its presets compute a run of steps first and then single ones in growing gaps, the last step always; here with a run
    of one, a quarter or half of the budget, and evenly spaced ones.
    """
    found = {}
    for name, run in (("even", 1), ("quarter first", max(1, budget // 4)), ("half first", max(1, budget // 2))):
        rest = budget - run
        gaps = np.linspace(1.0, 1.0 if name == "even" else 2.0, max(rest, 1))
        places = run - 1 + np.cumsum(gaps) / gaps.sum() * (num_inference_steps - run)
        steps = {*range(run), *(round(place) for place in places[:rest])}
        if len(steps) == budget:
            found[name] = [int(step in steps) for step in range(num_inference_steps)]
    return found


def _mask_settings(bench: Bench, budget: int) -> list[Setting]:
    _needs_cache_dit()
    total, apart = bench.table.num_inference_steps, branches_apart(bench)
    return [
        Setting(
            text=f"{name} mask{', taylor' if order else ''}",
            values={"mask": mask, "order": order, "total": total, "apart": apart},
        )
        for name, mask in masks(budget, total).items()
        for order in (None, 1)
    ]


def _masked(pipeline: Any, setting: Setting) -> contextlib.AbstractContextManager[None]:
    values = setting.values
    return _cache_dit(
        pipeline,
        values["order"],
        apart=values["apart"],
        steps_computation_mask=list(values["mask"]),
        steps_computation_policy="static",
        num_inference_steps=values["total"],
        max_warmup_steps=1,
    )


def _dynamic_settings(bench: Bench, budget: int) -> list[Setting]:
    _needs_cache_dit()
    total, apart = bench.table.num_inference_steps, branches_apart(bench)
    return [
        Setting(
            text=f"warm-up {warmup}{', taylor' if order else ''}",
            values={"warmup": warmup, "order": order, "total": total, "apart": apart},
        )
        for warmup in sorted({1, max(1, budget // 2)})
        for order in (None, 1)
    ]


def _dynamic(pipeline: Any, setting: Setting) -> contextlib.AbstractContextManager[None]:
    values = setting.values
    return _cache_dit(
        pipeline,
        values["order"],
        apart=values["apart"],
        residual_diff_threshold=setting.threshold,
        max_warmup_steps=values["warmup"],
        num_inference_steps=values["total"],
    )


METHODS = (
    PipelineMethod(
        name="cache-dit mask", group="library", source="cache-dit, static mask", settings=_mask_settings, wrap=_masked
    ),
    PipelineMethod(
        name="cache-dit dynamic",
        group="library",
        source="cache-dit, DBCache",
        settings=_dynamic_settings,
        wrap=_dynamic,
        adaptive=True,
        thresholds=WIDE,
    ),
)
