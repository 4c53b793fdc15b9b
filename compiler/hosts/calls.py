"""The call of a pipeline that is running: diffusers tells neither a scheduler nor a transformer who calls it, so that
the pipeline, and what it was asked for, are looked for on the call stack.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class PipelineCall:
    """The innermost call of a pipeline in this thread."""

    pipeline: Any
    given: Mapping[str, Any]
    """Arguments that the caller named, as they were given."""
    values: Mapping[str, Any]
    """Its variables by now, defaults filled in."""


def calling_pipeline() -> Any:
    """The innermost pipeline that runs in this thread, or None."""
    frame = _pipeline_frame(sys._getframe(1))
    return None if frame is None else frame.f_locals["self"]


def calling_pipeline_call() -> PipelineCall | None:
    """The innermost call of a pipeline, or None where none is running."""
    frame = _pipeline_frame(sys._getframe(1))
    if frame is None:
        return None
    pipeline, inner = frame.f_locals["self"], frame
    while frame is not None and not (frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipeline):
        frame = frame.f_back
    if frame is None:
        return PipelineCall(pipeline=pipeline, given={}, values=dict(inner.f_locals))
    return PipelineCall(pipeline=pipeline, given=_given(frame), values=dict(frame.f_locals))


def _pipeline_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame of a method of a pipeline."""
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",) and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            return frame
        frame = frame.f_back
    return None


def _given(frame: FrameType) -> dict[str, Any]:
    """What `__call__` was given, before it filled in defaults: torch's `no_grad`, which is around it, still holds
    that.
    """
    outer = frame.f_back
    if outer is None or "args" not in outer.f_locals or "kwargs" not in outer.f_locals:
        return {}
    args, kwargs = outer.f_locals["args"], outer.f_locals["kwargs"]
    try:
        bound = inspect.signature(type(frame.f_locals["self"]).__call__).bind_partial(*args, **kwargs)
    except TypeError:
        return dict(kwargs)
    return {name: value for name, value in bound.arguments.items() if name != "self"}
