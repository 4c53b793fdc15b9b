"""`otc run`: prompts → pictures."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from otcache.schemas.errors import UsageError

from ..loop.timing import Timing
from .completion import complete_budgets, complete_qualities
from .options import (
    artifact_argument,
    backend_option,
    json_option,
    print_json,
    quiet_option,
    size_options,
    threads_option,
)
from .progress import progress_bar
from .timing_table import parts_table, steps_table

if TYPE_CHECKING:
    from ..artifact.reader import Artifact
    from ..loop.loop import Float32
    from ..serving.request import Request
    from ..serving.sampler import Sampler

_log = logging.getLogger(__name__)


@click.command(
    epilog="""\b
Examples:
  otc run artifacts/shapes --budget 8 --prompt "a small red ring on blue"
  otc run artifacts/shapes --budget full --prompt "a green star" -n 4 --seed 7 -o stars.png
  otc run artifacts/shapes --budget full,16,8,4 --prompt "a green star" --prompt "a red ring" -o compare.png
  otc run artifacts/shapes --quality high --prompt "a small red ring on blue" -o high.png
  otc run artifacts/shapes --quality "worst psnr>=30" --prompt "a green star" -o star.png
  otc run artifacts/mine --height 768 --width 512 --budget 8 --prompt "a green star"
"""
)
@artifact_argument
@click.option(
    "--budget",
    metavar="N|full[,…]",
    shell_complete=complete_budgets,
    help="Model evaluations to spend; `otc inspect` lists them. Several give a column each.",
)
@click.option(
    "--quality",
    metavar="draft|good|high|best|psnr>=N",
    shell_complete=complete_qualities,
    help="Instead of --budget: the smallest one that was measured to reach it; a tier of `otc inspect`, or a bound.",
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
@backend_option
@threads_option
@click.option("--force", is_flag=True, help="Overwrite an existing output file.")
@click.option("--profile", is_flag=True, help="Say on stderr where the time goes; with --json, by step.")
@quiet_option
@json_option
def run(
    artifact: Path,
    budget: str | None,
    quality: str | None,
    prompt: tuple[str, ...],
    conditioning: Path | None,
    negative_prompt: str | None,
    seed: int,
    images: int,
    guidance_scale: float | None,
    size: dict[str, int | None],
    output: Path,
    fps: int,
    separate: bool,
    backend: str,
    threads: int | None,
    force: bool,
    profile: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Draw pictures from ARTIFACT, without torch."""
    from ..artifact.reader import Artifact
    from ..engines.choose import Options, check_engines, select_backend
    from ..engines.profiles import request_of
    from ..pictures import save_all
    from ..serving.conditioning import read_conditioning
    from ..serving.request_size import Sizes
    from ..serving.sampler import Sampler

    if (budget is None) == (quality is None):
        raise UsageError("expected --budget or --quality, and not both: `otc inspect` lists budgets and tiers")
    _check_source(prompt, conditioning, negative_prompt, images)
    whole = Artifact.open(artifact)
    check_engines(whole.manifest)
    asked: dict[str, Any] = {"quality": quality} if quality is not None else {}
    budget = _budget_asked(whole, budget, quality, size)
    source: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative_prompt, "images_per_prompt": images}
    if conditioning is not None:
        source = {"conditioning": read_conditioning(conditioning, Sizes(whole).at(size).manifest)}
    requests = _parse_requests(whole, budget, source, size=size, seed=seed, guidance_scale=guidance_scale)
    some = next(iter(requests.values()))
    total = some.samples * len(requests)
    targets = _check_targets(output, total, some.manifest.conditions.num_frames, separate=separate, force=force)
    begin = time.perf_counter()
    options = Options(threads=threads, request=request_of(some.manifest, some.samples))
    with Sampler(whole, select_backend(backend, whole.manifest, options)) as sampler:
        load_s = time.perf_counter() - begin
        _log_backend(sampler, artifact, load_s)
        drawn, timings = _draw(sampler, requests, quiet=quiet, as_json=as_json)
        used, load_stages_s = sampler.backend, sampler.load_s
    save_all(drawn, targets, separate=separate, fps=fps)
    seconds = {name: round(timing.total_s, 4) for name, timing in timings.items()}
    if as_json:
        asked |= {"outputs": [str(target) for target in targets], "images": total, "budget": budget, "seed": seed}
        spent = {"load_s": round(load_s, 4), "request_s": round(sum(seconds.values()), 4), "budget_s": seconds}
        more = {"profile": _profile(load_s, load_stages_s, timings)} if profile else {}
        print_json({**asked, "backend": used, **spent, **more})
        return
    if profile:
        _print_profile(load_s, timings)
    names = ", ".join(str(target) for target in targets)
    times = ", ".join(f"budget {name} {value:.2f} s" for name, value in seconds.items())
    reason = f" for quality {quality}" if quality is not None else ""
    click.echo(f"{names}: {total} picture{'s' * (total > 1)}, {times}{reason} ({used})")


def _budget_asked(artifact: Artifact, budget: str | None, quality: str | None, size: dict[str, int | None]) -> str:
    """The budgets as they are given, or the one that a quality comes to. Raises RequestError."""
    from ..serving.quality import budget_of_quality
    from ..serving.request_size import Sizes

    if budget is not None:
        return budget
    return budget_of_quality(Sizes(artifact).at(size).manifest, str(quality))


def _check_source(prompt: tuple[str, ...], conditioning: Path | None, negative_prompt: str | None, images: int) -> None:
    if bool(prompt) == (conditioning is not None):
        raise UsageError("expected --prompt or --conditioning, and not both: `otc encode` writes the latter")
    if conditioning and (images > 1 or negative_prompt is not None):
        raise UsageError("--conditioning holds its negative prompt and its samples: leave out --negative-prompt and -n")


def _parse_requests(artifact: Artifact, budgets: str, source: dict[str, Any], **given: Any) -> dict[str, Request]:
    """A request for each of the budgets, in the order in which they are listed. Raises RequestError."""
    from ..serving.request import parse_request
    from ..serving.request_size import Sizes

    sizes = Sizes(artifact)
    names = [name.strip() for name in budgets.split(",")]
    return {name: parse_request(sizes, budget=name, **source, **given) for name in names}


def _check_targets(output: Path, total: int, frames: int | None, *, separate: bool, force: bool) -> list[Path]:
    """The files that are going to be written, after a check that they can be. Raises UsageError.

    Args:
        output: as the user gave it.
        total: pictures or videos that are going to be drawn.
        frames: of a video; None for pictures.
        separate: a file for each rather than a sheet.
        force: overwrite what is there.
    """
    from .. import pictures

    targets = pictures.numbered(output, total) if separate and total > 1 else [output]
    if frames is not None and output.suffix.lower() in pictures.SUFFIXES:
        targets = [path for target in targets for path in pictures.numbered_frames(target, frames)]
    pictures.check_targets(targets, force=force, video=frames is not None)
    return targets


def _draw(
    sampler: Sampler, requests: dict[str, Request], **shown: bool
) -> tuple[dict[str, Float32], dict[str, Timing]]:
    """The pictures of each budget, and where the time went."""
    from ..loop.timing import Timer

    drawn, timings = {}, {}
    for name, request in requests.items():
        timer = Timer()
        with progress_bar(f"budget {name}", **shown) as progress:
            drawn[name] = sampler.draw(request, progress=progress, timer=timer)
        timings[name] = timer.timing()
    return drawn, timings


def _log_backend(sampler: Sampler, artifact: Path, load_s: float) -> None:
    _log.info("serves %s on %s, loaded in %.2f s", artifact, sampler.backend, load_s)
    for passed_over, reason in sampler.passed_over.items():
        _log.debug("%s was passed over: %s", passed_over, reason)


def _profile(load_s: float, stages_s: dict[str, float], timings: dict[str, Timing]) -> dict[str, Any]:
    """What `otc run --profile --json` says of the time, in seconds."""
    load = {"total_s": round(load_s, 6), "stages": {name: round(value, 6) for name, value in stages_s.items()}}
    return {"load": load, "budgets": {name: timing.as_json() for name, timing in timings.items()}}


def _print_profile(load_s: float, timings: dict[str, Timing]) -> None:
    console = Console(stderr=True, highlight=False)
    console.print(parts_table(timings, load_s))
    console.print(steps_table(timings))
