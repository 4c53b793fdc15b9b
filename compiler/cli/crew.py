"""The crew of a command that was asked for workers. Imports click only, and Ray where it is asked for."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..options import CompileOptions
    from ..passes.crew import Crew
    from ..workspace.progress import Reporter


@contextlib.contextmanager
def crew_for(
    options: CompileOptions, reporter: Reporter, workers: int | None, address: str | None
) -> Iterator[tuple[Crew | None, Reporter]]:
    """A crew while the context lasts, with the reporter that shows it; None where no workers are asked for.

    Args:
        options: of the command.
        reporter: that shows it.
        workers: of `--workers`.
        address: of `--ray`.

    Raises UsageError for an address without workers, HostError where Ray is missing, or a cluster too small.
    """
    from otcache.schemas.errors import HostError, UsageError

    if workers == 0 and address is not None:
        raise UsageError(f"--workers is 0 and --ray is {address}: expected at least 1 worker, or no --ray")
    if not workers and address is None:
        yield None, reporter
        return
    if importlib.util.find_spec("ray") is None:
        raise HostError("--workers and --ray need a package that is not installed (ray): pip install 'otcache[ray]'")
    from ..fleet.crew import crew_of

    with crew_of(options, reporter, workers, address) as found:
        yield found
