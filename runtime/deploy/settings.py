"""What a deployment is to be: the same few settings for every target."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from otcache.schemas.errors import UsageError
from otcache.schemas.manifest import Manifest
from otcache.schemas.messages import one_line

Target = Literal["triton", "ray-serve", "docker"]
Device = Literal["cpu", "cuda"]
TARGETS: tuple[Target, ...] = get_args(Target)
DEVICES: tuple[Device, ...] = get_args(Device)
NAME = re.compile(r"(?=.{1,63}$)[A-Za-z0-9]+(?:[_-][A-Za-z0-9]+)*")
"""Of a model of Triton, an application of Ray Serve, and a container's image: what all three take as it is."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of a deployment, checked. Raises UsageError."""

    name: str
    device: Device = "cpu"
    instances: int = 1
    """Copies of the artifact that draw at once: Triton's instances, at most so many replicas, the server's workers."""
    threads: int | None = None
    """CPU threads of each instance; None takes one for each core, on Ray one."""
    max_batch: int = 4
    """Pictures that are drawn in one run."""
    max_wait_s: float = 0.02
    """That a request waits for others to join it."""
    capacity: int = 16
    """Requests that may wait."""
    timeout_s: float = 60.0
    """That a request may take, waiting included."""
    lowest_budget: str | None = None
    """What load may lower budgets to; None for the artifact's lowest."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UsageError(
                f"--name is {one_line(repr(self.name), 80)}: expected words of letters and digits with - or _ "
                "between them, at most 63 characters: choose one"
            )


def check_settings(settings: Settings, manifest: Manifest) -> None:
    """Raise UsageError for a floor that is none of the artifact's budgets."""
    if settings.lowest_budget not in (None, *manifest.budgets):
        raise UsageError(
            f"--lowest-budget is {one_line(settings.lowest_budget, 40)}: expected one of {', '.join(manifest.budgets)}"
        )
