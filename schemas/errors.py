"""The one exception tree. Every message names the subject, what was received, what was expected and the fix."""

from __future__ import annotations


class OTCacheError(Exception):
    """Base of everything that otcache raises on purpose. `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(OTCacheError):
    """An option or argument is out of its range, or a place for results cannot be written."""

    exit_code = 2


class ModelError(OTCacheError):
    """A model cannot be loaded, or holds something that cannot be compiled."""

    exit_code = 3


class ArtifactError(OTCacheError):
    """An artifact is damaged, incomplete or of an unknown version."""

    exit_code = 4


class RequestError(OTCacheError):
    """A request asks for a budget, prompt or size that the artifact does not serve."""

    exit_code = 5


class HostError(OTCacheError):
    """This host lacks a package, a backend or a device."""

    exit_code = 6
