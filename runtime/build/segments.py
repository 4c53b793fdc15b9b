"""The ONNX files of consecutive stages as one ONNX file, for an engine that covers them all.

Needs the package `onnx`, as only `otc build-engines --granularity` does; serving does not. A stage's inner names get
its own name before them; what stages hand to each other keeps its name.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otcache.schemas.errors import HostError
from otcache.schemas.manifest import Stage


@dataclass(frozen=True)
class OnnxSegment:
    """Consecutive stages that become one graph."""

    stages: tuple[Stage, ...]
    paths: tuple[Path, ...]
    """Of the stages' ONNX files, verified."""
    outputs: tuple[str, ...]
    """Tensors that the graph writes; what stages write beside them stays inside."""


def check_onnx() -> None:
    """Raise HostError if the package is missing."""
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise HostError(
            "onnx is not installed, which puts several blocks into one graph: expected its package: pip install onnx, "
            "or use --granularity block"
        ) from None


@contextmanager
def file_from_segment(segment: OnnxSegment, folder: Path) -> Iterator[Path]:
    """The segment as an ONNX file in `folder`, which is made for it and removed at the end.

    Raises HostError for graphs that do not go together, OSError.
    """
    import onnx

    model = model_from_segment(segment)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        path = folder / "segment.onnx"
        # Weights beside the graph, because a protobuf message ends at 2 GB.
        onnx.save_model(model, path, save_as_external_data=True, location="segment.onnx.data")
        del model
        yield path
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def model_from_segment(segment: OnnxSegment) -> Any:
    """The segment as one `onnx.ModelProto`, weights in memory. Raises HostError for graphs that do not go together."""
    import onnx

    models = [onnx.load(path) for path in segment.paths]
    _check_alike(segment.stages, models)
    graph = onnx.GraphProto(name=f"{segment.stages[0].name}..{segment.stages[-1].name}")
    written: set[str] = set()
    for stage, model in zip(segment.stages, models, strict=True):
        _prefix(model.graph, f"{stage.name}/", {tensor.name for tensor in (*stage.inputs, *stage.outputs)})
        graph.node.extend(model.graph.node)
        graph.initializer.extend(model.graph.initializer)
        known = {value.name for value in graph.input} | written
        graph.input.extend(value for value in model.graph.input if value.name not in known)
        graph.output.extend(value for value in model.graph.output if value.name in segment.outputs)
        written |= {value.name for value in model.graph.output}
    return onnx.helper.make_model(graph, opset_imports=models[0].opset_import, ir_version=models[0].ir_version)


def _check_alike(stages: Sequence[Stage], models: Sequence[Any]) -> None:
    versions = [{entry.domain: entry.version for entry in model.opset_import} for model in models]
    for stage, model, version in zip(stages, models, versions, strict=True):
        if version != versions[0] or model.functions or model.graph.sparse_initializer:
            sparse = len(model.graph.sparse_initializer)
            raise HostError(
                f"{stage.name}: found operators {version}, {len(model.functions)} functions, {sparse} sparse weights: "
                f"expected operators {versions[0]} and none of the others, to put it into one graph with "
                f"{stages[0].name}: build it with --granularity block"
            )


def _prefix(graph: Any, prefix: str, keep: set[str]) -> None:
    """Put the prefix before every name in the graph, and in those inside it, except before `keep`."""

    def rename(name: str) -> str:  # an empty name stands for an input that is left out
        return prefix + name if name and name not in keep else name

    for node in graph.node:
        node.name = rename(node.name)
        node.input[:] = map(rename, node.input)
        node.output[:] = map(rename, node.output)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _prefix(inner, prefix, keep)
    for named in (*graph.initializer, *graph.input, *graph.output):
        named.name = rename(named.name)
