"""Pass `export` as a whole: a calibrated model → its engines, and what the manifest says of them.

Engines are exported from a model on the CPU in float32. Where the calibration was elsewhere, or in another precision,
the model is loaded again for it, or brought there and back.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from otcache.schemas import manifest as schema

from ..export.at_sizes import constant_files
from ..export.precision import Served
from ..models.model import Model
from ..models.offloading import weights_in_place
from ..schedules.search import Found
from .capture import calibration_scales
from .evaluate import Evaluated, evaluation_key
from .export import DESCRIPTION, EXPORTS, Exportable, Exported, export_key, export_parts, serve_trunk
from .golden import first_denoiser, golden_record, rounding_of, tolerance_of, write_golden
from .manifest import engine_fields
from .prepare import Prepared, cut_stages, example_of
from .session import EVALUATION_SEED, Session, begin


@dataclass(frozen=True, kw_only=True)
class Engines:
    """Exported files, and what the manifest says of them."""

    source: Exportable
    exported: Exported
    golden: np.ndarray | None
    """Final latents of the golden request, float32 (…)."""
    fields: dict[str, Any]
    """Of the manifest, as JSON values."""

    def write(self, folder: Path) -> None:
        """Put all files into an artifact's folder."""
        for exported_folder in self.exported.folders:
            shutil.copytree(exported_folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(DESCRIPTION))
        for path, content in constant_files(self.source.sizes).items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)
        if self.golden is not None:
            write_golden(folder, self.golden)


@contextlib.contextmanager
def exportable_from_prepared(prepared: Prepared) -> Iterator[Exportable]:
    """What engines are exported from: the calibrated model itself where that is on the CPU in float32, else another."""
    session = prepared.session
    if session.placement.exportable:
        example = example_of(session, prepared.runs)
        yield Exportable(session=session, stages=prepared.trunk, sizes=prepared.sizes, example=example)
        return
    options = replace(session.options, device="cpu", precision="float32", offload="none", micro_batch=1)
    with _brought_to_the_cpu(session) as live:
        own, _, _ = begin(options, session.reporter, live)
        own = replace(own, workspace=session.workspace, key=session.key)
        yield exportable_from_session(own, example_of(own, prepared.runs))


@contextlib.contextmanager
def _brought_to_the_cpu(session: Session) -> Iterator[Model | None]:
    """A model that the caller made, on the CPU in float32 while it lasts; None for one that can be loaded again."""
    model = session.model
    if not model.live:
        yield None
        return
    pipeline = model.pipeline
    modules = [each for each in pipeline.components.values() if isinstance(each, nn.Module)]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(weights_in_place(module))
        hooks = getattr(pipeline, "_all_hooks", None)
        if hooks:  # else the pipeline hooks its components again at the end of every call
            stack.callback(setattr, pipeline, "_all_hooks", hooks)
            pipeline._all_hooks = []
        for module in modules:
            stack.enter_context(_in_float32(module))
        yield model


@contextlib.contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """A module whose parameters and buffers are on the CPU in float32 while it lasts, and then where and what they
    were. Quantised weights, and whole numbers, keep their form.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    kept = {name: tensor.data for name, tensor in tensors}
    module.to("cpu", torch.float32)
    try:
        yield
    finally:
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            tensor.data = kept[name]


def exportable_from_session(session: Session, example: dict[str, Tensor]) -> Exportable:
    """Cut a model that is on the CPU in float32.

    Args:
        session: with the model.
        example: transformer inputs with a batch of 2 · branches.
    """
    stages, sizes = cut_stages(session, example)
    session = replace(session, interface=replace(session.interface, tables=sizes.own_tables))
    return Exportable(session=session, stages=stages, sizes=sizes, example=example)


def make_engines(
    source: Exportable,
    found: Found,
    quality: Evaluated,
    prompt: str,
    programs_at: Mapping[str, list[schema.BudgetProgram]],
) -> Engines:
    """Export everything, with a golden request where prompts are served.

    Args:
        source: the model.
        found: the chosen programs; the golden request is at the smallest budget.
        quality: with the full runs of held-out prompts, and the golden latents.
        prompt: the first held-out one.
        programs_at: of sizes with a sampler of their own.
    """
    session, options = source.session, source.session.options
    trunk = functools.cache(partial(serve_trunk, source))
    exported = export_parts(source, trunk)
    golden = None
    if session.encoders is not None:
        low, high = options.guidance_scale
        golden = golden_record(
            prompt=prompt,
            budget=min(found.trials),
            seed=options.seed + EVALUATION_SEED,
            guidance_scale=calibration_scales(low, high, 1)[0] if session.interface.guided else None,
            max_relative_error=_golden_tolerance(source, found, quality, prompt, exported, trunk),
        )
    return Engines(
        source=source,
        exported=exported,
        golden=None if golden is None else quality.golden,
        fields=engine_fields(source, exported, golden, programs_at),
    )


def _golden_tolerance(
    source: Exportable,
    found: Found,
    quality: Evaluated,
    prompt: str,
    exported: Exported,
    trunk_of: Any,
) -> float:
    """How far a host's golden latents may be from the stored ones (`golden`)."""
    session, budget = source.session, min(found.trials)
    same = session.key["placement"]["precision"] == "float32" and session.options.dtype == "float32"
    if same:
        return tolerance_of(exported.max_relative_error, None)
    program = found.trials[budget][0].program
    key = [export_key(session, EXPORTS[0]), evaluation_key(session, [prompt], budget, program)]

    def compute() -> float:
        served: Served = trunk_of()
        latents = torch.from_numpy(quality.runs.latents(slice(1), 0))
        return rounding_of(served, program, first_denoiser(session, quality.runs), latents, quality.golden)

    return tolerance_of(exported.max_relative_error, session.workspace.json("rounding", key, compute))
