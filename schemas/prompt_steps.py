"""What is done to a prompt before it is tokenized, as some pipelines do it in Python: steps that a manifest lists."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from typing import Literal

from .errors import HostError

PromptStep = Literal["ftfy", "unescape", "collapse", "strip", "lower"]


def apply_steps(text: str, steps: Sequence[PromptStep]) -> str:
    """The text after the steps, one after the other.

    `ftfy` repairs it with the package of that name (`ftfy.fix_text`); `unescape` replaces HTML's character references;
    `collapse` makes every run of Unicode's white space one space; `strip` removes white space at both ends; `lower`
    makes it lower case.

    Raises:
        HostError: the package ftfy is needed and not installed.

    >>> apply_steps("  a &amp;amp; b  c", ["unescape", "unescape", "collapse", "strip"])
    'a & b c'
    """
    for step in steps:
        text = _STEPS[step](text)
    return text


def _fix(text: str) -> str:
    try:
        import ftfy
    except ImportError:
        raise HostError(
            "prompts of this artifact pass through a package that is not installed (ftfy): run pip install ftfy"
        ) from None
    fixed: str = ftfy.fix_text(text)
    return fixed


def _collapse(text: str) -> str:
    return re.sub(r"[^\S\x1c-\x1f]+", " ", text)  # Unicode's White_Space; Python's \s has four separators more


_STEPS: dict[PromptStep, Callable[[str], str]] = {
    "ftfy": _fix,
    "unescape": html.unescape,
    "collapse": _collapse,
    "strip": str.strip,
    "lower": str.lower,
}
