"""Room that a compile takes in its workspace: known before it starts, and checked then.

Full runs stay there until they are deleted. Beside them is a scratch folder, which goes with the compile: walks, and
evaluated outputs that walks share, of which no more than `OUTPUT_BYTES` are kept. Residuals that are being weighed, a
micro-batch's at a time, come on top where there are any.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from otcache.schemas.errors import HostError

from ..calibration.local import OUTPUT_BYTES
from ..pipelines.full_run import conditioning_of
from ..workspace.workspace import ELSEWHERE
from .session import Session


@dataclass(frozen=True, kw_only=True)
class RunBytes:
    """Bytes of one full run in the workspace."""

    latents: int
    """T + 1 latents, and the first output."""
    gram: int
    """Inner products of all of them."""
    conditioning: int
    pictures: int
    outputs: int
    """T outputs, while the run is made."""

    @property
    def kept(self) -> int:
        """What stays of it."""
        return self.latents + self.gram + self.conditioning + self.pictures


def run_bytes(session: Session, steps: int, conditioning: int = 0) -> RunBytes:
    """Of one full run of T evaluations, with so many bytes of conditioning."""
    call, elements = session.call, math.prod(session.interface.latents_shape)
    return RunBytes(
        latents=4 * (steps + 2) * elements,
        gram=8 * (2 * steps + 1) ** 2,
        conditioning=conditioning,
        pictures=4 * 3 * (call.num_frames or 1) * call.height * call.width,
        outputs=4 * steps * elements,
    )


def conditioning_bytes(session: Session, prompts: Sequence[str]) -> int:
    """What the pipeline makes of the first prompt."""
    found = conditioning_of(
        session.model.pipeline, session.interface, session.call, session.options.nominal_scale, prompts[:1]
    )
    return sum(value.nbytes for value in found.values())


def scratch_bytes(session: Session, prompts: int, held_out: int) -> int:
    """At most at once, while programs are searched and measured on so many prompts."""
    options, latents = session.options, 4 * math.prod(session.interface.latents_shape)
    tried = [options.reference] * options.limits.reference_graphs + [options.anchor] * options.trials
    tried += [budget for budget in options.budgets for _ in range(options.limits.weights + options.limits.graphs)]
    outputs = min(OUTPUT_BYTES, sum(tried) * prompts * latents)
    return prompts * latents + outputs + len(options.budgets) * held_out * latents


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Raises HostError where a disk has less room than is needed.

    Args:
        folder: on the disk; it may be missing.
        needed: bytes.
        what: takes them.
    """
    free = free_disk(folder)
    if needed > free:
        raise HostError(
            f"no space left on the disk of {existing(folder)} ({free / 1e6:.1f} MB free): {what} take "
            f"{needed / 1e6:.1f} MB: free some or {ELSEWHERE}, or give fewer --calibration-prompts and "
            "--evaluation-prompts"
        )


def free_disk(folder: Path) -> int:
    """Bytes that are free on the disk where a folder is or will be."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    absolute = folder.absolute()
    return next(each for each in (absolute, *absolute.parents) if each.exists())
