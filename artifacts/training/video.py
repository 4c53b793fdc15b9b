"""Train the bundled model `shapes-video`: a small HunyuanVideo of one shape that moves over a plain ground.

    python -m otcache.artifacts.training.video [--steps 6000] [-o artifacts/models/shapes-video]

The same passes as in `shapes`, on clips of 13 frames (4 latent ones) whose captions name the motion. Guidance is
classifier-free (`true_cfg_scale`): embedded guidance is what a *distilled* HunyuanVideo has, and distilling would need
a second training that teaches nothing about captions. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from otcache.artifacts.training import flow, scenes, text, tokens

SIDE, FRAMES = 32, 13
LATENT_CHANNELS = 4
TEXT_WIDTH = 64
TEXT_LENGTH = 12
"""Tokens of the longest caption and its end: the mask hides everything after it, so training needs no more."""
SHIFT = 3.0
GUIDANCE = 4.0
VAE_FRAMES = 5
"""Frames of the windows that the autoencoder, which is causal, is trained on: two latent frames."""
SHAPES = ("circle", "square", "triangle", "ring")
MOTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
TRAVEL = 0.36
"""How far the shape gets from the middle of its path to either end, as a fraction of half the picture's side."""
ATTRIBUTES = {
    "shape": SHAPES,
    "colour": tuple(scenes.PALETTE),
    "background": tuple(scenes.BACKGROUNDS),
    "motion": tuple(MOTIONS),
}


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A scene and where its shape goes."""

    scene: scenes.Scene
    motion: str

    @property
    def caption(self) -> str:
        """For example `a red ring on blue moving left`."""
        return f"{self.scene.caption} moving {self.motion}"

    @property
    def long_caption(self) -> str:
        """The same with the ground spelled out."""
        return f"{self.scene.long_caption} moving {self.motion}"

    @property
    def names(self) -> dict[str, str]:
        """Value of each of `ATTRIBUTES`."""
        scene = self.scene
        return {"shape": scene.shape, "colour": scene.colour, "background": scene.background, "motion": self.motion}


def all_clips() -> list[Clip]:
    """Every plain scene of medium size with one of `SHAPES`, in every motion."""
    plain = [s for s in scenes.all_scenes() if s.texture == "plain" and s.size == "medium" and s.shape in SHAPES]
    return [Clip(scene=scene, motion=motion) for scene, motion in itertools.product(plain, MOTIONS)]


def render(clip: Clip, frames: int = FRAMES, side: int = SIDE) -> np.ndarray:
    """Draw a clip. Returns uint8 (frames, side, side, 3); the motion is even and passes through the scene's place."""
    dx, dy = MOTIONS[clip.motion]
    return np.stack(
        [
            scenes.render(dataclasses.replace(clip.scene, x=clip.scene.x + dx * at, y=clip.scene.y + dy * at), side)
            for at in np.linspace(-TRAVEL, TRAVEL, frames)
        ]
    )


def make_dataset(count: int, seed: int) -> tuple[Tensor, list[Clip]]:
    """Clips uint8 (count, 3, FRAMES, SIDE, SIDE) and what they show; places vary by little, so that no clip is cut."""
    random = np.random.default_rng(seed)
    everything = all_clips()
    chosen = []
    for i in random.integers(len(everything), size=count):
        clip = everything[int(i)]
        x, y = (float(v) for v in random.uniform(-0.08, 0.08, size=2))
        chosen.append(dataclasses.replace(clip, scene=dataclasses.replace(clip.scene, x=x, y=y)))
    pictures = np.stack([render(clip) for clip in chosen])
    return torch.from_numpy(pictures).permute(0, 4, 1, 2, 3).contiguous(), chosen


def read_motion(frames: np.ndarray) -> str:
    """The name of the motion, from pixels: where the middle of what is not ground goes from first to last frame.

    frames: uint8 (n, height, width, 3). "" if a frame shows no shape or it stays within a pixel.
    """
    places = []
    for frame in (frames[0], frames[-1]):
        _, ground = scenes.read_colours(frame)
        rows, columns = np.nonzero(scenes._name_pixels(frame) != ground)
        if not rows.size:
            return ""
        places.append((columns.mean(), rows.mean()))
    dx, dy = np.subtract(places[1], places[0])
    if max(abs(dx), abs(dy)) < 1:
        return ""
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def make_tokenizers() -> tuple[PreTrainedTokenizerFast, CLIPTokenizer]:
    """Llama's knows every word of captions and template, so the template's head is the 95 tokens that are cropped."""
    captions = sorted({caption for clip in all_clips() for caption in (clip.caption, clip.long_caption)})
    llama = tokens.llama_tokenizer([*captions, DEFAULT_PROMPT_TEMPLATE["template"].format("")])
    clip, _ = text.make_tokenizers(captions)
    return llama, clip


def make_text_encoders(llama: PreTrainedTokenizerFast, clip: CLIPTokenizer) -> tuple[LlamaModel, CLIPTextModel]:
    """Llama with four layers, of which the pipeline skips the last two; CLIP with two. Both of width 64."""
    encoder = LlamaModel(
        LlamaConfig(
            vocab_size=len(llama),
            hidden_size=TEXT_WIDTH,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=llama.bos_token_id,
            eos_token_id=llama.eos_token_id,
            pad_token_id=llama.pad_token_id,
        )
    )
    pooled = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=TEXT_WIDTH,
            intermediate_size=128,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
    )
    return encoder, pooled


def train_text_encoders(pipeline: HunyuanVideoPipeline, *, steps: int, seed: int) -> None:
    """CLIP's pooled output and Llama's mean and last output each name every attribute."""
    everything = all_clips()

    def features(captions: list[str]) -> list[Tensor]:
        embeds, mask = pipeline._get_llama_prompt_embeds(
            captions, DEFAULT_PROMPT_TEMPLATE, max_sequence_length=TEXT_LENGTH
        )
        mean = (embeds * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        ids = pipeline.tokenizer_2(captions, padding="longest", return_tensors="pt").input_ids
        return [mean, embeds[torch.arange(len(captions)), mask.sum(1) - 1], pipeline.text_encoder_2(ids).pooler_output]

    def draw(random: torch.Generator, count: int) -> tuple[list[str], list[dict[str, str]]]:
        chosen = [everything[int(i)] for i in torch.randint(len(everything), (count,), generator=random)]
        captions = [clip.long_caption if i % 2 else clip.caption for i, clip in enumerate(chosen)]
        return captions, [clip.names for clip in chosen]

    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    parameters = [parameter for encoder in encoders for parameter in encoder.parameters()]
    tokens.train_features(parameters, features, ATTRIBUTES, draw, width=TEXT_WIDTH, steps=steps, seed=seed)
    for encoder in encoders:
        encoder.eval().requires_grad_(False)


def make_autoencoder() -> AutoencoderKLHunyuanVideo:
    """4× smaller in time, height and width. One norm group: more would wash flat colours out.

    Convolutions begin with the newest frame alone, so that frames are drawn one by one before motion is learnt
    (`single_frame`).
    """
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        norm_num_groups=1,
        scaling_factor=1.0,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        mid_block_add_attention=False,
    )
    flow.preserve_variance(vae)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, HunyuanVideoCausalConv3d):
                weight = module.conv.weight
                weight[:, :, :-1] = 0
                weight.mul_(weight.shape[2] ** 0.5)
    flow.zero_weights(vae, lambda name: name.endswith(".conv2.conv"))
    return vae


@contextlib.contextmanager
def single_frame() -> Iterator[None]:
    """While it lasts, the autoencoder's causal convolutions take one frame, and learn the kernel's newest slice alone.

    Exact as long as the other slices are zero, which they are at the start, and several times faster on a CPU.
    """

    def forward(self: HunyuanVideoCausalConv3d, hidden_states: Tensor) -> Tensor:
        conv, (left, right, top, bottom, *_) = self.conv, self.time_causal_padding
        frame = F.pad(hidden_states[:, :, 0], (left, right, top, bottom), mode=self.pad_mode)
        return F.conv2d(frame, conv.weight[:, :, -1], conv.bias, conv.stride[1:], conv.padding[1:])[:, :, None]

    original = HunyuanVideoCausalConv3d.forward
    HunyuanVideoCausalConv3d.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        HunyuanVideoCausalConv3d.forward = original  # type: ignore[method-assign]


def train_autoencoder(clips: Tensor, *, frame_steps: int, window_steps: int, seed: int) -> AutoencoderKLHunyuanVideo:
    """First on single frames, then on windows of `VAE_FRAMES`. clips: uint8 (n, 3, FRAMES, height, width)."""
    random = np.random.default_rng(seed)

    def windows(length: int) -> Tensor:
        starts = random.integers(FRAMES - length + 1, size=len(clips))
        return torch.stack([clip[:, at : at + length] for clip, at in zip(clips, starts, strict=True)])

    vae = make_autoencoder()
    with single_frame():
        flow.train_autoencoder(vae, windows(1), steps=frame_steps, batch=8, rate=2.5e-3, seed=seed)
    vae.requires_grad_(True).train()
    vae = flow.train_autoencoder(vae, windows(VAE_FRAMES), steps=window_steps, batch=4, rate=1.2e-3, seed=seed)
    scale = 1 / flow.encode(vae, clips[:256]).square().mean().sqrt()
    vae.register_to_config(scaling_factor=round(float(scale), 5))
    return vae


def make_transformer() -> HunyuanVideoTransformer3DModel:
    """Two double and four single blocks, width 96, 4×4×4 tokens; gates and output start at zero (adaLN-zero)."""
    model = HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=3,
        attention_head_dim=32,
        num_layers=2,
        num_single_layers=4,
        num_refiner_layers=1,
        mlp_ratio=4.0,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=False,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        rope_axes_dim=(8, 12, 12),
    )
    flow.zero_weights(
        model,
        lambda name: name == "proj_out" or (name.endswith(".linear") and "norm" in name and "refiner" not in name),
    )
    return model


def make_pipeline(
    vae: AutoencoderKLHunyuanVideo,
    tokenizers: tuple[PreTrainedTokenizerFast, CLIPTokenizer],
    encoders: tuple[LlamaModel, CLIPTextModel],
    transformer: HunyuanVideoTransformer3DModel,
) -> HunyuanVideoPipeline:
    return HunyuanVideoPipeline(
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
    )


def check(
    pipeline: HunyuanVideoPipeline, *, count: int = 64, seed: int = 10_000
) -> tuple[dict[str, float], np.ndarray]:
    """How often clips have the colour, ground, shape (middle frame) and motion of their caption; and the clips."""
    everything = all_clips()
    random = np.random.default_rng(seed)
    chosen = [everything[int(i)] for i in random.choice(len(everything), size=count, replace=False)]
    pipeline.set_progress_bar_config(disable=True)
    clips = []
    for start in range(0, count, 16):
        part = chosen[start : start + 16]
        clips.append(
            pipeline(
                [clip.caption for clip in part],
                negative_prompt=[""] * len(part),
                true_cfg_scale=GUIDANCE,
                num_inference_steps=50,
                height=SIDE,
                width=SIDE,
                num_frames=FRAMES,
                max_sequence_length=TEXT_LENGTH,
                generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(part))],
                output_type="np",
            ).frames
        )
    drawn = (np.concatenate(clips) * 255).round().astype(np.uint8)
    shares = flow.caption_shares([frames[FRAMES // 2] for frames in drawn], [clip.scene for clip in chosen])
    moved = [read_motion(frames) == clip.motion for frames, clip in zip(drawn, chosen, strict=True)]
    return {**shares, "motion": round(float(np.mean(moved)), 4)}, drawn


def write_prompts(folder: Path, count: int = 128, seed: int = 1) -> None:
    """Default calibration and evaluation prompts of the model, one caption a line."""
    everything = all_clips()
    chosen = np.random.default_rng(seed).choice(len(everything), size=count, replace=False)
    (folder / "prompts.txt").write_text("".join(everything[int(i)].caption + "\n" for i in chosen))


def train_transformer(
    pipeline: HunyuanVideoPipeline, latents: Tensor, chosen: list[Clip], *, steps: int, checkpoint: Path, seed: int
) -> HunyuanVideoTransformer3DModel:
    """Rectified flow; see `flow.train_transformer`.

    Args:
        pipeline: whose text encoders and tokenizers are trained.
        latents: float32 (n, LATENT_CHANNELS, frames, height, width), scaled.
        chosen: what each clip shows.
        steps: optimizer steps in all.
        checkpoint: file from which an interrupted run goes on.
        seed: of weights and batches.
    """
    wordings, captions = flow.index_captions(chosen)
    with torch.no_grad():
        embeds, pooled, mask = pipeline.encode_prompt([*wordings, ""], max_sequence_length=TEXT_LENGTH)
    mask = mask.float()

    def predict(model: nn.Module, noisy: Tensor, sigma: Tensor, caption: Tensor) -> Tensor:
        return model(
            hidden_states=noisy,
            timestep=1000 * sigma,
            encoder_hidden_states=embeds[caption],
            encoder_attention_mask=mask[caption],
            pooled_projections=pooled[caption],
            return_dict=False,
        )[0]

    return flow.train_transformer(
        make_transformer,
        predict,
        latents,
        captions,
        len(wordings),
        steps=steps,
        batch=32,
        rate=2e-3,
        checkpoint=checkpoint,
        seed=seed,
    )


def _load_or_train_text(pipeline: HunyuanVideoPipeline, folder: Path, *, steps: int, seed: int) -> None:
    """The text encoders of a pipeline, from an earlier run's folder or trained and kept there."""
    parts: dict[str, Any] = {"text_encoder": LlamaModel, "text_encoder_2": CLIPTextModel}
    if (folder / "text_encoder_2" / "config.json").exists():
        for name, kind in parts.items():
            setattr(pipeline, name, kind.from_pretrained(folder / name).eval())
        return
    train_text_encoders(pipeline, steps=steps, seed=seed)
    for name in parts:
        getattr(pipeline, name).save_pretrained(folder / name)


def parse_options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("artifacts/models/shapes-video"))
    parser.add_argument(
        "--work", type=Path, default=Path("artifacts/work/shapes-video"), help="unfinished training state"
    )
    parser.add_argument("--steps", type=int, default=6000, help="of the transformer")
    parser.add_argument("--text-steps", type=int, default=300)
    parser.add_argument("--frame-steps", type=int, default=1200, help="of the autoencoder on single frames")
    parser.add_argument("--vae-steps", type=int, default=600, help="of the autoencoder on short clips")
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(options.seed)
    tokenizers = make_tokenizers()
    encoders = make_text_encoders(*tokenizers)
    pipeline = make_pipeline(make_autoencoder(), tokenizers, encoders, make_transformer())
    _load_or_train_text(pipeline, options.work, steps=options.text_steps, seed=options.seed)
    pictures, chosen = make_dataset(options.clips, options.seed)
    vae = flow.load_or_train(
        AutoencoderKLHunyuanVideo,
        options.work / "vae",
        lambda: train_autoencoder(
            pictures, frame_steps=options.frame_steps, window_steps=options.vae_steps, seed=options.seed
        ),
    )
    latents = flow.encode(vae, pictures) * vae.config.scaling_factor
    transformer = train_transformer(
        pipeline,
        latents,
        chosen,
        steps=options.steps,
        checkpoint=options.work / "transformer.pt",
        seed=options.seed,
    )

    pipeline = make_pipeline(vae, tokenizers, (pipeline.text_encoder, pipeline.text_encoder_2), transformer)
    flow.save_half(pipeline, options.output)
    write_prompts(options.output)
    flow.write_call(options.output, height=SIDE, width=SIDE, num_frames=FRAMES, max_sequence_length=TEXT_LENGTH)
    shares, drawn = check(HunyuanVideoPipeline.from_pretrained(options.output, torch_dtype=torch.float32))
    rows = drawn[:12, :: (FRAMES - 1) // 4].reshape(-1, SIDE, SIDE, 3)
    flow.contact_sheet(rows, columns=10).save(options.output / "samples.png")
    (options.output / "check.json").write_text(json.dumps(shares, indent=1) + "\n")
    print(
        f"follows its caption on {shares}; weights {flow.weights_bytes(options.output) / 1e6:.1f} MB; {options.output}"
    )
    if min(shares["both"], shares["motion"]) < 0.9:
        raise SystemExit("the model does not follow its captions well enough: train for longer with --steps")


if __name__ == "__main__":
    main()
