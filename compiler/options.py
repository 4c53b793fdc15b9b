"""What a user may choose about a compile, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from otcache.schemas.errors import UsageError
from otcache.schemas.shapes import MAX_EXTENT
from otcache.schemas.strict_json import INTEGERS
from otcache.schemas.targets import Target, parse_target

from .effort import EFFORTS, Effort, EffortName

DEFAULT_BUDGETS = (4, 8, 16)
FROM_EFFORT = -1
"""Of a number that follows from the effort."""
Objective = Literal["ssim", "psnr", "lpips"]
"""What the searches maximise (of lpips, the negative)."""
DTypeName = Literal["float32", "float16", "bfloat16"]
Offload = Literal["none", "model", "group"]


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Options of `otc compile`. Raises UsageError for what cannot be."""

    model: str
    budgets: tuple[int, ...] = DEFAULT_BUDGETS
    targets: tuple[str, ...] = ()
    """Qualities such as `psnr>=35`: of each the smallest budget that reaches it on held-out prompts is compiled, beside
    `budgets`, which may then be empty."""
    output: Path | None = None
    num_inference_steps: int = 50
    guidance_scale: tuple[float, float] = (4.0, 4.0)
    """Lowest and highest scale that will be served."""
    prompts: Path | tuple[str, ...] | None = None
    """A text file with one a line, or the prompts themselves."""
    negative_prompt: str | None = None
    """Default, as of the next four: the model's own (`call.json`), else the pipeline's; of this one nothing."""
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    """Of a video."""
    max_sequence_length: int | None = None
    search_size: tuple[int, int] | None = None
    """Height and width at which schedules are found; coefficients are then fitted at the compiled size on few prompts.
    """
    sizes: str | None = None
    """Sizes to serve beside `height` and `width`, as `wanted` reads them; likewise the next two."""
    frame_counts: str | None = None
    text_lengths: str | None = None
    reference_budget: int | None = None
    """Default: two fifths of the steps."""
    anchor_budget: int | None = None
    """Default: a twelfth of the steps, at least 2."""
    effort: EffortName = "standard"
    """How much the searches may cost; it says how many trials and calibration prompts there are by default."""
    trials: int = FROM_EFFORT
    objective: Objective = "ssim"
    payload: Literal["auto", "output", "residual"] = "auto"
    edge_costs: Literal["statistics", "end-to-end"] = "statistics"
    calibration_prompts: int = FROM_EFFORT
    evaluation_prompts: int = 32
    seed: int = 0
    revision: str | None = None
    variant: str | None = None
    """Of the stored weights, such as fp16, where a model has several."""
    trust_remote_code: bool = False
    """Run Python that comes with the model."""
    lora: Path | None = None
    """Folder of a LoRA that is fused into the weights."""
    dtype: DTypeName = "float32"
    """Of the transformer's stages, as they are exported."""
    device: str = "auto"
    """Where the model is evaluated: auto, cpu, cuda, cuda:1 or any other name that torch knows."""
    precision: DTypeName = "float32"
    """Of the model's evaluations; latents, sums, fits and metrics are float32 and float64 always."""
    micro_batch: int = 0
    """Samples that are evaluated at once; 0 chooses."""
    offload: Offload = "none"
    """What leaves the device while it is not needed, by diffusers' own means: whole components, or groups of layers."""
    engines: Literal["onnx", "none"] = "onnx"
    """none: an artifact of programs alone, for hosts that keep torch."""
    threads: int | None = None
    """Of torch, by default as many as it chooses: with another number kernels share their work otherwise, and round
    otherwise.
    """
    workspace: Path | None = None
    bench: bool = False
    """Measure the latency of the artifact on this host, in a process of its own, for its report; `otc compile` does."""
    force: bool = False

    def __post_init__(self) -> None:
        for name in ("trials", "calibration_prompts"):
            if getattr(self, name) == FROM_EFFORT:
                object.__setattr__(self, name, getattr(self.limits, name))
        total = self.num_inference_steps
        if not 1 <= total <= 1000:
            raise UsageError(f"--num-inference-steps is {total}: expected 1 … 1000")
        if not self.budgets and not self.targets:
            raise UsageError("--budgets is empty: expected whole numbers such as 4,8,16")
        if self.wanted and self.search_size is not None:
            raise UsageError(
                "--target with --search-size: qualities are measured at the compiled size: leave one of them out"
            )
        if self.wanted and total < 2:
            raise UsageError(f"--target with --num-inference-steps {total}: expected at least 2 steps to choose from")
        for budget in self.budgets:
            if not 1 <= budget <= total:
                raise UsageError(
                    f"--budgets has {budget}: expected 1 … {total}, the number of steps (see --num-inference-steps)"
                )
        for name, value in (("--reference-budget", self.reference_budget), ("--anchor-budget", self.anchor_budget)):
            if value is not None and not 1 <= value <= total:
                raise UsageError(f"{name} is {value}: expected 1 … {total}, the number of steps")
        if self.anchor >= self.reference and total > 1:
            raise UsageError(
                f"--anchor-budget is {self.anchor} and --reference-budget is {self.reference}: expected the anchor's "
                "to be the lower one"
            )
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise UsageError(f"--threads is {self.threads}: expected 1 … 1024")
        if self.micro_batch < 0:
            raise UsageError(f"--micro-batch is {self.micro_batch}: expected 0 to choose, or 1 or more samples")
        if self.trials < 0:
            raise UsageError(f"--trials is {self.trials}: expected 0 or more (0 takes the graph's schedule)")
        if self.offload != "none" and self.payload == "residual":
            raise UsageError(
                f"--offload {self.offload} with --payload residual: residuals run the model in parts, which offloading "
                "has no hooks for: leave one of them out"
            )
        low, high = self.guidance_scale
        if not 0 <= low <= high <= 1000:
            raise UsageError(f"--guidance-scale is {low}:{high}: expected a number or LOW:HIGH between 0 and 1000")
        for name, count in (
            ("--calibration-prompts", self.calibration_prompts),
            ("--evaluation-prompts", self.evaluation_prompts),
        ):
            if count < 1:
                raise UsageError(f"{name} is {count}: expected 1 or more")
        for name, extent, least in (
            ("--height", self.height, 8),
            ("--width", self.width, 8),
            ("--num-frames", self.num_frames, 1),
            ("--max-sequence-length", self.max_sequence_length, 1),
        ):
            if extent is not None and not least <= extent <= MAX_EXTENT:
                raise UsageError(f"{name} is {extent}: expected {least} to {MAX_EXTENT}, as artifacts hold them")
        if self.seed not in INTEGERS:
            raise UsageError(f"--seed is {self.seed}: expected a whole number in [-2**63, 2**64), as in torch")

    @property
    def limits(self) -> Effort:
        """What the searches may try."""
        return EFFORTS[self.effort]

    @property
    def wanted(self) -> tuple[Target, ...]:
        """The targets, read. Raises UsageError."""
        return tuple(parse_target(text, "--target") for text in self.targets)

    @property
    def nominal_scale(self) -> float:
        """The guidance scale that is served when a request names none: the middle of the range."""
        return sum(self.guidance_scale) / 2

    @property
    def reference(self) -> int:
        return self.reference_budget or min(
            self.num_inference_steps, max(self.anchor + 1, round(0.4 * self.num_inference_steps))
        )

    @property
    def anchor(self) -> int:
        return self.anchor_budget or min(
            max(2, round(self.num_inference_steps / 12)), max(1, self.num_inference_steps - 1)
        )


def check_evaluations(options: CompileOptions, evaluations: int, scheduler: str) -> None:
    """Every budget is within the evaluations of a full run, which some samplers make fewer of than steps.

    Raises UsageError.
    """
    budgets = {
        "--budgets": max(options.budgets, default=1),
        "--reference-budget": options.reference,
        "--anchor-budget": options.anchor,
    }
    for name, budget in budgets.items():
        if budget > evaluations:
            raise UsageError(
                f"{name} has {budget}: expected 1 … {evaluations}, the model evaluations of {scheduler} in "
                f"{options.num_inference_steps} steps"
            )


def parse_budgets(text: str) -> tuple[int, ...]:
    """`4,8,16` → (4, 8, 16), in increasing order without repeats. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    try:
        budgets = sorted({int(part) for part in parts})
    except ValueError:
        raise UsageError(f"--budgets is {text!r}: expected whole numbers separated by commas, such as 4,8,16") from None
    if budgets[0] < 1:
        raise UsageError(f"--budgets has {budgets[0]}: expected whole numbers of at least 1, such as 4,8,16")
    return tuple(budgets)


def budgets_or_default(budgets: tuple[int, ...] | None, targets: Sequence[str]) -> tuple[int, ...]:
    """The budgets that were given; without any, the default ones, or those alone that reach the targets."""
    if budgets is not None:
        return budgets
    return () if targets else DEFAULT_BUDGETS


def parse_search_size(text: str | None) -> tuple[int, int] | None:
    """`512x768` → (512, 768), height first; None stays None. Raises UsageError."""
    if text is None:
        return None
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) >= 8 for side in sides):
        raise UsageError(f"--search-size is {text!r}: expected HEIGHTxWIDTH in pixels, such as 512x512")
    return int(sides[0]), int(sides[1])


def parse_micro_batch(text: str) -> int:
    """`auto` → 0, `4` → 4. Raises UsageError."""
    if text == "auto":
        return 0
    if not text.isdecimal() or not 1 <= int(text) <= 4096:
        raise UsageError(f"--micro-batch is {text!r}: expected auto, or a whole number from 1 to 4096")
    return int(text)


def parse_guidance(text: str) -> tuple[float, float]:
    """`4` → (4, 4), `2:6` → (2, 6). Raises UsageError."""
    try:
        values = [float(part) for part in text.split(":")]
    except ValueError:
        values = []
    if len(values) not in (1, 2):
        raise UsageError(f"--guidance-scale is {text!r}: expected a number such as 4, or a range such as 2:6")
    return values[0], values[-1]


def split_prompts(prompts: Sequence[str], calibration: int, evaluation: int) -> tuple[list[str], list[str]]:
    """Disjoint prompts for calibration and evaluation. Raises UsageError when there are fewer than two.

    At most half of them (and at most `evaluation`) are held out, the last ones of the list.
    """
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < 2:
        raise UsageError(f"--prompts has {len(distinct)} distinct prompt: expected at least 2, one of them held out")
    held_out = min(evaluation, len(distinct) // 2)
    return distinct[: min(calibration, len(distinct) - held_out)], distinct[-held_out:]
