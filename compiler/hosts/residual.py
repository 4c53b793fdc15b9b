"""Programs of payload `residual` in torch, through diffusers' hooks: at a cached step the blocks are passed by.

    computed step   r = hidden states after the last block − before the first, float32, kept with the request
    cached step     hidden states after the last block ← before the first + Σ c_m r_m

The forecast is put in at the last block, so that what a ControlNet adds between blocks, which r contains, is not added
twice. Every branch of guidance has its own residuals. See `requests` for how a request is kept apart from all others.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import CacheContext, StateManager
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from otcache.schemas.errors import ModelError, UsageError

from ..models.model import transformer_of
from .blocks import Passage, block_lists
from .calls import calling_pipeline
from .requests import Branch, Request, call_of, running_call
from .scheduler import OTCacheScheduler

HOOK = "otcache_residual"


def apply_residual_cache(
    pipeline: Any, folder: str | Path, budget: int | str, *, strict: bool = True, check: bool = True
) -> None:
    """Run a residual program of an artifact in a pipeline, which is then called with all steps of the full sampler.

    Sets its scheduler and puts hooks on its transformer. Other pipelines with the same transformer are not affected.

    check: compare the transformer with the one that was compiled (`OTCacheScheduler.check`).

    Raises ArtifactError, RequestError, ModelError.
    """
    scheduler = ResidualScheduler.from_artifact(folder, budget, strict=strict, pipeline=pipeline if check else None)
    scheduler.attach(pipeline)
    pipeline.scheduler = scheduler


def remove_residual_cache(pipeline: Any) -> None:
    """Undo `apply_residual_cache`: the scheduler is the one from before, and hooks that no other pipeline uses are
    gone.
    """
    scheduler = pipeline.scheduler
    if not isinstance(scheduler, ResidualScheduler):
        raise UsageError(
            f"the pipeline's scheduler is a {type(scheduler).__name__}: expected that of apply_residual_cache"
        )
    pipeline.scheduler = scheduler.replaced
    transformer = unwrap_module(transformer_of(pipeline, "the pipeline"))
    hook = _hook_of(transformer)
    if hook is not None:
        hook.users.discard(scheduler)
        if not hook.users:
            _remove_hooks(transformer)


class ResidualScheduler(OTCacheScheduler):
    """The scheduler of a residual program. Made by `apply_residual_cache`; it needs the hooks on the transformer."""

    payloads = ("residual",)
    replaced: Any = None
    """The pipeline's scheduler from before."""
    request: Request | None = None
    """The one that is running, with all that is kept for it."""
    _attached = False

    def attach(self, pipeline: Any) -> None:
        """Put hooks on the pipeline's transformer, unless they are there."""
        transformer = unwrap_module(transformer_of(pipeline, "the pipeline"))
        blocks = [block for blocks in block_lists(transformer) for block in blocks]
        expected = len(blocks) if self._recipe.blocks is None else self._recipe.blocks
        if (len(blocks), self._recipe.features) != (expected, 1):
            raise ModelError(
                f"{type(transformer).__name__} has {len(blocks)} blocks here and {self._recipe.features} tensors after "
                f"them: expected {expected}, as the artifact, and one: use a budget of another payload"
            )
        passages = [Passage(block) for block in blocks]
        hook = _hook_of(transformer)
        if hook is None:
            hook = _TransformerHook()
            _register(transformer, hook)
            for place, (block, passage) in enumerate(zip(blocks, passages, strict=True)):
                _register(block, _BlockHook(passage, first=place == 0, last=place == len(blocks) - 1))
            HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()
        hook.users.add(self)
        before = pipeline.scheduler
        self.replaced = before.replaced if isinstance(before, ResidualScheduler) else before
        self._attached = True

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        return_dict: bool = True,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        request = self.request
        if request is None or not request.calls:
            raise ModelError(
                f"step {self._step_index or 0} of {self._recipe} had no call of the transformer from the pipeline's "
                "own __call__: expected one with the hooks of apply_residual_cache in place: apply it again"
            )
        result = super().step(model_output, timestep, sample, return_dict, eta, generator)
        if not request.advance():
            self.request = None
        return result

    def _begin_request(self) -> None:
        super()._begin_request()
        if not self._attached:
            raise UsageError(f"{self._recipe} needs hooks on the pipeline's transformer: use apply_residual_cache")
        self.request = Request(self._recipe, self._program)


class _ThreadContext(StateManager):  # type: ignore[misc]
    """Where diffusers leaves the name of a cache context: here for the calling thread alone, and without any state."""

    def __init__(self) -> None:
        self._local = threading.local()

    def set_context(self, context: CacheContext | None) -> None:
        self._local.name = context.name if context is not None else ""

    @property
    def name(self) -> str:
        return getattr(self._local, "name", "")


class _TransformerHook(ModelHook):  # type: ignore[misc]
    """Finds the request that a call of the transformer belongs to; a call of none passes as if there were no hooks."""

    _is_stateful = True
    fn_ref: Any

    def __init__(self) -> None:
        super().__init__()
        self._context = _ThreadContext()
        self.users: weakref.WeakSet[ResidualScheduler] = weakref.WeakSet()
        """Schedulers that need the hooks."""

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        scheduler = getattr(calling_pipeline(), "scheduler", None)
        request = scheduler.request if isinstance(scheduler, ResidualScheduler) else None
        with call_of(request, self._context.name):
            return self.fn_ref.original_forward(*args, **kwargs)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Nothing to do: the state is the requests' own."""
        return module


class _BlockHook(ModelHook):  # type: ignore[misc]
    """Runs a block, or passes it by."""

    fn_ref: Any

    def __init__(self, passage: Passage, *, first: bool, last: bool) -> None:
        super().__init__()
        self._passage, self._first, self._last = passage, first, last

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = running_call()
        if call is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        request, branch = call
        if self._first:
            branch.source = self._passage.source(args, kwargs)
        if request.step.compute:
            output = self.fn_ref.original_forward(*args, **kwargs)
            if self._last:
                _keep(request, branch, self._passage.result(output))
            return output
        hidden_states = _forecast(request, branch) if self._last else self._passage.source(args, kwargs)
        return self._passage.output(hidden_states, args, kwargs)


def _hook_of(transformer: nn.Module) -> _TransformerHook | None:
    found = HookRegistry.check_if_exists_or_initialize(transformer).get_hook(HOOK)
    return found if isinstance(found, _TransformerHook) else None


def _register(module: nn.Module, hook: ModelHook) -> None:
    with _without_accelerate(module):
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)


def _remove_hooks(transformer: nn.Module) -> None:
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.get_hook(HOOK) is not None:
            with _without_accelerate(module):
                registry.remove_hook(HOOK, recurse=False)
    HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()


@contextmanager
def _without_accelerate(module: nn.Module) -> Iterator[None]:
    """Work beneath accelerate's hook on a module: pipelines take that off and put it on again at every call."""
    outer = getattr(module, "_hf_hook", None)
    if outer is None:
        yield
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(module)
    try:
        yield
    finally:
        add_hook_to_module(module, outer)


def _keep(request: Request, branch: Branch, result: Tensor) -> None:
    source = branch.source
    if source is None or source.shape != result.shape:
        raise ModelError(
            f"{request.recipe}: the blocks make {tuple(result.shape)} of "
            f"{None if source is None else tuple(source.shape)}: expected the same shape: use a budget of payload "
            "'output'"
        )
    memory = request.program.residual_memory
    branch.residuals = [*branch.residuals, result.float() - source.float()][-memory:] if memory else []


def _forecast(request: Request, branch: Branch) -> Tensor:
    """Source + Σ c r, in the source's type."""
    coefs, source = request.step.residual_coefs, branch.source
    recent = branch.residuals[-len(coefs) :]
    if source is None or len(recent) < len(coefs):
        raise ModelError(
            f"step {request.position} of {request.recipe} forecasts from {len(coefs)} computed steps and has "
            f"{len(recent)}: expected every branch of guidance at every step"
        )
    total = coefs[0] * recent[0]
    for coef, residual in zip(coefs[1:], recent[1:], strict=True):
        total += coef * residual
    return (source.float() + total).to(source.dtype)
