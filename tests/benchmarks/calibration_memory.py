"""Memory of a compile's own (`RssAnon`) does not grow with its calibration prompts and steps, and real latents fit.

    python tests/benchmarks/calibration_memory.py prompts      # 4 and 16 calibration prompts: at most 5 % apart
    python tests/benchmarks/calibration_memory.py steps        # 20 and 50 steps: at most 5 % apart
    python tests/benchmarks/calibration_memory.py flux         # FLUX.1's latents at 1024², 8 prompts: 3 GB
    python tests/benchmarks/calibration_memory.py hunyuan      # HunyuanVideo's latents at 720p, 2 prompts: 6 GB

Each compiles pipelines of diffusers' own classes with random weights, narrow so that an evaluation costs little, by
`otc compile --engines none --payload output`, in a process of its own. Latents, text length and pictures have the size
that is named; `--side`, `--frames`, `--num-inference-steps` make them smaller. What is counted is anonymous memory, the
process's own, every 5 ms; pages of mapped files are the system's to drop. Prints one JSON object, kept by `-o`. Exit
code 1: a bound does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from output import host, output_option, write

from otcache.compiler.workspace.progress import LineReporter, Pass

INTERVAL_S = 0.005
APART = 0.05
"""Of two compiles' peaks, at most."""
PROMPTS = tuple(f"a {colour} {shape} on black" for colour in ("red", "blue", "green") for shape in "abcdefgh")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A compile to measure."""

    model: str
    """flux or hunyuan."""
    side: tuple[int, int]
    """Height and width in pixels."""
    frames: int = 1
    text_length: int = 512
    prompts: int
    """Of calibration."""
    held_out: int = 4
    steps: int
    budgets: tuple[int, ...] = (2, 4)
    trials: int = 4
    micro_batch: int = 2


FLUX = Case(model="flux", side=(512, 512), prompts=8, steps=20)
CASES: dict[str, dict[str, Case]] = {
    "prompts": {str(count): replace(FLUX, prompts=count) for count in (4, 16)},
    "steps": {str(steps): replace(FLUX, steps=steps) for steps in (20, 50)},
    "flux": {"8": replace(FLUX, side=(1024, 1024), steps=50)},
    "hunyuan": {
        "2": Case(
            model="hunyuan",
            side=(720, 1280),
            frames=129,
            text_length=256,
            prompts=2,
            held_out=1,
            steps=4,
            budgets=(2,),
            trials=0,
            micro_batch=1,
        )
    },
}
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
"""Of glibc, in the compile's process: large tensors go back to the system when they are freed. With its own settings
the same work differs by up to 90 MB from run to run, by what it happens to keep."""
LIMITS = {"flux": 3e9, "hunyuan": 6e9}
"""Bytes."""


class Peaks(LineReporter):
    """The highest `RssAnon` of each pass, by a thread that reads it all the time."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._current = "start"
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        with open("/proc/self/status", "rb", buffering=0) as file:
            while True:
                file.seek(0)
                line = next(line for line in file.read().splitlines() if line.startswith(b"RssAnon:"))
                self.peaks[self._current] = max(int(line.split()[1]) << 10, self.peaks.get(self._current, 0))
                time.sleep(INTERVAL_S)

    @contextlib.contextmanager
    def on(self, name: str, description: str) -> Iterator[Pass]:
        self._current = name
        with super().on(name, description) as current:
            yield current
        self.note(f"{name}: {self.peaks.get(name, 0) / 1e9:.3f} GB at most")
        self._current = "between passes"


def flux(case: Case) -> Any:
    """FluxPipeline whose latents are 16 channels at an eighth of the side, packed 2 × 2, as FLUX.1's."""
    import diffusers
    from model_zoo import small

    (clip, clip_encoder), (t5, t5_encoder) = small.clip(), small.t5()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=small.WIDTH,
        pooled_projection_dim=small.WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return diffusers.FluxPipeline(
        scheduler=small.flow(),
        vae=small.vae(channels=16, levels=4, size=case.side[0], shift_factor=0.1),
        text_encoder=clip_encoder,
        tokenizer=clip,
        text_encoder_2=t5_encoder,
        tokenizer_2=t5,
        transformer=transformer,
    )


def video_autoencoder(channels: int) -> Any:
    """Decodes as HunyuanVideo's counts (4 frames a latent one after the first, 8 × 8 pixels), by one matrix a position:
    what is measured are videos of the real size; a real decoder's activations are that decoder's, in tiles.
    """
    import torch
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

    class Repeating(ModelMixin, ConfigMixin):  # type: ignore[misc]
        @register_to_config
        def __init__(self, latent_channels: int, scaling_factor: float = 0.7) -> None:
            super().__init__()
            self.temporal_compression_ratio, self.spatial_compression_ratio = 4, 8
            self.colours = torch.nn.Conv3d(latent_channels, 3, 1)

        def decode(self, latents: torch.Tensor, return_dict: bool = True) -> Any:
            frames = torch.tanh(self.colours(latents))
            size = (4 * (frames.shape[2] - 1) + 1, 8 * frames.shape[3], 8 * frames.shape[4])
            found = frames.new_empty(*frames.shape[:2], *size)
            for index in range(size[0]):
                small = frames[:, :, (index + 3) // 4]
                found[:, :, index] = torch.nn.functional.interpolate(small, size[1:])
            return (found,)

    return Repeating(channels)


def hunyuan(case: Case) -> Any:
    """HunyuanVideoPipeline with 16 channels at a quarter of the frames and an eighth of the side; patches of 3 × 10 ×
    10.
    """
    import diffusers

    from otcache.artifacts.training import video

    tokenizers = video.make_tokenizers()
    vae = video_autoencoder(16)
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=1,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=10,
        patch_size_t=3,
        guidance_embeds=True,
        text_embed_dim=video.TEXT_WIDTH,
        pooled_projection_dim=video.TEXT_WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    return video.make_pipeline(vae, tokenizers, video.make_text_encoders(*tokenizers), transformer)


def compile_case(case: Case, workspace: Path) -> dict[str, Any]:
    """Compile in this process, and say what it took."""
    import torch
    from model_zoo import small

    import otcache.compiler

    torch.manual_seed(0)
    pipeline = small.ready({"flux": flux, "hunyuan": hunyuan}[case.model](case))
    reporter, start = Peaks(), time.monotonic()
    otcache.compiler.compile(
        pipeline,
        progress=reporter,
        prompts=PROMPTS[: case.prompts + case.held_out],
        output=workspace / "artifact",
        workspace=workspace / "cache",
        engines="none",
        payload="output",
        budgets=case.budgets,
        height=case.side[0],
        width=case.side[1],
        num_frames=case.frames if case.model == "hunyuan" else None,
        max_sequence_length=case.text_length,
        num_inference_steps=case.steps,
        calibration_prompts=case.prompts,
        evaluation_prompts=case.held_out,
        trials=case.trials,
        effort="standard" if case.trials else "quick",
        micro_batch=case.micro_batch,
        guidance_scale=1.0,
    )
    return {
        "peak_bytes": max(reporter.peaks.values()),
        "pass_peak_bytes": reporter.peaks,
        "seconds": round(time.monotonic() - start, 1),
        "disk_bytes": sum(path.stat().st_size for path in (workspace / "cache").rglob("*") if path.is_file()),
    }


def measure(case: Case, folder: Path | None) -> dict[str, Any]:
    """`compile_case` in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as workspace, multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(compile_case, (case, Path(workspace)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(CASES))
    parser.add_argument("--side", type=int, nargs="+", help="height and width, or one number for both")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--num-inference-steps", type=int, help="of prompts, flux and hunyuan")
    parser.add_argument("--folder", type=Path, help="for the workspace; on a disk, not in memory")
    output_option(parser)
    options = parser.parse_args()
    changes: dict[str, Any] = {}
    if options.side:
        changes["side"] = (options.side[0], options.side[-1])
    if options.frames:
        changes["frames"] = options.frames
    if options.num_inference_steps and options.what != "steps":
        changes["steps"] = options.num_inference_steps
    cases = {name: replace(case, **changes) for name, case in CASES[options.what].items()}
    os.environ.update(MALLOC)
    found = {name: measure(case, options.folder) for name, case in cases.items()}
    peaks = [each["peak_bytes"] for each in found.values()]
    apart = max(peaks) / min(peaks) - 1
    holds = max(peaks) <= LIMITS[options.what] if options.what in LIMITS else apart <= APART
    case = next(iter(cases.values()))
    result: dict[str, Any] = {
        "what": f"anonymous memory of a compile; {options.what}: {', '.join(cases)}",
        "command": f"python tests/benchmarks/{Path(__file__).name} {' '.join(sys.argv[1:])}",
        "host": host(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
        "malloc": MALLOC,
        "height_width_frames": [*case.side, case.frames],
        "compiles": found,
        "holds": holds,
    }
    bound = {"limit_bytes": LIMITS[options.what]} if options.what in LIMITS else {"apart": apart, "limit": APART}
    write({**result, **bound}, options.output)
    return int(not holds)


if __name__ == "__main__":
    sys.exit(main())
