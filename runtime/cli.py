"""The command `otc`. Serving commands are here; others come through the entry-point group `otcache.commands`."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from otcache.schemas.errors import HostError, OTCacheError, UsageError

from .cli_options import artifact_argument, granularity_option, json_option, size_options
from .cli_options import print_json as _print_json
from .completion import complete_backends, complete_budgets, completion
from .trust_cli import pack, sign, unpack, verify

if TYPE_CHECKING:
    from otcache.schemas.manifest import BudgetProgram, Manifest, TensorInfo
    from otcache.schemas.segments import Granularity

    from .timing import Timing

GROUP = "otcache.commands"
EXIT_CODES = """\b
Exit codes:
  0  success
  1  any other failure
  2  usage: an option, argument or output file
  3  model: cannot be loaded or compiled
  4  artifact: damaged, incomplete or of an unknown version
  5  request: a budget, prompt or size that is not served
  6  host: a package, backend or device is missing
  130, 143  stopped by Ctrl-C or SIGTERM

\b
Environment:
  OTC_LOG          debug, info, warning (default) or error: what is logged to stderr
  OTC_CACHE        where compiles keep their results; default ~/.cache/otcache
  HF_HUB_OFFLINE   1: hub ids are taken from the local cache only
"""
KINDS = {1: "other", 2: "usage", 3: "model", 4: "artifact", 5: "request", 6: "host"}
"""Exit codes by name, as `--json` reports errors."""
_JSON = "--json"
_log = logging.getLogger(__name__)


class Commands(click.Group):
    """Commands of this module and of the entry points; every error ends in one line and a documented exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_entry_points()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        point = _entry_points().get(cmd_name)
        return own if own is not None or point is None else _load_command(cmd_name, point)

    def main(  # type: ignore[override]  # click overloads it by standalone_mode
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        *,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's, but with `--json` on the line an error is a JSON object on stderr."""
        args = list(sys.argv[1:] if args is None else args)
        if not standalone_mode or not _asks_for_json(args):
            return super().main(args, prog_name, standalone_mode=standalone_mode, **extra)
        try:
            code = super().main(args, prog_name, standalone_mode=False, **extra)
        except click.ClickException as error:
            _print_json_error(error.format_message(), error.exit_code)
            sys.exit(error.exit_code)
        except click.Abort:
            _print_json_error("interrupted: start it again", 1)
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_JSON] = _asks_for_json(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OTCacheError as error:
            _log.debug("%s was raised here", type(error).__name__, exc_info=True)
            raise _one_line_error(str(error), error.exit_code) from None
        except (click.exceptions.Exit, click.ClickException, click.Abort, KeyboardInterrupt, BrokenPipeError):
            raise
        except Exception as error:
            _log.debug("unexpected %s was raised here", type(error).__name__, exc_info=True)
            what = f"unexpected {type(error).__name__}: {error}: set OTC_LOG=debug to see where"
            raise _one_line_error(what, 1) from None


def _asks_for_json(args: Sequence[str]) -> bool:
    """Whether `--json` is among the options of a command line, also of one that does not parse."""
    return _JSON in (args[: args.index("--")] if "--" in args else args)


def _print_json_error(message: str, exit_code: int) -> None:
    """The last line of stderr: `{"event": "error", "exit_code": 4, "kind": "artifact", "message": …}`."""
    from .messages import one_line

    event = {"event": "error", "exit_code": exit_code, "kind": KINDS.get(exit_code, "other"),
             "message": one_line(message, 2000)}  # fmt: skip
    click.echo(json.dumps(event, ensure_ascii=False), err=True)


def _one_line_error(message: str, exit_code: int) -> click.ClickException:
    from .messages import one_line

    error = click.ClickException(one_line(message, 2000))
    error.exit_code = exit_code  # type: ignore[misc]
    return error


def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=GROUP)}


def _load_command(name: str, point: metadata.EntryPoint) -> click.Command:
    """The command, or one that says what is missing."""
    try:
        command: click.Command = point.load()
        return command
    except (ImportError, AttributeError) as error:
        reason = str(error)

    def fail(**_: Any) -> None:
        raise HostError(f"otc {name} cannot be loaded: {reason}: pip install 'otcache[compiler]'")

    arguments = click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)
    settings = {"ignore_unknown_options": True}
    return click.Command(
        name, callback=fail, params=[arguments], context_settings=settings, help="(its packages are not installed)"
    )


@click.group(
    cls=Commands,
    epilog=f"""\b
Examples:
  otc run artifacts/shapes --budget 8 --prompt "a small red ring on blue" -o ring.png
  otc inspect artifacts/shapes --json
  otc completion bash

{EXIT_CODES}""",
)
@click.version_option(package_name="otcache", prog_name="otc")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Ahead-of-time compiled sampling for diffusion models.

    Results go to stdout, progress, logs and errors to stderr. With --json stdout holds one JSON value, and every line on
    stderr is a JSON object too: the last one of a command that fails is its error.
    """
    from .logs import configure

    configure(as_json=ctx.meta[_JSON])


for _command in (completion, pack, sign, unpack, verify):
    main.add_command(_command)


@main.command(
    epilog="""\b
Examples:
  otc run artifacts/shapes --budget 8 --prompt "a small red ring on blue"
  otc run artifacts/shapes --budget full --prompt "a green star" -n 4 --seed 7 -o stars.png
  otc run artifacts/shapes --budget full,16,8,4 --prompt "a green star" --prompt "a red ring" -o compare.png
  otc run artifacts/mine --height 768 --width 512 --budget 8 --prompt "a green star"
"""
)
@artifact_argument
@click.option("--budget", required=True, metavar="N|full[,…]", shell_complete=complete_budgets,
              help="Model evaluations to spend; `otc inspect` lists them. Several give a column each.")  # fmt: skip
@click.option("--prompt", multiple=True, help="What to draw; may be given several times.")
@click.option("--conditioning", type=click.Path(path_type=Path, dir_okay=False),
              help="What `otc encode` made of prompts, instead of --prompt.")  # fmt: skip
@click.option("--negative-prompt", default=None, help="What to steer away from; default: the artifact's.")
@click.option("--seed", type=int, default=0, show_default=True, help="As a torch CPU generator's seed in diffusers.")
@click.option("-n", "--images", "images", type=click.IntRange(min=1), default=1, show_default=True, help="Per prompt.")
@click.option(
    "--guidance-scale", type=float, default=None, help="Within the calibrated range; default: the artifact's."
)
@size_options
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("out.png"), show_default=True,
              help="PNG, JPEG or WebP; several pictures make one contact sheet. A video: GIF, MP4, or frames as pictures.")  # fmt: skip
@click.option("--fps", type=click.IntRange(1, 50), default=15, show_default=True, help="Frames a second of a video.")
@click.option("--separate", is_flag=True, help="Write numbered files instead of a contact sheet.")
@click.option("--backend", default="auto", show_default=True, shell_complete=complete_backends,
              help="auto, onnxruntime, tensorrt or tensorrt-rtx.")  # fmt: skip
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
    import time

    from . import pictures
    from .artifact import Artifact
    from .conditioning import read_conditioning
    from .engine import Options, select_backend
    from .profiles import request_of
    from .sampler import Sampler
    from .sizes import Sizes
    from .timing import Timer

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
    manifest = Sizes(whole).manifest(size)
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
                "outputs": [str(target) for target in targets], "images": total, "budget": budget, "seed": seed,
                "backend": used, "load_s": round(loaded - begin, 4), "request_s": round(sum(seconds.values()), 4),
                "budget_s": {name: round(value, 4) for name, value in seconds.items()},
                **({"profile": _profile(loaded - begin, load_stages_s, timings)} if profile else {}),
            }
        )  # fmt: skip
    else:
        if profile:
            _print_profile(loaded - begin, timings)
        names = ", ".join(str(target) for target in targets)
        times = ", ".join(f"budget {name} {value:.2f} s" for name, value in seconds.items())
        click.echo(f"{names}: {total} picture{'s' * (total > 1)}, {times} ({used})")


@main.command(
    epilog="""\b
Examples:
  otc inspect artifacts/shapes
  otc inspect artifacts/shapes --json | jq .budgets
  otc inspect artifacts/shapes --memory --images 4 --granularity trunk
  otc inspect artifacts/mine --memory --height 768 --width 512
"""
)
@artifact_argument
@click.option(
    "--memory", is_flag=True, help="Show the device memory of each budget at a size, and every address, instead."
)
@click.option("-n", "--images", type=click.IntRange(min=1), default=1, show_default=True, help="At once, for --memory.")
@size_options
@granularity_option
@json_option
def inspect(
    artifact: Path,
    memory: bool,
    images: int,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    max_sequence_length: int | None,
    granularity: Granularity,
    as_json: bool,
) -> None:
    """Show what ARTIFACT holds: model, stages, engines, budgets, quality and every schedule."""
    from .artifact import Artifact
    from .engine_tables import memory_summary, memory_tables
    from .sizes import Sizes

    whole = Artifact.open(artifact)
    manifest = whole.manifest
    if memory:
        size = {"height": height, "width": width, "num_frames": num_frames, "max_sequence_length": max_sequence_length}
        sized = Sizes(whole).manifest(size)
        if as_json:
            _print_json(memory_summary(sized, images, granularity))
        else:
            _print_tables(memory_tables(sized, images, granularity))
    elif as_json:
        _print_json(summary(manifest))
    else:
        _print_manifest(manifest)


def _profile(load_s: float, stages_s: dict[str, float], timings: dict[str, Timing]) -> dict[str, Any]:
    """What `otc run --profile --json` says of the time, in seconds."""
    load = {"total_s": round(load_s, 6), "stages": {name: round(value, 6) for name, value in stages_s.items()}}
    return {"load": load, "budgets": {name: timing.as_json() for name, timing in timings.items()}}


def _print_profile(load_s: float, timings: dict[str, Timing]) -> None:
    from rich.console import Console

    from .timing_table import parts_table, steps_table

    console = Console(stderr=True, highlight=False)
    console.print(parts_table(timings, load_s))
    console.print(steps_table(timings))


def timeline(schedule: tuple[int, ...], total: int, width: int = 64) -> str:
    """A schedule on a line of at most `width` characters: the height of a block is the share of computed steps."""
    cells = min(total, width)
    blocks = "·▁▂▃▄▅▆▇█"
    computed, sizes = [0] * cells, [0] * cells
    for index in range(total):
        cell = index * cells // total
        sizes[cell] += 1
        computed[cell] += index in schedule
    return "".join(blocks[-(-8 * some // size)] for some, size in zip(computed, sizes, strict=True))


def summary(manifest: Manifest) -> dict[str, Any]:
    """What `otc inspect --json` prints."""
    from .engine_tables import engine_summaries

    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    stages = [{**stage.model_dump(mode="json"), "size_bytes": sizes[stage.onnx]} for stage in manifest.stages]
    budgets = [_budget_summary(entry) for name in manifest.budgets if (entry := manifest.program(name))]
    parts = ("schema_version", "digest", "producer", "model", "sampler", "conditions", "guidance", "reference",
             "anchor", "shapes", "costs", "measurements")  # fmt: skip
    dumped = manifest.model_dump(mode="json", include=set(parts))
    files = {"count": len(manifest.files), "size_bytes": sum(sizes.values())}
    engines = engine_summaries(manifest)
    return {
        **{part: dumped[part] for part in parts},
        "engines": engines,
        "stages": stages,
        "budgets": budgets,
        "files": files,
    }


def _budget_summary(entry: BudgetProgram) -> dict[str, Any]:
    dumped = entry.model_dump(mode="json", exclude={"program"})
    program = entry.program
    return {
        "budget": entry.budget, "payload": program.payload, "nfe": program.nfe, "steps": len(program.steps),
        "schedule": list(program.schedule), **{key: dumped[key] for key in ("quality", "candidates", "baselines")},
    }  # fmt: skip


def _print_tables(tables: Sequence[Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for table in tables:
        console.print(table)


def _print_manifest(manifest: Manifest) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .engine_tables import engines_table
    from .messages import one_line, readable_size
    from .sizes import size_lines

    def safe(value: object) -> str:
        return escape(one_line(value))

    console = Console(highlight=False)
    model, sampler, conditions, guidance = manifest.model, manifest.sampler, manifest.conditions, manifest.guidance
    facts = Table.grid(padding=(0, 2))
    facts.add_column()
    facts.add_column(overflow="fold")
    scale = f"{guidance.kind} {guidance.scale:g} (served {guidance.minimum:g} to {guidance.maximum:g})"
    for name, value in (
        ("model", f"{model.name} ({model.pipeline}, {model.transformer})"),
        ("sampler", f"{sampler.scheduler}, {sampler.num_inference_steps} steps"),
        ("guidance", scale if guidance.kind != "none" else "none"),
        ("pictures", f"{conditions.width} × {conditions.height}, {conditions.dtype}"),
        *(("sizes", text) for text in size_lines(manifest)),
        ("calibrated", f"{conditions.calibration_prompts} prompts for {conditions.objective}, seed {conditions.seed}"),
        ("digest", manifest.digest),
    ):
        facts.add_row(name, safe(value))
    console.print(facts)
    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    stages = Table(title="Stages", title_justify="left", box=None)
    for heading in ("stage", "kind", "reads", "writes", "size", "error"):
        figure = heading in ("size", "error")
        stages.add_column(heading, justify="right" if figure else "left", no_wrap=figure, overflow="fold")
    for stage in manifest.stages:
        reads, writes = ("\n".join(safe(_tensor(t)) for t in side) for side in (stage.inputs, stage.outputs))
        error = f"{stage.max_relative_error:.1e}"
        stages.add_row(safe(stage.name), stage.kind, reads, writes, readable_size(sizes[stage.onnx]), error)
    console.print(stages)
    if manifest.engines:
        console.print(engines_table(manifest))
    budgets = Table(title="Budgets", title_justify="left", box=None)
    for heading in ("budget", "payload", "PSNR dB", "worst", "SSIM", "schedule"):
        budgets.add_column(heading, no_wrap=True, justify="left" if heading in ("payload", "schedule") else "right")
    width = max(8, console.width - 46)
    for name in manifest.budgets:
        if entry := manifest.program(name):
            budgets.add_row(*_budget_row(entry, sampler.num_inference_steps, width))
    console.print(budgets)


def _tensor(tensor: TensorInfo) -> str:
    """`hidden batch×64×128`; the type is named unless it is float32."""
    dtype = "" if tensor.dtype == "float32" else f" {tensor.dtype}"
    return f"{tensor.name}{dtype} {'×'.join(map(str, tensor.shape)) or 'scalar'}"


def _budget_row(entry: BudgetProgram, total: int, width: int) -> tuple[str, ...]:
    quality = ("–", "–", "–")
    if q := entry.quality:
        quality = (f"{q.psnr_db.mean:.1f}", f"{q.psnr_db.worst:.1f}", f"{q.ssim.mean:.3f}")
    return (entry.budget, entry.program.payload, *quality, timeline(entry.program.schedule, total, min(width, 100)))


@contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr if that is a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(title))
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
