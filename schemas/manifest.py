"""The manifest: index, contract and trust boundary of an artifact. `schemas/README.md` is its specification."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from .digest import digest_of_value
from .program import Frozen, Program

SCHEMA_MAJOR, SCHEMA_MINOR = 1, 0
SCHEMA_VERSION = f"{SCHEMA_MAJOR}.{SCHEMA_MINOR}"
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 16 << 20
FULL = "full"
"""Name of the budget that takes every step."""

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*\Z")


def _check_path(path: str) -> str:
    parts = path.split("/")
    if len(path) > 255 or len(parts) > 8 or not all(_PART.match(part) for part in parts):
        raise ValueError(
            f"{path!r} is no plain relative path (letters, digits, '._+-' and '/', no part starts with a dot)"
        )
    return path


ArtifactPath = Annotated[str, AfterValidator(_check_path)]
"""Relative path with forward slashes, inside the artifact: no parent, absolute, hidden or drive parts."""
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*$", max_length=128)]
Count = Annotated[int, Field(ge=0, le=1 << 48)]
Size = Annotated[int, Field(ge=1, le=1 << 31)]
DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "bool"]


class FileEntry(Frozen):
    """A file of the artifact."""

    path: ArtifactPath
    size_bytes: Count
    digest: Digest


class TensorInfo(Frozen):
    """Name, dtype and shape of a tensor; a string in the shape is a symbol, such as `batch`."""

    name: Name
    dtype: DType
    shape: tuple[Size | Literal["batch"], ...] = Field(max_length=8)


class Stage(Frozen):
    """A piece of the model with its own engine; wired to the others by tensor names."""

    name: Name
    kind: Literal["text_encoder", "embed", "block", "head", "decoder"]
    inputs: tuple[TensorInfo, ...] = Field(min_length=1, max_length=256)
    outputs: tuple[TensorInfo, ...] = Field(min_length=1, max_length=256)
    onnx: ArtifactPath
    max_relative_error: float = Field(ge=0)
    """Largest difference of the exported stage from the original, relative to the largest output."""


class Feature(Frozen):
    """A tensor that the blocks turn from `source` into `result`; `result − source` is what a residual program caches."""

    source: Name
    result: Name


class Tokenizer(Frozen):
    """A tokenizer file of the `tokenizers` library and the input of the text encoder that it feeds."""

    input_name: Name
    path: ArtifactPath
    length: int = Field(ge=1, le=65536)
    pad_id: int = Field(ge=0)


class Latents(Frozen):
    """How noise becomes the first latents: drawn as `noise_shape`, reshaped, permuted, reshaped to `shape`, scaled."""

    noise_shape: tuple[Size, ...] = Field(min_length=1, max_length=6)
    """Shape of one sample's noise, as the pipeline draws it."""
    split: tuple[Size, ...] = Field(min_length=1, max_length=12)
    permutation: tuple[int, ...] = Field(min_length=1, max_length=12)
    shape: tuple[Size, ...] = Field(min_length=1, max_length=6)
    """Shape of one sample's latents, as the scheduler sees them."""
    initial_scale: float

    @model_validator(mode="after")
    def _consistent(self) -> Latents:
        counts = [_product(shape) for shape in (self.noise_shape, self.split, self.shape)]
        if len(set(counts)) != 1:
            raise ValueError(f"latents: noise_shape, split and shape have {counts} elements: expected the same")
        if sorted(self.permutation) != list(range(len(self.split))):
            raise ValueError(f"latents.permutation is {self.permutation}: expected an order of {len(self.split)} axes")
        return self


class Guidance(Frozen):
    """How the outputs of the branches become one: Σ weights · outputs.

    `cfg`: branches are (negative, positive) with weights (1 − scale, scale). `cfg_norm`: the same, then multiplied so
    that every vector along the last axis is as long as the positive branch's (Qwen-Image).
    """

    kind: Literal["none", "cfg", "cfg_norm"]
    scale: float
    minimum: float
    maximum: float
    """Range of scales that the coefficients were calibrated for."""
    negative_prompt: str = ""

    @property
    def branches(self) -> int:
        return 1 if self.kind == "none" else 2

    def weights(self, scale: float) -> tuple[float, ...]:
        """Weight of each branch's output at a guidance scale."""
        return (1.0,) if self.kind == "none" else (1.0 - scale, scale)


class Sampler(Frozen):
    """The diffusers scheduler that the programs were lowered from."""

    scheduler: str
    config: dict[str, Any]
    num_inference_steps: int = Field(ge=1, le=4096)


class Model(Frozen):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    pipeline: str
    transformer: str
    config_digest: Digest
    weights_digest: Digest


class Conditions(Frozen):
    """What the artifact was calibrated for; requests outside are refused."""

    height: Size
    width: Size
    max_sequence_length: int = Field(ge=1)
    dtype: DType
    objective: str
    prompts_digest: Digest
    calibration_prompts: int
    evaluation_prompts: int
    seed: int


class Policy(Frozen):
    """A schedule and the budget at which it was found; its measure's quantile function is linear between its steps."""

    schedule: tuple[int, ...] = Field(min_length=1)
    num_inference_steps: int
    source: str


class Statistic(Frozen):
    mean: float
    std: float
    worst: float


class Quality(Frozen):
    """Fidelity to the full run on prompts that calibration has not seen."""

    psnr_db: Statistic
    ssim: Statistic
    relative_latent_error: Statistic


class Candidate(Frozen):
    """A program that was rolled out on the calibration set and could have been chosen."""

    name: str
    payload: Literal["output", "residual"]
    schedule: tuple[int, ...]
    weight: float | None = None
    """Position on the path from the reference (0) to the anchor policy (1), if it is interpolated."""
    psnr_db: float
    ssim: float
    chosen: bool = False


class Baseline(Frozen):
    """A peer at the same number of model evaluations, on the same prompts and seeds as `Quality`."""

    name: str
    nfe: int
    quality: Quality


class BudgetProgram(Frozen):
    """What is served at one budget, how good it is, and what else was tried."""

    budget: str
    program: Program
    quality: Quality | None = None
    candidates: tuple[Candidate, ...] = ()
    baselines: tuple[Baseline, ...] = ()


class Cost(Frozen):
    """Model evaluations that a pass took, in full runs of T steps per calibration prompt."""

    name: str
    full_runs: float


class Engine(Frozen):
    """Engines of one backend and target; `stages` names a file for each stage."""

    backend: Literal["onnx", "tensorrt", "tensorrt-rtx"]
    version: str
    target: str
    stages: dict[str, ArtifactPath]


class Measurement(Frozen):
    """A timing of this host; outside the digested core."""

    name: str
    value: float
    unit: str


class Manifest(Frozen):
    """See `schemas/README.md`. `digest` is that of everything but itself, `measurements` and `attachments`."""

    schema_version: Annotated[str, Field(pattern=r"^\d{1,4}\.\d{1,4}$")] = SCHEMA_VERSION
    producer: dict[str, str]
    model: Model
    sampler: Sampler
    conditions: Conditions
    latents: Latents
    timestep_scale: float
    """What the scheduler's timestep is multiplied by before the model sees it."""
    latents_input: Name
    timestep_input: Name
    output: Name
    guidance: Guidance
    max_relative_error: float = Field(default=0.0, ge=0)
    """Largest difference of the exported trunk from the original model, end to end, relative to the largest output."""
    stages: tuple[Stage, ...] = Field(min_length=3, max_length=4096)
    features: tuple[Feature, ...] = Field(max_length=64)
    tokenizers: tuple[Tokenizer, ...] = Field(max_length=8)
    reference: Policy
    anchor: Policy
    programs: tuple[BudgetProgram, ...] = Field(min_length=1, max_length=4096)
    costs: tuple[Cost, ...] = ()
    engines: tuple[Engine, ...] = ()
    files: tuple[FileEntry, ...] = Field(max_length=65536)
    digest: Digest
    measurements: tuple[Measurement, ...] = ()
    attachments: tuple[FileEntry, ...] = ()
    """Reports and pictures: checked when present, not part of the digest, safe to delete."""

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        paths = [entry.path for entry in (*self.files, *self.attachments)]
        folded = [path.casefold() for path in paths]
        if len(set(folded)) != len(folded):
            raise ValueError("files: two entries have the same path")
        if any(str(PurePosixPath(path).parent) != "." and path.split("/")[0] == MANIFEST_NAME for path in paths):
            raise ValueError(f"files: {MANIFEST_NAME} cannot be a folder")
        listed = {entry.path for entry in self.files}
        needed = {stage.onnx for stage in self.stages} | {tokenizer.path for tokenizer in self.tokenizers}
        needed |= {path for engine in self.engines for path in engine.stages.values()}
        if missing := sorted(needed - listed):
            raise ValueError(f"files: {missing[0]} is used but not listed")
        names = [entry.budget for entry in self.programs]
        if len(set(names)) != len(names):
            raise ValueError("programs: two have the same budget")
        for entry in self.programs:
            self._check_program(entry)
        self._check_wiring()
        return self

    def _check_program(self, entry: BudgetProgram) -> None:
        total = self.sampler.num_inference_steps
        if entry.budget != FULL and (not entry.budget.isascii() or not entry.budget.isdigit()):
            raise ValueError(f"programs: budget {entry.budget!r} is neither a number nor {FULL!r}")
        expected = total if entry.budget == FULL else int(entry.budget)
        if entry.program.nfe != expected:
            raise ValueError(f"programs: budget {entry.budget} computes {entry.program.nfe} steps: expected {expected}")
        if entry.program.steps[-1].step_index >= total:
            raise ValueError(f"programs: budget {entry.budget} has a step beyond the last of {total}")
        if entry.program.payload == "residual" and not self.features:
            raise ValueError(f"programs: budget {entry.budget} caches residuals but no features are declared")

    def _check_wiring(self) -> None:
        """Every input of the trunk is a request input or comes from an earlier stage, with the same type and shape."""
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError("stages: two have the same name")
        trunk = self.trunk
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
                if tensor.name in known or tensor.name in request:
                    raise ValueError(f"stages: {stage.name} writes {tensor.name}, which exists already")
                known[tensor.name] = tensor
        if self.output not in {tensor.name for tensor in trunk[-1].outputs}:
            raise ValueError(f"output: {self.output} is not an output of the head")
        for name in (self.latents_input, self.timestep_input):
            if name not in request:
                raise ValueError(f"{name} is no input of the model")
        for feature in self.features:
            source, result = known.get(feature.source) or request.get(feature.source), known.get(feature.result)
            if source is None or result is None or (source.dtype, source.shape) != (result.dtype, result.shape):
                raise ValueError(f"features: {feature.source} and {feature.result} are no tensors of the same shape")
        encoders = [stage for stage in self.stages if stage.kind == "text_encoder"]
        if len(encoders) > 1 or len([s for s in self.stages if s.kind == "decoder"]) > 1:
            raise ValueError("stages: at most one text encoder and one decoder")
        if encoders and {t.name for t in encoders[0].inputs} != {t.input_name for t in self.tokenizers}:
            raise ValueError("tokenizers: expected one for each input of the text encoder")

    @property
    def trunk(self) -> tuple[Stage, ...]:
        """Embed, blocks and head, in order of execution."""
        return tuple(stage for stage in self.stages if stage.kind in ("embed", "block", "head"))

    def stage(self, kind: str) -> Stage | None:
        """The only stage of a kind, or None."""
        return next((stage for stage in self.stages if stage.kind == kind), None)

    @property
    def conditioning(self) -> tuple[TensorInfo, ...]:
        """The trunk's inputs that a request brings: all but latents and timestep."""
        produced = {tensor.name for stage in self.trunk for tensor in stage.outputs}
        found: dict[str, TensorInfo] = {}
        for stage in self.trunk:
            for tensor in stage.inputs:
                if tensor.name not in produced and tensor.name not in (self.latents_input, self.timestep_input):
                    found.setdefault(tensor.name, tensor)
        return tuple(found.values())

    @property
    def budgets(self) -> tuple[str, ...]:
        """Names of the budgets, the numbers in increasing order, then `full`."""
        numbers = sorted(int(entry.budget) for entry in self.programs if entry.budget != FULL)
        return (*map(str, numbers), *(FULL for entry in self.programs if entry.budget == FULL))

    def program(self, budget: int | str) -> BudgetProgram | None:
        return next((entry for entry in self.programs if entry.budget == str(budget)), None)


def core_digest(manifest: dict[str, Any]) -> str:
    """Digest of a manifest's JSON value without `digest`, `measurements` and `attachments`."""
    outside = ("digest", "measurements", "attachments")
    return digest_of_value({key: value for key, value in manifest.items() if key not in outside})


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
