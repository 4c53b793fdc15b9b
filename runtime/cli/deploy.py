"""`otc deploy`: an artifact as a folder that Triton, Ray Serve or a container serves."""

from __future__ import annotations

import re
from pathlib import Path

import click

from .options import artifact_argument, json_option, print_json, queue_options, threads_option

TARGETS = ("triton", "ray-serve", "docker")
"""As `settings.TARGETS`, which costs more to import than a command line's help may."""
NEXT = {
    "triton": "tritonserver --model-repository {folder}",
    "ray-serve": "serve run serve.yaml, in {folder}",
    "docker": "docker compose --project-directory {folder} up --build",
}
"""What serves a deployment."""


@click.command(
    epilog="""\b
Targets:
  triton     a model repository: NVIDIA's Python backend around the whole sampling loop
  ray-serve  an application: replicas, autoscaling, the routes of otc serve
  docker     Dockerfile and compose file of otc serve: no torch, no root, nothing to write to

\b
Examples:
  otc deploy artifacts/shapes --to triton -o model_repository
  otc deploy artifacts/shapes --to ray-serve -o application --instances 4 --lowest-budget 8
  otc deploy artifacts/shapes --to docker -o container --device cuda
"""
)
@artifact_argument
@click.option("--to", "target", type=click.Choice(TARGETS), required=True, help="What is going to serve it.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="A folder that is new."
)
@click.option("--name", default=None, help="Of the model, application or container.  [default: the artifact's model]")
@click.option(
    "--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True, help="What its hosts draw on."
)
@click.option(
    "--instances",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Copies that draw at once: Triton's instances (on each GPU), at most so many replicas, the server's workers.",
)
@threads_option
@queue_options(max_batch=4, max_wait_s=0.02)
@click.option("--force", is_flag=True, help="Replace a folder that otc deploy has written.")
@json_option
def deploy(
    artifact: Path,
    target: str,
    output: Path,
    name: str | None,
    device: str,
    instances: int,
    threads: int | None,
    max_batch: int,
    max_wait_s: float,
    capacity: int,
    timeout_s: float,
    lowest_budget: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write ARTIFACT with all that an engine needs to serve it: verified, self-contained, whole or not at all.

    On Triton --timeout is for the wait in the queue alone, and load lowers no budget.
    """
    from ..artifact.reader import Artifact
    from ..deploy.deploy import deploy as write
    from ..deploy.settings import Settings
    from ..engines.choose import check_engines

    opened = Artifact.open(artifact)
    check_engines(opened.manifest)
    settings = Settings(
        name=re.sub(r"[^A-Za-z0-9]+", "-", opened.manifest.model.name).strip("-")[:63] if name is None else name,
        device=device,  # type: ignore[arg-type]  # click has checked it
        instances=instances,
        threads=threads,
        max_batch=max_batch,
        max_wait_s=max_wait_s,
        capacity=capacity,
        timeout_s=timeout_s,
        lowest_budget=lowest_budget,
    )
    deployed = write(opened, target, output, settings, force=force)  # type: ignore[arg-type]
    if as_json:
        files = [*deployed.files, deployed.artifact]
        print_json(
            {"output": str(output), "target": target, "name": deployed.name, "digest": deployed.digest, "files": files}
        )
    else:
        click.echo(f"{output}: {', '.join(deployed.files)} and {deployed.artifact} ({deployed.digest})")
        click.echo(f"next: {NEXT[target].format(folder=output)}")
