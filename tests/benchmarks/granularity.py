"""What it costs that every block has an engine of its own: a computed step in per-block, segment and whole-trunk
sessions.

    python tests/benchmarks/granularity.py artifacts/shapes [--images 1,4] [--rounds 30] [--threads 1] [-o FILE]

ONNX Runtime on the CPU, as served: buffers in place, idle threads asleep. All granularities take turns within a round
and are compared within it, so that a noisy machine moves them together. Prints JSON. It says nothing about GPUs, where
launches cost more and graphs take them away: `tests/benchmarks/resident.py` measures those.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
from output import host, output_option, write

from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.build.segments import OnnxSegment, model_from_segment
from otcache.runtime.engines.onnx import OnnxBackend, OnnxEngine
from otcache.runtime.loop.backend import Engine, shape_of
from otcache.runtime.loop.host_loop import Trunk
from otcache.runtime.serving.bench import versions
from otcache.runtime.serving.request_size import Sizes
from otcache.schemas.segments import Granularity, coarsen, name_of, segments


def trunk_of(artifact: Artifact, granularity: Granularity, backend: OnnxBackend, folder: Path, images: int) -> Trunk:
    """Embed, blocks and head of the artifact, bound, with so many blocks in a session."""
    manifest = artifact.manifest
    stages = {stage.name: stage for stage in manifest.stages}
    held = segments(manifest, granularity)
    members = {name_of(segment): segment for segment in held}
    coarse = coarsen(manifest, held)
    engines: dict[str, Engine] = {}
    for stage in coarse.trunk:
        parts = tuple(stages[name] for name in members.get(stage.name, (stage.name,)))
        paths = tuple(artifact.engine_path(part.onnx) for part in parts)
        path = paths[0]
        if len(parts) > 1:
            path = folder / f"{granularity}-{stage.name}.onnx"
            onnx.save(
                model_from_segment(OnnxSegment(parts, paths, tuple(tensor.name for tensor in stage.outputs))), path
            )
        engines[stage.name] = OnnxEngine(stage, path, backend._options, backend._providers)
    return Trunk(coarse, engines, backend, images)


def held_of(artifact: Artifact, images: int) -> dict[str, np.ndarray]:
    """Random conditioning, and what follows from the artifact's size alone."""
    random = np.random.default_rng(0)
    branches = artifact.manifest.guidance.branches
    found = {}
    for tensor in artifact.manifest.conditioning:
        values = random.standard_normal(shape_of(tensor, branches * images))
        found[tensor.name] = values.reshape(branches, images, *values.shape[1:]) if "batch" in tensor.shape else values
    return {**found, **Sizes(artifact).at({}).constants}


def measured(artifact: Artifact, images: int, rounds: int, backend: OnnxBackend, folder: Path) -> dict[str, Any]:
    latents = np.random.default_rng(1).standard_normal((images, *artifact.manifest.latents.shape)).astype(np.float32)
    trunks = {name: trunk_of(artifact, name, backend, folder, images) for name in get_args(Granularity)}
    held, outputs, seconds = held_of(artifact, images), {}, {name: [] for name in trunks}
    for trunk in trunks.values():
        trunk.hold(held)
    for index in range(rounds + 2):
        for name in list(trunks)[:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            trunks[name].embed(latents, 0.5)
            trunks[name].blocks()
            outputs[name] = trunks[name].head()
            if index >= 2:
                seconds[name].append(time.perf_counter() - start)
    block = outputs["block"]
    return {
        name: {
            "sessions_for_blocks": len(segments(artifact.manifest, name)),
            "step_ms": round(1e3 * statistics.median(seconds[name]), 3),
            "of_block": round(
                statistics.median(a / b for a, b in zip(seconds[name], seconds["block"], strict=True)), 4
            ),
            "max_relative_difference": float(np.abs(outputs[name] - block).max() / np.abs(block).max()),
        }
        for name in trunks
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--images", default="1,4")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    output_option(parser)
    options = parser.parse_args()
    artifact, backend = Artifact.open(options.artifact), OnnxBackend(threads=options.threads)
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            images: measured(artifact, int(images), options.rounds, backend, Path(folder))
            for images in options.images.split(",")
        }
    found = {
        "what": "a computed step of the bundled model through ONNX Runtime; no figures of a GPU",
        "device": backend.device,
        "host": host(),
        "versions": versions(),
        "model": artifact.manifest.model.name,
        "blocks": len(artifact.manifest.trunk) - 2,
        "threads": options.threads,
        "rounds": options.rounds,
        "images": steps,
    }
    write(found, options.output)


if __name__ == "__main__":
    main()
