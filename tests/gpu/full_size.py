"""Real architectures with random weights, compiled and served on a device: time, memory, micro-batch, speed-up.

    python tests/gpu/full_size.py --output results.json              # on a GPU with 80 GB: some minutes
    python tests/gpu/full_size.py --narrow --device cpu              # the same code with narrow models, anywhere

Transformers and autoencoders are as wide and as deep as the published ones, their weights drawn on the device. Text
encoders are small, with their outputs repeated to the real width, because what they say does not matter here. What is
measured: a compile without engines (full runs, fit, evaluation), and the pipeline with the drop-in scheduler at B steps
against its own at T.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as d
import torch
from torch import Tensor, nn

import otcache.compiler
from otcache.artifacts.training import qwen, text, video
from otcache.compiler.hosts import OTCacheScheduler
from otcache.runtime.artifact.reader import Artifact

PROMPTS = ["a red ring on blue", "a small white circle on red", "a blue cross on yellow"]
"""Two to calibrate on and one held out."""
NUM_INFERENCE_STEPS, BUDGET = 20, 5
TEXT_WIDTH = 64
"""Of the small text encoders."""


def repeated(encoder: nn.Module, width: int) -> nn.Module:
    """A text encoder whose outputs (…, 64) are repeated to (…, width)."""

    def widen(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(widen, value))
        return torch.cat([value] * (width // TEXT_WIDTH), dim=-1) if isinstance(value, Tensor) else value

    def hook(module: Any, args: Any, output: Any) -> Any:
        for name in list(output):
            output[name] = widen(output[name])
        return output

    encoder.register_forward_hook(hook)
    return encoder


def flux(narrow: bool) -> tuple[Any, dict[str, int]]:
    """FLUX.1-dev: 12 billion weights, a guidance scale that is embedded, 1024²."""
    clip, t5 = text.make_tokenizers()
    encoders = text.make_encoders(clip, t5)
    size = dict(num_layers=1, num_single_layers=1, num_attention_heads=1) if narrow else {}
    wide = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    pipeline = d.FluxPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=not narrow),
        vae=d.AutoencoderKL(
            **wide,
            block_out_channels=(8, 8, 8, 8) if narrow else (128, 256, 512, 512),
            norm_num_groups=8 if narrow else 32,
            layers_per_block=1 if narrow else 2,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
            force_upcast=False,
        ),
        text_encoder=repeated(encoders[0], 768),
        tokenizer=clip,
        text_encoder_2=repeated(encoders[1], 4096),
        tokenizer_2=t5,
        transformer=d.FluxTransformer2DModel(guidance_embeds=True, **size),
    )
    side = 64 if narrow else 1024
    return pipeline, {"height": side, "width": side, "max_sequence_length": 32 if narrow else 512}


def qwen_image(narrow: bool) -> tuple[Any, dict[str, int]]:
    """Qwen-Image: 20 billion weights, two branches, 1024²."""
    tokenizer = qwen.make_tokenizer()
    small = dict(base_dim=8, num_res_blocks=1) if narrow else {}
    size = dict(num_layers=1, num_attention_heads=1) if narrow else {}
    pipeline = qwen.make_pipeline(
        d.AutoencoderKLQwenImage(**small),
        tokenizer,
        repeated(qwen.make_text_encoder(tokenizer), 3584),
        d.QwenImageTransformer2DModel(**size),
    )
    side = 64 if narrow else 1024
    return pipeline, {"height": side, "width": side, "max_sequence_length": 32}


def hunyuan_video(narrow: bool) -> tuple[Any, dict[str, int]]:
    """HunyuanVideo: 13 billion weights, a short clip at 320 × 512."""
    tokenizers = video.make_tokenizers()
    encoders = video.make_text_encoders(*tokenizers)
    widths = (4096, 768)
    small = dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=8) if narrow else {}
    size = dict(num_layers=1, num_single_layers=1, num_attention_heads=1, num_refiner_layers=1) if narrow else {}
    pipeline = video.make_pipeline(
        d.AutoencoderKLHunyuanVideo(**small),
        tokenizers,
        tuple(repeated(encoder, width) for encoder, width in zip(encoders, widths, strict=True)),
        d.HunyuanVideoTransformer3DModel(**size),
    )
    height, width, frames = (64, 64, 5) if narrow else (320, 512, 17)
    return pipeline, {"height": height, "width": width, "num_frames": frames, "max_sequence_length": 32}


CASES: dict[str, Callable[[bool], tuple[Any, dict[str, int]]]] = {
    "flux": flux,
    "qwen-image": qwen_image,
    "hunyuan-video": hunyuan_video,
}


def make(case: str, device: torch.device, narrow: bool) -> tuple[Any, dict[str, int]]:
    """The pipeline on the device in bfloat16, its weights drawn there, and its size."""
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            pipeline, size = CASES[case](narrow)
    finally:
        torch.set_default_dtype(default)
    pipeline.to(device, torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, size


def measure(case: str, device: torch.device, work: Path, *, narrow: bool = False) -> dict[str, Any]:
    """Compile a case and serve it with the drop-in scheduler. Returns what was measured, as JSON values."""
    clock = Clock(device)
    pipeline, size = make(case, device, narrow)
    made_s = clock.lap()
    folder = otcache.compiler.compile(
        pipeline,
        model=case,
        engines="none",
        payload="output",
        budgets=[BUDGET],
        num_inference_steps=NUM_INFERENCE_STEPS,
        prompts=PROMPTS,
        calibration_prompts=2,
        evaluation_prompts=1,
        trials=0,
        output=work / case,
        workspace=work / "workspace",
        progress=False,
        **size,
    )
    compile_s = clock.lap()
    manifest = Artifact.open(folder).manifest
    program = next(each for each in manifest.programs if each.budget == str(BUDGET))
    call = functools.partial(draw, pipeline, size)
    full, full_s = timed(clock, functools.partial(call, NUM_INFERENCE_STEPS))
    own, pipeline.scheduler = pipeline.scheduler, OTCacheScheduler.from_artifact(folder, BUDGET)
    served, served_s = timed(clock, functools.partial(call, BUDGET))
    pipeline.scheduler = own
    return {
        "parameters": sum(each.numel() for each in pipeline.transformer.parameters()),
        "size": size,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "budget": BUDGET,
        "make_s": made_s,
        "compile_s": compile_s,
        "peak_bytes": clock.peak_bytes(),
        "micro_batch": int(manifest.producer["micro batch"]),
        "precision": manifest.producer["precision"],
        "psnr_db": program.quality.psnr_db.mean,
        "full_s": full_s,
        "served_s": served_s,
        "speed_up": full_s / served_s,
        "latent_error": float((served - full).norm() / full.norm()),
    }


def draw(pipeline: Any, size: dict[str, int], steps: int) -> Tensor:
    """Final latents of one request, float32 on the CPU."""
    call: dict[str, Any] = {**size, "num_inference_steps": steps, "output_type": "latent"}
    if type(pipeline).__name__ == "QwenImagePipeline":
        call |= {"negative_prompt": "", "true_cfg_scale": 4.0}
    else:
        call["guidance_scale"] = 4.0
    return pipeline(PROMPTS[-1], generator=torch.Generator().manual_seed(0), return_dict=False, **call)[0].float().cpu()


def timed(clock: Clock, run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What the second of two runs gives, and the seconds that it took."""
    run()
    clock.lap()
    return run(), clock.lap()


class Clock:
    """Seconds since the last lap with the device's work done, and its memory at most."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.start = device, time.perf_counter()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.start = self.start, time.perf_counter()
        return self.start - before

    def peak_bytes(self) -> int | None:
        """None where the device does not count."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


def describe(device: torch.device) -> dict[str, Any]:
    """The device and everything that has a say in the figures."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {each: importlib.metadata.version(each) for each in ("otcache", "torch", "diffusers", "transformers")}
    return {"device": name, "cuda": torch.version.cuda, "python": platform.python_version(), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="by default all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--narrow", action="store_true", help="narrow models, to see that the code runs")
    parser.add_argument("--output", type=Path, help="a JSON file; by default the results are printed")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here: run on a GPU host, or give --narrow --device cpu")
    results = {**describe(device), "narrow": arguments.narrow, "cases": {}}
    for case in arguments.cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            results["cases"][case] = measure(case, device, Path(folder), narrow=arguments.narrow)
        print(case, results["cases"][case], file=sys.stderr, flush=True)
    text_of = json.dumps(results, indent=2)
    if arguments.output:
        arguments.output.write_text(text_of + "\n", encoding="utf-8")
    else:
        print(text_of)


if __name__ == "__main__":
    main()
