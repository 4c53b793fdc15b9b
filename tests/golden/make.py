"""How the folders beside this file were made: `python tests/golden/make.py VERSION`, with the compiler of that version.

Each holds `artifact/`, compiled by `otc compile` from a tiny random FLUX (its reports removed: attachments may be), and
what the runtime of its time drew from it: `request.json`, and of each budget `latents-<budget>.npy` (float32) and
`pictures-<budget>.npy` (uint8); from 1.5 on `sized-<budget>.npy` as well, latents at another size than the artifact's
own; from 1.6 on of outputs, with enough prompts for slopes (and from 1.7 on for means). `tests/runtime/test_golden.py`
holds every later runtime to them. A folder is made once, when its version is released, and never again: a runtime that
cannot reproduce it is wrong, not the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
REQUEST = {"prompt": ["a red ring", "a blue star"], "seed": 11}
SIZE = {"height": 24, "width": 16, "max_sequence_length": 4}
OPTIONS = (
    "--budgets",
    "2,3",
    "--num-inference-steps",
    "6",
    "--payload",
    "output",
    "--calibration-prompts",
    "8",
    "--evaluation-prompts",
    "2",
    "--trials",
    "4",
    "--sizes",
    "16x16,24x16",
    "--text-lengths",
    "6,4",
)
COLOURS, SHAPES = ("red", "blue", "green", "white"), ("ring", "star", "cross")


def tokenizers() -> tuple[Any, Any]:
    """A CLIP tokenizer of single letters and a T5 tokenizer of the prompts' words."""
    from transformers import CLIPTokenizer, T5Tokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=12)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -2.0) for word in ("a", *COLOURS, *SHAPES)] + [(letter, -8.0) for letter in letters]
    return clip, T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=6)


def save_model(folder: Path) -> None:
    """A FluxPipeline folder with random weights: one double and one single block, 16 × 16 pictures."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    clip, t5 = tokenizers()
    width = 16
    clip_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=width,
            intermediate_size=width,
            projection_dim=width,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=12,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
    )
    t5_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(t5),
            d_model=width,
            d_kv=8,
            d_ff=width,
            num_layers=1,
            num_heads=1,
            decoder_start_token_id=0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=0.7,
        shift_factor=0.1,
        force_upcast=False,
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        guidance_embeds=False,
        axes_dims_rope=(2, 2, 4),
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip_encoder,
        tokenizer=clip,
        text_encoder_2=t5_encoder,
        tokenizer_2=t5,
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)
    (folder / "call.json").write_text('{"height": 16, "width": 16, "max_sequence_length": 6}')
    (folder / "prompts.txt").write_text("".join(f"a {colour} {shape}\n" for colour in COLOURS for shape in SHAPES))


def make(target: Path) -> None:
    import numpy as np

    from otcache.runtime import Sampler

    target.mkdir()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        save_model(work / "tiny")
        call = "from otcache.runtime.cli.main import main; main(prog_name='otc')"
        line = [sys.executable, "-c", call, "compile", str(work / "tiny"), *OPTIONS, "-o", str(work / "artifact")]
        subprocess.run(line, check=True, env={**os.environ, "OTC_CACHE": str(work / "cache")})
        shutil.rmtree(work / "artifact" / "report")
        (work / "artifact" / "report.html").unlink()
        shutil.copytree(work / "artifact", target / "artifact")
    (target / "request.json").write_text(json.dumps({**REQUEST, "size": SIZE}, indent=1) + "\n")
    with Sampler.load(target / "artifact", threads=1) as sampler:
        for budget in sampler.budgets:
            latents = sampler.sample(sampler.encode(REQUEST["prompt"]), budget=budget, seed=REQUEST["seed"])
            np.save(target / f"latents-{budget}.npy", latents, allow_pickle=False)
            pictures = np.round(255 * sampler.decode(latents)).astype(np.uint8)
            np.save(target / f"pictures-{budget}.npy", pictures, allow_pickle=False)
            encoded = sampler.encode(REQUEST["prompt"], max_sequence_length=SIZE["max_sequence_length"])
            sized = sampler.sample(encoded, budget=budget, seed=REQUEST["seed"], **SIZE)
            np.save(target / f"sized-{budget}.npy", sized, allow_pickle=False)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tests/golden/make.py VERSION")
    make(Path(__file__).parent / sys.argv[1])
