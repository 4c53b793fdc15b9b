"""Consecutive blocks as one stage: what `otc build-engines --granularity` puts into one plan.

Consumes a manifest, produces the manifest whose blocks are the segments, so that whatever lays out, loads or runs
stages needs to know nothing of segments. Embed and head stay apart: a cached step runs them without the blocks.
"""

from __future__ import annotations

import itertools
from typing import Literal, TypeVar

from .structure import Engine, Stage, Structure, TensorInfo

M = TypeVar("M", bound=Structure)
"""The kind of manifest that goes in comes out."""

Granularity = Literal["block", "segment", "trunk"]
SEGMENT_BLOCKS = 4
"""Blocks of a segment, at most: four of FLUX.1's double blocks are a plan of 2.7 GB, which takes some 14 GB to build.
"""
COMBINATIONS = "combinations/"
"""What a combination's name has before it, where stages are named beside it; no stage's name has a slash."""
Segment = tuple[str, ...]
"""Names of consecutive blocks with one engine."""


def segments(manifest: Structure, granularity: Granularity) -> tuple[Segment, ...]:
    """All blocks of the manifest, each alone, up to SEGMENT_BLOCKS together, or all in one."""
    blocks = _blocks(manifest)
    size = {"block": 1, "segment": SEGMENT_BLOCKS, "trunk": len(blocks)}[granularity]
    return tuple(tuple(blocks[start : start + size]) for start in range(0, len(blocks), size))


def segments_of(engine: Engine, manifest: Structure) -> tuple[Segment, ...]:
    """All blocks of the manifest, those together whose file in an entry of `engines` is the same."""
    groups = itertools.groupby(_blocks(manifest), key=lambda name: engine.stages[name])
    return tuple(tuple(names) for _, names in groups)


def name_of(segment: Segment) -> str:
    """What a segment's stage is called; no stage of a manifest has such a name.

    >>> name_of(("block_0",)), name_of(("block_0", "block_1", "block_2"))
    ('block_0', 'block_0..block_2')
    """
    return segment[0] if len(segment) == 1 else f"{segment[0]}..{segment[-1]}"


def coarsen(manifest: M, segments: tuple[Segment, ...]) -> M:
    """The manifest with a stage for every segment in the place of its blocks.

    `onnx` of such a stage is its first block's.
    """
    stages = {stage.name: stage for stage in manifest.stages}
    first = {segment[0]: segment for segment in segments}
    inside = {name for segment in segments for name in segment[1:]}
    found = tuple(
        _joined(manifest, [stages[name] for name in first[stage.name]]) if len(first.get(stage.name, ())) > 1 else stage
        for stage in manifest.stages
        if stage.name not in inside
    )
    return manifest.model_copy(update={"stages": found})


def _blocks(manifest: Structure) -> list[str]:
    return [stage.name for stage in manifest.trunk if stage.kind == "block"]


def _joined(manifest: Structure, blocks: list[Stage]) -> Stage:
    """Several blocks as one stage: it writes what a stage outside reads, or a feature holds."""
    names = {block.name for block in blocks}
    read = {tensor.name for stage in manifest.trunk if stage.name not in names for tensor in stage.inputs}
    read |= {feature.result for feature in manifest.features}
    inputs: dict[str, TensorInfo] = {}
    written: dict[str, TensorInfo] = {}
    for block in blocks:
        inputs |= {tensor.name: tensor for tensor in block.inputs if tensor.name not in written}
        written |= {tensor.name: tensor for tensor in block.outputs}
    return blocks[0].model_copy(
        update={
            "name": name_of(tuple(block.name for block in blocks)),
            "inputs": tuple(inputs.values()),
            "outputs": tuple(tensor for name, tensor in written.items() if name in read),
            "max_relative_error": max(block.max_relative_error for block in blocks),
        }
    )
