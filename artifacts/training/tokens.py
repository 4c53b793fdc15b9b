"""Byte-level tokenizers of the Qwen and Llama kinds that know every word of the captions and of a prompt's template."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

LLAMA_REGEX = PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
"""How Llama 3 cuts text into words: as Qwen does, but up to three digits together."""


def _train_tokenizer(corpus: Iterable[str], regex: str, specials: Sequence[str]) -> Tokenizer:
    """Byte-pair encoding merged until every word of the corpus is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
    )
    for special in specials:
        corpus = [text.replace(special, "\x00") for text in corpus]
    tokenizer.train_from_iterator([part for text in corpus for part in text.split("\x00") if part], trainer)
    return tokenizer


def qwen_tokenizer(corpus: Iterable[str]) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer for which every word of the corpus is one token."""
    specials = ("<|im_start|>", "<|im_end|>")
    model = json.loads(_train_tokenizer(corpus, PRETOKENIZE_REGEX, specials).to_str())["model"]
    vocab = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]], model_max_length=2048)
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    tokenizer.padding_side = "right"
    return tokenizer


def llama_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """A Llama 3 tokenizer for which every word of the corpus is one token; pads on the right."""
    specials = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = _train_tokenizer(corpus, LLAMA_REGEX, specials)
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|begin_of_text|>", *specials, "<pad>")])
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=512,
    )


def train_features(
    parameters: Iterable[nn.Parameter],
    features: Callable[[list[str]], Sequence[Tensor]],
    attributes: dict[str, tuple[str, ...]],
    draw: Callable[[torch.Generator, int], tuple[list[str], list[dict[str, str]]]],
    *,
    width: int,
    steps: int,
    seed: int = 0,
) -> None:
    """Train text encoders until linear layers on each of their features name every attribute of a caption.

    features: captions → tensors (n, width). draw: (random, n) → captions and the values of their attributes.
    """
    kinds = len(features(["a"]))
    readers = nn.ModuleDict(
        {
            f"{kind}_{name}": nn.Linear(width, len(values))
            for name, values in attributes.items()
            for kind in range(kinds)
        }
    )
    optimizer = torch.optim.AdamW([*parameters, *readers.parameters()], lr=2e-3)
    random = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        captions, values = draw(random, 64)
        loss = torch.zeros(())
        for kind, feature in enumerate(features(captions)):
            for name, names in attributes.items():
                target = torch.tensor([names.index(value[name]) for value in values])
                loss = loss + nn.functional.cross_entropy(readers[f"{kind}_{name}"](feature), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"text encoders: step {step + 1}/{steps}, loss {loss.item():.4f}", flush=True)
