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
from otcache.runtime.trunk import Trunk
from otcache.schemas.manifest import FULL


def single_graph(artifact: Path, sampler: Sampler) -> onnx.ModelProto:
    """Embed, blocks and head of an artifact as one ONNX graph."""
    manifest = sampler.manifest
    merged = onnx.GraphProto(name="trunk")
    produced: set[str] = set()
    inputs: dict[str, onnx.ValueInfoProto] = {}
    opsets: dict[str, int] = {}
    for stage in manifest.trunk:
        model = onnx.load(artifact / stage.onnx)
        model = onnx.compose.add_prefix(
            model, f"{stage.name}/", rename_inputs=False, rename_outputs=False, rename_edges=False
        )
        interface = {tensor.name for tensor in (*stage.inputs, *stage.outputs)}
        prefix_values(model.graph, f"{stage.name}/", interface)
        opsets |= {entry.domain: entry.version for entry in model.opset_import}
        merged.node.extend(model.graph.node)
        merged.initializer.extend(model.graph.initializer)
        inputs |= {
            value.name: value for value in model.graph.input if value.name not in produced and value.name not in inputs
        }
        produced |= {value.name for value in model.graph.output}
        if stage.kind == "head":
            merged.output.extend(value for value in model.graph.output if value.name == manifest.output)
    merged.input.extend(inputs.values())
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    return onnx.helper.make_model(merged, opset_imports=imports, ir_version=10)


def prefix_values(graph: onnx.GraphProto, prefix: str, keep: set[str]) -> None:
    """Rename the values inside a stage, so that two stages' do not collide."""

    def renamed(name: str) -> str:
        return name if not name or name in keep or name.startswith(prefix) else prefix + name

    for node in graph.node:
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)


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
        onnx.save(single_graph(options.artifact, sampler), path)
        settings = onnxruntime.SessionOptions()
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        whole = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        trunk = Trunk(manifest, sampler._engines, sampler._backend, options.images)
        trunk.condition(conditioning)
        latents = np.random.default_rng(0).normal(size=(options.images, *manifest.latents.shape)).astype(np.float32)
        rows = manifest.guidance.branches * options.images
        feed = {
            manifest.latents_input: np.concatenate([latents] * manifest.guidance.branches),
            manifest.timestep_input: np.full(rows, 0.5, np.float32),
            **{name: value.reshape(rows, *value.shape[2:]) for name, value in conditioning.items()},
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
