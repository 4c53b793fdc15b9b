"""Train the bundled model `shapes`: a small FLUX that draws one shape on a plain ground.

    python -m otcache.artifacts.training.shapes [--steps 3000] [-o artifacts/models/shapes]

Renders captioned pictures, trains text encoders, autoencoder and rectified-flow transformer, writes a standard
diffusers folder and checks, on pixels, that the pictures follow their captions. An interrupted run goes on where it
stopped: its state is kept in the work folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from otcache.artifacts.training import flow, scenes, text

SIDE = 48
LATENT_CHANNELS = 4
SHIFT = 3.0
GUIDANCE = 4.0


def make_dataset(count: int, seed: int) -> tuple[torch.Tensor, list[scenes.Scene]]:
    """Pictures uint8 (count, 3, SIDE, SIDE) and their scenes."""
    random = np.random.default_rng(seed)
    everything = scenes.all_scenes()
    chosen = [scenes.place(everything[int(i)], random) for i in random.integers(len(everything), size=count)]
    pictures = np.stack([scenes.render(scene, SIDE) for scene in chosen])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), chosen


def make_autoencoder() -> AutoencoderKL:
    """4× smaller on each side. One norm group: more would wash flat colours out. Residual branches start at zero."""
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=SIDE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
    )
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return vae


def train_autoencoder(pictures: torch.Tensor, *, steps: int, seed: int = 0) -> AutoencoderKL:
    """The trained autoencoder with its scale and shift."""
    torch.manual_seed(seed)
    vae = flow.train_autoencoder(make_autoencoder(), pictures, steps=steps, seed=seed)
    latents = flow.encode(vae, pictures[:1024])
    vae.register_to_config(
        scaling_factor=round(float(1 / latents.std()), 5), shift_factor=round(float(latents.mean()), 5)
    )
    return vae


def make_transformer() -> FluxTransformer2DModel:
    """Two double and six single blocks, width 96; gates and output start at zero (adaLN-zero)."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ((name.endswith(".linear") and "norm" in name) or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def train_transformer(
    latents: torch.Tensor,
    embeddings: tuple[torch.Tensor, torch.Tensor],
    captions: torch.Tensor,
    *,
    steps: int,
    checkpoint: Path,
    seed: int = 0,
) -> FluxTransformer2DModel:
    """Rectified flow; see `flow.train_transformer`.

    Args:
        latents: float32 (n, tokens, 4·LATENT_CHANNELS), scaled and packed.
        embeddings: pooled float32 (m, 64) and token features float32 (m, TEXT_LENGTH, 64) of every caption, the empty
            one last.
        captions: indices of each sample's captions, int64 (n, 2).
        steps: optimizer steps in all.
        checkpoint: file from which an interrupted run goes on.
        seed: of weights and batches.
    """
    side = int(latents.shape[1] ** 0.5)
    rows = torch.arange(side, dtype=torch.float32)
    image_ids = torch.cartesian_prod(torch.zeros(1), rows, rows)
    text_ids = torch.zeros(text.TEXT_LENGTH, 3)

    def predict(model: nn.Module, noisy: torch.Tensor, sigma: torch.Tensor, caption: torch.Tensor) -> torch.Tensor:
        return model(
            hidden_states=noisy,
            timestep=sigma,
            pooled_projections=embeddings[0][caption],
            encoder_hidden_states=embeddings[1][caption],
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]

    return flow.train_transformer(
        make_transformer,
        predict,
        latents,
        captions,
        len(embeddings[0]) - 1,
        steps=steps,
        checkpoint=checkpoint,
        seed=seed,
    )


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(n, c, h, w) → (n, h/2·w/2, 4c), as FluxPipeline packs latents."""
    count, channels, height, width = latents.shape
    return FluxPipeline._pack_latents(latents, count, channels, height, width)


def make_pipeline(
    vae: AutoencoderKL,
    clip: CLIPTokenizer,
    clip_encoder: CLIPTextModel,
    t5: T5Tokenizer,
    t5_encoder: T5EncoderModel,
    transformer: FluxTransformer2DModel,
) -> FluxPipeline:
    """A FLUX pipeline of the parts."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=clip_encoder,
        tokenizer=clip,
        text_encoder_2=t5_encoder,
        tokenizer_2=t5,
        transformer=transformer,
    )


def check(pipeline: FluxPipeline, *, count: int = 64, seed: int = 10_000) -> tuple[dict[str, float], np.ndarray]:
    """How often pictures have the colour, ground and shape of their caption, in [0, 1]; and the pictures."""
    everything = scenes.all_scenes()
    random = np.random.default_rng(seed)
    chosen = [everything[int(i)] for i in random.choice(len(everything), size=count, replace=False)]
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, count, 16):
        part = chosen[start : start + 16]
        pictures.append(
            pipeline(
                [scene.caption for scene in part],
                negative_prompt=[""] * len(part),
                true_cfg_scale=GUIDANCE,
                num_inference_steps=50,
                height=SIDE,
                width=SIDE,
                max_sequence_length=text.TEXT_LENGTH,
                output_type="np",
                generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(part))],
            ).images
        )
    drawn = (np.concatenate(pictures) * 255).round().astype(np.uint8)
    return flow.caption_shares(list(drawn), chosen), drawn


def write_prompts(folder: Path, count: int = 128, seed: int = 1) -> None:
    """Default calibration and evaluation prompts of the model, one caption a line."""
    everything = scenes.all_scenes()
    random = np.random.default_rng(seed)
    chosen = random.choice(len(everything), size=count, replace=False)
    (folder / "prompts.txt").write_text("".join(everything[int(i)].caption + "\n" for i in chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("artifacts/models/shapes"))
    parser.add_argument("--work", type=Path, default=Path("artifacts/work/shapes"), help="unfinished training state")
    parser.add_argument("--steps", type=int, default=3000, help="of the transformer")
    parser.add_argument("--vae-steps", type=int, default=2500)
    parser.add_argument("--pictures", type=int, default=24_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    clip, t5 = text.make_tokenizers()
    clip_encoder, t5_encoder = text.train_encoders(clip, t5, seed=options.seed)
    pictures, chosen = make_dataset(options.pictures, options.seed)
    vae = flow.load_or_train(
        AutoencoderKL,
        options.work / "vae",
        lambda: train_autoencoder(pictures, steps=options.vae_steps, seed=options.seed),
    )
    latents = pack((flow.encode(vae, pictures) - vae.config.shift_factor) * vae.config.scaling_factor)

    wordings, captions = flow.index_captions(chosen)
    with torch.no_grad():
        pooled = clip_encoder(text.tokenize(clip, [*wordings, ""])).pooler_output
        tokens = t5_encoder(text.tokenize(t5, [*wordings, ""]))[0]
    transformer = train_transformer(
        latents,
        (pooled, tokens),
        captions,
        steps=options.steps,
        checkpoint=options.work / "transformer.pt",
        seed=options.seed,
    )

    pipeline = make_pipeline(vae, clip, clip_encoder, t5, t5_encoder, transformer)
    flow.save_half(pipeline, options.output)
    write_prompts(options.output)
    flow.write_call(options.output, height=SIDE, width=SIDE, max_sequence_length=text.TEXT_LENGTH)
    shares, drawn = check(FluxPipeline.from_pretrained(options.output, torch_dtype=torch.float32))
    flow.contact_sheet(drawn).save(options.output / "samples.png")
    (options.output / "check.json").write_text(json.dumps(shares, indent=1) + "\n")
    weights = flow.weights_bytes(options.output)
    print(f"follows its caption on {shares}; weights {weights / 1e6:.1f} MB; {options.output}")
    if shares["both"] < 0.9:
        raise SystemExit("the model does not follow its captions well enough: train for longer with --steps")


if __name__ == "__main__":
    main()
