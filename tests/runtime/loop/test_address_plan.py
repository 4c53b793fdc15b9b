"""Addresses of random programs over random chains: nothing is overwritten while it is needed, and little is wasted."""

from typing import get_args

import pytest
import small_artifact as small
from hypothesis import given, settings
from hypothesis import strategies as st
from sized_artifact import LATENTS, shapes, term

from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.loop.address_plan import ALIGNMENT, ITEM_BYTES, align, plan_addresses
from otcache.runtime.loop.launches import Value, list_launches
from otcache.schemas.combinations import combinations
from otcache.schemas.consistency import check_wiring
from otcache.schemas.manifest import Manifest
from otcache.schemas.segments import Granularity, coarsen, segments
from otcache.schemas.sized import manifest_at

ZEROS = "sha256:" + "0" * 64


@st.composite
def programs(draw, payload):
    count = draw(st.integers(1, 10))
    steps, computed = [], 0
    for index in range(count):
        compute = payload == "output" or index == 0 or draw(st.booleans())
        computed += compute
        residual = [] if compute else [1.0] * draw(st.integers(1, min(computed, 3)))
        steps.append(
            {
                "step_index": index,
                "timestep": 1.0,
                "compute": compute,
                "residual_coefs": residual,
                "latent_coef": 1.0,
                "output_coefs": [0.5] * draw(st.integers(0, min(index + 1, 4))),
            }
        )
    return {"payload": payload, "steps": steps}


@st.composite
def manifests(draw, artifact_folder):
    """Chains of blocks with a picture stream and a text stream, much wider than the latents, as transformers are."""
    payload = draw(st.sampled_from(["output", "residual"]))
    return chain(
        artifact_folder,
        draw(programs(payload)),
        dtype=draw(st.sampled_from(["float32", "float16"])),
        width=draw(st.sampled_from([192, 256])),
        tokens=draw(st.integers(4, 32)),
        blocks=draw(st.integers(1, 8)),
        joined=draw(st.booleans()),
        guided=draw(st.booleans()),
    )


REQUESTS = st.fixed_dictionaries(
    {
        "height": st.sampled_from(range(2, 13, 2)),
        "width": st.sampled_from([4, 8]),
        "max_sequence_length": st.integers(1, 9),
    }
)


def with_axes(value, tokens):
    """The value of a chain's manifest whose picture stream follows the picture's area, and its text stream the text's
    length.
    """
    area, text = shapes(), [term(1, "max_sequence_length"), term(tokens - small.LENGTH)]
    lengths = {"name": "max_sequence_length", "minimum": 1, "maximum": 9, "step": 1}
    more = [{"name": "stream", "terms": [term(4, "height", "width")]}, {"name": "text", "terms": text}]
    value["shapes"] = {"axes": [*area["axes"], lengths], "symbols": [*area["symbols"], *more]}
    value["latents"] |= LATENTS
    for stage in value["stages"]:
        for found in (*stage["inputs"], *stage["outputs"]):
            if len(found["shape"]) == 3:
                name = {"latents": "tokens", "velocity": "tokens", "a": "stream"}.get(
                    found["name"].rstrip("0123456789"), "text"
                )
                found["symbols"] = [None, name, None]


def chain(artifact_folder, program, *, dtype, width, tokens, blocks, joined, guided):
    def tensor(name, *shape):
        return small.tensor(name, "batch", *shape, dtype=dtype)

    streams = [("a", tensor("a0", 64, width)), ("b", tensor("b0", tokens, width))][: 2 if joined else 1]
    time = tensor("time", width)
    value = small.read_manifest(artifact_folder)
    latents, timestep = small.tensor("latents", *small.HIDDEN), small.tensor("timestep", "batch")
    text = tensor("text", tokens, 64)
    stages = [("embed", "embed", [latents, timestep, text], [time, *(first for _, first in streams)])]
    for index in range(blocks):
        ends = [{**first, "name": f"{name}{index + 1}"} for name, first in streams]
        stages.append((f"block_{index}", "block", [time, *(first for _, first in streams)], ends))
        streams = [(name, end) for (name, _), end in zip(streams, ends, strict=True)]
    stages.append(("head", "head", [time, streams[0][1]], [small.tensor("velocity", *small.HIDDEN)]))
    entry = value["stages"][0]
    value["stages"] = [{**entry, "name": n, "kind": k, "inputs": i, "outputs": o} for n, k, i, o in stages]
    value["features"] = [{"source": "a0", "result": f"a{blocks}"}]
    nfe = sum(step.get("compute", True) for step in program["steps"])
    value.update(tokenizers=[], programs=[{"budget": str(nfe), "program": program}])
    value["sampler"]["num_inference_steps"] = value["reference"]["num_inference_steps"] = 10
    value["anchor"]["num_inference_steps"] = 10
    with_axes(value, tokens)
    if not guided:
        value["guidance"] = {"kind": "none", "scale": 1.0, "minimum": 1.0, "maximum": 1.0}
    return Manifest.model_validate_json(small.canonical_json(value))


def check(manifest, program, samples):
    """Run the plan over bytes that remember who wrote them."""
    plan = plan_addresses(manifest, program, samples)
    memory: dict[int, object] = {}

    def blocks(value):
        place = plan.places[value]
        assert place.offset % ALIGNMENT == 0 and place.offset + place.size_bytes <= plan.size_bytes
        return range(place.offset, place.offset + place.size_bytes, ALIGNMENT)

    def write(value):
        memory.update(dict.fromkeys(blocks(value), value))

    def read(value):
        assert {memory[block] for block in blocks(value)} == {value}, value

    for value in plan.listing.brought:
        write(value)
    for launch in plan.listing.launches:
        for value in launch.writes.values():
            write(value)
        for value in launch.reads.values():
            if not plan.listing.is_constant(value):
                read(value)  # after the writes: a launch reads while it writes
    read(plan.listing.final)
    return plan


@settings(max_examples=150, deadline=None)
@given(data=st.data(), samples=st.integers(1, 3), request=REQUESTS)
def test_random_programs(artifact_folder, data, samples, request):
    """At random sizes of a request, too: the plan is that of the shapes there."""
    manifest = manifest_at(data.draw(manifests(artifact_folder)), request)
    manifest = coarsen(manifest, segments(manifest, data.draw(st.sampled_from(get_args(Granularity)))))
    check_wiring(manifest)
    plan = check(manifest, manifest.programs[0].program, samples)
    assert plan.lower_bound_bytes <= plan.size_bytes <= 1.1 * plan.lower_bound_bytes
    assert plan == plan_addresses(manifest, manifest.programs[0].program, samples), "a pure function"
    stream = plan.listing.tensors[value := Value("a0", 0)]
    rows, width = samples * manifest.guidance.branches * 4 * request["height"] * request["width"], stream.shape[2]
    assert plan.places[value].size_bytes == align(rows * width * ITEM_BYTES[stream.dtype])


def test_what_a_request_brings_for_one_step_leaves_no_hole_behind(artifact_folder):
    """Text that only the first block reads lies where a later stream goes."""
    manifest = chain(
        artifact_folder,
        small.output_program((0,)),
        dtype="float16",
        width=256,
        tokens=32,
        blocks=1,
        joined=False,
        guided=False,
    )
    plan = check(manifest, manifest.programs[0].program, 1)
    assert plan.size_bytes <= 1.02 * plan.lower_bound_bytes


def test_stages_keep_their_addresses_from_step_to_step(artifact_folder):
    manifest = chain(
        artifact_folder,
        small.output_program(tuple(range(6))),
        dtype="float16",
        width=256,
        tokens=16,
        blocks=8,
        joined=True,
        guided=True,
    )
    plan = plan_addresses(manifest, manifest.programs[0].program, 2)
    found: dict[str, set] = {}
    for launch in plan.listing.launches:
        if not launch.engine.startswith("@"):
            values = [v for v in (*launch.reads.values(), *launch.writes.values()) if not plan.listing.is_constant(v)]
            found.setdefault(launch.engine, set()).add(tuple(plan.places[value].offset for value in values))
    assert len(found) == 10 and all(len(offsets) == 1 for offsets in found.values())


def test_of_the_small_artifact(artifact_folder):
    manifest = Artifact.open(artifact_folder).manifest
    for entry in manifest.programs:
        plan = check(manifest, entry.program, 2)
        assert plan == plan_addresses(manifest, entry.program, 2), "a pure function"
        twice = plan_addresses(manifest, entry.program, 4)
        assert plan.size_bytes < twice.size_bytes <= 2 * plan.size_bytes


def test_size_of_a_value_is_that_of_its_tensor(artifact_folder):
    manifest = Artifact.open(artifact_folder).manifest
    plan = plan_addresses(manifest, manifest.programs[0].program, 64)
    hidden = 64 * small.TOKENS * small.WIDTH * ITEM_BYTES["float32"]
    found = {value.name: place.size_bytes for value, place in plan.places.items()}
    assert found["@x"] == found["@v"] == hidden and found["h0"] == found["latents"] == 2 * hidden


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_launches_are_of_stages_and_combinations(artifact_folder, data):
    """Every launch reads and writes what its engine has, and residuals are computed only where one is used later."""
    manifest = data.draw(manifests(artifact_folder))
    program = manifest.programs[0].program
    listing = list_launches(manifest, program)
    inputs = {stage.name: {t.name for t in stage.inputs} for stage in manifest.trunk}
    outputs = {stage.name: {t.name for t in stage.outputs} for stage in manifest.trunk}
    counts = {}
    for combination in combinations(manifest):
        inputs["@" + combination.name] = {tensor.name for tensor in combination.inputs}
        outputs["@" + combination.name] = {combination.total.name}
        counts["@" + combination.name] = combination.coefs
    for launch in listing.launches:
        assert set(launch.reads) == inputs[launch.engine] and set(launch.writes) == outputs[launch.engine]
        assert len(launch.coefs) == (0 if launch.engine == "@guide" else counts.get(launch.engine, 0))
    names = [launch.engine for launch in listing.launches]
    assert names.count("head") == len(program.steps) and names.count("block_0") == program.nfe
    used = {value for launch in listing.launches for value in launch.reads.values()}
    assert all(launch.writes["total"] in used for launch in listing.launches if launch.engine.startswith("@residual"))


@pytest.mark.parametrize(
    ("budget", "updates"), [("2", {"update_1", "follow_2"}), ("3", {"update_1"}), ("full", {"update_1", "update_2"})]
)
def test_combinations_of_the_small_artifact(artifact_folder, budget, updates):
    manifest = Artifact.open(artifact_folder).manifest
    names = [combination.name for combination in combinations(manifest)]
    assert names == [
        "spread",
        "residual_0",
        "forecast_0_1",
        "forecast_0_2",
        "guide",
        "update_1",
        "update_2",
        "follow_2",
    ]
    listing = list_launches(manifest, manifest.program(budget).program)
    assert {x.engine[1:] for x in listing.launches if x.engine.startswith(("@update", "@follow"))} == updates


def test_combinations_of_means(tmp_path):
    manifest = Artifact.open(small.with_means(small.write_artifact(tmp_path / "small"))).manifest
    counts = {combination.name: combination.coefs for combination in combinations(manifest)}
    program = manifest.program("4").program
    launches = [x for x in list_launches(manifest, program).launches if x.engine.startswith(("@update", "@follow"))]
    assert [x.engine for x in launches] == ["@update_means_1", *["@follow_means_2"] * 3]
    assert (
        [len(x.coefs) for x in launches]
        == [counts["update_means_1"], *[counts["follow_means_2"]] * 3]
        == [4, 14, 14, 14]
    )
