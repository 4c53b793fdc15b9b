"""Methods that decide inside the pipeline: the stock pipeline runs with its own loop, and a method wraps its
transformer.

Adaptive methods decide for one picture at a time, so they run one prompt at a time. Evaluations are counted on a layer
deep in the blocks, which runs only when they do.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from otcache.schemas.errors import ModelError

from ..calibration.batch import Batch
from ..calibration.metrics import relative_latent_error
from ..calibration.samples import Rows
from ..calibration.scoring import scores_from_latents
from ..hosts import blocks
from ..pipelines.call import ABOVE_ONE
from ..pipelines.invoke import invoke
from ..pipelines.prompts import prompt_arguments
from ..pipelines.record import guider_at, record
from .cells import Group, Range
from .method import Bench, NotApplicable, Outcome, choose

BISECTIONS = 9
SLACK = 1e-6
"""Evaluations by which a mean may exceed a budget: they are counted in fractions of branches."""

_LOG = logging.getLogger(__name__)

Wrap = Callable[[Any, "Setting"], contextlib.AbstractContextManager[None]]
"""(pipeline, setting) → the pipeline runs the method while the context lasts."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a method is started with."""

    text: str
    values: dict[str, Any]
    threshold: float | None = None
    """Searched so that the budget is kept, where the method has one."""
    lower: float = 0.0
    """A lower threshold, which `share` of the samples are run with."""
    share: float = 0.0

    def at_row(self, row: int) -> Setting:
        """The setting of one sample: those with the lower threshold are spread evenly."""
        if math.floor((row + 1) * self.share + 1e-9) > math.floor(row * self.share + 1e-9):
            return at_threshold(self, self.lower)
        return replace(self, share=0.0)

    @property
    def description(self) -> str:
        """As reports show it."""
        if self.threshold is None:
            return self.text
        below = f" ({self.lower:.4g} for {self.share:.0%})" if self.share else ""
        return f"{self.text} at threshold {self.threshold:.4g}{below}".strip()


@dataclass(frozen=True, kw_only=True)
class PipelineMethod:
    """A method that wraps the pipeline's transformer."""

    name: str
    group: Group
    source: str
    settings: Callable[[Bench, int], list[Setting]]
    """What to choose from at a budget; the best on calibration prompts is taken."""
    wrap: Wrap
    adaptive: bool = False
    """Each picture has its own evaluations, so prompts run one by one."""
    thresholds: tuple[float, float] | None = None
    """Range of the threshold; a larger one computes less."""
    uses_own: bool = False
    published: Range | None = None
    """See `Method`."""

    def run(self, bench: Bench, budget: int) -> Outcome:
        """See `Method`. Raises what its last setting broke with, where none of them ran."""
        candidates: list[Setting] = []
        failure: Exception = NotApplicable(f"no setting keeps to {budget} evaluations")
        for setting in self.settings(bench, budget):
            try:
                if self.thresholds:
                    setting = self._within(bench, budget, setting, self.thresholds)
                if self._tune(bench, setting, bench.tuning)["nfe"] <= budget + SLACK or self.thresholds:
                    candidates.append(setting)
            except NotApplicable as error:
                failure = error
            except ModelError as error:  # what the pipeline met with this setting
                _LOG.info("%s, %s: %s", self.name, setting.text, error)
                failure = error
        if not candidates:
            raise failure
        setting = choose(bench, candidates, lambda each, rows: self._tune(bench, each, rows)["psnr_db"])
        rows = bench.evaluation.map(self._answer(bench, setting, held_out=True))
        while rows["nfe"].mean() > budget + SLACK and setting.threshold is not None and setting.threshold < 1e6:
            setting = replace(setting, share=0.0) if setting.share else at_threshold(setting, 1.05 * setting.threshold)
            rows = bench.evaluation.map(self._answer(bench, setting, held_out=True))
        times = rows["seconds"]
        if not self.adaptive:
            times = bench.evaluation.map(self._answer(bench, setting, held_out=True, singly=True), slice(2))["seconds"]
        return Outcome(
            scores=rows,
            nfe=rows["nfe"],
            blocks=rows["blocks"],
            setting=setting.description,
            seconds=float(np.median(times)),
        )

    def _tune(self, bench: Bench, setting: Setting, rows: slice) -> dict[str, float]:
        """Mean `nfe` and `psnr_db` on some calibration samples, from the workspace where they are known."""

        def compute() -> dict[str, float]:
            found = bench.calibration.samples.map(self._answer(bench, setting, held_out=False), rows)
            return {name: float(found[name].mean()) for name in ("nfe", "psnr_db")}

        key = [bench.key, self.name, setting.values, setting.threshold, setting.lower, setting.share, rows.stop]
        found: dict[str, float] = bench.workspace.json("tune", key, compute)
        return found

    def _within(self, bench: Bench, budget: int, setting: Setting, bounds: tuple[float, float]) -> Setting:
        """The setting with thresholds that use the whole budget on calibration samples.

        Evaluations are whole numbers: of the least threshold that keeps the mean within the budget and the next lower
        one that was tried, each is used for its share of the samples, so that the mean is the budget. What a threshold
        came to is kept: bisections of several budgets begin alike.

        Raises NotApplicable where the budget is exceeded at any threshold.
        """

        def evaluations(threshold: float) -> float:
            def mean() -> float:
                answer = self._answer(bench, at_threshold(setting, threshold), held_out=False, score=False)
                return float(bench.calibration.samples.map(answer, bench.tuning)["nfe"].mean())

            key = [bench.key, self.name, setting.values, threshold, bench.tuning.stop]
            return float(bench.workspace.json("threshold", key, mean))

        lower, upper = bounds
        if evaluations(lower) <= budget + SLACK:
            return at_threshold(setting, lower)
        if evaluations(upper) > budget + SLACK:
            raise NotApplicable(f"it computes more than {budget} steps at any threshold up to {upper:g}")
        for _ in range(BISECTIONS):
            middle = math.sqrt(lower * upper)
            lower, upper = (lower, middle) if evaluations(middle) <= budget + SLACK else (middle, upper)
        more, fewer = evaluations(lower), evaluations(upper)
        return replace(at_threshold(setting, upper), lower=lower, share=(budget - fewer) / (more - fewer))

    def _answer(
        self, bench: Bench, setting: Setting, *, held_out: bool, singly: bool = False, score: bool = True
    ) -> Callable[[Batch], Rows]:
        """For a batch: `nfe`, `blocks` (`Count`) and `seconds` (m,) of its samples, and the scores of its pictures.

        Args:
            bench: with the pipeline.
            setting: of the method.
            held_out: whether the batch is of the held-out samples, rather than of calibration's.
            singly: run one prompt at a time although the method decides for all at once.
            score: decode and score.
        """

        def answer(batch: Batch) -> Rows:
            everything = list(range(batch.rows.start, batch.rows.stop))
            apart = self.adaptive or singly or setting.share > 0
            parts = [[row] for row in everything] if apart else [everything]
            latents = list[Tensor]()
            nfe, block_runs, seconds = list[float](), list[float](), list[float]()
            for part in parts:  # wrapped anew each time: FirstBlockCache's reset keeps the last run's residual
                with self.wrap(bench.pipeline, setting.at_row(part[0])), count_evaluations(bench) as counter:
                    start = time.perf_counter()
                    latents.append(run_pipeline(bench, part, held_out=held_out))
                    seconds += [time.perf_counter() - start] * len(part)
                nfe += [counter.evaluations] * len(part)
                block_runs += [counter.blocks] * len(part)
            measured = {"nfe": nfe, "blocks": block_runs, "seconds": seconds}
            rows = {name: np.asarray(values, dtype=np.float64) for name, values in measured.items()}
            if not score:
                return rows
            return {**rows, **scores_from_latents(batch, torch.cat(latents).to(batch.evaluator.device))}

        return answer


def at_threshold(setting: Setting, threshold: float) -> Setting:
    """The setting with one threshold for all samples."""
    return replace(setting, threshold=threshold, share=0.0)


@torch.no_grad()
def run_pipeline(bench: Bench, rows: list[int], *, held_out: bool) -> Tensor:
    """Where the pipeline's own run ends (m, …), on the CPU, with prompts and seeds of samples of one of the sets."""
    prompts = bench.prompts if held_out else bench.calibration_prompts
    seeds = bench.seeds if held_out else bench.calibration_seeds
    scale = ABOVE_ONE if bench.interface.guided and bench.guidance_scale == 1 else bench.guidance_scale
    last: list[Tensor] = []

    def keep(index: int, timestep: float, before: Tensor, output: Tensor, after: Tensor) -> None:
        last[:] = [after[: len(rows)]]  # some pipelines hand both branches, with the same latents, to the scheduler

    arguments = bench.call.arguments(scale, len(rows))
    generators = [torch.Generator().manual_seed(seeds[row]) for row in rows]
    named = prompt_arguments(bench.pipeline, [prompts[row] for row in rows])
    with record(bench.pipeline, keep_calls=0, on_step=keep), guider_at(bench.pipeline, scale):
        invoke(bench.pipeline, {**named, "generator": generators, **arguments})
    return last[0]


def pipeline_error(bench: Bench) -> Callable[[Batch], Rows]:
    """For a batch of held-out samples: `latent_error` (m,), how far the pipeline now ends from where it did."""

    def answer(batch: Batch) -> Rows:
        final = run_pipeline(bench, list(range(batch.rows.start, batch.rows.stop)), held_out=True)
        return {"latent_error": relative_latent_error(final, batch.latents(-1).cpu())}

    return answer


@dataclass
class Count:
    """What was run of the blocks, in full runs of all branches of guidance."""

    evaluations: float = 0.0
    """Of the blocks that run least: a cache may compute the first ones of every list at every step."""
    blocks: float = 0.0
    """Mean over all blocks: some caches compute the first one at every step."""


@contextlib.contextmanager
def count_evaluations(bench: Bench) -> Iterator[Count]:
    """Counts runs of the blocks, on a layer deep in each, which every cache of this room skips with its block."""
    calls = bench.interface.branches if branches_apart(bench) else 1
    layers = [deep_layer(block) for each in block_lists(transformer_of(bench.pipeline)) for block in each]
    runs = np.zeros(len(layers))
    found = Count()

    def counter(index: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            runs[index] += 1 / calls

        return count

    handles = [layer.register_forward_hook(counter(index)) for index, layer in enumerate(layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found.evaluations = round(float(runs[runs > 0].min(initial=runs.max())), 6)
        found.blocks = round(float(runs.mean()), 6)


def branches_apart(bench: Bench) -> bool:
    """Whether the pipeline calls its transformer for each branch of guidance, rather than once for both."""
    return bench.interface.guided and not bench.interface.stacked


def transformer_of(pipeline: Any) -> nn.Module:
    """The pipeline's transformer. Raises NotApplicable."""
    found = getattr(pipeline, "transformer", None)
    if not isinstance(found, nn.Module):
        raise NotApplicable(f"{type(pipeline).__name__} has no transformer, and caches of blocks take no other model")
    return found


def block_lists(transformer: nn.Module) -> list[nn.ModuleList]:
    """The transformer's lists of blocks in order, as diffusers' caches find them. Raises NotApplicable."""
    try:
        return blocks.block_lists(transformer)
    except ModelError as error:
        raise NotApplicable(str(error)) from error


def deep_layer(block: nn.Module) -> nn.Module:
    """A linear layer of a block's attention: the query's projection, whatever its class calls it."""
    named = [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    queries = [module for name, module in named if name.split(".")[-1].startswith(("to_q", "to_query", "q_proj"))]
    attention = [module for name, module in named if "attn" in name or "attention" in name]
    if not (queries or attention):
        raise NotApplicable(f"{type(block).__name__} has no attention query to count evaluations by")
    return (queries or attention)[0]
