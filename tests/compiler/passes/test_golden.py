"""What the compiler stores as golden, the runtime makes again."""

from __future__ import annotations

import numpy as np
import pytest

from otcache.compiler.passes.golden import PATH, ROUNDINGS, STAGES_TO_LATENTS, TOLERANCE, tolerance_of
from otcache.runtime import Sampler
from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.shipping.verify import verify


def test_a_compiled_artifact_holds_one(compiled):
    artifact = Artifact.open(compiled)
    golden = artifact.manifest.golden
    assert golden is not None and golden.budget == artifact.manifest.budgets[0] and golden.latents == PATH
    assert PATH in {entry.path for entry in artifact.manifest.files}
    outcome = verify(compiled, "golden")
    assert outcome.golden and outcome.golden.relative_error < 1e-4 < outcome.golden.max_relative_error == TOLERANCE


def test_it_tells_another_request_apart(compiled):
    """Each part of the request counts: with another one the latents lie far outside the tolerance."""
    with Sampler.load(compiled) as sampler:
        golden = sampler.manifest.golden
        expected = np.frombuffer(sampler.artifact.read(golden.latents), "<f4").reshape(sampler.manifest.latents.shape)

        def error(prompt=golden.prompt, budget=golden.budget, seed=golden.seed):
            found = sampler.sample(
                sampler.encode(prompt), budget=budget, seed=seed, guidance_scale=golden.guidance_scale
            )
            return np.linalg.norm(found[0] - expected) / np.linalg.norm(expected)

        assert error() < 1e-4
        others = (error(prompt="a large square"), error(budget="full"), error(seed=golden.seed + 1))
        assert min(others) > 2 * golden.max_relative_error, others


def test_tolerance_follows_what_was_measured():
    assert tolerance_of(1e-7, None) == TOLERANCE
    assert tolerance_of(1e-3, None) == pytest.approx(STAGES_TO_LATENTS * 1e-3)
    assert tolerance_of(1e-2, 4e-3) == pytest.approx(ROUNDINGS * 4e-3), "in half precision the latents themselves"
    assert tolerance_of(1.0, None) == 1.0
