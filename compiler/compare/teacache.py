"""TeaCache (arXiv 2411.19108): an indicator's accumulated change decides which steps skip the blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from .diffusers_caches import WIDE
from .method import Bench, NotApplicable
from .pipeline_method import PipelineMethod, Setting, block_lists, branches_apart, run_pipeline, transformer_of

Indicator = Callable[[Tensor, int], Tensor]
"""(first block's modulated input, step) → what is compared between steps."""


class TeaCache:
    """TeaCache (arXiv 2411.19108): blocks are skipped while the modulated input of the first changes little.

    Changes are rescaled by a polynomial fitted to how much the blocks' residual changes with them, and accumulated up
    to the threshold. Branches of guidance are kept apart. The first and the last step are always computed.
    """

    def __init__(
        self,
        pipeline: Any,
        polynomial: np.ndarray | None,
        threshold: float,
        total: int,
        branches: int,
        indicator: Indicator = lambda hidden, step: hidden,
    ) -> None:
        """A cache for one run of the pipeline, or several of the same length.

        Args:
            pipeline: a diffusers pipeline.
            polynomial: highest power first; None computes every step and keeps what is observed.
            threshold: accumulated change at which the blocks are computed.
            total: steps of a run.
            branches: calls of the transformer at each step.
            indicator: what is compared between steps, of the modulated input.
        """
        from diffusers.hooks._helpers import TransformerBlockRegistry

        self.blocks = [block for blocks in block_lists(transformer_of(pipeline)) for block in blocks]
        try:
            self.metadata = [TransformerBlockRegistry.get(type(block)) for block in self.blocks]
        except ValueError as error:
            raise NotApplicable(f"a block that diffusers' table does not describe: {error}") from error
        self.polynomial, self.threshold, self.total, self.branches = polynomial, threshold, total, branches
        self.indicator = indicator
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
                step = self.calls // self.branches % self.total
                modulated = modulated_input(block, lambda: original(*args, **kwargs))
                self._decide(self.indicator(modulated, step), hidden, text)
            last = index == len(self.blocks) - 1
            if self.skipping:
                state = self.state[(self.calls - 1) % self.branches]
                if last:
                    hidden = state["input"][0] + state["residual"][0]
                    text = None if state["residual"][1] is None else state["input"][1] + state["residual"][1]
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
        before_text = state["input"][1]
        residual = (hidden - state["input"][0], None if text is None or before_text is None else text - before_text)
        if self.polynomial is None and "residual" in state and "change" in state:
            before = state["residual"][0]
            self.observed.append((state["change"], float((residual[0] - before).abs().mean() / before.abs().mean())))
        state["residual"] = residual


class _Seen(Exception):
    """Carries an attention layer's input out of a block."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def modulated_input(block: nn.Module, call: Callable[[], Any]) -> Tensor:
    """The first block's input after its timestep modulation: TeaCache's indicator.

    It is what the block's first attention layer is given, in every class of blocks that modulates its input.

    Args:
        block: the first one.
        call: runs it; ends where the layer would.

    Raises NotApplicable where the block runs no such layer.
    """

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        first = kwargs.get("hidden_states")
        raise _Seen(first if first is not None else next(value for value in given if isinstance(value, Tensor)))

    layers = [each for each in block.modules() if each is not block and "attn" in type(each).__name__.lower()]
    layers += [each for each in block.modules() if each is not block and "attention" in type(each).__name__.lower()]
    handles = [each.register_forward_pre_hook(stop, with_kwargs=True) for each in layers]
    try:
        call()
    except _Seen as seen:
        return seen.hidden
    finally:
        for handle in handles:
            handle.remove()
    raise NotApplicable(f"{type(block).__name__} has no attention layer whose input TeaCache's indicator could be")


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


def _settings(bench: Bench, budget: int) -> list[Setting]:
    """The polynomial of degree 4 fitted on all calibration prompts and both branches, as the authors fit theirs."""
    branches, total = (2 if branches_apart(bench) else 1), bench.table.num_inference_steps

    def fit() -> list[float]:
        observed = []
        for row in range(bench.calibration.count):
            cache = TeaCache(bench.pipeline, None, 0.0, total, branches)
            with cache.installed():
                run_pipeline(bench, [row], held_out=False)
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


METHODS = (
    PipelineMethod(
        name="teacache",
        group="cache",
        source="arXiv 2411.19108",
        settings=_settings,
        wrap=_teacache,
        adaptive=True,
        thresholds=WIDE,
    ),
)
