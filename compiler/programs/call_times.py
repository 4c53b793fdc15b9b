"""The times of a schedule's computed steps as arguments of a diffusers pipeline: `sigmas=` or `timesteps=`.

A pipeline that is called with them takes as many steps as the schedule has, at its times, with its own solver. What the
scheduler does to such arguments (shift, by the picture's size as well) is undone first; each form is tried on the
scheduler itself, and only one that gives the schedule's times is returned.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from otcache.schemas.manifest import Manifest

TOLERANCE = 1e-3
"""How far timesteps may be from the schedule's, of about 1000: what float32 makes of a shift and its inverse."""


def call_times(manifest: Manifest, schedule: Sequence[int]) -> tuple[dict[str, Any], str]:
    """Arguments of the artifact's pipeline class for the steps of a schedule; empty with the reason where it takes
    none.
    """
    import diffusers

    pipeline, scheduler = (
        getattr(diffusers, name, None) for name in (manifest.model.pipeline, manifest.sampler.scheduler)
    )
    full = next(entry.program for entry in manifest.programs if entry.budget == "full")
    times = [step.timestep for step in full.steps]
    if pipeline is None or scheduler is None or len(times) != len(set(times)):
        return {}, f"times of {manifest.sampler.scheduler} in {manifest.model.pipeline} are not known"
    taken = set(inspect.signature(pipeline.__call__).parameters)
    wanted = [times[index] for index in schedule]
    for name, values, options in _forms(manifest, times, schedule):
        if name in taken and _gives(scheduler, manifest.sampler.config, {name: values, **options}, wanted):
            return {"num_inference_steps": len(schedule), name: values}, ""
    asked = " or ".join(sorted({"sigmas", "timesteps"} & taken)) or "neither sigmas nor timesteps"
    return {}, f"{manifest.model.pipeline} takes {asked}, with which {manifest.sampler.scheduler} gives other times"


def _forms(
    manifest: Manifest, times: Sequence[float], schedule: Sequence[int]
) -> Iterator[tuple[str, list[float] | list[int], dict[str, Any]]]:
    """Arguments that may give the schedule's times: their name, values, and what the pipeline adds of its own."""
    config, total = manifest.sampler.config, len(times)
    trained = float(config.get("num_train_timesteps") or 1000)
    for unshifted in ([1.0 - index / total for index in range(total)], _unshifted(times, trained, config)):
        values = [round(unshifted[index], 8) for index in schedule]
        if not config.get("use_dynamic_shifting"):
            yield "sigmas", values, {}
        elif (mu := _mu(times, trained, unshifted)) is not None:
            yield "sigmas", values, {"mu": mu}
    wanted = [times[index] for index in schedule]
    yield "timesteps", [int(time) for time in wanted] if all(time.is_integer() for time in wanted) else wanted, {}


def _unshifted(times: Sequence[float], trained: float, config: Mapping[str, Any]) -> list[float]:
    """Noise levels before a constant shift: σ = s·b / (1 + (s − 1)·b), solved for b."""
    shift = float(config.get("shift") or 1.0)
    sigmas = [time / trained for time in times]
    return [sigma / (shift - (shift - 1.0) * sigma) for sigma in sigmas]


def _mu(times: Sequence[float], trained: float, unshifted: Sequence[float]) -> float | None:
    """Of an exponential shift that depends on the size: σ = e^μ / (e^μ + 1/b − 1), solved for μ in the middle."""
    middle = len(times) // 2
    sigma, base = times[middle] / trained, unshifted[middle]
    if not (0 < sigma < 1 and 0 < base < 1):
        return None
    return math.log(sigma / (1.0 - sigma) * (1.0 / base - 1.0))


def _gives(scheduler: Any, config: Mapping[str, Any], arguments: Mapping[str, Any], wanted: Sequence[float]) -> bool:
    """Whether the scheduler, told this, has the wanted timesteps."""
    made = scheduler.from_config(dict(config))
    if not set(arguments) <= set(inspect.signature(made.set_timesteps).parameters):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.set_timesteps(**arguments)
    except (ValueError, TypeError):  # an argument that this scheduler's configuration does not take
        return False
    found = np.asarray(made.timesteps.tolist())
    return found.shape == (len(wanted),) and bool(np.allclose(found, wanted, rtol=0.0, atol=TOLERANCE))
