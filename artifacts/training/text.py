"""Tiny CLIP and T5 text encoders with real tokenizers, trained to tell a caption's attributes apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from otcache.artifacts.training import scenes

TEXT_LENGTH = 12
"""Tokens of T5, which knows every word: nine words and an end."""
POOLED_LENGTH = 32
"""Tokens of CLIP, which splits some words; only its pooled output is used."""
ATTRIBUTES = {
    "shape": tuple(scenes.SHAPES),
    "colour": tuple(scenes.PALETTE),
    "size": tuple(scenes.SIZES),
    "texture": tuple(scenes.TEXTURES),
    "background": tuple(scenes.BACKGROUNDS),
}


def make_tokenizers(captions: Sequence[str] | None = None) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """A CLIP (byte-pair) and a T5 (unigram) tokenizer that know every word of the captions (the scenes') and all
    letters.
    """
    captions = captions or [scene.long_caption for scene in scenes.all_scenes()]
    words = sorted({word for caption in captions for word in caption.split()})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]

    vocab: dict[str, int] = {}
    for token in [*letters, *(letter + "</w>" for letter in letters)]:
        vocab[token] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in words:
        prefix = word[0] if len(word) > 1 else word + "</w>"
        for index, letter in enumerate(word[1:], start=1):
            tail = letter + ("</w>" if index == len(word) - 1 else "")
            if (prefix, tail) not in merges:
                merges.append((prefix, tail))
            prefix += tail
            vocab.setdefault(prefix, len(vocab))
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    clip = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=POOLED_LENGTH)

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -2.0) for word in words]
    pieces += [(letter, -8.0) for letter in letters]
    t5 = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)
    return clip, t5


def make_encoders(clip: CLIPTokenizer, t5: T5Tokenizer) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Untrained text encoders: pooled CLIP output (n, 64), T5 output (n, TEXT_LENGTH, 64)."""
    clip_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=POOLED_LENGTH,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
    )
    t5_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(t5),
            d_model=64,
            d_kv=32,
            d_ff=128,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    return clip_encoder, t5_encoder


def tokenize(tokenizer: CLIPTokenizer | T5Tokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids int64 (n, the tokenizer's length), padded and cut as the Flux pipeline does."""
    length = tokenizer.model_max_length
    encoded = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoded.input_ids


def train_encoders(
    clip: CLIPTokenizer, t5: T5Tokenizer, *, steps: int = 1500, seed: int = 0
) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Train both encoders until a linear layer on their outputs names every attribute; frozen afterwards."""
    torch.manual_seed(seed)
    clip_encoder, t5_encoder = make_encoders(clip, t5)
    readers = nn.ModuleDict(
        {
            f"{encoder}_{name}": nn.Linear(64, len(values))
            for name, values in ATTRIBUTES.items()
            for encoder in ("clip", "t5")
        }
    )
    parameters = [*clip_encoder.parameters(), *t5_encoder.parameters(), *readers.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    everything = scenes.all_scenes()
    random = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        batch = [everything[int(i)] for i in torch.randint(len(everything), (64,), generator=random)]
        captions = [scene.caption if step % 2 else scene.long_caption for scene in batch]
        pooled = clip_encoder(tokenize(clip, captions)).pooler_output
        tokens = t5_encoder(tokenize(t5, captions))[0].mean(dim=1)
        loss = torch.zeros(())
        for name, values in ATTRIBUTES.items():
            target = torch.tensor([values.index(getattr(scene, name)) for scene in batch])
            for encoder, features in (("clip", pooled), ("t5", tokens)):
                loss = loss + nn.functional.cross_entropy(readers[f"{encoder}_{name}"](features), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 250 == 0 or step == steps - 1:
            print(f"text encoders: step {step + 1}/{steps}, loss {loss.item():.4f}", flush=True)
    return clip_encoder.eval().requires_grad_(False), t5_encoder.eval().requires_grad_(False)
