"""Text encoders leave the device while a model's full runs are made there: all prompts of those are encoded before.

What `encode_prompt` made of each call is kept on the CPU, and handed to the pipeline again when it asks for the same;
it is the same conditioning to the last bit. Only where the encoders are in nobody else's care: a pipeline with
offloading moves them itself, and on the CPU there is no memory to give back.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .placement import Placement

PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device)
"""Arguments by which a call of `encode_prompt` is known again."""


@dataclass(frozen=True)
class _Away:
    """A tensor's values on the CPU, and where it was."""

    values: Tensor
    device: torch.device


def _away(value: Any) -> Any:
    return _Away(value.detach().to("cpu", copy=True), value.device) if isinstance(value, Tensor) else value


def _back(value: Any) -> Any:
    return value.values.to(value.device, copy=True) if isinstance(value, _Away) else value


@contextlib.contextmanager
def encoders_aside(pipeline: Any, placement: Placement) -> Iterator[Callable[[], None]]:
    """While it lasts, prompts are encoded once. Yields what moves the text encoders off the device, for when all
    prompts that are known were encoded; they come back for as long as another is encoded, and at the end.

    Where a pipeline has no `encode_prompt`, or finds its device by its encoders, nothing changes.
    """
    encoders = text_encoders(pipeline)
    encode = getattr(pipeline, "encode_prompt", None)
    if placement.offload != "none" or placement.device.type == "cpu" or encode is None or not encoders:
        yield lambda: None
        return
    keeper = _Encoded(pipeline, encode, encoders)
    pipeline.encode_prompt = keeper
    try:
        yield keeper.leave
    finally:
        del pipeline.encode_prompt
        keeper.come_back()


def text_encoders(pipeline: Any) -> list[nn.Module]:
    """The pipeline's text encoders that may be moved: not those that are quantised, or spread over devices."""
    named = [part for name, part in pipeline.components.items() if name.startswith("text_encoder")]
    fixed = ("hf_quantizer", "hf_device_map")
    return [
        part
        for part in named
        if isinstance(part, nn.Module) and all(getattr(part, name, None) is None for name in fixed)
    ]


class _Encoded:
    """`encode_prompt` with what it has made so far."""

    def __init__(self, pipeline: Any, encode: Any, encoders: list[nn.Module]) -> None:
        self.pipeline, self.encode = pipeline, encode
        self.places = [(encoder, next(encoder.parameters()).device) for encoder in encoders]
        self.signature = inspect.signature(encode)
        self.made: dict[str, Any] = {}
        self.away = False
        self.__signature__ = self.signature  # pipelines, and what reads their calls, may ask for it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = self._key(args, kwargs)
        if key is not None and key in self.made:
            return tree_map(_back, self.made[key])
        away = self.away
        self.come_back()
        made = self.encode(*args, **kwargs)
        if key is not None:
            self.made[key] = tree_map(_away, made)
        if away:
            self.leave()
        return made

    def _key(self, args: Any, kwargs: Any) -> str | None:
        """None for a call with tensors, pictures or the like."""
        bound = self.signature.bind(*args, **kwargs).arguments
        values = [each for value in bound.values() for each in (value if isinstance(value, list) else [value])]
        return repr(sorted(bound.items())) if all(isinstance(value, PLAIN) for value in values) else None

    def leave(self) -> None:
        """Move the encoders to the CPU, unless the pipeline would then run there."""
        before = torch.device(self.pipeline._execution_device)
        for encoder, _ in self.places:
            encoder.to("cpu")
        self.away = True
        if torch.device(self.pipeline._execution_device) != before:
            self.come_back()

    def come_back(self) -> None:
        """Move the encoders to where they were."""
        if self.away:
            for encoder, device in self.places:
                encoder.to(device)  # type: ignore[arg-type]
        self.away = False
