"""Text from outside (file names, values, other libraries' errors) made fit for a one-line message."""

from __future__ import annotations


def one_line(value: object, limit: int = 240) -> str:
    """`value` as one printable line of at most `limit` characters: no line breaks, no escape sequences."""
    text = str(value)[: 4 * limit]
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
