"""The command `otc build-engines`."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import artifact_argument, granularity_option, json_option, print_json, quiet_option
from .progress import progress_bar

if TYPE_CHECKING:
    from otcache.schemas.segments import Granularity

    from ..build.build_engines import Progress

MOST_JOBS = 256
"""Processes that build at once, each with gigabytes."""
_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "MiB": 1 << 20, "GiB": 1 << 30}


@click.command(
    "build-engines",
    epilog="""\b
Examples:
  otc build-engines artifacts/shapes --backend tensorrt-rtx --target sm_89,sm_120
  otc build-engines artifacts/shapes --backend tensorrt --profile batch=1:1:8 --workspace 8GB
  otc build-engines artifacts/mine --backend tensorrt --profile height=512:1024:1024,width=512:1024:1024
  otc build-engines artifacts/shapes --backend tensorrt-rtx --target sm_86 --jobs 2 --json
  otc build-engines artifacts/shapes --backend tensorrt --granularity trunk

\b
tensorrt-rtx builds for sm_75 to sm_121 on any host, without a GPU; tensorrt builds for the GPU of the host only.
A build that was stopped goes on where it was when it is started again. Engines for other targets stay.
""",
)
@artifact_argument
@click.option("--backend", type=click.Choice(["tensorrt", "tensorrt-rtx"]), required=True, help="Whose plans to build.")
@click.option("--target", default="", metavar="sm_NN[,…]", help="Compute capabilities; default: this host's GPU.")
@click.option(
    "--profile",
    default="",
    metavar="NAME=MIN:OPT:MAX[,…]",
    help="Pictures at once (batch) and sizes (height, width, num_frames, max_sequence_length) to serve.  "
    "[default: batch=1:1:4, and all sizes that the artifact serves]",
)
@click.option("--workspace", default=None, metavar="SIZE", help="Most memory of one layer, such as 4GB.")
@granularity_option
@click.option("--jobs", type=click.IntRange(1, MOST_JOBS), default=1, show_default=True, help="Plans built at once.")
@click.option("--unsign", is_flag=True, help="Remove the signature of a signed artifact; it cannot cover new engines.")
@quiet_option
@json_option
def build_command(
    artifact: Path,
    backend: str,
    target: str,
    profile: str,
    workspace: str | None,
    granularity: Granularity,
    jobs: int,
    unsign: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Build TensorRT engines of ARTIFACT from its ONNX files and list them in its manifest.

    Needs no torch, no model.
    """
    from ..build.build_engines import build_engines
    from ..messages import readable_size

    with progress_bar("engines", quiet=quiet, as_json=as_json) as bar:

        def progress(event: Progress) -> None:
            if as_json and not quiet:
                click.echo(json.dumps({"event": "engine", **asdict(event)}), err=True)
            if bar is not None:
                bar(event.done, event.total)

        results = build_engines(
            artifact,
            backend=backend,
            targets=parse_targets(target),
            profile=parse_profile(profile),
            workspace_bytes=parse_size(workspace),
            granularity=granularity,
            jobs=jobs,
            unsign=unsign,
            progress=progress,
        )
    if as_json:
        print_json({"artifact": str(artifact), "engines": [asdict(result) for result in results]})
        return
    for result in results:
        again = f", {result.reused} of them from before" if result.reused else ""
        click.echo(
            f"{result.folder}: {result.plans} plans{again}, {readable_size(result.size_bytes)}, {result.build_s:.1f} s"
        )


def parse_targets(text: str) -> tuple[str, ...]:
    """`sm_89,sm_120` → its parts."""
    parts = tuple(part.strip() for part in text.split(",")) if text else ()
    if odd := [part for part in parts if not re.fullmatch(r"sm_[0-9]{2,3}", part)]:
        raise click.BadParameter(
            f"received {odd[0]!r}: expected compute capabilities such as sm_89", param_hint="--target"
        )
    return parts


def parse_profile(text: str) -> dict[str, tuple[int, int, int]]:
    """`batch=1:1:4,height=512:1024:1024` → {"batch": (1, 1, 4), "height": (512, 1024, 1024)}."""
    found = {}
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"\s*([A-Za-z_]\w*)=([0-9]{1,9}):([0-9]{1,9}):([0-9]{1,9})\s*", part)
        if match is None:
            raise click.BadParameter(
                f"received {part!r}: expected NAME=MIN:OPT:MAX, such as batch=1:1:4", param_hint="--profile"
            )
        name, *sizes = match.groups()
        smallest, usual, largest = map(int, sizes)
        found[name] = (smallest, usual, largest)
    return found


def parse_size(text: str | None) -> int | None:
    """`4GB` → bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,12})\s*(|MB|GB|MiB|GiB)", text)
    if match is None:
        raise click.BadParameter(f"received {text!r}: expected a size such as 4GB or 512MiB", param_hint="--workspace")
    return int(match.group(1)) * _UNITS[match.group(2)]
