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
from ..sizes.served import Sizes
from .evaluate import Evaluated
from .export import Exportable, Exported
from .prepare import Prepared
from .session import versions


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


def program_fields(
    prepared: Prepared, found: Found, evaluated: Evaluated, programs_at: Mapping[str, list[schema.BudgetProgram]]
) -> dict[str, Any]:
    """The manifest of an artifact of programs alone, but for files and digest, as a JSON value.

    Args:
        prepared: the model and its calibration.
        found: what the searches came to.
        evaluated: fidelity on held-out prompts.
        programs_at: of sizes with a sampler of their own, by what `described` says of the size.
    """
    session, table, sizes = prepared.session, prepared.table, prepared.sizes
    options, interface, model = session.options, session.interface, session.model
    total = table.num_inference_steps
    scheduler = model.pipeline.scheduler
    parts: dict[str, Any] = {
        "schema_version": schema.SCHEMA_VERSION,
        "producer": {**versions(), **session.producer},
        "model": schema.Model(
            name=model.name,
            pipeline=type(model.pipeline).__name__,
            transformer=type(model.transformer).__name__,
            config_digest=model.config_digest,
            weights_digest=model.weights_digest,
            # what was rounded to float16 cannot be compared in bfloat16
            denoiser_digest=None if session.placement.precision == torch.float16 else model.denoiser_digest,
            denoiser_digest_float16=denoiser_digest(model.transformer, torch.float16),
        ),
        "sampler": schema.Sampler(
            scheduler=type(scheduler).__name__,
            num_inference_steps=total,
            config=plain_options(scheduler),
        ),
        "conditions": _conditions(prepared),
        "latents": _latents(prepared, sizes),
        "timestep_scale": interface.timestep_scale,
        "latents_input": interface.latents_input,
        "timestep_input": interface.timestep_input,
        "output": "output",
        "max_relative_error": 0.0,
        "guidance": schema.Guidance(
            kind=interface.guidance_kind,
            scale=options.nominal_scale,
            minimum=options.guidance_scale[0],
            maximum=options.guidance_scale[1],
            negative_prompt=session.call.negative_prompt,
            negative_zeros=session.negative_zeros,
        ),
        "stages": [],
        "features": [],
        "tokenizers": [],
        "reference": schema.Policy(
            schedule=found.reference.schedule, num_inference_steps=total, source=found.reference.name
        ),
        "anchor": schema.Policy(schedule=found.anchor.schedule, num_inference_steps=total, source=found.anchor.name),
        "programs": budget_programs(found, evaluated),
        "shapes": manifest_shapes(sizes, list(sizes.book.symbols), programs_at),
        "costs": [schema.Cost(name="capture", full_runs=1.0)]
        + [schema.Cost(name=name, full_runs=round(value, 4)) for name, value in found.costs.items()],
    }
    return {name: _dump(value) for name, value in parts.items()}


def engine_fields(
    source: Exportable,
    exported: Exported,
    golden: schema.Golden | None,
    programs_at: Mapping[str, list[schema.BudgetProgram]],
) -> dict[str, Any]:
    """What engines add to `program_fields`, as a JSON value.

    Args:
        source: what they were exported from.
        exported: the files.
        golden: the request that hosts can run to check themselves.
        programs_at: as of `program_fields`.
    """
    stages, sizes = source.stages, source.sizes
    symbols = {symbol.name: symbol for symbol in (*exported.symbols, *sizes.book.symbols)}
    engine = schema.Engine(
        backend="onnx", version="opset 20", target="any", stages={s.name: s.onnx for s in exported.stages}
    )
    parts: dict[str, Any] = {
        "output": stages.output,
        "max_relative_error": exported.max_relative_error,
        "stages": exported.stages,
        "features": [schema.Feature(source=source, result=result) for source, result in stages.features],
        "tokenizers": exported.tokenizers,
        "shapes": manifest_shapes(sizes, list(symbols.values()), programs_at),
        "golden": golden,
        "engines": [engine],
    }
    return {name: _dump(value) for name, value in parts.items()}


def _conditions(prepared: Prepared) -> schema.Conditions:
    options, call = prepared.session.options, prepared.session.call
    return schema.Conditions(
        height=call.height,
        width=call.width,
        num_frames=call.num_frames,
        max_sequence_length=call.max_sequence_length or 1,
        dtype=options.dtype,
        objective=options.objective,
        prompts_digest=digest_of_value([list(prepared.prompts), list(prepared.held_out)]),
        calibration_prompts=len(prepared.prompts),
        evaluation_prompts=len(prepared.held_out),
        seed=options.seed,
    )


def _latents(prepared: Prepared, sizes: Sizes) -> schema.Latents:
    interface = prepared.session.interface
    return schema.Latents(
        noise_shape=interface.noise_shape,
        split=interface.noise_split,
        permutation=interface.noise_permutation,
        shape=interface.latents_shape,
        initial_scale=prepared.table.initial_scale,
        decoded_as="latents",
        **layout_symbols(sizes, type(prepared.session.model.pipeline).__name__),
    )


def latents_with_engines(latents: dict[str, Any], source: Exportable, exported: Exported) -> dict[str, Any]:
    """The manifest's latents, a JSON value, with what the exported decoder takes and the sizes that stages follow."""
    symbols = layout_symbols(source.sizes, type(source.session.model.pipeline).__name__)
    return {**latents, "decoded_as": exported.decoded_as, **{name: list(value) for name, value in symbols.items()}}


def _dump(value: Any) -> Any:
    """Models inside lists and on their own as JSON values."""
    if isinstance(value, list):
        return [_dump(item) for item in value]
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value
