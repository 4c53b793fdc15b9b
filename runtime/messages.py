"""One-line messages: text from outside (file names, values, other libraries' errors) made fit for them, and commands
they name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from otcache.schemas.messages import one_line

if TYPE_CHECKING:
    from otcache.schemas.manifest import Engine


def build_command(artifact: object, plans: Engine, profile: Mapping[str, Sequence[int]] | None = None) -> str:
    """What builds plans of the same backend and target, for the same profile unless another one is given."""
    line = f"otc build-engines {one_line(artifact)} --backend {plans.backend} --target {one_line(plans.target)}"
    profile = plans.profile if profile is None else profile
    return f"{line} --profile {profile_text(profile)}" if profile else line


def profile_text(profile: Mapping[str, Sequence[int]]) -> str:
    """`batch=1:1:4,height=512:1024:1024`, as `--profile` takes it."""
    return ",".join(f"{name}={':'.join(map(str, sizes))}" for name, sizes in profile.items())


def readable_size(size_bytes: int) -> str:
    """A size in words, in powers of 1000.

    >>> readable_size(14_123_456), readable_size(815)
    ('14.1 MB', '815 B')
    """
    from rich.filesize import decimal

    return f"{size_bytes} B" if size_bytes < 1000 else decimal(size_bytes)


OPTIONS = {
    "height": "--sizes",
    "width": "--sizes",
    "num_frames": "--frame-counts",
    "max_sequence_length": "--text-lengths",
}
"""What `otc compile` takes to serve more of an axis."""

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Import name by backend."""
