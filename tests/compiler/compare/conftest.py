"""A bench on the tiny pipeline: what `otc compare` hands to every method."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def prepared(tiny_flux_folder, workspace):
    from otcache.compiler.options import CompileOptions
    from otcache.compiler.passes.prepare import prepare
    from otcache.compiler.workspace.progress import Reporter
    from otcache.compiler.workspace.quiet import quiet

    quiet()
    options = CompileOptions(
        model=str(tiny_flux_folder),
        budgets=(2, 4),
        num_inference_steps=8,
        calibration_prompts=4,
        evaluation_prompts=3,
        trials=4,
        workspace=workspace,
    )
    return prepare(options, Reporter())


@pytest.fixture(scope="session")
def bench(prepared):
    from otcache.compiler.compare.measure import bench_of

    return bench_of(prepared)
