"""The host's GPU, through cuda-core: whether there is one, and its compute capability as a target (`sm_89`)."""

from __future__ import annotations

from functools import cache

from otcache.schemas.messages import one_line


@cache
def why_no_gpu() -> tuple[str | None, str | None]:
    """(reason why there is no usable GPU, None) or (None, target of the first one). Looked up once in a process."""
    try:
        from cuda.core import Device
    except ImportError:
        return "cuda-core is not installed: pip install cuda-core cuda-bindings", None
    try:
        major, minor = Device(0).compute_capability
    except Exception as error:  # cuda-core's errors have no common base but this
        return f"no NVIDIA GPU can be used ({one_line(error, 120)})", None
    return None, f"sm_{major}{minor}"
