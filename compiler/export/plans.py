"""Plans for GPUs after a compile: what `otc build-engines` does, for `otc compile --backend onnx,tensorrt-rtx --target
…`.

Compiler and runtime do not import each other: the builder is found through the entry-point group `otcache.engines`,
where the runtime offers `check` and `build`.
"""

from __future__ import annotations

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
    """`onnx,tensorrt-rtx` → the backends to build plans for, in that order. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    if odd := [part for part in parts if part not in BACKENDS]:
        raise UsageError(f"--backend has {odd[0]!r}: expected some of {', '.join(BACKENDS)}")
    return tuple(dict.fromkeys(part for part in parts if part != ONNX))


def parse_targets(text: str) -> tuple[str, ...]:
    """`sm_89,sm_120` → its parts; which there are is the builder's to say."""
    return tuple(part.strip() for part in text.split(",")) if text else ()


def check(backends: tuple[str, ...], targets: tuple[str, ...]) -> None:
    """Raise UsageError or HostError, before anything is computed, for plans that cannot be built here."""
    if targets and not backends:
        raise UsageError("--target is given without a backend that has targets: add --backend onnx,tensorrt-rtx")
    for backend in backends:
        _offered("check")(backend, targets)


def build(folder: Path, backends: tuple[str, ...], targets: tuple[str, ...], reporter: Reporter) -> list[str]:
    """Add plans to an artifact; the folders of each backend and target in it. Raises as `otc build-engines`."""
    folders: list[str] = []
    for backend in backends:
        with reporter.on(f"build {backend}", f"plans for {', '.join(targets) or 'this GPU'}") as current:
            progress = partial(_advance, current)
            results = _offered("build")(folder, backend=backend, targets=targets, progress=progress)
        folders += [result.folder for result in results]
    return folders


def _advance(current: Pass, event: Any) -> None:
    current(event.done, event.total)


def _offered(name: str) -> Any:
    points = metadata.entry_points(group=GROUP, name=name)
    if not points:
        raise HostError(
            f"plans cannot be built: found no {name} in the entry points {GROUP}: pip install --upgrade otcache"
        )
    return next(iter(points)).load()
