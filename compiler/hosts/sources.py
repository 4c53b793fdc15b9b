"""The diffusers scheduler that a program was lowered from, on the host: its options, its noise levels, its ways to add
noise.

Shapes: B computed steps of a program, T steps of the full sampler.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch

from otcache.schemas.errors import ArtifactError
from otcache.schemas.manifest import Sampler
from otcache.schemas.program import Step

from ..models.digests import options_from_plain
from ..programs.lower import is_flow


def source_scheduler(sampler: Sampler) -> Any:
    """A scheduler of the manifest's class and options. Raises ArtifactError for a class that this diffusers has not."""
    kind = getattr(diffusers, sampler.scheduler, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ArtifactError(
            f"sampler.scheduler is {sampler.scheduler[:80]!r}: expected a scheduler of diffusers "
            f"{diffusers.__version__}: install the version that the artifact was compiled with"
        )
    return kind.from_config(options_from_plain(sampler.config))


def full_timeline(source: Any, evaluations: int) -> Any:
    """A copy of the source that is ready for its T = `evaluations`, or None where a number of steps alone does not
    tell.

    Steps are counted down from T + 1: some samplers evaluate the model once less than asked, once more, or twice in a
    step.
    """
    for num_steps in range(evaluations + 1, 0, -1):
        ready = copy.deepcopy(source)
        try:
            ready.set_timesteps(num_steps)
        except Exception:  # it wants more than a number, such as the shift that its pipeline works out
            return None
        if len(ready.timesteps) <= evaluations:
            return ready if len(ready.timesteps) == evaluations else None
    return None


def times_tensor(timeline: Any, steps: Sequence[Step], source: Any) -> torch.Tensor:
    """Times (B,) in the type that the source holds its own in: float32, or integers for places in training's table.

    timeline: the source's own (`full_timeline`), or None.
    """
    times = [step.timestep for step in steps]
    integers = all(time.is_integer() for time in times) and "FlowMatch" not in type(source).__name__
    dtype = timeline.timesteps.dtype if timeline is not None else torch.int64 if integers else torch.float32
    if not dtype.is_floating_point and not integers:
        dtype = torch.float32
    return torch.tensor(times, dtype=dtype)


def noise_levels(timeline: Any, steps: Sequence[Step], source: Any) -> torch.Tensor | None:
    """Sigmas float32 (B + 1,) at the steps' times and after the last one, in the source's own convention.

    They are the source's own where its timeline has the program's times. Else they follow from the times: of flow
    matching t over the number of training steps; of continuous times exp(4 t) (arXiv 2206.00364, table 1); else
    √((1 − ᾱ) / ᾱ), linear between training steps. None where nothing tells.
    """
    own = None if timeline is None else _own_levels(timeline, steps)
    if own is not None:
        return own
    times, options = np.array([step.timestep for step in steps]), source.config
    with contextlib.suppress(AttributeError):
        if is_flow(source):
            levels = times / options.num_train_timesteps
        elif "sigma_data" in options or options.get("timestep_type") == "continuous":
            levels = np.exp(4.0 * times)
        else:
            signal = source.alphas_cumprod.double().numpy()
            with np.errstate(divide="ignore", invalid="ignore"):  # of zero signal, levels are infinite
                levels = np.interp(times, np.arange(len(signal)), ((1 - signal) / signal) ** 0.5)
        last = 1.0 if options.get("invert_sigmas") else 0.0
        return torch.tensor([*levels, last], dtype=torch.float32)
    return None


def _own_levels(timeline: Any, steps: Sequence[Step]) -> torch.Tensor | None:
    """The timeline's sigmas at the steps, if their times are the timeline's and there is one sigma more than times."""
    sigmas, times = getattr(timeline, "sigmas", None), timeline.timesteps.double().cpu().numpy()
    if sigmas is None or len(sigmas) != len(times) + 1:
        return None
    places = [step.step_index for step in steps]
    if not np.allclose(times[places], [step.timestep for step in steps], rtol=1e-5, atol=1e-5):
        return None
    return torch.as_tensor(sigmas).float().cpu()[[*places, -1]]
