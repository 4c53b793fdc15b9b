"""What a manifest is made of: the types of its fields. `schemas/README.md` is the specification."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from .program import MAX_STEPS, Coefficient, Frozen, Payload, Program
from .prompt_steps import PromptStep, apply_steps
from .shapes import Axis, AxisName, Extent, Symbol, SymbolName, Symbols

SCHEMA_MAJOR, SCHEMA_MINOR = 1, 9
SCHEMA_VERSION = f"{SCHEMA_MAJOR}.{SCHEMA_MINOR}"
MAX_MANIFEST_BYTES = 16 << 20
FULL = "full"
"""Name of the budget that takes every step."""
MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.sig"
PLACE = "{}"
"""Where a prompt stands in a template."""

_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._+-]*[A-Za-z0-9_+-])?\Z")
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|\Z)", re.IGNORECASE)
"""Names that Windows takes for devices, whatever follows the dot."""


def _check_path(path: str) -> str:
    parts = path.split("/")
    if len(path) > 255 or len(parts) > 8 or not all(_PART.match(part) and not _DEVICE.match(part) for part in parts):
        raise ValueError(
            f"{path[:80]!r} is no plain relative path (letters, digits, '._+-' and '/', no part starts or ends with a "
            "dot)"
        )
    return path


def _check_onnx(path: str) -> str:
    if not path.endswith(".onnx"):
        raise ValueError(f"{path!r} is no ONNX file: expected a name that ends in .onnx")
    return path


ArtifactPath = Annotated[str, Field(json_schema_extra={"maxLength": 255}), AfterValidator(_check_path)]
"""Relative path with forward slashes, inside the artifact: no parent, absolute, hidden or drive parts."""
OnnxPath = Annotated[ArtifactPath, AfterValidator(_check_onnx)]
"""ONNX Runtime takes the format of a file from its name."""
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*$", max_length=128)]
Count = Annotated[int, Field(ge=0, le=1 << 48)]
Size = Annotated[int, Field(ge=1, le=1 << 31)]
StepIndex = Annotated[int, Field(ge=0, lt=MAX_STEPS)]
Prompts = Annotated[int, Field(ge=0, le=1 << 24)]
"""How many were used."""
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]
RelativeError = Annotated[float, Field(ge=0, le=1)]
"""1 is as large as the largest value there is."""
MAX_FIGURE = 1e6
Figure = Annotated[float, Field(ge=-MAX_FIGURE, le=MAX_FIGURE)]
"""What was measured of pictures and latents. Larger errors count as this."""
Label = Annotated[str, Field(max_length=256)]
Text = Annotated[str, Field(max_length=1 << 16)]
"""Of people, for people or the model."""
Budget = Annotated[str, Field(pattern=r"^(full|[1-9][0-9]{0,3})$")]
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
    """At the artifact's own size."""
    symbols: Symbols = Field(default=(), max_length=8)
    """Since 1.5: what its dimensions follow at other sizes."""


class Stage(Frozen):
    """A piece of the model with its own engine; wired to the others by tensor names."""

    name: Name
    kind: Literal["text_encoder", "embed", "block", "head", "decoder"]
    inputs: tuple[TensorInfo, ...] = Field(min_length=1, max_length=256)
    outputs: tuple[TensorInfo, ...] = Field(min_length=1, max_length=256)
    onnx: OnnxPath
    external_data: tuple[ArtifactPath, ...] = Field(default=(), max_length=64)
    """Since 1.1: files beside `onnx` that hold weights of it. It may refer to no other file."""
    max_relative_error: RelativeError
    """Largest difference of the exported stage from the original, relative to the largest output."""


class Feature(Frozen):
    """A tensor that the blocks turn from `source` into `result`; a residual program caches `result − source`."""

    source: Name
    result: Name


class Tokenizer(Frozen):
    """A tokenizer file of the `tokenizers` library and the input of the text encoder that it feeds."""

    input_name: Name
    path: ArtifactPath
    length: Extent
    pad_id: int = Field(ge=0, lt=1 << 31)
    template: str = Field(default=PLACE, max_length=8192)
    """Since 1.3: what is encoded, with the prompt in the place of the one `{}`."""
    length_symbol: SymbolName | None = None
    """Since 1.5: what `length` follows at other sizes."""
    steps: tuple[PromptStep, ...] = Field(default=(), max_length=16)
    """Since 1.8: what is done to a prompt before it takes its place in the template, in this order."""

    @model_validator(mode="after")
    def _consistent(self) -> Tokenizer:
        if self.template.count(PLACE) != 1:
            raise ValueError(f"template of {self.input_name} has {self.template.count(PLACE)} {PLACE}: expected one")
        return self

    def text(self, prompt: str) -> str:
        """What is encoded for a prompt. Raises HostError for a step whose package is not installed."""
        return self.template.replace(PLACE, apply_steps(prompt, self.steps))


class Latents(Frozen):
    """How noise becomes the first latents: drawn as `noise_shape`, reshaped, permuted, reshaped to `shape`, scaled."""

    noise_shape: tuple[Size, ...] = Field(min_length=1, max_length=6)
    """Shape of one sample's noise, as the pipeline draws it."""
    split: tuple[Size, ...] = Field(min_length=1, max_length=12)
    permutation: tuple[Annotated[int, Field(ge=0, lt=12)], ...] = Field(min_length=1, max_length=12)
    shape: tuple[Size, ...] = Field(min_length=1, max_length=6)
    """Shape of one sample's latents, as the scheduler sees them."""
    initial_scale: Coefficient
    noise_symbols: Symbols = Field(default=(), max_length=6)
    """Since 1.5, as those of tensors; likewise the next two."""
    split_symbols: Symbols = Field(default=(), max_length=12)
    shape_symbols: Symbols = Field(default=(), max_length=6)
    decoded_as: Literal["latents", "noise"] = "latents"
    """Since 1.5: what the decoder reads: latents, or latents put back in the noise's order and given its input's shape.
    """

    @model_validator(mode="after")
    def _consistent(self) -> Latents:
        counts = [_product(shape) for shape in (self.noise_shape, self.split, self.shape)]
        if len(set(counts)) != 1:
            raise ValueError(f"latents: noise_shape, split and shape have {counts} elements: expected the same")
        if sorted(self.permutation) != list(range(len(self.split))):
            raise ValueError(f"latents.permutation is {self.permutation}: expected an order of {len(self.split)} axes")
        if counts[0] > 1 << 32:
            raise ValueError(f"latents: one sample has {counts[0]} elements: expected at most 2**32")
        return self


class Guidance(Frozen):
    """How the outputs of the branches become one: Σ weights · outputs.

    `cfg`: branches are (negative, positive) with weights (1 − scale, scale). `cfg_norm`: the same, then multiplied so
    that every vector along the last axis is as long as the positive branch's (Qwen-Image).
    """

    kind: Literal["none", "cfg", "cfg_norm"]
    scale: Coefficient
    minimum: Coefficient
    maximum: Coefficient
    """Range of scales that the coefficients were calibrated for."""
    negative_prompt: Text | None = ""
    """Of a request that names none. Since 1.8, None: the pipeline takes something then that no text gives."""
    negative_zeros: bool = False
    """Since 1.9: this something is zeros, in the place of all that the text encoder writes. Without it, an artifact
    whose `negative_prompt` is None has no text encoder.
    """

    @model_validator(mode="after")
    def _consistent(self) -> Guidance:
        if not self.minimum <= self.scale <= self.maximum:
            raise ValueError(f"guidance: scale is {self.scale}: expected {self.minimum} to {self.maximum}")
        if self.negative_zeros and (self.negative_prompt is not None or self.kind == "none"):
            raise ValueError("guidance.negative_zeros: expected branches of guidance and no negative_prompt")
        return self

    @property
    def branches(self) -> int:
        """How often the trunk runs for a sample: once, or for the negative and the positive prompt."""
        return 1 if self.kind == "none" else 2

    def weights(self, scale: float) -> tuple[float, ...]:
        """The weight of each branch's output at a guidance scale, the negative one first.

        >>> Guidance(kind="cfg", scale=4.0, minimum=2.0, maximum=6.0).weights(4.0)
        (-3.0, 4.0)
        """
        return (1.0,) if self.kind == "none" else (1.0 - scale, scale)


class Sampler(Frozen):
    """The diffusers scheduler that the programs were lowered from."""

    scheduler: Label
    config: dict[str, Any]
    """As it was: nothing but its own host reads it, and only the manifest's size bounds it."""
    num_inference_steps: int = Field(ge=1, le=MAX_STEPS)


class Model(Frozen):
    """The diffusers pipeline that was compiled."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    pipeline: Label
    transformer: Label
    config_digest: Digest
    weights_digest: Digest
    denoiser_digest: Digest | None = None
    """Since 1.2: of the transformer as it was in memory, for hosts that run it in torch (see the specification)."""
    denoiser_digest_float16: Digest | None = None
    """Since 1.8: the same for hosts that hold it in float16."""


class Conditions(Frozen):
    """What the artifact was calibrated for; requests outside are refused."""

    height: Extent
    width: Extent
    num_frames: Extent | None = None
    """Since 1.3: of a video; None for pictures."""
    max_sequence_length: Extent
    dtype: DType
    objective: Label
    prompts_digest: Digest
    calibration_prompts: Prompts
    evaluation_prompts: Prompts
    seed: Seed


class Policy(Frozen):
    """A schedule and the budget at which it was found; its measure's quantile function is linear between its steps."""

    schedule: tuple[StepIndex, ...] = Field(min_length=1, max_length=MAX_STEPS)
    num_inference_steps: int = Field(ge=1, le=MAX_STEPS)
    source: Label

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        steps = self.schedule
        if any(after <= before for before, after in itertools.pairwise(steps)):
            raise ValueError("schedule: expected increasing step indices")
        if steps[-1] >= self.num_inference_steps:
            raise ValueError(f"schedule: expected step indices from 0 to {self.num_inference_steps - 1}")
        return self


class Statistic(Frozen):
    """Mean, standard deviation and worst value over prompts."""

    mean: Figure
    std: Figure
    worst: Figure


class Quality(Frozen):
    """Fidelity to the full run on prompts that calibration has not seen."""

    psnr_db: Statistic
    ssim: Statistic
    relative_latent_error: Statistic


class Candidate(Frozen):
    """A program that was rolled out on the calibration set and could have been chosen."""

    name: Label
    payload: Payload
    schedule: tuple[StepIndex, ...] = Field(max_length=MAX_STEPS)
    weight: Coefficient | None = None
    """Position on the path from the reference (0) to the anchor policy (1), if it is interpolated."""
    psnr_db: Figure
    ssim: Figure
    chosen: bool = False


class Baseline(Frozen):
    """A peer at the same number of model evaluations, on the same prompts and seeds as `Quality`."""

    name: Label
    nfe: int = Field(ge=0, le=MAX_STEPS)
    quality: Quality


class BudgetProgram(Frozen):
    """What is served at one budget, how good it is, and what else was tried."""

    budget: Budget
    program: Program
    quality: Quality | None = None
    candidates: tuple[Candidate, ...] = Field(default=(), max_length=4096, fail_fast=True)
    baselines: tuple[Baseline, ...] = Field(default=(), max_length=256, fail_fast=True)


class ServedSize(Frozen):
    """One of the sizes that are served, where not every size within the ranges is."""

    size: dict[AxisName, Extent] = Field(min_length=1, max_length=4)
    """A value for each axis."""
    constants: dict[Name, ArtifactPath] = Field(default={}, max_length=64)
    """Files with the values of `Shapes.constants` at this size: little-endian, in C order, nothing else in the file."""
    programs: tuple[BudgetProgram, ...] = Field(default=(), max_length=256, fail_fast=True)
    """Those that are served at this size instead of the artifact's; empty where the artifact's hold."""


class Shapes(Frozen):
    """Since 1.5: the sizes that a request may choose, and what follows from them."""

    axes: tuple[Axis, ...] = Field(default=(), max_length=4)
    symbols: tuple[Symbol, ...] = Field(default=(), max_length=4096, fail_fast=True)
    constants: tuple[Name, ...] = Field(default=(), max_length=64)
    """Inputs of the trunk that depend on the size alone, such as positions: they come from files, not from the request.
    """
    sizes: tuple[ServedSize, ...] = Field(default=(), max_length=1024, fail_fast=True)
    """Where it is not empty, no other size is served."""
    fixed: dict[AxisName, Text] = Field(default={}, max_length=4)
    """Axes that stay as compiled although others were asked for, with the reason."""


class Cost(Frozen):
    """Model evaluations that a pass took, in full runs of T steps per calibration prompt."""

    name: Label
    full_runs: float = Field(ge=0, le=MAX_FIGURE)


PlanName = Annotated[str, Field(max_length=512)]
"""Of a stage, of several, or of a combination."""
ProfileName = Annotated[str, Field(pattern=r"^(batch|height|width|num_frames|max_sequence_length)$")]
Digests = Annotated[tuple[Digest, ...], Field(max_length=65)]
Layers = Annotated[dict[Label, Count], Field(max_length=64)]


class Engine(Frozen):
    """Engines of one backend and target; `stages` names a file for each stage."""

    backend: Literal["onnx", "tensorrt", "tensorrt-rtx"]
    version: Annotated[str, Field(max_length=64)]
    target: Annotated[str, Field(pattern=r"^(any|sm_[0-9]{2,3}[a-z]?)$")]
    """`any`, or the compute capability that plans were built for, such as `sm_89`."""
    stages: dict[PlanName, ArtifactPath] = Field(max_length=4096)
    """Which is what follows from their names (`consistency.py`)."""
    combinations: dict[PlanName, ArtifactPath] = Field(default={}, max_length=4096)
    """Since 1.4: a plan for each linear combination between the stages (`combinations.py`)."""
    platform: str = Field(default="any", max_length=64)
    """Since 1.4: system and machine whose code plans hold, such as `linux-x86_64`."""
    profile: dict[ProfileName, tuple[Size, Size, Size]] = Field(default={}, max_length=8)
    """Smallest, most frequent and largest, since 1.4 of `batch`, which counts samples, since 1.5 of each axis that is
    served.
    """
    workspace_bytes: Count | None = None
    """Since 1.4: the limit that plans were built under; None for the library's own."""
    sources: dict[PlanName, Digests] = Field(default={}, max_length=4096)
    """Since 1.4: digests of what each stage's plan was built from: its ONNX file, then its external data."""
    layers: dict[PlanName, Layers] = Field(default={}, max_length=8192)
    """Since 1.4: of each plan the number of layers, by the type of what they write."""


class Golden(Frozen):
    """Since 1.1: a request with its result, so that a host can show that it serves what was compiled."""

    prompt: str = Field(max_length=4096)
    budget: Budget
    seed: Seed
    guidance_scale: Coefficient | None
    """None for an artifact without guidance."""
    latents: ArtifactPath
    """The final latents of one sample: little-endian float32 in C order, `latents.shape`, nothing else in the file."""
    max_relative_error: float = Field(gt=0, le=1)
    """A host's latents x agree with those of the file, g, if ‖x − g‖₂ ≤ max_relative_error · ‖g‖₂."""


class Measurement(Frozen):
    """A timing of this host; outside the digested core."""

    name: PlanName
    value: float = Field(ge=0, le=1e12)
    unit: Label


class Structure(Frozen):
    """Fields of a manifest, each valid by itself: what `consistency` compares and `Manifest` checks as a whole.

    `digest` is that of everything but itself, `measurements` and `attachments`.
    """

    schema_version: Annotated[str, Field(pattern=r"^\d{1,4}\.\d{1,4}$")] = SCHEMA_VERSION
    producer: dict[Label, Text] = Field(max_length=256)
    model: Model
    sampler: Sampler
    conditions: Conditions
    latents: Latents
    timestep_scale: Coefficient
    """What the scheduler's timestep is multiplied by before the model sees it."""
    latents_input: Name
    timestep_input: Name
    output: Name
    guidance: Guidance
    max_relative_error: RelativeError = 0.0
    """Largest difference of the exported trunk from the original model, end to end, relative to the largest output."""
    stages: tuple[Stage, ...] = Field(max_length=4096, fail_fast=True)
    """None in an artifact of programs alone, which hosts that keep torch can use."""
    features: tuple[Feature, ...] = Field(max_length=64)
    tokenizers: tuple[Tokenizer, ...] = Field(max_length=8)
    reference: Policy
    anchor: Policy
    programs: tuple[BudgetProgram, ...] = Field(min_length=1, max_length=4096, fail_fast=True)
    golden: Golden | None = None
    shapes: Shapes | None = None
    costs: tuple[Cost, ...] = Field(default=(), max_length=256, fail_fast=True)
    engines: tuple[Engine, ...] = Field(default=(), max_length=256, fail_fast=True)
    files: tuple[FileEntry, ...] = Field(max_length=65536, fail_fast=True)
    digest: Digest
    measurements: tuple[Measurement, ...] = Field(default=(), max_length=65536, fail_fast=True)
    attachments: tuple[FileEntry, ...] = Field(default=(), max_length=65536, fail_fast=True)
    """Reports and pictures: checked when present, not part of the digest, safe to delete."""

    @property
    def programs_alone(self) -> bool:
        """Whether the artifact has no engines: programs, quality and report, for hosts that keep torch."""
        return not self.stages

    @property
    def trunk(self) -> tuple[Stage, ...]:
        """Embed, blocks and head, in order of execution."""
        return tuple(stage for stage in self.stages if stage.kind in ("embed", "block", "head"))

    def stage(self, kind: str) -> Stage | None:
        """The only stage of a kind, or None."""
        return next((stage for stage in self.stages if stage.kind == kind), None)

    @property
    def conditioning(self) -> tuple[TensorInfo, ...]:
        """The trunk's inputs that a request brings: all but latents, timestep, and constants of the size."""
        constants = self.shapes.constants if self.shapes else ()
        return tuple(tensor for tensor in self.steady_inputs if tensor.name not in constants)

    @property
    def steady_inputs(self) -> tuple[TensorInfo, ...]:
        """The trunk's inputs that stay for all steps: conditioning, and constants of the size."""
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

    @property
    def all_programs(self) -> tuple[BudgetProgram, ...]:
        """The artifact's programs, and those that listed sizes have of their own."""
        own = [entry.programs for entry in self.shapes.sizes] if self.shapes else []
        return (*self.programs, *(entry for programs in own for entry in programs))

    def program(self, budget: int | str) -> BudgetProgram | None:
        """The program of a budget at the artifact's own size, or None."""
        return next((entry for entry in self.programs if entry.budget == str(budget)), None)


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
