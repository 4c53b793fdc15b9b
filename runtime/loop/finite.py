"""Numbers that are not finite: where they came from first, and what to do about it.

Results are checked once a request. Only when that fails is the request run again, with a look at what every stage
writes: a check that costs nothing where nothing is wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from otcache.schemas.errors import HostError
from otcache.schemas.manifest import Manifest
from otcache.schemas.messages import one_line

from .backend import Array, Origin, Run

LARGEST_FLOAT16 = 65504


def is_spoilt(array: Array) -> bool:
    """Whether an array holds NaN or +∞. −∞ alone is what attention masks are made of.

    >>> is_spoilt(np.array([1.0, np.inf])), is_spoilt(np.array([1.0, -np.inf])), is_spoilt(np.array([1, 2]))
    (True, False, False)
    """
    if array.dtype.kind in "iub":
        return False
    values = array if array.dtype.kind == "f" else array.astype(np.float32)
    return not bool((values < np.inf).all())


def spoilt_run_error(run: Run, origin: Origin | None) -> HostError:
    """The error of a run whose final latents are not finite. origin: None where it was not found again."""
    total = len(run.program.steps)
    if origin is None:
        return _error("the final latents", f"after {total} steps of budget {run.budget}", run.manifest)
    step = run.program.steps[origin.step]
    place = f"at step {origin.step + 1} of {total} of budget {run.budget} (step_index {step.step_index})"
    kind = "what is computed between stages" if origin.engine.startswith("@") else "stage"
    return _error(f"{kind} {one_line(origin.engine.removeprefix('@'), 80)}", place, run.manifest)


def check_output(array: Array, stage: str, manifest: Manifest) -> None:
    """Raise HostError if a stage outside of the loop has written NaN or +∞."""
    if is_spoilt(array):
        raise _error(f"stage {one_line(stage, 80)}", "outside of the steps", manifest)


def _error(what: str, place: str, manifest: Manifest) -> HostError:
    return HostError(
        f"{what}: found numbers that are not finite (NaN or infinity) {place}: expected finite ones: {_cure(manifest)}"
    )


def _cure(manifest: Manifest) -> str:
    tensors: list[Any] = [tensor for stage in manifest.stages for tensor in (*stage.inputs, *stage.outputs)]
    if any(tensor.dtype == "float16" for tensor in tensors):
        return f"float16 overflows beyond {LARGEST_FLOAT16}: compile with --dtype bfloat16 or --dtype float32"
    return "check the artifact with otc verify ARTIFACT --level golden, or try another --backend"
