"""What happens when a pipeline is not what a program was calibrated for: an error, or a warning where the user prefers
it.
"""

from __future__ import annotations

import warnings

from otcache.schemas.errors import OTCacheError


class CalibrationWarning(UserWarning):
    """A program runs under other conditions than it was calibrated for: its quality is not what the artifact says."""


def refuse(error: OTCacheError, *, strict: bool) -> None:
    """Raise `error` if strict, else warn with its message."""
    if strict:
        raise error
    warnings.warn(str(error), CalibrationWarning, stacklevel=3)
