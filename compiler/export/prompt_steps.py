"""Part of pass `export`: what a pipeline does to prompts before its tokenizer, found by giving it prompts that show it.

Some pipelines change text in Python: Wan reads HTML's character references, repairs Unicode and collapses white space.
The runtime has only what the manifest lists, so that steps are tried until the exported encoders give the pipeline's
own conditioning on prompts where each step shows. A pipeline that does something else is not served from the prompt on.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from otcache.schemas.prompt_steps import PromptStep

from ..pipelines.call import CallOptions
from ..pipelines.full_run import positive_conditioning
from ..pipelines.interface import Interface
from ..pipelines.prompts import class_prompts
from .text_encoders import Encoders

_CLEAN: tuple[PromptStep, ...] = ("unescape", "unescape", "collapse", "strip")
"""`prompt_clean` of Wan and its relatives, without ftfy."""
CANDIDATES: tuple[tuple[PromptStep, ...], ...] = (
    (),
    ("strip",),
    ("collapse", "strip"),
    ("lower", "strip"),
    _CLEAN,
    *((("ftfy", *_CLEAN),) if importlib.util.find_spec("ftfy") else ()),
)
ROUNDING = 1e-3
"""Of conditioning, relative: what two ways to compute the same encoder may differ by."""


def telling_prompts(prompt: str) -> list[str]:
    """Prompts in words of a plain one, each of which a cleaning of text changes.

    >>> telling_prompts("a ring")[:2]
    ['&#97; ring', '&amp;#97; ring']
    """
    first, rest = prompt[:1], prompt[1:]
    wide = "".join(chr(ord(each) + 0xFEE0) if "!" <= each <= "~" else each for each in prompt)
    return [
        f"&#{ord(first)};{rest}" if first else "&#97;",
        f"&amp;#{ord(first)};{rest}" if first else "&amp;#97;",
        f"&lt;{prompt}&gt; &amp; &quot;",
        wide,
        f"ﬁ {prompt}",
        f"cafe\u0301 {prompt}",
        f"“{prompt}” it\u2019s",
        f"cafÃ© {prompt}",
        f"  {prompt.replace(' ', '   ')}\n\t",
        prompt.upper(),
    ]


def with_prompt_steps(
    encoders: Encoders, pipeline: Any, interface: Interface, call: CallOptions, prompts: Sequence[str]
) -> Encoders | None:
    """The encoders with tokenizers that do to prompts what the pipeline does; None where no listed steps do.

    Args:
        encoders: as they are exported.
        pipeline, interface, call: the pipeline that they are of, and how it is called.
        prompts: some that the tokenizers know the words of.
    """
    if class_prompts(pipeline) is not None:
        return encoders
    texts = [prompts[0], *telling_prompts(prompts[0])]
    expected = positive_conditioning(pipeline, interface, call, texts)
    for steps in CANDIDATES:
        specifications = tuple(dataclasses.replace(each, steps=steps) for each in encoders.tokenizers)
        with torch.no_grad():
            made = encoders.module(**{each.input_name: each.encode(texts) for each in specifications})
        if _same_conditioning(made, expected):
            return dataclasses.replace(encoders, tokenizers=specifications)
    return None


def _same_conditioning(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether the tensors of both are the same but for rounding, and but for padding that a mask among them hides."""
    masks = [value for name, value in expected.items() if "mask" in name and value.ndim == 2]
    return all(_close(value, expected[name], masks) for name, value in found.items() if name in expected)


def _close(found: Tensor, expected: Tensor, masks: Sequence[Tensor]) -> bool:
    if found.shape != expected.shape:
        return False
    found, expected = found.float(), expected.float()
    for mask in masks:
        if found.ndim == 3 and found.shape[:2] == mask.shape:
            found, expected = found * mask[..., None], expected * mask[..., None]
    return bool((found - expected).norm() <= ROUNDING * expected.norm())
