"""Plans for GPUs after a compile: `otc compile --backend onnx,tensorrt-rtx --target …` does what `build-engines` does.

Compiler and runtime do not import each other: the builder is found through the entry-point group `otcache.engines`,
where the runtime offers `check` and `build`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from otcache.schemas.errors import HostError, UsageError

from ..workspace.progress import Pass, Reporter

GROUP = "otcache.engines"
ONNX = "onnx"
"""The backend whose engines every artifact has."""
BACKENDS = (ONNX, "tensorrt", "tensorrt-rtx")


def parse_backends(text: str) -> tuple[str, ...]:
    """The backends to build plans for, in their order. Raises UsageError.

    >>> parse_backends("onnx,tensorrt-rtx")
    ('tensorrt-rtx',)
    """
    parts = [part.strip() for part in text.split(",")]
    if odd := [part for part in parts if part not in BACKENDS]:
        raise UsageError(f"--backend has {odd[0]!r}: expected some of {', '.join(BACKENDS)}")
    return tuple(dict.fromkeys(part for part in parts if part != ONNX))


def parse_targets(texts: Iterable[str]) -> tuple[str, ...]:
    """The parts of lists; which targets there are is the builder's to say.

    >>> parse_targets(["sm_89, sm_120"])
    ('sm_89', 'sm_120')
    """
    return tuple(part.strip() for text in texts for part in text.split(",") if text)


def check(backends: tuple[str, ...], targets: tuple[str, ...]) -> None:
    """Raise UsageError or HostError, before anything is computed, for plans that cannot be built here."""
    if targets and not backends:
        raise UsageError("--target is given without a backend that has targets: add --backend onnx,tensorrt-rtx")
    for backend in backends:
        _load_builder("check")(backend, targets)


def build(folder: Path, backends: tuple[str, ...], targets: tuple[str, ...], reporter: Reporter) -> list[str]:
    """Add plans to an artifact.

    Args:
        folder: the artifact.
        backends: from `parse_backends`.
        targets: compute capabilities; empty for that of the GPU that is there.
        reporter: is told how far it is.

    Returns:
        Paths in the artifact, one of each backend and target.

    Raises:
        OTCacheError: as `otc build-engines`.
    """
    folders: list[str] = []
    for backend in backends:
        with reporter.on(f"build {backend}", f"plans for {', '.join(targets) or 'this GPU'}") as current:
            progress = partial(_advance, current)
            results = _load_builder("build")(folder, backend=backend, targets=targets, progress=progress)
        folders += [result.folder for result in results]
    return folders


def _advance(current: Pass, event: Any) -> None:
    current(event.done, event.total)


def _load_builder(name: str) -> Any:
    """What the entry point `name` of `GROUP` offers. Raises HostError where there is none."""
    points = metadata.entry_points(group=GROUP, name=name)
    if not points:
        raise HostError(
            f"plans cannot be built: found no {name} in the entry points {GROUP}: pip install --upgrade otcache"
        )
    return next(iter(points)).load()
