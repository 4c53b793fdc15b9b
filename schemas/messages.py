"""One-line messages: text from outside (file names, values, other libraries' errors) made fit for them."""

from __future__ import annotations

from .errors import ArtifactError

AGAIN = "restore it from where the artifact came from, or compile it again"


def one_line(value: object, limit: int = 240) -> str:
    """`value` as one printable line of at most `limit` characters: no line breaks, no escape sequences."""
    text = str(value)[: 4 * limit]
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def damage_error(name: str, found: object, expected: object, fix: str = AGAIN) -> ArtifactError:
    """The error of a part of an artifact that is not what it has to be. name, found: may come from outside."""
    return ArtifactError(
        f"artifact is damaged: {one_line(name)}: found {one_line(found)}: expected {one_line(expected)}: {fix}"
    )
