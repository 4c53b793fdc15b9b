"""Options that `otc compile` and `otc compare` have in common, with the defaults of `CompileOptions`.

Imports click only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from ..effort import EffortName
from ..options import CompileOptions, DTypeName, Objective, Offload

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def call_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how the pipeline is called, and for which prompts."""
    return _all(
        click.option(
            "--num-inference-steps",
            default=CompileOptions.num_inference_steps,
            show_default=True,
            help="Steps of the full sampler.",
        ),
        click.option(
            "--guidance-scale", default="4", show_default=True, help="Guidance scale, or a range such as 2:6."
        ),
        click.option(
            "--prompts", type=click.Path(path_type=Path), help="Text file, a prompt a line; half at most is held out."
        ),
        click.option("--negative-prompt", help="Negative prompt of guided models.  [default: the model's, or none]"),
        click.option("--height", type=int, help="Pixels.  [default: the model's]"),
        click.option("--width", type=int, help="Pixels.  [default: the model's]"),
        click.option("--num-frames", type=int, help="Frames of a video.  [default: the model's]"),
        click.option("--max-sequence-length", type=int, help="Text tokens.  [default: the model's]"),
    )(command)


def search_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what the searches do, and on how many prompts."""
    return _all(
        click.option(
            "--effort",
            type=click.Choice(get_args(EffortName)),
            default=CompileOptions.effort,
            show_default=True,
            help="What the searches may cost: about 2, 10 or 25 full runs a prompt.",
        ),
        click.option("--trials", type=int, help="Trials of the anchor search.  [default: by --effort]"),
        click.option(
            "--objective",
            type=click.Choice(get_args(Objective)),
            default=CompileOptions.objective,
            show_default=True,
            help="What the searches maximise; lpips needs weights that OTC_LPIPS names.",
        ),
        click.option(
            "--calibration-prompts",
            type=int,
            help="Prompts to calibrate on, at most.  [default: by --effort]",
        ),
        click.option(
            "--evaluation-prompts",
            default=CompileOptions.evaluation_prompts,
            show_default=True,
            help="Prompts to hold out, at most.",
        ),
        click.option(
            "--seed",
            default=CompileOptions.seed,
            show_default=True,
            help="Of the calibration's noise and the searches.",
        ),
    )(command)


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where the model is evaluated, and in what."""
    return _all(
        click.option(
            "--device",
            default=CompileOptions.device,
            show_default=True,
            metavar="auto|cpu|cuda|cuda:1",
            help="Where the model is evaluated; auto takes the first GPU there is.",
        ),
        click.option(
            "--precision",
            type=click.Choice(get_args(DTypeName)),
            default=CompileOptions.precision,
            show_default=True,
            help="Of the model's evaluations; latents, fits and metrics stay float32 and float64.",
        ),
        click.option(
            "--micro-batch",
            default="auto",
            show_default=True,
            metavar="auto|N",
            help="Samples that are evaluated at once; auto chooses from free memory.",
        ),
        click.option(
            "--offload",
            type=click.Choice(get_args(Offload)),
            default=CompileOptions.offload,
            show_default=True,
            help="What leaves the device while it is not needed: whole components, or groups of layers.",
        ),
    )(command)


def crew_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say who makes full runs and holds samples."""
    return _all(
        click.option(
            "--workers",
            type=click.IntRange(min=0),
            metavar="N",
            help="Spread over N workers, a GPU each or, without GPUs, a CPU core: on the cluster that RAY_ADDRESS "
            "names, else on this host. Needs otcache[ray].",
        ),
        click.option(
            "--ray",
            "ray_address",
            metavar="ADDRESS",
            help="Of a running Ray cluster, such as auto or 10.0.0.1:6379; all its GPUs or cores without --workers.",
        ),
    )(command)


def quiet_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `-q`, `--quiet`: without progress."""
    text = "No progress on stderr, neither bars nor lines; notes and errors stay."
    return click.option("-q", "--quiet", is_flag=True, help=text)(command)


def _all(*options: Decorator) -> Decorator:
    """Several options as one decorator; help lists them in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
