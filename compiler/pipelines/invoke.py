"""The one place where a pipeline is called: whole, or no further than to what it is asked for."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from otcache.schemas.errors import ModelError, OTCacheError

from ..models.model import transformer_of
from .out_of_memory import error_without_memory, is_out_of_memory

PICTURES = ("image", "mask_image", "control_image", "video", "images")
"""Arguments of pipelines that start from a picture; a call without them fails wherever one is read first."""


class Stop(Exception):
    """Raised inside a pipeline's call by what wants no more of it; `invoke` lets it pass."""


def invoke(pipeline: Any, arguments: Mapping[str, Any]) -> Any:
    """Call a pipeline without gradients.

    Raises:
        ModelError: the pipeline refuses the call or fails in it: one line with its class and the argument it names.
        HostError: there is no memory for it.
    """
    try:
        with torch.no_grad():
            return pipeline(**arguments)
    except Stop:
        pipeline.maybe_free_model_hooks()  # as at the end of a call: what is offloaded leaves the device
        raise
    except (OTCacheError, OSError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise error_without_memory(type(pipeline).__name__, error) from error
        raise ModelError(_describe(pipeline, arguments, error)) from error


def _describe(pipeline: Any, arguments: Mapping[str, Any], error: Exception) -> str:
    name = type(pipeline).__name__
    said = " ".join(str(error).split()) or type(error).__name__
    parameters = inspect.signature(type(pipeline).__call__).parameters
    named = [each for each in parameters if each != "self" and re.search(rf"(?<![\w.]){each}(?!\w)", said)]
    pictures = [each for each in parameters if each in PICTURES and each not in arguments]
    absent = [each for each in named if each not in arguments] or ([] if named else pictures)
    about = (absent or named)[:3]
    subject = f"{name}, argument {' and '.join(about)}" if about else f"{name}, called with {', '.join(arguments)}"
    expected = f"a pipeline that draws without {' and '.join(absent[:3])}" if absent else "arguments that it takes"
    return f"{subject}: {type(error).__name__}: {said[:300]}: expected {expected} ({_shown(arguments)})"


def _shown(arguments: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in arguments.items() if isinstance(value, (int, float, str))}
    return ", ".join(f"{key}={value!r}" for key, value in plain.items()) or "prompts alone"


@contextlib.contextmanager
def stopping_at_the_model(pipeline: Any) -> Iterator[None]:
    """While it lasts, a pipeline's call ends where it would evaluate its transformer; the block is left there."""

    def stop(*_: Any) -> None:
        raise Stop

    handle = transformer_of(pipeline, type(pipeline).__name__).register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(Stop):
            yield
    finally:
        handle.remove()
