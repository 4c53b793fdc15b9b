"""Methods that decide inside the pipeline: diffusers' own caches, cache-dit, and TeaCache.

The stock pipeline runs with its own loop; a method only wraps the transformer. Adaptive methods decide for one picture
at a time, so they run one prompt at a time. Evaluations are counted on a layer deep in the blocks, which runs only when
they do.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from otcache.schemas.errors import ModelError

from ..calibration import metrics
from ..pipelines.record import record
from .method import Bench, Group, NotApplicable, Outcome

TUNING_PROMPTS = 4
"""Calibration prompts on which a method's free settings are chosen, or a threshold is searched."""
BISECTIONS = 9
Wrap = Callable[[Any, "Setting"], contextlib.AbstractContextManager[None]]
"""(pipeline, setting) → the pipeline runs the method while the context lasts."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a method is started with."""

    text: str
    values: dict[str, Any]
    threshold: float | None = None
    """Searched so that the budget is kept, where the method has one."""


@dataclass(frozen=True, kw_only=True)
class HookMethod:
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

    def run(self, bench: Bench, budget: int) -> Outcome:
        tuning = list(range(min(TUNING_PROMPTS, bench.calibration.trajectory.count)))
        candidates = []
        for setting in self.settings(bench, budget):
            if self.thresholds:
                setting = self._within(bench, budget, setting, self.thresholds)
            latents, nfe, _ = self._run(bench, setting, tuning, held_out=False)
            if nfe.mean() <= budget or self.thresholds:  # a threshold is raised below until the budget is kept
                pictures = bench.calibration.decode(latents)
                score = float(metrics.psnr(pictures, bench.calibration.references[: len(tuning)]).mean())
                candidates.append((score, setting))
        if not candidates:
            raise NotApplicable(f"no setting keeps to {budget} evaluations")
        setting = max(candidates, key=lambda pair: pair[0])[1]
        everything = list(range(bench.count))
        latents, nfe, seconds = self._run(bench, setting, everything, held_out=True)
        while nfe.mean() > budget and setting.threshold is not None and setting.threshold < 1e6:
            setting = _at(setting, 1.05 * setting.threshold)
            latents, nfe, seconds = self._run(bench, setting, everything, held_out=True)
        if not self.adaptive:
            seconds = self._run(bench, setting, [0, min(1, bench.count - 1)], held_out=True, singly=True)[2]
        return Outcome(latents=latents, nfe=nfe, setting=setting.text, seconds=seconds)

    def _within(self, bench: Bench, budget: int, setting: Setting, bounds: tuple[float, float]) -> Setting:
        """The setting at the least threshold that keeps the mean within the budget on a few held-out prompts.

        On the prompts that are measured, which favours the method. What a threshold came to is kept: bisections of
        several budgets begin alike.
        """
        low, high = np.log(bounds[0]), np.log(bounds[1])
        few = list(range(min(TUNING_PROMPTS, bench.count)))

        def keeps(threshold: float) -> bool:
            def mean() -> float:
                return float(self._run(bench, _at(setting, threshold), few, held_out=True)[1].mean())

            key = [bench.key, self.name, setting.values, threshold, len(few)]
            return float(bench.workspace.json("threshold", key, mean)) <= budget

        if keeps(bounds[0]):
            return _at(setting, bounds[0])
        for _ in range(BISECTIONS):
            middle = 0.5 * (low + high)
            low, high = (low, middle) if keeps(float(np.exp(middle))) else (middle, high)
        return _at(setting, float(np.exp(high)))

    def _run(
        self, bench: Bench, setting: Setting, rows: list[int], *, held_out: bool, singly: bool = False
    ) -> tuple[Tensor, np.ndarray, float]:
        """Final latents (n, …), evaluations of each sample (n,), and the median seconds of a run."""
        trajectory = (bench.evaluation if held_out else bench.calibration).trajectory
        parts = [[row] for row in rows] if self.adaptive or singly else [rows]
        latents, nfe, times = [], [], []
        for part in parts:  # wrapped anew each time: FirstBlockCache's reset keeps the last run's residual
            with self.wrap(bench.pipeline, setting), counted(bench) as counter, torch.no_grad():
                start = time.perf_counter()
                latents.append(_sample(bench, trajectory, part))
                times.append(time.perf_counter() - start)
            nfe += [counter[0]] * len(part)
        return torch.cat(latents), np.asarray(nfe, dtype=np.float64), float(np.median(times))


def _at(setting: Setting, threshold: float) -> Setting:
    base = setting.text.split(" at threshold")[0].strip()
    return Setting(text=f"{base} at threshold {threshold:.4g}".strip(), values=setting.values, threshold=threshold)


def _sample(bench: Bench, trajectory: Any, rows: list[int]) -> Tensor:
    """The pipeline's own run from recorded initial latents and conditioning's prompts."""
    prompts, seeds = bench.prompts_of(trajectory)
    generators = [torch.Generator().manual_seed(seeds[row]) for row in rows]
    arguments = bench.call.arguments(bench.guidance_scale, len(rows))
    with record(bench.pipeline, keep_calls=0) as tape:
        bench.pipeline([prompts[row] for row in rows], generator=generators, **arguments)
    return tape.final[0]


@contextlib.contextmanager
def counted(bench: Bench) -> Iterator[list[float]]:
    """Counts full runs of the blocks: calls of a linear layer in the second block, per branch of guidance."""
    branches = bench.calibration.denoiser.interface
    calls = branches.branches if branches.guided and not branches.stacked else 1
    counter = [0.0]

    def count(*_: Any) -> None:
        counter[0] += 1 / calls

    handle = _deep_layer(bench.pipeline.transformer).register_forward_hook(count)
    try:
        yield counter
    finally:
        handle.remove()
        counter[0] = round(counter[0], 6)


def block_lists(transformer: nn.Module) -> list[nn.ModuleList]:
    """The transformer's lists of blocks in order, as diffusers' caches find them."""
    from ..hosts.blocks import block_lists as lists_of

    try:
        return lists_of(transformer)
    except ModelError as error:
        raise NotApplicable(str(error)) from error


def _deep_layer(transformer: nn.Module) -> nn.Module:
    """The query projection of the second block: every cache of this module skips it when it skips the blocks."""
    second = [block for blocks in block_lists(transformer) for block in blocks][1]
    for name, module in second.named_modules():
        if name.endswith("to_q"):
            return module
    raise NotApplicable(f"{type(second).__name__} has no attention query to count evaluations by")


# --- diffusers' own caches
# -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def diffusers_cache(pipeline: Any, config: Any) -> Iterator[None]:
    """While it lasts, the pipeline's transformer has one of diffusers' caches. Raises NotApplicable where diffusers
    refuses it.
    """
    transformer = pipeline.transformer
    try:
        transformer.enable_cache(config)
    except Exception as error:
        raise NotApplicable(f"diffusers' enable_cache refuses {type(config).__name__}: {error}") from error
    try:
        yield
    finally:
        transformer.disable_cache()


LAYERS = (r".*blocks\.\d+\.(attn|ff|ff_context|img_mlp|txt_mlp|proj_mlp|proj_out)",)
"""Attention and feed-forward layers of every block: what FORA and TaylorSeer cache."""


def _intervals(order: int) -> Callable[[Bench, int], list[Setting]]:
    """Warm-ups of one to three steps with the shortest interval that keeps the budget."""

    def settings(bench: Bench, budget: int) -> list[Setting]:
        total, found = bench.table.num_inference_steps, []
        for warmup in (1, 2, 3):
            for interval in range(1, total + 1):
                computed = [step for step in range(total) if step < warmup or (step - warmup - 1) % interval == 0]
                if len(computed) <= budget:
                    text = f"interval {interval} after {warmup} steps"
                    found.append(Setting(text=text, values={"warmup": warmup, "interval": interval, "order": order}))
                    break
        return found

    return settings


def _taylor(pipeline: Any, setting: Setting) -> contextlib.AbstractContextManager[None]:
    from diffusers import TaylorSeerCacheConfig

    values = setting.values
    return diffusers_cache(
        pipeline,
        TaylorSeerCacheConfig(
            cache_interval=values["interval"],
            disable_cache_before_step=values["warmup"],
            max_order=values["order"],
            taylor_factors_dtype=torch.float32,
            cache_identifiers=list(LAYERS),
        ),
    )


def _first_block(pipeline: Any, setting: Setting) -> contextlib.AbstractContextManager[None]:
    from diffusers import FirstBlockCacheConfig

    return diffusers_cache(pipeline, FirstBlockCacheConfig(threshold=setting.threshold))


def _magcache_settings(bench: Bench, budget: int) -> list[Setting]:
    """Magnitude ratios from MagCache's own calibration run, with one, a quarter or half of the budget kept at the
    start.
    """
    from diffusers import MagCacheConfig

    total = bench.table.num_inference_steps

    def calibrate() -> list[float]:
        said = io.StringIO()
        config = MagCacheConfig(calibrate=True, num_inference_steps=total)
        with diffusers_cache(bench.pipeline, config), contextlib.redirect_stdout(said), torch.no_grad():
            _sample(bench, bench.calibration.trajectory, [0])
        listed = re.findall(r"^\[[-\d., e]+\]$", said.getvalue(), flags=re.MULTILINE)
        return [float(value) for value in listed[0].strip("[]").split(",")] if listed else []

    ratios = bench.workspace.json("magcache", [bench.key], calibrate)
    if len(ratios) != total:
        raise NotApplicable("MagCache's calibration run printed no ratios for this model")
    return [
        Setting(text=f"{kept} steps kept", values={"ratios": ratios, "kept": kept, "total": total})
        for kept in sorted({1, max(1, budget // 4), max(1, budget // 2)})
    ]


def _magcache(pipeline: Any, setting: Setting) -> contextlib.AbstractContextManager[None]:
    from diffusers import MagCacheConfig

    values = setting.values
    return diffusers_cache(
        pipeline,
        MagCacheConfig(
            threshold=setting.threshold,
            max_skip_steps=values["total"],
            num_inference_steps=values["total"],
            retention_ratio=values["kept"] / values["total"],
            mag_ratios=list(values["ratios"]),
        ),
    )


# --- TeaCache
# ------------------------------------------------------------------------------------------------------------


class TeaCache:
    """TeaCache (arXiv 2411.19108): blocks are skipped while the modulated input of the first changes little.

    Changes are rescaled by a polynomial fitted to how much the blocks' residual changes with them, and accumulated up
    to the threshold. Branches of guidance are kept apart. The first and the last step are always computed.
    """

    def __init__(
        self, pipeline: Any, polynomial: np.ndarray | None, threshold: float, total: int, branches: int
    ) -> None:
        from diffusers.hooks._helpers import TransformerBlockRegistry

        self.blocks = [block for blocks in block_lists(pipeline.transformer) for block in blocks]
        self.metadata = [TransformerBlockRegistry.get(type(block)) for block in self.blocks]
        self.polynomial, self.threshold, self.total, self.branches = polynomial, threshold, total, branches
        self.calls = 0
        self.state: list[dict[str, Any]] = [{} for _ in range(branches)]
        self.observed: list[tuple[float, float]] = []
        """Changes of indicator and residual, while there is no polynomial yet."""
        self.skipping = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        originals = [block.forward for block in self.blocks]
        for index, (block, original) in enumerate(zip(self.blocks, originals, strict=True)):
            block.forward = self._wrapped(index, original)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _wrapped(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        metadata, block = self.metadata[index], self.blocks[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = metadata._get_parameter_from_args_kwargs(metadata.hidden_states_argument_name, args, kwargs)
            text = None
            if metadata.return_encoder_hidden_states_index is not None:
                text = metadata._get_parameter_from_args_kwargs(
                    metadata.encoder_hidden_states_argument_name, args, kwargs
                )
            if index == 0:
                self._decide(modulated_input(block, hidden, args, kwargs), hidden, text)
            last = index == len(self.blocks) - 1
            if self.skipping:
                state = self.state[(self.calls - 1) % self.branches]
                if last:
                    hidden = state["input"][0] + state["residual"][0]
                    text = None if text is None else state["input"][1] + state["residual"][1]
                return _as_returned(metadata, hidden, text)
            output = original(*args, **kwargs)
            if last:
                self._remember(metadata, output)
            return output

        return forward

    def _decide(self, indicator: Tensor, hidden: Tensor, text: Tensor | None) -> None:
        step, branch = divmod(self.calls, self.branches)
        step %= self.total
        self.calls += 1
        state = self.state[branch]
        if step == 0:
            state.clear()
        compute = True
        if "indicator" in state:
            change = float((indicator - state["indicator"]).abs().mean() / state["indicator"].abs().mean())
            state["change"] = change
            if self.polynomial is not None and 0 < step < self.total - 1:
                state["sum"] += abs(float(np.polyval(self.polynomial, change)))
                compute = state["sum"] >= self.threshold
        if compute:
            state["sum"] = 0.0
        state["indicator"], state["input"] = indicator, (hidden, text)
        self.skipping = not compute

    def _remember(self, metadata: Any, output: Any) -> None:
        state = self.state[(self.calls - 1) % self.branches]
        hidden, text = _returned(metadata, output)
        residual = (hidden - state["input"][0], None if text is None else text - state["input"][1])
        if self.polynomial is None and "residual" in state and "change" in state:
            before = state["residual"][0]
            self.observed.append((state["change"], float((residual[0] - before).abs().mean() / before.abs().mean())))
        state["residual"] = residual


def modulated_input(block: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first block's input after its timestep modulation: TeaCache's indicator."""
    time_embedding = kwargs.get("temb")
    if time_embedding is None:
        time_embedding = next((value for value in args[1:] if isinstance(value, Tensor) and value.ndim == 2), None)
    if hasattr(block, "img_mod") and hasattr(block, "img_norm1"):
        shift, scale, _ = block.img_mod(time_embedding).chunk(2, dim=-1)[0].chunk(3, dim=-1)
        return block.img_norm1(hidden) * (1 + scale[:, None]) + shift[:, None]
    if hasattr(block, "norm1"):
        normed = block.norm1(hidden, emb=time_embedding)
        return normed[0] if isinstance(normed, tuple) else normed
    raise NotApplicable(f"{type(block).__name__} modulates its input in a way that TeaCache's indicator does not know")


def _returned(metadata: Any, output: Any) -> tuple[Tensor, Tensor | None]:
    if not isinstance(output, tuple):
        return output, None
    index = metadata.return_encoder_hidden_states_index
    return output[metadata.return_hidden_states_index], None if index is None else output[index]


def _as_returned(metadata: Any, hidden: Tensor, text: Tensor | None) -> Any:
    index = metadata.return_encoder_hidden_states_index
    if index is None:
        return hidden
    pair: list[Any] = [None, None]
    pair[metadata.return_hidden_states_index], pair[index] = hidden, text
    return tuple(pair)


def _teacache_settings(bench: Bench, budget: int) -> list[Setting]:
    """The polynomial of degree 4 fitted on calibration prompts, as TeaCache's authors fit theirs."""
    interface = bench.calibration.denoiser.interface
    branches = 2 if interface.guided and not interface.stacked else 1
    total = bench.table.num_inference_steps

    def fit() -> list[float]:
        observed = []
        for row in range(min(TUNING_PROMPTS, bench.calibration.trajectory.count)):
            cache = TeaCache(bench.pipeline, None, 0.0, total, branches)
            with cache.installed(), torch.no_grad():
                _sample(bench, bench.calibration.trajectory, [row])
            observed += cache.observed
        changes, residuals = np.asarray(observed).T
        return [float(value) for value in np.polyfit(changes, residuals, 4)]

    polynomial = bench.workspace.json("teacache", [bench.key], fit)
    return [Setting(text="", values={"polynomial": polynomial, "total": total, "branches": branches})]


@contextlib.contextmanager
def _teacache(pipeline: Any, setting: Setting) -> Iterator[None]:
    values = setting.values
    cache = TeaCache(
        pipeline, np.asarray(values["polynomial"]), float(setting.threshold or 0.0), values["total"], values["branches"]
    )
    with cache.installed():
        yield


# --- cache-dit
# -----------------------------------------------------------------------------------------------------------


def _needs_cache_dit() -> None:
    if importlib.util.find_spec("cache_dit") is None:
        raise NotApplicable("cache-dit is not installed: pip install 'otcache[compare]'")


@contextlib.contextmanager
def _cache_dit(pipeline: Any, calibrator: int | None, **options: Any) -> Iterator[None]:
    _needs_cache_dit()
    import cache_dit

    config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, enable_separate_cfg=True, **options)
    taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=calibrator) if calibrator else None
    # cache-dit rearranges the transformer and patches the pipeline's class, and does not take all of that back.
    kept, call = (pipeline.transformer, pipeline.scheduler), type(pipeline).__call__
    pipeline.transformer = copy.deepcopy(pipeline.transformer)
    try:
        cache_dit.enable_cache(pipeline, cache_config=config, calibrator_config=taylor)
        yield
    finally:
        with contextlib.suppress(Exception):
            cache_dit.disable_cache(pipeline)
        pipeline.transformer, pipeline.scheduler = kept
        type(pipeline).__call__ = call


def masks(budget: int, num_inference_steps: int) -> dict[str, list[int]]:
    """Step masks of cache-dit's kind with exactly `budget` computed steps, by name.

    Its presets compute a run of steps first and then single ones in growing gaps, the last step always; here with a run
    of one, a quarter or half of the budget, and evenly spaced ones.
    """
    found = {}
    for name, run in (("even", 1), ("quarter first", max(1, budget // 4)), ("half first", max(1, budget // 2))):
        rest = budget - run
        gaps = np.linspace(1.0, 1.0 if name == "even" else 2.0, max(rest, 1))
        places = run - 1 + np.cumsum(gaps) / gaps.sum() * (num_inference_steps - run)
        steps = {*range(run), *(round(place) for place in places[:rest])}
        if len(steps) == budget:
            found[name] = [int(step in steps) for step in range(num_inference_steps)]
    return found


def _mask_settings(bench: Bench, budget: int) -> list[Setting]:
    _needs_cache_dit()
    total = bench.table.num_inference_steps
    return [
        Setting(text=f"{name} mask{', taylor' if order else ''}", values={"mask": mask, "order": order, "total": total})
        for name, mask in masks(budget, total).items()
        for order in (None, 1)
    ]


def _masked(pipeline: Any, setting: Setting) -> contextlib.AbstractContextManager[None]:
    values = setting.values
    return _cache_dit(
        pipeline,
        values["order"],
        steps_computation_mask=list(values["mask"]),
        steps_computation_policy="static",
        num_inference_steps=values["total"],
        max_warmup_steps=1,
    )


def _dynamic_settings(bench: Bench, budget: int) -> list[Setting]:
    _needs_cache_dit()
    total = bench.table.num_inference_steps
    return [
        Setting(
            text=f"warm-up {warmup}{', taylor' if order else ''}",
            values={"warmup": warmup, "order": order, "total": total},
        )
        for warmup in sorted({1, max(1, budget // 2)})
        for order in (None, 1)
    ]


def _dynamic(pipeline: Any, setting: Setting) -> contextlib.AbstractContextManager[None]:
    values = setting.values
    return _cache_dit(
        pipeline,
        values["order"],
        residual_diff_threshold=setting.threshold,
        max_warmup_steps=values["warmup"],
        num_inference_steps=values["total"],
    )


def _no_settings(bench: Bench, budget: int) -> list[Setting]:
    return [Setting(text="", values={})]


def hook_methods() -> list[HookMethod]:
    """All of them, in the order of the table."""
    wide = (1e-3, 10.0)
    return [
        HookMethod(
            name="fora", group="cache", source="arXiv 2407.01425, diffusers", settings=_intervals(0), wrap=_taylor
        ),
        HookMethod(
            name="taylorseer-1",
            group="cache",
            source="arXiv 2503.06923, diffusers",
            settings=_intervals(1),
            wrap=_taylor,
        ),
        HookMethod(
            name="taylorseer-2",
            group="cache",
            source="arXiv 2503.06923, diffusers",
            settings=_intervals(2),
            wrap=_taylor,
        ),
        HookMethod(
            name="first block",
            group="cache",
            source="FirstBlockCache, diffusers",
            settings=_no_settings,
            wrap=_first_block,
            adaptive=True,
            thresholds=wide,
        ),
        HookMethod(
            name="magcache",
            group="cache",
            source="arXiv 2506.09045, diffusers",
            settings=_magcache_settings,
            wrap=_magcache,
            thresholds=wide,
        ),
        HookMethod(
            name="teacache",
            group="cache",
            source="arXiv 2411.19108",
            settings=_teacache_settings,
            wrap=_teacache,
            adaptive=True,
            thresholds=wide,
        ),
        HookMethod(
            name="cache-dit mask",
            group="library",
            source="cache-dit, static mask",
            settings=_mask_settings,
            wrap=_masked,
        ),
        HookMethod(
            name="cache-dit dynamic",
            group="library",
            source="cache-dit, DBCache",
            settings=_dynamic_settings,
            wrap=_dynamic,
            adaptive=True,
            thresholds=wide,
        ),
    ]
