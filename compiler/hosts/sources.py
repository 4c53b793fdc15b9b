"""The diffusers scheduler that a program was lowered from, on the host: its options, its noise levels, its ways to add
noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch

from otcache.schemas.errors import ArtifactError
from otcache.schemas.manifest import Sampler

from ..models.digests import options_from_plain
from ..programs.lower import is_flow


def source_scheduler(sampler: Sampler) -> Any:
    """A scheduler of the manifest's class and options. Raises ArtifactError for a class that this diffusers has not."""
    found = getattr(diffusers, sampler.scheduler, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise ArtifactError(
            f"sampler.scheduler is {sampler.scheduler[:80]!r}: expected a scheduler of diffusers {diffusers.__version__}: "
            "install the version that the artifact was compiled with"
        )
    return found.from_config(options_from_plain(sampler.config))


def times_tensor(source: Any, timesteps: Sequence[float]) -> torch.Tensor:
    """Times (B,) as the source itself would hold them: flow matching in float32, tables of training steps as integers."""
    whole = all(float(time).is_integer() for time in timesteps)
    return torch.tensor(timesteps, dtype=torch.int64 if whole and _training_table(source) else torch.float32)


def noise_levels(source: Any, timesteps: Sequence[float]) -> torch.Tensor:
    """Sigmas float32 (B + 1,) at the given times and after the last one, in the source's own convention.

    Flow matching: the time over the number of training steps. Else √((1 − ᾱ) / ᾱ), between training steps linear.
    """
    if is_flow(source):
        levels = np.asarray(timesteps) / source.config.num_train_timesteps
    else:
        signal = source.alphas_cumprod.double().numpy()
        levels = np.interp(timesteps, np.arange(len(signal)), ((1 - signal) / signal) ** 0.5)
    last = 1.0 if source.config.get("invert_sigmas") else 0.0
    return torch.tensor([*levels, last], dtype=torch.float32)


def _training_table(source: Any) -> bool:
    """Whether times are places in a table of training steps."""
    return "FlowMatch" not in type(source).__name__
