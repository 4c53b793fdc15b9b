"""Cut and export take no more memory than the model and twice its largest block. In a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MEMORY = Path(__file__).parents[1] / "benchmarks" / "memory.py"


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_cut_and_export(dtype):
    sizes = ("--heads", "12", "--double", "1", "--single", "1")
    done = subprocess.run([sys.executable, str(MEMORY), *sizes, "--dtype", dtype], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["peak_bytes"] <= found["allowed_bytes"] and done.returncode == 0, done.stderr
    assert found["peak_bytes"] > found["model_bytes"], "nothing was measured"
