"""A container of the torch-free server: `Dockerfile`, `compose.yaml`."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

from otcache.schemas.manifest import Manifest

from .settings import Settings

_HERE = Path(__file__).parent / "docker"
GRACE_S = 30
"""`otc serve --grace`; the container has some seconds more."""


def files_of(manifest: Manifest, settings: Settings) -> dict[str, str]:
    """Contents by path."""
    extras = ["server"]
    if settings.device == "cuda":
        extras += ["gpu", *sorted({engine.backend for engine in manifest.engines} & {"tensorrt", "tensorrt-rtx"})]
    dockerfile = (_HERE / f"Dockerfile.{settings.device}").read_text(encoding="utf-8")
    requirement = f"otcache[{','.join(extras)}]=={metadata.version('otcache')}"
    words = {"@REQUIREMENT@": requirement, "@ARGUMENTS@": json.dumps(_arguments(settings)), "@GRACE@": str(GRACE_S)}
    for word, value in words.items():
        dockerfile = dockerfile.replace(word, value)
    return {
        "Dockerfile": dockerfile,
        "compose.yaml": _compose(settings),
        "packages/README.txt": (_HERE / "packages.txt").read_text(encoding="utf-8"),
        ".dockerignore": "*\n!artifact\n!packages\n",
    }


def _arguments(settings: Settings) -> list[str]:
    """Options of `otc serve`."""
    options = {
        "--workers": settings.instances,
        "--threads": settings.threads,
        "--max-batch": settings.max_batch,
        "--max-wait": settings.max_wait_s,
        "--capacity": settings.capacity,
        "--timeout": settings.timeout_s,
        "--lowest-budget": settings.lowest_budget,
        "--grace": GRACE_S,
    }
    return [word for name, value in options.items() if value is not None for word in (name, str(value))]


def _compose(settings: Settings) -> str:
    """The compose file, https://github.com/compose-spec/compose-spec."""
    text = (_HERE / "compose.yaml").read_text(encoding="utf-8")
    text = text.replace("@NAME@", json.dumps(settings.name.lower())).replace("@STOP@", f"{GRACE_S + 15}s")
    return text + ((_HERE / "compose.cuda.yaml").read_text(encoding="utf-8") if settings.device == "cuda" else "")
