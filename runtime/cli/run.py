"""`otc run`: prompts → pictures."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from otcache.schemas.errors import UsageError

from ..loop.timing import Timing
from .completion import complete_backends, complete_budgets
from .options import artifact_argument, json_option, size_options
from .options import print_json as _print_json
from .timing_table import parts_table, steps_table

_log = logging.getLogger(__name__)


@click.command(
    epilog="""\b
Examples:
  otc run artifacts/shapes --budget 8 --prompt "a small red ring on blue"
  otc run artifacts/shapes --budget full --prompt "a green star" -n 4 --seed 7 -o stars.png
  otc run artifacts/shapes --budget full,16,8,4 --prompt "a green star" --prompt "a red ring" -o compare.png
  otc run artifacts/mine --height 768 --width 512 --budget 8 --prompt "a green star"
"""
)
@artifact_argument
@click.option(
    "--budget",
    required=True,
    metavar="N|full[,…]",
    shell_complete=complete_budgets,
    help="Model evaluations to spend; `otc inspect` lists them. Several give a column each.",
)
@click.option("--prompt", multiple=True, help="What to draw; may be given several times.")
@click.option(
    "--conditioning",
    type=click.Path(path_type=Path, dir_okay=False),
    help="What `otc encode` made of prompts, instead of --prompt.",
)
@click.option("--negative-prompt", default=None, help="What to steer away from; default: the artifact's.")
@click.option("--seed", type=int, default=0, show_default=True, help="As a torch CPU generator's seed in diffusers.")
@click.option("-n", "--images", "images", type=click.IntRange(min=1), default=1, show_default=True, help="Per prompt.")
@click.option(
    "--guidance-scale", type=float, default=None, help="Within the calibrated range; default: the artifact's."
)
@size_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out.png"),
    show_default=True,
    help="PNG, JPEG or WebP; several pictures make one contact sheet. A video: GIF, MP4, or frames as pictures.",
)
@click.option("--fps", type=click.IntRange(1, 50), default=15, show_default=True, help="Frames a second of a video.")
@click.option("--separate", is_flag=True, help="Write numbered files instead of a contact sheet.")
@click.option(
    "--backend",
    default="auto",
    show_default=True,
    shell_complete=complete_backends,
    help="auto, onnxruntime, tensorrt or tensorrt-rtx.",
)
@click.option("--threads", type=click.IntRange(min=1), default=None, help="CPU threads; default: one for each core.")
@click.option("--force", is_flag=True, help="Overwrite an existing output file.")
@click.option("--profile", is_flag=True, help="Say on stderr where the time goes; with --json, by step.")
@json_option
def run(
    artifact: Path,
    budget: str,
    prompt: tuple[str, ...],
    conditioning: Path | None,
    negative_prompt: str | None,
    seed: int,
    images: int,
    guidance_scale: float | None,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    max_sequence_length: int | None,
    output: Path,
    fps: int,
    separate: bool,
    backend: str,
    threads: int | None,
    force: bool,
    profile: bool,
    as_json: bool,
) -> None:
    """Draw pictures from ARTIFACT, without torch."""

    from .. import pictures
    from ..artifact.reader import Artifact
    from ..engines.choose import Options, select_backend
    from ..engines.profiles import request_of
    from ..loop.timing import Timer
    from ..serving.conditioning import read_conditioning
    from ..serving.request_size import Sizes
    from ..serving.sampler import Sampler

    if bool(prompt) == (conditioning is not None):
        raise UsageError("expected --prompt or --conditioning, and not both: `otc encode` writes the latter")
    if conditioning and (images > 1 or negative_prompt is not None):
        raise UsageError("--conditioning holds its negative prompt and its samples: leave out --negative-prompt and -n")
    whole = Artifact.open(artifact)
    size: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "max_sequence_length": max_sequence_length,
    }
    manifest = Sizes(whole).at(size).manifest
    request = read_conditioning(conditioning, manifest) if conditioning else None
    budgets = [name.strip() for name in budget.split(",")]
    count = images * len(prompt) if request is None else next(iter(request.values())).shape[1]
    total = count * len(budgets)
    targets = pictures.numbered(output, total) if separate and total > 1 else [output]
    frames = manifest.conditions.num_frames
    if frames is not None and output.suffix.lower() in pictures.SUFFIXES:
        targets = [path for target in targets for path in pictures.numbered_frames(target, frames)]
    pictures.check_targets(targets, force=force, video=frames is not None)
    begin = time.perf_counter()
    drawn, seconds, timings = {}, {}, {}
    options = Options(threads=threads, request=request_of(manifest, count))
    with Sampler(whole, select_backend(backend, whole.manifest, options)) as sampler:
        loaded = time.perf_counter()
        _log.info("serves %s on %s, loaded in %.2f s", artifact, sampler.backend, loaded - begin)
        for passed_over, reason in sampler.passed_over.items():
            _log.debug("%s was passed over: %s", passed_over, reason)
        for name in budgets:
            start, timer = time.perf_counter(), Timer()
            with _progress_bar(f"budget {name}") as progress:
                settings: dict[str, Any] = {
                    "budget": name,
                    "seed": seed,
                    "guidance_scale": guidance_scale,
                    "progress": progress,
                    "timer": timer,
                }
                if request is None:
                    drawn[name] = sampler(
                        list(prompt), negative_prompt=negative_prompt, images_per_prompt=images, **size, **settings
                    )
                else:
                    latents = sampler.sample(request, **size, **settings)
                    drawn[name] = sampler.decode(
                        latents, height=height, width=width, num_frames=num_frames, timer=timer
                    )
                timings[name] = timer.timing()
            seconds[name] = time.perf_counter() - start
        used, load_stages_s = sampler.backend, sampler.load_s
    pictures.save_all(drawn, targets, separate=separate, fps=fps)
    if as_json:
        _print_json(
            {
                "outputs": [str(target) for target in targets],
                "images": total,
                "budget": budget,
                "seed": seed,
                "backend": used,
                "load_s": round(loaded - begin, 4),
                "request_s": round(sum(seconds.values()), 4),
                "budget_s": {name: round(value, 4) for name, value in seconds.items()},
                **({"profile": _profile(loaded - begin, load_stages_s, timings)} if profile else {}),
            }
        )
    else:
        if profile:
            _print_profile(loaded - begin, timings)
        names = ", ".join(str(target) for target in targets)
        times = ", ".join(f"budget {name} {value:.2f} s" for name, value in seconds.items())
        click.echo(f"{names}: {total} picture{'s' * (total > 1)}, {times} ({used})")


def _profile(load_s: float, stages_s: dict[str, float], timings: dict[str, Timing]) -> dict[str, Any]:
    """What `otc run --profile --json` says of the time, in seconds."""
    load = {"total_s": round(load_s, 6), "stages": {name: round(value, 6) for name, value in stages_s.items()}}
    return {"load": load, "budgets": {name: timing.as_json() for name, timing in timings.items()}}


def _print_profile(load_s: float, timings: dict[str, Timing]) -> None:

    console = Console(stderr=True, highlight=False)
    console.print(parts_table(timings, load_s))
    console.print(steps_table(timings))


@contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr if that is a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield None
        return

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(title))
        yield lambda done, total: bar.update(task, completed=done, total=total)
