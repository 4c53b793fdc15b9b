"""What must hold between the parts of a manifest, so that executing it cannot go wrong half-way.

Every check raises ValueError with the place, what was found and what was expected; `Manifest` turns that into its own
error. The specification is `schemas/README.md`, "Consistency"; the checks are in its order.
"""

from __future__ import annotations

import itertools
import math

from .program import position_axes
from .segments import COMBINATIONS, name_of
from .structure import FULL, MANIFEST_NAME, SIGNATURE_NAME, BudgetProgram, Engine, Stage, Structure, TensorInfo

RESERVED = frozenset({MANIFEST_NAME, SIGNATURE_NAME})
"""Paths that the format itself uses, so that no file may be listed under them."""
FLOATS = frozenset({"float32", "float16", "bfloat16"})
INTEGERS = frozenset({"int32", "int64"})
MAX_ELEMENTS = 1 << 40
"""Of one tensor and one sample: larger than any device, small enough that sizes in bytes fit in 64 bits."""

MAX_ONNX_BYTES = (1 << 31) - 1
"""Of a protobuf message; larger weights are external data."""


def check(manifest: Structure) -> None:
    """Check all parts of a manifest against each other. Raises ValueError at the first fault."""
    check_files(manifest)
    check_programs(manifest)
    check_wiring(manifest)
    check_golden(manifest)


def check_files(manifest: Structure) -> None:
    """Check that no two paths collide on any file system, and that everything that is used is listed."""
    paths = [entry.path for entry in (*manifest.files, *manifest.attachments)]
    folded = {path.casefold() for path in paths}
    if len(folded) != len(paths):
        raise ValueError("files: two entries have the same path")
    for path in paths:
        parts = path.casefold().split("/")
        if parts[0] in RESERVED:
            raise ValueError(f"files: {path} is reserved: expected another name")
        if any("/".join(parts[:count]) in folded for count in range(1, len(parts))):
            raise ValueError(f"files: {path} lies in another file: expected a folder there")
    listed = {entry.path for entry in manifest.files}
    needed = {stage.onnx for stage in manifest.stages} | {tokenizer.path for tokenizer in manifest.tokenizers}
    needed |= {path for stage in manifest.stages for path in stage.external_data}
    needed |= {path for engine in manifest.engines for path in (*engine.stages.values(), *engine.combinations.values())}
    needed |= {
        path for entry in (manifest.shapes.sizes if manifest.shapes else ()) for path in entry.constants.values()
    }
    if missing := sorted(needed - listed):
        raise ValueError(f"files: {missing[0]} is used but not listed")
    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    for stage in manifest.stages:
        if (size := sizes[stage.onnx]) > MAX_ONNX_BYTES:
            raise ValueError(f"stages: {stage.onnx} has {size} bytes: expected at most {MAX_ONNX_BYTES}")
        folder = stage.onnx.rpartition("/")[0]
        if odd := [path for path in stage.external_data if path.rpartition("/")[0] != folder]:
            raise ValueError(f"stages: {stage.name} has its external data at {odd[0]}: expected it beside {stage.onnx}")
    _check_engines(manifest)


def _check_engines(manifest: Structure) -> None:
    """Check that every stage has an engine, made from the artifact's own ONNX file, and who shares one."""
    digests = {entry.path: entry.digest for entry in manifest.files}
    expected = {
        stage.name: tuple(digests[path] for path in (stage.onnx, *stage.external_data)) for stage in manifest.stages
    }
    for engine in manifest.engines:
        if odd := sorted(set(expected) ^ set(engine.stages)):
            raise ValueError(f"engines: {odd[0]} is a stage or has an engine for {engine.target}, but not both")
        _check_shared(manifest, engine)
        _check_names(manifest, engine)
        if odd := sorted(name for name, sizes in engine.profile.items() if list(sizes) != sorted(sizes)):
            raise ValueError(
                f"engines: {odd[0]} for {engine.target} is {engine.profile[odd[0]]}: expected increasing sizes: build "
                "it again"
            )
        for stage, source in engine.sources.items():
            if source != expected.get(stage):
                raise ValueError(
                    f"engines: {stage} for {engine.target} was built from another ONNX file than the artifact's: build "
                    "it again"
                )


def _check_shared(manifest: Structure, engine: Engine) -> None:
    """Check that only consecutive blocks have an engine together."""
    seen: set[str] = set()
    for path, run in itertools.groupby(manifest.stages, key=lambda stage: engine.stages[stage.name]):
        kinds = [stage.kind for stage in run]
        if path in seen or (len(kinds) > 1 and set(kinds) != {"block"}):
            raise ValueError(
                f"engines: {path} for {engine.target} holds stages that are no consecutive blocks: build it again"
            )
        seen.add(path)


def _check_names(manifest: Structure, engine: Engine) -> None:
    """Check that each file is called as what it is for, so that no two can be swapped: the stage's own ONNX file, or a
    plan in the entry's one folder that has the name of its stage, its blocks or its combination.
    """
    if engine.backend == "onnx":
        expected = {stage.name: stage.onnx for stage in manifest.stages}
    else:
        folder = min(engine.stages.values()).rpartition("/")[0] + "/"
        runs = itertools.groupby(manifest.stages, key=lambda stage: engine.stages[stage.name])
        expected = {
            name: f"{folder}{name_of(run)}.plan"
            for run in (tuple(s.name for s in run) for _, run in runs)
            for name in run
        }
        expected |= {COMBINATIONS + name: f"{folder}{COMBINATIONS}{name}.plan" for name in engine.combinations}
    found = engine.stages | {COMBINATIONS + name: path for name, path in engine.combinations.items()}
    if odd := sorted(name for name, path in found.items() if path != expected.get(name)):
        raise ValueError(
            f"engines: {odd[0]} for {engine.target} is {found[odd[0]]}: expected {expected.get(odd[0], 'none')}, as it "
            "is called"
        )


def check_programs(manifest: Structure) -> None:
    """Check that there is one program for each budget, within the sampler's steps, that computes as many as it says."""
    for programs in (
        manifest.programs,
        *(entry.programs for entry in (manifest.shapes.sizes if manifest.shapes else ())),
    ):
        names = [entry.budget for entry in programs]
        if len(set(names)) != len(names):
            raise ValueError("programs: two have the same budget")
        for entry in programs:
            _check_program(manifest, entry)
    total = manifest.sampler.num_inference_steps
    for name, policy in (("reference", manifest.reference), ("anchor", manifest.anchor)):
        if policy.num_inference_steps != total:
            raise ValueError(f"{name}.num_inference_steps is {policy.num_inference_steps}: expected {total}")


def _check_program(manifest: Structure, entry: BudgetProgram) -> None:
    total = manifest.sampler.num_inference_steps
    expected = total if entry.budget == FULL else int(entry.budget)
    if entry.program.nfe != expected:
        raise ValueError(f"programs: budget {entry.budget} computes {entry.program.nfe} steps: expected {expected}")
    if entry.program.steps[-1].step_index >= total:
        raise ValueError(f"programs: budget {entry.budget} has a step beyond the last of {total}")
    if entry.program.payload == "residual" and not (manifest.features or manifest.programs_alone):
        raise ValueError(f"programs: budget {entry.budget} caches residuals but no features are declared")
    if entry.program.payload == "banded" and not position_axes(1 + len(manifest.latents.shape)):
        raise ValueError(
            f"programs: budget {entry.budget} weighs means over positions, and latents of shape "
            f"{manifest.latents.shape} have none: expected two axes or more"
        )


def check_wiring(manifest: Structure) -> None:
    """Check that what a stage reads is there before it, with its type and shape, on every path through the loop."""
    names = [stage.name for stage in manifest.stages]
    if len(set(names)) != len(names):
        raise ValueError("stages: two have the same name")
    if manifest.programs_alone:
        _check_programs_alone(manifest)
        return
    for stage in manifest.stages:
        _check_tensors(stage)
    known, request = _connect(manifest.trunk)
    if manifest.output not in {tensor.name for tensor in manifest.trunk[-1].outputs}:
        raise ValueError(f"output: {manifest.output} is not an output of the head")
    for name in (manifest.latents_input, manifest.timestep_input):
        if name not in request:
            raise ValueError(f"{name} is no input of the model")
    if manifest.latents_input == manifest.timestep_input:
        raise ValueError(f"{manifest.latents_input} cannot be latents and timestep at once")
    latents: tuple[int | str, ...] = ("batch", *manifest.latents.shape)
    for tensor in (request[manifest.latents_input], known[manifest.output]):
        _expect(tensor, FLOATS, latents)
    _check_features(manifest, known, request)
    check_encoder(manifest)
    check_decoder(manifest)


def _check_programs_alone(manifest: Structure) -> None:
    """Check that an artifact without stages has nothing that goes with them."""
    for name in ("features", "tokenizers", "engines", "golden"):
        if getattr(manifest, name):
            raise ValueError(f"{name}: expected none in a manifest without stages")


def _check_tensors(stage: Stage) -> None:
    for side in (stage.inputs, stage.outputs):
        names = [tensor.name for tensor in side]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: {stage.name} has two tensors of the same name on one side")
        for tensor in side:
            if "batch" in tensor.shape[1:]:
                raise ValueError(f"stages: {tensor.name} of {stage.name} has its batch not first: compile it again")
            if elements(tensor) > MAX_ELEMENTS:
                raise ValueError(f"stages: {tensor.name} of {stage.name} has more than 2**40 elements")


def elements(tensor: TensorInfo) -> int:
    """How many elements one sample of a tensor has, at the artifact's own size."""
    count = 1
    for size in tensor.shape:
        count *= size if isinstance(size, int) else 1
    return count


def _connect(trunk: tuple[Stage, ...]) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """Tensors that stages write, and those that a request brings."""
    if len(trunk) < 3 or [s.kind for s in trunk] != ["embed", *["block"] * (len(trunk) - 2), "head"]:
        raise ValueError("stages: expected one embed, at least one block and one head, in this order")
    known: dict[str, TensorInfo] = {}
    request: dict[str, TensorInfo] = {}
    for stage in trunk:
        for tensor in stage.inputs:
            have = known.get(tensor.name) or request.setdefault(tensor.name, tensor)
            if (have.dtype, have.shape) != (tensor.dtype, tensor.shape):
                raise ValueError(f"stages: {stage.name} reads {tensor.name} in another type or shape than it has")
        for tensor in stage.outputs:
            # Also what makes a cycle impossible: a tensor that was read before it was written is in `request`.
            if tensor.name in known or tensor.name in request:
                raise ValueError(f"stages: {stage.name} writes {tensor.name}, which exists already")
            known[tensor.name] = tensor
    return known, request


def _check_features(manifest: Structure, known: dict[str, TensorInfo], request: dict[str, TensorInfo]) -> None:
    made = {tensor.name for stage in manifest.trunk if stage.kind == "block" for tensor in stage.outputs}
    for feature in manifest.features:
        source, result = known.get(feature.source) or request.get(feature.source), known.get(feature.result)
        if source is None or result is None or (source.dtype, source.shape) != (result.dtype, result.shape):
            raise ValueError(f"features: {feature.source} and {feature.result} are no tensors of the same shape")
        if source.dtype not in FLOATS:
            raise ValueError(f"features: {feature.source} is {source.dtype}: expected a floating-point type")
        if feature.source in made:
            raise ValueError(f"features: {feature.source} is a source, but a block writes it: compile it again")
        if feature.result not in made:
            raise ValueError(f"features: {feature.result} is a result, but no block writes it: compile it again")
    results = [feature.result for feature in manifest.features]
    if len(set(results)) != len(results):
        raise ValueError("features: two have the same result")
    cached = any(not step.compute for entry in manifest.programs for step in entry.program.steps)
    needed = {tensor.name for tensor in manifest.trunk[-1].inputs} & made
    if cached and (missing := sorted(needed - set(results))):
        raise ValueError(
            f"features: the head reads {missing[0]}, which blocks write but no feature holds: a cached step would "
            "have none: compile it again"
        )


def check_encoder(manifest: Structure) -> None:
    """Check that the text encoder takes tokens, and gives all that the trunk needs besides latents and timestep."""
    encoder = _only(manifest, "text_encoder")
    lengths = {tokenizer.input_name: tokenizer.length for tokenizer in manifest.tokenizers}
    if len(lengths) != len(manifest.tokenizers) or set(lengths) != {
        t.name for t in (encoder.inputs if encoder else ())
    }:
        raise ValueError("tokenizers: expected one for each input of the text encoder")
    if encoder is None:
        return
    if manifest.guidance.negative_prompt is None and not manifest.guidance.negative_zeros:
        raise ValueError("guidance.negative_prompt is null: expected a text, which the text encoder reads, or zeros")
    for tensor in encoder.inputs:
        _expect(tensor, INTEGERS, ("batch", lengths[tensor.name]))
    made = {tensor.name: tensor for tensor in encoder.outputs}
    for tensor in encoder.outputs:
        _expect(tensor, None, ("batch", *tensor.shape[1:]))
    for tensor in manifest.conditioning:
        if tensor.name not in made:
            raise ValueError(f"stages: the model reads {tensor.name}, which nothing writes: compile it again")
        _expect(made[tensor.name], None, tensor.shape)


def check_decoder(manifest: Structure) -> None:
    """Check that the decoder takes latents, and gives pictures of the artifact's size."""
    decoder = _only(manifest, "decoder")
    if decoder is None:
        return
    if len(decoder.inputs) != 1 or len(decoder.outputs) != 1:
        raise ValueError(f"stages: {decoder.name} is a decoder: expected one input and one output: compile it again")
    height, width, frames = (getattr(manifest.conditions, name) for name in ("height", "width", "num_frames"))
    latents = manifest.latents
    if latents.decoded_as == "latents":
        _expect(decoder.inputs[0], FLOATS, ("batch", *latents.shape))
    elif decoder.inputs[0].shape[:1] != ("batch",) or elements(decoder.inputs[0]) != math.prod(latents.shape):
        raise ValueError(
            f"{decoder.inputs[0].name} has shape {decoder.inputs[0].shape}: expected as many elements as latents"
        )
    pictures = [("batch", height, width, 3), ("batch", 3, height, width)]
    _expect(decoder.outputs[0], FLOATS, *(pictures if frames is None else [("batch", frames, height, width, 3)]))


def _only(manifest: Structure, kind: str) -> Stage | None:
    found = [stage for stage in manifest.stages if stage.kind == kind]
    if len(found) > 1:
        raise ValueError("stages: at most one text encoder and one decoder")
    return found[0] if found else None


def _expect(tensor: TensorInfo, dtypes: frozenset[str] | None, *shapes: tuple[int | str, ...]) -> None:
    if tensor.shape not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{tensor.name} has shape {tensor.shape}: expected {expected}: compile it again")
    if dtypes is not None and tensor.dtype not in dtypes:
        raise ValueError(f"{tensor.name} is {tensor.dtype}: expected one of {', '.join(sorted(dtypes))}")


def check_golden(manifest: Structure) -> None:
    """Check that the artifact serves its golden request, and that its latents are a listed file of the right size."""
    golden, guidance = manifest.golden, manifest.guidance
    if golden is None:
        return
    if manifest.program(golden.budget) is None:
        raise ValueError(f"golden.budget is {golden.budget}: expected one of {', '.join(manifest.budgets)}")
    if manifest.stage("text_encoder") is None:
        raise ValueError("golden: there is no text encoder for its prompt")
    if (golden.guidance_scale is None) != (guidance.kind == "none"):
        raise ValueError(f"golden.guidance_scale is {golden.guidance_scale}, with guidance of kind {guidance.kind}")
    if golden.guidance_scale is not None and not guidance.minimum <= golden.guidance_scale <= guidance.maximum:
        raise ValueError(
            f"golden.guidance_scale is {golden.guidance_scale}: expected {guidance.minimum} to {guidance.maximum}"
        )
    size = 4
    for extent in manifest.latents.shape:
        size *= extent
    if size not in [entry.size_bytes for entry in manifest.files if entry.path == golden.latents]:
        raise ValueError(f"golden.latents: expected {golden.latents} among the files, with {size} bytes")
