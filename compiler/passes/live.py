"""`compile`: a pipeline that is in memory → an artifact, as `otc compile` does it for a folder."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from otcache.schemas.errors import ModelError, UsageError

from ..models.digests import config_digest, denoiser_digest, loaded_adapters, weights_digest
from ..models.files import INDEX
from ..models.model import Model, transformer_of
from ..options import CompileOptions, budgets_or_default, parse_budgets, parse_guidance
from ..workspace.progress import Reporter, reporter_for
from .compile import compile_model

OF_LOADING = ("revision", "variant", "trust_remote_code", "lora", "device", "precision", "offload")
"""Options that say how and where a model is loaded, and have no meaning for one that is."""


def compile(
    pipeline: Any,
    *,
    budgets: Iterable[int] | str | None = None,
    targets: Iterable[str] | str = (),
    prompts: Iterable[str] | Path | None = None,
    guidance_scale: float | tuple[float, float] | str = 4.0,
    progress: bool | Reporter = True,
    **options: Any,
) -> Path:
    """Compile a diffusers pipeline into an artifact and return its folder.

    The pipeline is taken as it is, on any device, in any precision, with offloading or with a quantised model, and is
    as it was afterwards. Engines are exported from the same weights on the CPU in float32, to where they are brought
    for it; a quantised model has none (`engines="none"`). Its weights, as they are in memory, identify it: the same
    weights and options go on where an interrupted compile stopped.

    Args:
        budgets: model evaluations to serve at, as numbers or as on the command line; by default 4, 8 and 16, or those
            that reach the targets.
        targets: qualities such as `psnr>=35`; the smallest budget that reaches each on held-out prompts is compiled.
        prompts: the prompts themselves, or a text file with one a line; half at most is held out.
        guidance_scale: one scale, or the lowest and the highest that will be served.
        progress: show bars on a terminal; or a `Reporter` of one's own.
        options: every other field of `CompileOptions`. `model` is the name that the artifact gets.

    Raises OTCacheError, as `otc compile` does.
    """
    name = str(options.pop("model", None) or _name_of(pipeline))
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    chosen = CompileOptions(
        model=name,
        budgets=budgets_or_default(_budgets(budgets), wanted),
        targets=wanted,
        prompts=_prompts(prompts),
        guidance_scale=_scales(guidance_scale),
        **_checked(options),
    )
    _check_pipeline(pipeline)
    reporter = progress if isinstance(progress, Reporter) else Reporter()
    if progress is True:
        reporter = reporter_for(as_json=False, verbose=False)
    try:
        with _at_rest(pipeline):
            return compile_model(chosen, reporter, live_model(pipeline, name))[0]
    finally:
        reporter.close()


def live_model(pipeline: Any, name: str) -> Model:
    """The pipeline with digests of what it holds in memory."""
    return Model(
        name=name,
        folder=_folder_of(pipeline),
        pipeline=pipeline,
        config_digest=config_digest(pipeline),
        weights_digest=weights_digest(pipeline),
        denoiser_digest=denoiser_digest(transformer_of(pipeline, "the pipeline")),
        live=True,
    )


def _name_of(pipeline: Any) -> str:
    """Of the folder or hub model that it was loaded from, else of its class."""
    return Path(getattr(pipeline, "config", {}).get("_name_or_path") or "").name or type(pipeline).__name__


def _folder_of(pipeline: Any) -> Path | None:
    """Where the pipeline was loaded from, if that is a folder that is still there: it may bring prompts and a call."""
    path = Path(getattr(pipeline, "config", {}).get("_name_or_path") or "")
    return path if (path / INDEX).is_file() else None


def _budgets(given: Iterable[int] | str | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    return parse_budgets(given if isinstance(given, str) else ",".join(map(str, given)))


def _prompts(given: Iterable[str] | Path | None) -> Path | tuple[str, ...] | None:
    if isinstance(given, str):
        raise UsageError(f"prompts is the text {given[:40]!r}: expected a list of prompts, or the Path of a file")
    return given if given is None or isinstance(given, Path) else tuple(given)


def _scales(given: float | tuple[float, float] | str) -> tuple[float, float]:
    if isinstance(given, (int, float)):
        return float(given), float(given)
    return parse_guidance(given if isinstance(given, str) else ":".join(map(str, given)))


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options by name, paths as such."""
    known = {field.name for field in fields(CompileOptions)} - set(OF_LOADING)
    for name in options:
        if name in OF_LOADING:
            raise UsageError(f"{name} is given, but the pipeline is loaded already: leave it out")
        if name not in known:
            raise UsageError(f"{name} is no option of compile: expected some of {', '.join(sorted(known))}")
    paths = {name: Path(options[name]) for name in ("output", "workspace") if options.get(name) is not None}
    return {**options, **paths}


def _check_pipeline(pipeline: Any) -> None:
    """Raise ModelError for what cannot be compiled as it is."""
    transformer = transformer_of(pipeline, "the pipeline")
    subject = f"the {type(pipeline).__name__}"
    if "recipe" in pipeline.scheduler.config:
        raise ModelError(f"{subject} runs a compiled program already: set the scheduler from before on it")
    if hasattr(transformer, "_orig_mod"):
        raise ModelError(
            f"{subject} has a model made by torch.compile: expected the model itself, transformer._orig_mod"
        )
    for name, component in pipeline.components.items():
        if not isinstance(component, nn.Module):
            continue
        if adapters := loaded_adapters(component):
            raise ModelError(
                f"{subject} has LoRA {', '.join(adapters)} on its {name}: expected weights as they will be served: "
                "call fuse_lora and unload_lora_weights first"
            )


@contextlib.contextmanager
def _at_rest(pipeline: Any) -> Iterator[None]:
    """The pipeline as the passes need it: in eval mode, without gradients or bars, with a scheduler that may be
    changed.
    """
    components = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    modes = [(module, module.training) for component in components for module in component.modules()]
    gradients = [  # by name: hooks that offload weights put others in their place
        (component, {name: tensor.requires_grad for name, tensor in component.named_parameters()})
        for component in components
    ]
    scheduler, bar = pipeline.scheduler, getattr(pipeline, "_progress_bar_config", {})
    tiles = getattr(getattr(pipeline, "vae", None), "use_tiling", None)
    pipeline.scheduler = copy.deepcopy(scheduler)
    pipeline.set_progress_bar_config(disable=True)
    for component in components:
        component.eval().requires_grad_(False)
    try:
        yield
    finally:
        pipeline.scheduler, pipeline._progress_bar_config = scheduler, bar
        if tiles is not None:
            pipeline.vae.use_tiling = tiles
        for module, mode in modes:
            module.training = mode
        for component, needed in gradients:
            for name, tensor in component.named_parameters():
                if needed[name]:
                    tensor.requires_grad_()
