"""Consecutive blocks as one stage."""

from pathlib import Path

import pytest

from otcache.runtime.artifact.reader import Artifact
from otcache.schemas.consistency import check_wiring
from otcache.schemas.segments import coarsen, name_of, segments, segments_of

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def manifest():
    """A FLUX of one double and one single block."""
    return Artifact.open(GOLDEN / "1.4" / "artifact").manifest


def with_blocks(manifest, count):
    """Blocks of one kind in a row, which hand two tensors on; the head reads one of them."""
    embed, double, *_, head = manifest.trunk
    names = {"embed_x_embedder": "embed_x_embedder", "embed_context_embedder": "embed_context_embedder"}
    blocks = []
    for index in range(count):
        inputs = tuple(t.model_copy(update={"name": names.get(t.name, t.name)}) for t in double.inputs)
        outputs = tuple(t.model_copy(update={"name": f"{t.name}_{index}"}) for t in double.outputs)
        blocks.append(double.model_copy(update={"name": f"block_{index}", "inputs": inputs, "outputs": outputs}))
        names = {"embed_x_embedder": outputs[0].name, "embed_context_embedder": outputs[1].name}
    last = names["embed_x_embedder"]
    head_inputs = tuple(t.model_copy(update={"name": last}) if t.name == "block_1_out_0" else t for t in head.inputs)
    feature = manifest.features[0].model_copy(update={"result": last})
    stages = (embed, *blocks, head.model_copy(update={"inputs": head_inputs}))
    others = tuple(stage for stage in manifest.stages if stage.kind in ("text_encoder", "decoder"))
    return manifest.model_copy(update={"stages": (*others, *stages), "features": (feature,)})


def test_all_blocks_are_in_a_segment(manifest):
    ten = with_blocks(manifest, 10)
    check_wiring(ten)
    names = [stage.name for stage in ten.trunk][1:-1]
    for granularity, sizes in (("block", [1] * 10), ("segment", [4, 4, 2]), ("trunk", [10])):
        found = segments(ten, granularity)
        assert [len(segment) for segment in found] == sizes and [name for segment in found for name in segment] == names


@pytest.mark.parametrize("granularity", ["block", "segment", "trunk"])
def test_a_coarser_manifest_is_wired_as_the_finer_one(manifest, granularity):
    ten = with_blocks(manifest, 10)
    held = segments(ten, granularity)
    coarse = coarsen(ten, held)
    check_wiring(coarse)
    assert [stage.name for stage in coarse.trunk] == ["embed", *map(name_of, held), "head"]
    assert coarse.conditioning == ten.conditioning and coarse.trunk[-1] == ten.trunk[-1]
    for segment, stage in zip(held, coarse.trunk[1:-1], strict=True):
        last = segment[-1] == "block_9"
        assert len(stage.outputs) == (1 if last and granularity != "block" else 2), (
            "what only the segment reads stays inside"
        )
    assert (coarse is ten or coarse == ten) == (granularity == "block")


def test_segments_are_read_off_the_files(manifest):
    ten = with_blocks(manifest, 10)
    (onnx,) = [engine for engine in manifest.engines if engine.backend == "onnx"]
    for granularity in ("block", "segment", "trunk"):
        held = segments(ten, granularity)
        files = {name: f"{name_of(segment)}.plan" for segment in held for name in segment}
        assert segments_of(onnx.model_copy(update={"stages": files}), ten) == held
