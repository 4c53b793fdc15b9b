"""Part of pass `export`: a tokenizer of transformers → JSON of the `tokenizers` library, which the runtime loads.

What comes out gives the ids that the pipeline gives, checked here on prompts that tokenizers differ on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
from tokenizers import normalizers
from torch import Tensor

from otcache.schemas.errors import ArtifactError, ModelError
from otcache.schemas.manifest import PLACE
from otcache.schemas.prompt_steps import PromptStep, apply_steps
from otcache.schemas.tokenizer_file import parse_tokenizer

PROBES = (
    "",
    "a small red ring on blue",
    "A Photo,  of: two (2) CATS!",
    "a café – naïve 北京 🙂 ﬁne ½",
    "one two three four five six seven eight nine ten " * 60,
)
"""Prompts on which the exported tokenizers are compared: empty, plain, punctuation, Unicode, and one that is cut."""


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer of a text encoder: encode the template, cut to `length`, pad on the right with `pad_id`."""

    input_name: str
    """The encoder's input that takes the ids."""
    tokenizer_json: str
    """As `tokenizers.Tokenizer.to_str` writes it, without truncation or padding."""
    length: int
    """Ids of every prompt."""
    pad_id: int
    template: str = PLACE
    """What is encoded, with the prompt in the place of `{}`."""
    steps: tuple[PromptStep, ...] = ()
    """What is done to the prompt before."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Token ids of prompts, int64 (len(prompts), length)."""
        texts = [self.template.replace(PLACE, apply_steps(prompt, self.steps)) for prompt in prompts]
        return torch.tensor([encoding.ids for encoding in self.load().encode_batch(texts)], dtype=torch.int64)

    def load(self) -> tokenizers.Tokenizer:
        """Load the tokenizer as the runtime does, to encode prompts to `length` ids."""
        tokenizer = tokenizers.Tokenizer.from_str(self.tokenizer_json)
        tokenizer.enable_truncation(self.length)
        tokenizer.enable_padding(length=self.length, pad_id=self.pad_id)
        return tokenizer


def convert_tokenizer(
    tokenizer: Any, input_name: str, length: int, template: str = PLACE, *, lower: bool = False
) -> TokenizerSpec:
    """Write a tokenizer as JSON, and prove that it gives the ids of `tokenizer(prompt, padding="max_length", …)`.

    Args:
        tokenizer: of transformers, with a fast backend.
        input_name: the text encoder's input that takes the ids.
        length: ids of every prompt, template included.
        template: what the pipeline encodes, with the prompt in the place of `{}`.
        lower: the pipeline gives it prompts in lower case, without white space at either end.

    Raises:
        ModelError: the tokenizer has no fast backend, or what readers refuse (`schemas/tokenizer_file.py`); or the ids
            differ on one of `PROBES`.
    """
    subject = f"{type(tokenizer).__name__} of {input_name}"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.pad_token_id is None:
        lacks = "backend of the `tokenizers` library" if backend is None else "padding token"
        raise ModelError(f"{subject} has no {lacks}: expected a fast tokenizer with one; convert it with transformers")
    plain = tokenizers.Tokenizer.from_str(backend.to_str())
    plain.no_truncation()
    plain.no_padding()
    if lower:
        own = [plain.normalizer] if plain.normalizer is not None else []
        plain.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase(), *own])
    spec = TokenizerSpec(input_name, plain.to_str(), length, tokenizer.pad_token_id, template)
    try:
        parse_tokenizer(spec.tokenizer_json, subject)
    except ArtifactError as error:
        raise ModelError(
            f"{subject} has what no reader of artifacts takes: {error}: load the tokenizer that its family has"
        ) from None
    received = spec.encode(PROBES)
    expected = tokenizer(
        [template.replace(PLACE, prompt.lower().strip() if lower else prompt) for prompt in PROBES],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    for prompt, ours, theirs in zip(PROBES, received, expected, strict=True):
        if not torch.equal(ours, theirs):
            raise ModelError(
                f"{subject}: its JSON gives other ids than the pipeline for {prompt[:40]!r} ({ours[:8].tolist()}…, "
                f"expected {theirs[:8].tolist()}…); check that it pads and truncates on the right and has no "
                "preprocessing in Python"
            )
    return spec
