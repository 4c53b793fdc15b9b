"""Train the bundled model `shapes-qwen`: a small Qwen-Image that draws one plain shape on a plain ground.

    python -m otcache.artifacts.training.qwen [--steps 2500] [-o artifacts/models/shapes-qwen]

The same passes as in `shapes`: captioned pictures, text encoder, autoencoder, rectified flow, a standard diffusers
folder and a check on pixels. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from otcache.artifacts.training import flow, scenes, tokens

SIDE = 32
LATENT_CHANNELS = 4
TEXT_WIDTH = 64
TEXT_LENGTH = 16
"""Tokens of a prompt that the model is called with, of captions that have at most 11."""
SHIFT = 3.0
GUIDANCE = 4.0
NEGATIVE = " "
ATTRIBUTES = {
    "shape": tuple(scenes.SHAPES),
    "colour": tuple(scenes.PALETTE),
    "size": tuple(scenes.SIZES),
    "background": tuple(scenes.BACKGROUNDS),
}


def all_scenes() -> list[scenes.Scene]:
    """The plain scenes: a texture cannot be told at 32 pixels."""
    return [scene for scene in scenes.all_scenes() if scene.texture == "plain"]


def make_dataset(count: int, seed: int) -> tuple[Tensor, list[scenes.Scene]]:
    """Pictures uint8 (count, 3, 1, SIDE, SIDE) and their scenes."""
    random = np.random.default_rng(seed)
    everything = all_scenes()
    chosen = [scenes.place(everything[int(i)], random) for i in random.integers(len(everything), size=count)]
    pictures = np.stack([scenes.render(scene, SIDE) for scene in chosen])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)[:, :, None].contiguous(), chosen


def make_tokenizer() -> Qwen2Tokenizer:
    """Every word of captions and template is a token: the template's head is the 34 tokens that the pipeline drops."""
    captions = {caption for scene in all_scenes() for caption in (scene.caption, scene.long_caption)}
    template = QwenImagePipeline.__new__(QwenImagePipeline)
    QwenImagePipeline.__init__(template, None, None, None, None, None)
    return tokens.qwen_tokenizer([*sorted(captions), template.prompt_template_encode.format(" ")])


def make_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers of width 64 and the smallest vision tower, which nothing uses."""
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": 2048,
                "rope_theta": 10000.0,
                "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
                "bos_token_id": None,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": TEXT_WIDTH,
            },
            vision_start_token_id=0,
            vision_end_token_id=0,
            vision_token_id=0,
            image_token_id=len(tokenizer),
            video_token_id=len(tokenizer),
            tie_word_embeddings=True,
        )
    )


def train_text_encoder(pipeline: QwenImagePipeline, *, steps: int, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Train a pipeline's text encoder until its last token's and its mean output name every attribute."""
    everything = all_scenes()
    encode = QwenImagePipeline._get_qwen_prompt_embeds

    def features(captions: list[str]) -> list[Tensor]:
        embeds, mask = encode(pipeline, captions)
        mean = (embeds * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return [mean, embeds[torch.arange(len(captions)), mask.sum(1) - 1]]

    def draw(random: torch.Generator, count: int) -> tuple[list[str], list[dict[str, str]]]:
        chosen = [everything[int(i)] for i in torch.randint(len(everything), (count,), generator=random)]
        captions = [scene.long_caption if i % 2 else scene.caption for i, scene in enumerate(chosen)]
        return captions, [{name: getattr(scene, name) for name in ATTRIBUTES} for scene in chosen]

    encoder = pipeline.text_encoder
    tokens.train_features(encoder.parameters(), features, ATTRIBUTES, draw, width=TEXT_WIDTH, steps=steps, seed=seed)
    return encoder.eval().requires_grad_(False)


def make_autoencoder() -> AutoencoderKLQwenImage:
    """4× smaller on each side, one frame. Residual branches start at zero."""
    vae = AutoencoderKLQwenImage(
        base_dim=12,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    flow.preserve_variance(vae)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, QwenImageCausalConv3d):
                module.weight.mul_(module.kernel_size[0] ** 0.5)  # of its slices in time one meets a single frame
    flow.zero_weights(vae, lambda name: name.endswith((".conv2", ".proj")))
    return vae


@contextlib.contextmanager
def single_frame() -> Iterator[None]:
    """While it lasts, the autoencoder's causal convolutions see one frame as what it is: the kernel's last slice.

    The slices before it multiply the zeros that stand for earlier frames; leaving them out changes no value and is
    several times faster on a CPU.
    """

    def forward(self: QwenImageCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self._padding[0])[:, :, None]

    original = QwenImageCausalConv3d.forward
    QwenImageCausalConv3d.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        QwenImageCausalConv3d.forward = original  # type: ignore[method-assign]


def make_transformer() -> QwenImageTransformer2DModel:
    """Six blocks, width 96; gates and output start at zero (adaLN-zero)."""
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    flow.zero_weights(model, lambda name: name.endswith(("_mod.1", "norm_out.linear")) or name == "proj_out")
    return model


def make_pipeline(
    vae: AutoencoderKLQwenImage,
    tokenizer: Qwen2Tokenizer,
    text_encoder: nn.Module,
    transformer: QwenImageTransformer2DModel,
) -> QwenImagePipeline:
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def check(pipeline: QwenImagePipeline, *, count: int = 64, seed: int = 10_000) -> tuple[dict[str, float], np.ndarray]:
    """How often pictures have the colour, ground and shape of their caption, in [0, 1]; and the pictures."""
    everything = all_scenes()
    random = np.random.default_rng(seed)
    chosen = [everything[int(i)] for i in random.choice(len(everything), size=count, replace=False)]
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, count, 16):
        part = chosen[start : start + 16]
        pictures.append(
            pipeline(
                [scene.caption for scene in part],
                negative_prompt=[NEGATIVE] * len(part),
                true_cfg_scale=GUIDANCE,
                num_inference_steps=50,
                height=SIDE,
                width=SIDE,
                output_type="np",
                generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(part))],
            ).images
        )
    drawn = (np.concatenate(pictures) * 255).round().astype(np.uint8)
    return flow.caption_shares(list(drawn), chosen), drawn


def write_prompts(folder: Path, count: int = 128, seed: int = 1) -> None:
    """Default calibration and evaluation prompts of the model, one caption a line."""
    everything = all_scenes()
    chosen = np.random.default_rng(seed).choice(len(everything), size=count, replace=False)
    (folder / "prompts.txt").write_text("".join(everything[int(i)].caption + "\n" for i in chosen))


def train_autoencoder(pictures: Tensor, *, steps: int, seed: int) -> AutoencoderKLQwenImage:
    """The trained autoencoder with the mean and spread of its latents. pictures: uint8 (n, 3, 1, SIDE, SIDE)."""
    with single_frame():
        vae = flow.train_autoencoder(make_autoencoder(), pictures, steps=steps, seed=seed)
        latents = flow.encode(vae, pictures[:1024])
    vae.register_to_config(
        latents_mean=[round(float(v), 5) for v in latents.mean((0, 2, 3, 4))],
        latents_std=[round(float(v), 5) for v in latents.std((0, 2, 3, 4))],
    )
    return vae


def train_transformer(
    pipeline: QwenImagePipeline,
    latents: Tensor,
    chosen: list[scenes.Scene],
    *,
    steps: int,
    checkpoint: Path,
    seed: int,
) -> QwenImageTransformer2DModel:
    """Rectified flow; see `flow.train_transformer`.

    Args:
        pipeline: whose text encoder and tokenizer are trained.
        latents: float32 (n, LATENT_CHANNELS, 1, side, side), scaled.
        chosen: what each sample shows.
        steps: optimizer steps in all.
        checkpoint: file from which an interrupted run goes on.
        seed: of weights and batches.
    """
    side = latents.shape[-1]
    packed = QwenImagePipeline._pack_latents(latents[:, :, 0], len(latents), LATENT_CHANNELS, side, side)
    wordings, captions = flow.index_captions(chosen)
    with torch.no_grad():
        embeds, mask = pipeline._get_qwen_prompt_embeds([*wordings, NEGATIVE])

    def predict(model: nn.Module, noisy: Tensor, sigma: Tensor, caption: Tensor) -> Tensor:
        return model(
            hidden_states=noisy,
            timestep=sigma,
            encoder_hidden_states=embeds[caption],
            encoder_hidden_states_mask=mask[caption],
            img_shapes=[[(1, side // 2, side // 2)]] * len(noisy),
            return_dict=False,
        )[0]

    return flow.train_transformer(
        make_transformer,
        predict,
        packed,
        captions,
        len(wordings),
        steps=steps,
        rate=2e-3,
        checkpoint=checkpoint,
        seed=seed,
    )


def parse_options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("artifacts/models/shapes-qwen"))
    parser.add_argument(
        "--work", type=Path, default=Path("artifacts/work/shapes-qwen"), help="unfinished training state"
    )
    parser.add_argument("--steps", type=int, default=2500, help="of the transformer")
    parser.add_argument("--text-steps", type=int, default=400)
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--pictures", type=int, default=16_000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer()
    text_encoder = make_text_encoder(tokenizer)
    pipeline = make_pipeline(make_autoencoder(), tokenizer, text_encoder, make_transformer())
    pipeline.text_encoder = flow.load_or_train(
        Qwen2_5_VLForConditionalGeneration,
        options.work / "text_encoder",
        lambda: train_text_encoder(pipeline, steps=options.text_steps, seed=options.seed),
    )
    pictures, chosen = make_dataset(options.pictures, options.seed)
    vae = flow.load_or_train(
        AutoencoderKLQwenImage,
        options.work / "vae",
        lambda: train_autoencoder(pictures, steps=options.vae_steps, seed=options.seed),
    )
    mean, std = (
        torch.tensor(values)[:, None, None, None] for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    with single_frame():
        latents = (flow.encode(vae, pictures) - mean) / std
    transformer = train_transformer(
        pipeline,
        latents,
        chosen,
        steps=options.steps,
        checkpoint=options.work / "transformer.pt",
        seed=options.seed,
    )

    pipeline = make_pipeline(vae, tokenizer, pipeline.text_encoder, transformer)
    flow.save_half(pipeline, options.output)
    write_prompts(options.output)
    flow.write_call(options.output, height=SIDE, width=SIDE, negative_prompt=NEGATIVE, max_sequence_length=TEXT_LENGTH)
    shares, drawn = check(QwenImagePipeline.from_pretrained(options.output, torch_dtype=torch.float32))
    flow.contact_sheet(drawn).save(options.output / "samples.png")
    (options.output / "check.json").write_text(json.dumps(shares, indent=1) + "\n")
    print(
        f"follows its caption on {shares}; weights {flow.weights_bytes(options.output) / 1e6:.1f} MB; {options.output}"
    )
    if shares["both"] < 0.9:
        raise SystemExit("the model does not follow its captions well enough: train for longer with --steps")


if __name__ == "__main__":
    main()
