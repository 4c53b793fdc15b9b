"""Sizes that an artifact serves beside its own: those of a range, and listed ones with or without programs of their
own.
"""

from __future__ import annotations

import json

import pytest
import torch
from host_cases import STEPS

from otcache.compiler.hosts import OTCacheScheduler
from otcache.compiler.hosts.recipe import recipe_from_artifact
from otcache.schemas.errors import RequestError
from otcache.schemas.manifest import core_digest

AXES = [
    {"name": "height", "minimum": 8, "maximum": 24, "step": 8},
    {"name": "width", "minimum": 16, "maximum": 24, "step": 8},
]
SYMBOLS = [
    {"name": "rows", "terms": [{"factor": 1, "axes": ["height"]}], "divisor": 2},
    {"name": "columns", "terms": [{"factor": 1, "axes": ["width"]}], "divisor": 2},
]


@pytest.fixture
def artifact_of(prepared, tmp_path):
    """The artifact of case `sd3`, 16 × 16 pictures of 8 × 8 latents, with sizes."""

    def make(sizes=(), program=None):
        value = json.loads((prepared("sd3").artifact / "manifest.json").read_text())
        for tensor in (t for stage in value["stages"] for side in ("inputs", "outputs") for t in stage[side]):
            tensor["symbols"] = [None, None, "rows", "columns"] if len(tensor["shape"]) == 4 else []
        for name in ("noise_symbols", "split_symbols", "shape_symbols"):
            value["latents"][name] = [None, "rows", "columns"]
        listed = [{"size": {"height": height, "width": width}} for height, width in sizes]
        if program is not None:
            listed[-1]["programs"] = [{"budget": "full", "program": program}]
        value["shapes"] = {"axes": AXES, "symbols": SYMBOLS, "sizes": listed}
        value["digest"] = core_digest(value)
        (tmp_path / "manifest.json").write_text(json.dumps(value))
        return tmp_path

    return make


def draw(one, folder, height, width, scheduler=True):
    pipeline = one.case.make()
    if scheduler:
        pipeline.scheduler = OTCacheScheduler.from_artifact(folder, "full", pipeline=pipeline)
    return one.case(pipeline, height=height, width=width)


@pytest.mark.parametrize("sizes", [(), ((16, 16), (24, 24), (8, 16))], ids=["range", "listed"])
def test_another_size_that_is_served_runs(prepared, artifact_of, sizes):
    one, folder = prepared("sd3"), artifact_of(sizes)
    for height, width in ((16, 16), (24, 24), (8, 16)):
        expected = draw(one, folder, height, width, scheduler=False)
        found = draw(one, folder, height, width)
        assert float((found - expected).norm() / expected.norm()) < 1e-5
    received, served = (8, 8), "(n, 4, 8, 8), or another size within its ranges"
    if sizes:
        received, served = (24, 16), "(n, 4, 8, 8) or (n, 4, 12, 12) or (n, 4, 4, 8)"
    with pytest.raises(RequestError) as refusal:
        draw(one, folder, *received)
    shape = (1, 4, received[0] // 2, received[1] // 2)
    assert f"latents are {shape}: expected {served}, the size" in str(refusal.value)


def test_the_program_is_that_of_the_size_that_the_pipeline_was_asked_for(prepared, artifact_of):
    one = prepared("sd3")
    own = recipe_from_artifact(one.artifact, "full").program.model_dump(mode="json")
    changed = json.loads(json.dumps(own))
    for step in changed["steps"]:
        step["output_coefs"] = [0.5 * coef for coef in step["output_coefs"]]
        step["timestep"] *= 0.9
    folder = artifact_of(((16, 16), (24, 24)), changed)
    pipeline = one.case.make()
    pipeline.scheduler = scheduler = OTCacheScheduler.from_artifact(folder, "full", pipeline=pipeline)
    first = one.case(pipeline)
    assert float(scheduler.timesteps[0]) == own["steps"][0]["timestep"]
    other = one.case(pipeline, height=24, width=24)
    assert float(scheduler.timesteps[0]) == pytest.approx(changed["steps"][0]["timestep"])
    assert torch.equal(one.case(pipeline), first), "and its own again"
    expected = draw(one, folder, 24, 24, scheduler=False)
    assert float((other - expected).norm() / expected.norm()) > 0.05, "not the artifact's own program"
    scheduler = OTCacheScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(STEPS)
    latents = torch.zeros(1, 4, 12, 12)
    with pytest.raises(RequestError, match=r"latents are \(1, 4, 12, 12\): expected"):
        scheduler.step(latents, scheduler.timesteps[0], latents)
