"""What importing the package loads: nothing until something is used, then torch and diffusers, never the search or the
export.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers")
COMPILER_ONLY = ("optuna", "ot", "onnx", "onnxscript", "onnxruntime", "skimage", "matplotlib")


def loaded(code):
    """Top-level modules, and those of otcache, after `code` in a fresh interpreter."""
    listing = "import sys; print('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", f"{code}\n{listing}"], capture_output=True, text=True, check=True)
    names = set(result.stdout.split())
    return {name.split(".")[0] for name in names} | {name for name in names if name.startswith("otcache.")}


def test_the_package_alone_loads_nothing():
    assert not loaded("import otcache.compiler.hosts") & {*HEAVY, *COMPILER_ONLY, "numpy"}


@pytest.mark.parametrize("name", ["OTCacheScheduler", "apply_residual_cache", "CalibrationWarning"])
def test_using_it_loads_nothing_of_the_compilers(name):
    found = loaded(f"from otcache.compiler.hosts import {name}")
    assert not found & set(COMPILER_ONLY)
    assert (set(HEAVY) & found == set()) == (name == "CalibrationWarning")


def test_a_program_is_run_without_the_compilers_packages():
    """From the artifact to the last step; check and residual hooks included in what is imported."""
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({COMPILER_ONLY!r}))\n"  # None: an import of it fails
        "import torch\n"
        "from otcache.compiler.hosts import OTCacheScheduler, apply_residual_cache\n"
        "scheduler = OTCacheScheduler.from_artifact('tests/golden/1.2/artifact', 'full')\n"
        "scheduler.set_timesteps(6)\n"
        "x = torch.ones(1, 16, 16)\n"
        "for t in scheduler.timesteps: x = scheduler.step(x, t, x).prev_sample\n"
        "assert torch.isfinite(x).all()\n"
    )
    loaded(code)


def test_the_runtime_does_not_load_it():
    found = loaded("import otcache.runtime; from otcache.runtime import Sampler, Service")
    assert not found & set(HEAVY) and not [name for name in found if name.startswith("otcache.compiler")]


def test_unknown_names():
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        from otcache.compiler import hosts

        hosts.Nothing  # noqa: B018
    assert set(dir(hosts)) == set(hosts.__all__)
