"""One-line messages: text from outside (file names, values, other libraries' errors) made fit for them, and commands they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from otcache.schemas.errors import ArtifactError

if TYPE_CHECKING:
    from otcache.schemas.manifest import Engine

AGAIN = "restore it from where the artifact came from, or compile it again"


def one_line(value: object, limit: int = 240) -> str:
    """`value` as one printable line of at most `limit` characters: no line breaks, no escape sequences."""
    text = str(value)[: 4 * limit]
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def damaged(name: str, found: object, expected: object, fix: str = AGAIN) -> ArtifactError:
    """The error of a part of an artifact that is not what it has to be. name, found: may come from outside."""
    return ArtifactError(
        f"artifact is damaged: {one_line(name)}: found {one_line(found)}: expected {one_line(expected)}: {fix}"
    )


def build_command(artifact: object, plans: Engine, profile: Mapping[str, Sequence[int]] | None = None) -> str:
    """What builds plans of the same backend and target, for the same profile unless another one is given."""
    line = f"otc build-engines {one_line(artifact)} --backend {plans.backend} --target {one_line(plans.target)}"
    profile = plans.profile if profile is None else profile
    return f"{line} --profile {profile_text(profile)}" if profile else line


def profile_text(profile: Mapping[str, Sequence[int]]) -> str:
    """`batch=1:1:4,height=512:1024:1024`, as `--profile` takes it."""
    return ",".join(f"{name}={':'.join(map(str, sizes))}" for name, sizes in profile.items())


def readable_size(size_bytes: int) -> str:
    """`14.1 MB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes} B"
