"""Time of sampling at each budget against the full program, and of the chain of stages against one graph.

    python tests/benchmarks/serving.py artifacts/shapes [--images 4] [--rounds 9]

Runs are interleaved round by round and compared within a round, so that a noisy machine moves both sides. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from otcache.runtime import Sampler
from otcache.runtime.build.segments import OnnxSegment, model_from_segment
from otcache.runtime.loop.host_loop import Trunk
from otcache.runtime.serving.request_size import Sizes
from otcache.schemas.manifest import FULL


def single_graph(sampler: Sampler) -> onnx.ModelProto:
    """Embed, blocks and head of an artifact as one ONNX graph."""
    trunk, artifact = sampler.manifest.trunk, sampler.artifact
    paths = tuple(artifact.engine_path(stage.onnx) for stage in trunk)
    return model_from_segment(OnnxSegment(trunk, paths, (sampler.manifest.output,)))


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(rounds: int, subject: Callable[[], object], reference: Callable[[], object]) -> dict[str, float]:
    """Median times in ms of both, and the median of their ratio round by round."""
    pairs = []
    for index in range(rounds + 1):
        pair = (timed(subject), timed(reference)) if index % 2 else (timed(reference), timed(subject))[::-1]
        if index:
            pairs.append(pair)
    return {
        "ms": round(1e3 * statistics.median(a for a, _ in pairs), 2),
        "reference_ms": round(1e3 * statistics.median(b for _, b in pairs), 2),
        "ratio": round(statistics.median(a / b for a, b in pairs), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with Sampler.load(options.artifact) as sampler, tempfile.TemporaryDirectory() as folder:
        manifest = sampler.manifest
        total = manifest.sampler.num_inference_steps
        conditioning = sampler.encode([f"a red ring on {i}" for i in range(options.images)])
        result: dict[str, object] = {"images": options.images, "rounds": options.rounds, "budgets": {}}
        for budget in manifest.budgets:
            if budget != FULL:
                measured = ratios(
                    options.rounds,
                    lambda budget=budget: sampler.sample(conditioning, budget=budget),
                    lambda: sampler.sample(conditioning, budget=FULL),
                )
                measured["ratio_to_B/T"] = round(measured["ratio"] * total / int(budget), 4)
                result["budgets"][budget] = measured  # type: ignore[index]

        path = Path(folder) / "trunk.onnx"
        onnx.save(single_graph(sampler), path)
        settings = onnxruntime.SessionOptions()
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        whole = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        trunk = Trunk(manifest, sampler._engines, sampler._backend, options.images)
        constants = Sizes(sampler.artifact).at({}).constants
        trunk.hold({**conditioning, **constants})
        latents = np.random.default_rng(0).normal(size=(options.images, *manifest.latents.shape)).astype(np.float32)
        rows = manifest.guidance.branches * options.images
        feed = {
            manifest.latents_input: np.concatenate([latents] * manifest.guidance.branches),
            manifest.timestep_input: np.full(rows, 0.5, np.float32),
            **{name: value.reshape(rows, *value.shape[2:]) for name, value in conditioning.items()},
            **constants,
        }

        def chain() -> np.ndarray:
            trunk.embed(latents, 0.5)
            trunk.blocks()
            return trunk.head()

        expected = whole.run([manifest.output], feed)[0]
        found = chain().reshape(expected.shape)
        result["chain_against_single_graph"] = {
            "max_relative_difference": float(np.abs(found - expected).max() / np.abs(expected).max()),
            **ratios(8 * options.rounds, chain, lambda: whole.run([manifest.output], feed)),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
