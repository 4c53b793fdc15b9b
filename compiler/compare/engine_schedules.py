"""An artifact's schedule in the form that another engine reads: cache-dit, diffusers, sglang-diffusion.

Such an engine computes the same steps, but has none of the coefficients: at the other steps it reuses or extrapolates
what its blocks have made. What that costs is told where `otc compare` has measured it of the very program.

Sources: cache-dit 1.5, `load_configs` (a YAML file) and `steps_mask`; diffusers 0.42, `MagCacheConfig`, whose
magnitudes say which steps are skipped, and the times that a pipeline's call takes; sglang-diffusion,
`cache_dit_integration.py`, which makes cache-dit's configuration of environment variables.
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from otcache.schemas.errors import RequestError, UsageError
from otcache.schemas.manifest import FULL, BudgetProgram, Manifest
from otcache.schemas.messages import one_line

from ..programs.call_times import call_times
from .cache_dit import CALIBRATORS, mask_from_schedule
from .cells import DEFAULT, Comparison

Engine = Literal["cache-dit", "diffusers", "sglang"]
DEFAULT_CALIBRATOR = "taylor-1"
"""Of cache-dit and sglang where nothing was measured."""
_CALIBRATORS: dict[str, tuple[str, ...]] = {
    "cache-dit": CALIBRATORS,
    "diffusers": ("reuse",),
    "sglang": ("reuse", "taylor-1", "taylor-2"),
}
SAME = 1e-3
"""Decibels by which figures of one program may differ that was rolled out twice."""


@dataclass(frozen=True, kw_only=True)
class EngineSchedule:
    """What is written for an engine."""

    engine: Engine
    budget: str
    schedule: tuple[int, ...]
    num_inference_steps: int
    calibrator: str
    loss: str
    """What is lost against the artifact's own program, in words."""
    lost_db: float | None
    """PSNR; None where it was not measured."""
    text: str
    """Of the file."""

    def json(self) -> dict[str, Any]:
        """All but the text."""
        return {name: value for name, value in asdict(self).items() if name != "text"}


def export_schedule(
    manifest: Manifest, engine: Engine, budget: str | None, calibrator: str | None, comparison: Comparison | None
) -> EngineSchedule:
    """The schedule of a budget for an engine.

    Args:
        manifest: of the artifact.
        engine: that reads it.
        budget: one of the artifact's; None where it has one alone.
        calibrator: what the engine does at steps that are not computed; None for what was measured, else the default.
        comparison: what `otc compare` has measured of the model; None where there is nothing.

    Raises UsageError, RequestError.
    """
    entry = _entry(manifest, budget)
    measured = _measured_calibrator(manifest, entry, comparison) if engine != "diffusers" else None
    known = _CALIBRATORS[engine]
    chosen = calibrator or (measured if measured in known else None)
    chosen = chosen or (DEFAULT_CALIBRATOR if DEFAULT_CALIBRATOR in known else known[0])
    if chosen not in known:
        raise UsageError(f"--calibrator is {chosen!r}: expected one of {', '.join(known)}, which {engine} has")
    loss, lost_db = _loss(manifest, entry, engine, chosen, comparison)
    writers: dict[Engine, Callable[[Manifest, BudgetProgram, str, list[str]], str]] = {
        "cache-dit": _cache_dit_text,
        "diffusers": _diffusers_text,
        "sglang": _sglang_text,
    }
    total, schedule = manifest.sampler.num_inference_steps, entry.program.schedule
    head = [
        f"Steps {', '.join(map(str, schedule))} of {total}: the schedule of budget {entry.budget} of "
        f"{one_line(manifest.model.name)}, artifact {manifest.digest}.",
        f"At the other steps {engine} does by itself what it can ({chosen}); the artifact's coefficients are not here.",
        loss,
    ]
    return EngineSchedule(
        engine=engine,
        budget=entry.budget,
        schedule=schedule,
        num_inference_steps=total,
        calibrator=chosen,
        loss=loss,
        lost_db=lost_db,
        text=writers[engine](manifest, entry, chosen, head),
    )


def _entry(manifest: Manifest, budget: str | None) -> BudgetProgram:
    """The program of a budget. Raises UsageError, RequestError."""
    names = [name for name in manifest.budgets if name != FULL]
    if budget is None and len(names) != 1:
        raise UsageError(f"--budget is left out: expected one of {', '.join(names)}, which the artifact has")
    entry = manifest.program(names[0] if budget is None else budget)
    if entry is None or entry.budget == FULL:
        raise RequestError(
            f"budget is {str(budget)[:40]!r}: expected one of {', '.join(names)}: choose one, or compile the artifact "
            "for it"
        )
    if len(entry.program.schedule) >= manifest.sampler.num_inference_steps:
        raise RequestError(f"budget {entry.budget} computes every step: expected one that leaves some out")
    return entry


def is_of(comparison: Comparison, manifest: Manifest, entry: BudgetProgram) -> bool:
    """Whether a comparison measured this very program: on as many prompts, to the same figures."""
    cell = comparison.cell(DEFAULT, int(entry.budget))
    if cell is None or entry.quality is None:
        return False
    pairs = [(getattr(cell.psnr_db, name), getattr(entry.quality.psnr_db, name)) for name in ("mean", "std", "worst")]
    return (
        comparison.prompts == manifest.conditions.evaluation_prompts
        and comparison.num_inference_steps == manifest.sampler.num_inference_steps
        and all(abs(one - other) < SAME for one, other in pairs)
    )


def _measured_calibrator(manifest: Manifest, entry: BudgetProgram, comparison: Comparison | None) -> str | None:
    """What cache-dit did best with this schedule on calibration prompts, where that was what it was measured with."""
    if comparison is None or not is_of(comparison, manifest, entry):
        return None
    cell = comparison.cell("cache-dit mask", int(entry.budget))
    own = {f"{DEFAULT} mask, {name}": name for name in CALIBRATORS}
    return None if cell is None else own.get(cell.setting)


def _loss(
    manifest: Manifest, entry: BudgetProgram, engine: Engine, calibrator: str, comparison: Comparison | None
) -> tuple[str, float | None]:
    """What is lost, in words and in dB of PSNR."""
    measured = _measured_calibrator(manifest, entry, comparison)
    cell = comparison.cell("cache-dit mask", int(entry.budget)) if comparison else None
    if engine != "diffusers" and measured == calibrator and cell is not None and entry.quality is not None:
        lost = entry.quality.psnr_db.mean - cell.psnr_db.mean
        where = "" if engine == "cache-dit" else "in diffusers with cache-dit, not in sglang itself, "
        blocks = "" if cell.blocks_mean is None else f", for {cell.blocks_mean:.1f} full runs of the blocks"
        said = f"Lost: {lost:.1f} dB" if lost >= 0 else f"Lost: nothing, it gains {-lost:.1f} dB"
        return (
            f"{said}, measured {where}on {manifest.conditions.evaluation_prompts} held-out prompts by `otc compare`: "
            f"it comes to {cell.psnr_db.mean:.1f} dB (SSIM {cell.ssim.mean:.4f}){blocks}, where the artifact's own "
            f"program comes to {entry.quality.psnr_db.mean:.1f} dB ({entry.quality.ssim.mean:.4f}).",
            lost,
        )
    figure = "" if entry.quality is None else f", which comes to {entry.quality.psnr_db.mean:.1f} dB"
    return f"What is lost against the artifact's own program{figure}, was not measured for {engine}.", None


def _branches_apart(manifest: Manifest) -> bool | None:
    """Whether the pipeline calls its model for each branch of guidance; None of a class that is not diffusers' own."""
    if manifest.guidance.kind == "none":
        return False
    import diffusers

    pipeline = getattr(diffusers, manifest.model.pipeline, None)
    return None if pipeline is None else 'cache_context("uncond"' in inspect.getsource(pipeline.__call__)


def _cache_dit_text(manifest: Manifest, entry: BudgetProgram, calibrator: str, head: list[str]) -> str:
    """A YAML file for `cache_dit.load_configs`; every value is JSON, which YAML holds."""
    total = manifest.sampler.num_inference_steps
    values: dict[str, Any] = {
        "num_inference_steps": total,
        "steps_computation_mask": mask_from_schedule(entry.program.schedule, total),
        "steps_computation_policy": "static",
        "max_warmup_steps": 1,
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
    }
    if (apart := _branches_apart(manifest)) is not None:
        values["enable_separate_cfg"] = apart
    if calibrator.startswith("taylor"):
        values |= {"enable_taylorseer": True, "taylorseer_order": int(calibrator.removeprefix("taylor-"))}
    elif calibrator != "reuse":
        values[f"enable_{calibrator}"] = True
    use = "cache_dit.enable_cache(pipe, **cache_dit.load_configs(FILE)), and the pipeline is called with all steps."
    lines = [f"# {line}" for line in (*head, f"Read it with {use}")]
    return "\n".join([*lines, "cache_config:", *(f"  {key}: {json.dumps(value)}" for key, value in values.items()), ""])


def bins_from_schedule(schedule: Sequence[int], num_inference_steps: int) -> tuple[list[int], list[int]]:
    """Runs of computed steps and of others, in turn, as cache-dit's `steps_mask` takes them.

    >>> bins_from_schedule((0, 1, 3), 6)
    ([2, 1], [1, 2])
    """
    mask = mask_from_schedule(tuple(schedule), num_inference_steps)
    runs = [(value, len(list(group))) for value, group in itertools.groupby(mask)]
    return [count for value, count in runs if value], [count for value, count in runs if not value]


def _sglang_text(manifest: Manifest, entry: BudgetProgram, calibrator: str, head: list[str]) -> str:
    """A shell file of sglang-diffusion's environment variables, to be sourced."""
    total = manifest.sampler.num_inference_steps
    computed, cached = bins_from_schedule(entry.program.schedule, total)
    values = {
        "ENABLED": "true",
        "FN": "1",
        "BN": "0",
        "WARMUP": "1",
        "MC": "-1",
        "SCM_COMPUTE_BINS": ",".join(map(str, computed)),
        "SCM_CACHE_BINS": ",".join(map(str, cached)),
        "SCM_POLICY": "static",
        "TAYLORSEER": str(calibrator != "reuse").lower(),
        **({} if calibrator == "reuse" else {"TS_ORDER": calibrator.removeprefix("taylor-")}),
    }
    use = f"Source it before `sglang generate --num-inference-steps {total} …`, with that number of steps."
    lines = [f"# {line}" for line in (*head, use)]
    return "\n".join([*lines, *(f"export SGLANG_CACHE_DIT_{name}={value}" for name, value in values.items()), ""])


def _diffusers_text(manifest: Manifest, entry: BudgetProgram, calibrator: str, head: list[str]) -> str:
    """A JSON file: arguments of `MagCacheConfig`, which reuses what the blocks added, and those of a pipeline call with
    as many steps as the schedule has.

    MagCache skips a step where the magnitudes it was told multiply to about one, and computes it where they do not.
    """
    total, schedule = manifest.sampler.num_inference_steps, entry.program.schedule
    times, reason = call_times(manifest, schedule)
    value = {
        "about": head,
        "mag_cache": {
            "threshold": 0.5,
            "max_skip_steps": total,
            "retention_ratio": 0.0,
            "num_inference_steps": total,
            "mag_ratios": [0.0 if index in schedule else 1.0 for index in range(total)],
        },
        "use_mag_cache": "pipe.transformer.enable_cache(MagCacheConfig(**mag_cache)); the pipeline is called with all "
        f"{total} steps",
        "pipeline_call": times,
        "use_pipeline_call": reason
        or "instead of a cache: pipe(prompt, **pipeline_call) takes the schedule's steps alone, with its own solver",
    }
    return json.dumps(value, indent=1) + "\n"


def read_comparison(folder: Path) -> Comparison:
    """What `otc compare` has written to a folder. Raises UsageError."""
    path = folder / "comparison.json"
    try:
        return Comparison.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--comparison is {folder}, whose comparison.json cannot be read ({one_line(error, 120)}): expected a "
            "folder that otc compare has written"
        ) from error
