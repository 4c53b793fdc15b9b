"""What a compile came to → the manifest but for files and digest, as a JSON value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from otcache.schemas import manifest as schema
from otcache.schemas.digest import digest_of_value
from otcache.schemas.manifest import FULL

from ..export.at_sizes import layout_symbols, manifest_shapes
from ..models.digests import denoiser_digest, plain_options
from ..schedules.search import Found
from .capture import calibration_scales
from .evaluate import Evaluated
from .export import Exported
from .golden import golden_record
from .prepare import Prepared
from .session import EVALUATION_SEED, versions


def budget_programs(found: Found, evaluated: Evaluated) -> list[schema.BudgetProgram]:
    """The full sampler, then what was chosen for each budget and what else was tried."""
    programs = [schema.BudgetProgram(budget=FULL, program=evaluated.full)]
    for budget, trials in found.trials.items():
        programs.append(
            schema.BudgetProgram(
                budget=str(budget),
                program=trials[0].program,
                quality=evaluated.quality[str(budget)],
                baselines=tuple(evaluated.baselines[str(budget)]),
                candidates=tuple(trial.candidate(chosen=position == 0) for position, trial in enumerate(trials)),
            )
        )
    return programs


def manifest_fields(
    prepared: Prepared,
    found: Found,
    evaluated: Evaluated,
    exported: Exported,
    programs_at: Mapping[str, list[schema.BudgetProgram]],
    golden_tolerance: float,
) -> dict[str, Any]:
    """The manifest but for files and digest, as a JSON value.

    programs_at: of sizes with a sampler of their own. golden_tolerance: see `golden.tolerance_of`.
    """
    session, table, stages, sizes = prepared.session, prepared.table, prepared.trunk, prepared.sizes
    prompts, held_out = prepared.prompts, prepared.held_out
    options, call, interface, model = session.options, session.call, session.interface, session.model
    total = table.num_inference_steps
    low, high = options.guidance_scale
    scheduler = model.pipeline.scheduler
    latents = layout_symbols(sizes, type(model.pipeline).__name__)
    symbols = {symbol.name: symbol for symbol in (*exported.symbols, *sizes.book.symbols)}
    parts: dict[str, Any] = {
        "schema_version": schema.SCHEMA_VERSION,
        "producer": versions(),
        "model": schema.Model(
            name=model.name,
            pipeline=type(model.pipeline).__name__,
            transformer=type(model.transformer).__name__,
            config_digest=model.config_digest,
            weights_digest=model.weights_digest,
            denoiser_digest=model.denoiser_digest,
            denoiser_digest_float16=denoiser_digest(model.transformer, torch.float16),
        ),
        "sampler": schema.Sampler(
            scheduler=type(scheduler).__name__,
            num_inference_steps=total,
            config=plain_options(scheduler),
        ),
        "conditions": schema.Conditions(
            height=call.height,
            width=call.width,
            num_frames=call.num_frames,
            max_sequence_length=call.max_sequence_length or 1,
            dtype=options.dtype,
            objective=options.objective,
            prompts_digest=digest_of_value([list(prompts), list(held_out)]),
            calibration_prompts=len(prompts),
            evaluation_prompts=len(held_out),
            seed=options.seed,
        ),
        "latents": schema.Latents(
            noise_shape=interface.noise_shape,
            split=interface.noise_split,
            permutation=interface.noise_permutation,
            shape=interface.latents_shape,
            initial_scale=table.initial_scale,
            decoded_as=exported.decoded_as,
            **latents,
        ),
        "timestep_scale": interface.timestep_scale,
        "latents_input": interface.latents_input,
        "timestep_input": interface.timestep_input,
        "output": stages.output,
        "guidance": schema.Guidance(
            kind=interface.guidance_kind,
            scale=options.nominal_scale,
            minimum=low,
            maximum=high,
            negative_prompt=call.negative_prompt or "",
        ),
        "max_relative_error": exported.max_relative_error,
        "stages": exported.stages,
        "features": [schema.Feature(source=source, result=result) for source, result in stages.features],
        "tokenizers": exported.tokenizers,
        "reference": schema.Policy(
            schedule=found.reference.schedule, num_inference_steps=total, source=found.reference.name
        ),
        "anchor": schema.Policy(schedule=found.anchor.schedule, num_inference_steps=total, source=found.anchor.name),
        "programs": budget_programs(found, evaluated),
        "shapes": manifest_shapes(sizes, list(symbols.values()), programs_at),
        "golden": None
        if session.encoders is None
        else golden_record(
            prompt=held_out[0],
            budget=min(found.trials),
            seed=options.seed + EVALUATION_SEED,
            guidance_scale=None if interface.guidance_kind == "none" else calibration_scales(low, high, 1)[0],
            max_relative_error=golden_tolerance,
        ),
        "costs": [schema.Cost(name="capture", full_runs=1.0)]
        + [schema.Cost(name=name, full_runs=round(value, 4)) for name, value in found.costs.items()],
        "engines": [
            schema.Engine(
                backend="onnx", version="opset 20", target="any", stages={s.name: s.onnx for s in exported.stages}
            )
        ],
    }
    return {name: _dumped(value) for name, value in parts.items()}


def _dumped(value: Any) -> Any:
    """Models inside lists and on their own as JSON values."""
    if isinstance(value, list):
        return [_dumped(item) for item in value]
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value
