"""cache-dit, the library, with static step masks and with its dynamic decisions (DBCache)."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from .candidates import candidate_schedules
from .diffusers_caches import WIDE
from .method import Bench, NotApplicable
from .pipeline_method import PipelineMethod, Setting, block_lists, branches_apart, transformer_of

CALIBRATORS = ("reuse", "taylor-1", "taylor-2", "dmd", "foca")
"""What the library can put in the place of blocks that are not computed."""


def _needs_cache_dit() -> None:
    if importlib.util.find_spec("cache_dit") is None:
        raise NotApplicable("cache-dit is not installed: pip install 'otcache[compare]'")


@contextlib.contextmanager
def _cache_dit(pipeline: Any, calibrator: str, *, apart: bool, first: int, **options: Any) -> Iterator[None]:
    """While it lasts, the pipeline runs with cache-dit.

    Args:
        pipeline: a diffusers pipeline.
        calibrator: one of `CALIBRATORS`.
        apart: whether the pipeline calls its transformer for each branch of guidance.
        first: blocks at the beginning that are computed at every step (`Fn_compute_blocks`).
        options: others of `DBCacheConfig`.
    """
    _needs_cache_dit()
    import cache_dit

    transformer = transformer_of(pipeline)
    config = cache_dit.DBCacheConfig(Fn_compute_blocks=first, Bn_compute_blocks=0, enable_separate_cfg=apart, **options)
    # cache-dit rearranges the transformer and patches the pipeline's class, and does not take all of that back.
    kept, call = (transformer, pipeline.scheduler), type(pipeline).__call__
    weights = itertools.chain(transformer.parameters(), transformer.buffers())
    pipeline.transformer = copy.deepcopy(transformer, {id(each): each for each in weights})
    try:
        cache_dit.enable_cache(pipeline, cache_config=config, calibrator_config=_calibrator_config(calibrator))
        yield
    finally:
        with contextlib.suppress(Exception):
            cache_dit.disable_cache(pipeline)
        pipeline.transformer, pipeline.scheduler = kept
        type(pipeline).__call__ = call


def _calibrator_config(name: str) -> Any:
    import cache_dit

    if name == "reuse":
        return None
    if name in ("dmd", "foca"):
        return getattr(cache_dit, {"dmd": "DMDCalibratorConfig", "foca": "FoCaCalibratorConfig"}[name])()
    return cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=int(name.removeprefix("taylor-")))


def preset_schedules(budget: int, num_inference_steps: int) -> dict[str, tuple[int, ...]]:
    """Schedules like those of cache-dit's presets with exactly `budget` computed steps, by name.

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
            found[name] = tuple(sorted(steps))
    return found


def mask_from_schedule(schedule: tuple[int, ...], num_inference_steps: int) -> list[int]:
    """`steps_computation_mask` of a schedule.

    >>> mask_from_schedule((0, 2), 4)
    [1, 0, 1, 0]
    """
    return [int(step in schedule) for step in range(num_inference_steps)]


def _mask_settings(bench: Bench, budget: int) -> list[Setting]:
    """Every schedule that is known (the library takes any mask, and points at LeMiCa's), with every calibrator."""
    _needs_cache_dit()
    total = bench.table.num_inference_steps
    schedules = {**preset_schedules(budget, total), **candidate_schedules(bench, budget)}
    common = {"total": total, "apart": branches_apart(bench), "first": 1}
    return [
        Setting(
            text=f"{name} mask, {calibrator}",
            values={"mask": mask_from_schedule(schedule, total), "calibrator": calibrator, **common},
        )
        for name, schedule in schedules.items()
        for calibrator in CALIBRATORS
    ]


def _masked(pipeline: Any, setting: Setting) -> contextlib.AbstractContextManager[None]:
    values = setting.values
    return _cache_dit(
        pipeline,
        values["calibrator"],
        apart=values["apart"],
        first=values["first"],
        steps_computation_mask=list(values["mask"]),
        steps_computation_policy="static",
        num_inference_steps=values["total"],
        max_warmup_steps=1,
    )


def _dynamic_settings(bench: Bench, budget: int) -> list[Setting]:
    """Warm-ups of one step and half the budget, one block and a quarter of them that decide, residuals reused or
    extrapolated.

    A mask of the graph's (SCM, dynamic policy) says which steps have to be computed; others are if they change enough.
    """
    _needs_cache_dit()
    total = bench.table.num_inference_steps
    shortest = min(len(blocks) for blocks in block_lists(transformer_of(bench.pipeline)))
    firsts = sorted({1, max(1, shortest // 4)})
    warmups: list[tuple[str, dict[str, Any]]] = [
        (f"warm-up {warmup}", {"warmup": warmup, "mask": None}) for warmup in sorted({1, max(1, budget // 2)})
    ]
    half = next(iter(_masks_of_half(bench, budget).items()), None)
    if half:
        warmups.append((f"{half[0]} mask of half the budget", {"warmup": 1, "mask": half[1]}))
    return [
        Setting(
            text=f"{text}, F{first}, {calibrator}",
            values={**values, "calibrator": calibrator, "first": first, "total": total, "apart": branches_apart(bench)},
        )
        for text, values in warmups
        for first in firsts
        for calibrator in ("reuse", "taylor-1")
    ]


def _masks_of_half(bench: Bench, budget: int) -> dict[str, list[int]]:
    """The masks of the schedules with half the budget, the paths of residuals first."""
    total, half = bench.table.num_inference_steps, max(1, budget // 2)
    found = candidate_schedules(bench, half)
    names = sorted(found, key=lambda name: not name.startswith("residuals"))
    return {name: mask_from_schedule(found[name], total) for name in names}


def _dynamic(pipeline: Any, setting: Setting) -> contextlib.AbstractContextManager[None]:
    values = setting.values
    return _cache_dit(
        pipeline,
        values["calibrator"],
        apart=values["apart"],
        first=values["first"],
        residual_diff_threshold=setting.threshold,
        max_warmup_steps=values["warmup"],
        num_inference_steps=values["total"],
        steps_computation_mask=values["mask"],
        steps_computation_policy="dynamic",
    )


METHODS = (
    PipelineMethod(
        name="cache-dit mask",
        group="library",
        source="cache-dit, static mask",
        settings=_mask_settings,
        wrap=_masked,
        uses_own=True,
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
