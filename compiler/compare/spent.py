"""What a comparison costs: wall time and model evaluations of what is measured, counted while it runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..graph.stages import Stages
from .cells import Spent
from .method import Bench, NotApplicable
from .pipeline_method import block_lists, deep_layer


@dataclass
class Meter:
    """Counts while `metered` lasts."""

    started: float
    evaluations: float = 0.0

    def spent(self) -> Spent:
        """So far."""
        return Spent(seconds=time.perf_counter() - self.started, evaluations=self.evaluations)


@contextlib.contextmanager
def metered(bench: Bench) -> Iterator[Meter]:
    """Counts the samples of every call of the model, whole or in stages, whose last block is run."""
    meter, handles = Meter(time.perf_counter()), list[Any]()
    model: nn.Module = next(
        each for name in ("transformer", "unet") if isinstance(each := getattr(bench.pipeline, name, None), nn.Module)
    )
    handles += _counted(meter, bench, model, _last_layer(model))
    if bench.stages is not None:
        embed, blocks = bench.stages.of_kind("embed"), bench.stages.of_kind("block")
        if embed and blocks:
            handles += _counted(meter, bench, embed[0].module, blocks[-1].module, _latents_at(bench, bench.stages))
    try:
        yield meter
    finally:
        for handle in handles:
            handle.remove()


def _counted(meter: Meter, bench: Bench, entry: nn.Module, deep: nn.Module, position: int = 0) -> list[Any]:
    """Hooks: `entry` sees how many samples a call has, `deep` that it is not skipped."""
    waiting = [0.0]

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = kwargs.get(bench.interface.latents_input, args[position] if len(args) > position else None)
        rows = len(found) if isinstance(found, (Tensor, list, tuple)) else 1
        waiting[0] = rows / bench.interface.branches

    def reach(*_: Any) -> None:
        meter.evaluations += waiting[0]
        waiting[0] = 0.0

    reached: Callable[..., None] = reach
    return [entry.register_forward_pre_hook(enter, with_kwargs=True), deep.register_forward_hook(reached)]


def _last_layer(model: nn.Module) -> nn.Module:
    """A layer that runs only where the model's last block does; the model itself where it has no list of them."""
    try:
        return deep_layer(block_lists(model)[-1][-1])
    except NotApplicable:
        return model


def _latents_at(bench: Bench, stages: Stages) -> int:
    """Position of the latents among the inputs of the first stage."""
    names = stages.of_kind("embed")[0].inputs
    return names.index(bench.interface.latents_input) if bench.interface.latents_input in names else 0
