"""The loop against a straightforward oracle, over random valid programs, with a model that records its calls."""

import math

import numpy as np
import pytest
import small_artifact as small
from hypothesis import given, settings
from hypothesis import strategies as st

from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.loop import host_loop as trunk
from otcache.runtime.loop import loop
from otcache.schemas.errors import ArtifactError
from otcache.schemas.manifest import Manifest
from otcache.schemas.program import FARTHEST, TINY, Program

BRANCHES, SHAPE = 2, (3, 4)
coefficient = st.floats(-1.5, 1.5, width=32)


@st.composite
def programs(draw):
    payload = draw(st.sampled_from(["output", "residual", "adaptive", "banded"]))
    count = draw(st.integers(1, 8))
    steps, computed = [], 0
    for index in range(count):
        compute = payload != "residual" or index == 0 or draw(st.booleans())
        computed += compute
        residual = [] if compute else draw(st.lists(coefficient, min_size=1, max_size=min(computed, 3)))
        steps.append(
            {
                "step_index": index,
                "timestep": draw(st.floats(0, 1000)),
                "input_scale": draw(coefficient),
                "compute": compute,
                "residual_coefs": residual,
                "latent_coef": draw(coefficient),
                "output_coefs": draw(st.lists(coefficient, max_size=min(index + 1, 4))),
            }
        )
        count = len(steps[-1]["output_coefs"])
        if payload in ("adaptive", "banded") and count >= 2 and draw(st.booleans()):
            slopes = draw(st.lists(coefficient, min_size=count, max_size=count))
            steps[-1]["slopes"] = {
                "centre": draw(coefficient),
                "spread": draw(st.floats(0.1, 2)),
                "latent_coef": draw(coefficient),
                "output_coefs": slopes,
            }
        if payload == "banded" and count and draw(st.booleans()):
            of_outputs = st.lists(coefficient, min_size=count, max_size=count)
            steps[-1]["means"] = {"latent_coef": draw(coefficient), "output_coefs": draw(of_outputs)}
            if "slopes" in steps[-1]:
                steps[-1]["means"] |= {"latent_slope": draw(coefficient), "output_slopes": draw(of_outputs)}
    return Program(payload=payload, steps=steps)


class Recorder:
    """h = x + t per branch; blocks add a residual that depends on h; two features."""

    def __init__(self):
        self.calls = []

    def embed(self, x, timestep):
        assert x.dtype == np.float32
        self.calls.append("embed")
        self.source = np.stack([x + timestep, x - timestep])

    def blocks(self):
        self.calls.append("blocks")
        self._set(np.sin(self.source), np.cos(self.source))

    def residual(self):
        return self.parts

    def apply(self, residual):
        self.calls.append("apply")
        self._set(*residual)

    def head(self):
        self.calls.append("head")
        return (self.source / 8 + self.parts[0] * self.parts[1]).astype(np.float32)

    def _set(self, *parts):
        self.parts = tuple(part.astype(np.float32) for part in parts)


def oracle(program, x, weights):
    residuals, outputs = [], []
    for step in program.steps:
        source = np.stack([step.input_scale * x + step.timestep / 1000, step.input_scale * x - step.timestep / 1000])
        if step.compute:
            parts = (np.sin(source), np.cos(source))
            residuals.append(parts)
        else:
            used = residuals[len(residuals) - len(step.residual_coefs) :]
            parts = tuple(sum(c * r[i] for c, r in zip(step.residual_coefs, used, strict=True)) for i in range(2))
        velocity = source / 8 + parts[0] * parts[1]
        outputs.append(weights[0] * velocity[0] + weights[1] * velocity[1])
        used = outputs[len(outputs) - len(step.output_coefs) :]
        x = np.stack([updated(step, x[i], [v[i] for v in used]) for i in range(len(x))])
    return x


def updated(step, x, used):
    """One sample's update, as `Step`, `Slopes` and `Means` have it."""
    coefs, place = np.array([step.latent_coef, *step.output_coefs]), 0.0
    if slopes := step.slopes:
        moved, size = (max(float(np.square(part).sum()), TINY) for part in (used[-1] - used[-2], used[-1]))
        change = 0.5 * math.log(moved / size)
        place = min(max((change - slopes.centre) / slopes.spread, -FARTHEST), FARTHEST)
        coefs = coefs + place * np.array([slopes.latent_coef, *slopes.output_coefs])
    total = sum(coef * value for coef, value in zip(coefs, [x, *used], strict=True))
    if means := step.means:
        coefs = np.array([means.latent_coef, *means.output_coefs])
        if step.slopes:
            coefs = coefs + place * np.array([means.latent_slope, *means.output_slopes])
        for channel in range(x.shape[-1]):
            total[..., channel] += sum(c * value[:, channel].mean() for c, value in zip(coefs, [x, *used], strict=True))
    return total


@settings(max_examples=150, deadline=None)
@given(programs(), st.floats(1, 6))
def test_random_programs(program, scale):
    x = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    before, model, seen = x.copy(), Recorder(), []
    found = loop.sample(
        model,
        program,
        x,
        guidance_weights=(1 - scale, scale),
        timestep_scale=1e-3,
        callback=lambda done, total: seen.append((done, total)),
    )
    expected = oracle(program, x.astype(np.float64), (1 - scale, scale))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * max(1.0, float(np.abs(expected).max())))
    np.testing.assert_array_equal(x, before)
    calls = [["embed", "blocks" if step.compute else "apply", "head"] for step in program.steps]
    assert model.calls == [call for part in calls for call in part]
    assert seen == [(index + 1, len(program.steps)) for index in range(len(program.steps))]


def test_guidance_can_keep_the_positive_branchs_norm():
    branches = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    plain = loop.guide(branches, (-3.0, 4.0), False)
    np.testing.assert_allclose(plain, 4 * branches[1] - 3 * branches[0], rtol=1e-5)
    kept = loop.guide(branches, (-3.0, 4.0), True)
    np.testing.assert_allclose(np.linalg.norm(kept, axis=-1), np.linalg.norm(branches[1], axis=-1), rtol=1e-5)
    np.testing.assert_allclose(
        kept / np.linalg.norm(kept, axis=-1, keepdims=True),
        plain / np.linalg.norm(plain, axis=-1, keepdims=True),
        rtol=1e-4,
    )
    assert not loop.guide(np.zeros((2, 1, 3), np.float32), (-3.0, 4.0), True).any()


def test_callback_cancels():
    program = Program(payload="output", steps=[{"step_index": 0, "timestep": 0, "latent_coef": 1, "output_coefs": []}])

    def cancel(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.sample(Recorder(), program, np.zeros((1, 2), np.float32), guidance_weights=(0, 1), callback=cancel)


def test_buffers_are_shared_but_never_while_needed(artifact_folder):
    slots = trunk.plan_buffers(Artifact.open(artifact_folder).manifest)
    assert set(slots) == {"latents", "timestep", "text", "h0", "h1", "h2", "velocity"}
    assert len({slots[name] for name in ("latents", "timestep", "text")}) == 3
    assert len({slots[name] for name in ("h0", "h2", "h1", "latents")}) == 4
    assert slots["velocity"] == slots["h1"]


def deep(artifact_folder, blocks, features):
    """The small manifest with more blocks; the engines are never opened."""
    value = small.read_manifest(artifact_folder)
    first, head = value["stages"][1], value["stages"][3]
    stages = [value["stages"][0], first]
    for index in range(1, blocks):
        names = [{**first["outputs"][0], "name": f"h{index + side}"} for side in (0, 1)]
        stages.append({**first, "name": f"b{index}", "inputs": names[:1], "outputs": names[1:]})
    last = {**head, "inputs": [{**head["inputs"][0], "name": f"h{blocks}"}, head["inputs"][1]]}
    value.update(stages=[*stages, last], tokenizers=[])
    value["features"] = [{"source": "h0", "result": f"h{blocks}"}] if features else []
    if not features:
        value["programs"] = [entry for entry in value["programs"] if entry["program"]["payload"] == "output"]
    return Manifest.model_validate_json(small.canonical_json(value))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.booleans())
def test_depth_costs_no_memory(artifact_folder, blocks, features):
    manifest = deep(artifact_folder, blocks, features)
    slots = trunk.plan_buffers(manifest)
    assert len(set(slots.values())) <= (7 if features else 5)
    held: dict[int, str] = {}
    for stage in manifest.trunk:  # simulate: what a stage reads must still be there
        for tensor in stage.inputs:
            assert held.setdefault(slots[tensor.name], tensor.name) == tensor.name
        for tensor in stage.outputs:
            held[slots[tensor.name]] = tensor.name
        if stage.kind == "block" and features:
            assert held[slots["h0"]] == "h0"


def test_cached_step_needs_every_live_tensor(artifact_folder):
    manifest = Artifact.open(artifact_folder).manifest
    trunk.check_trunk(manifest)
    wrong = manifest.model_copy(update={"features": (manifest.features[0].model_copy(update={"result": "h1"}),)})
    with pytest.raises(ArtifactError, match="h2"):
        trunk.check_trunk(wrong)
