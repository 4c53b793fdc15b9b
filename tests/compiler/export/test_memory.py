"""Cut and export take no more memory than the model and twice its largest block. In a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MEMORY = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "float16")]
)
def test_peak_memory_of_cut_and_export(stored, dtype, tmp_path):
    sizes = ("--heads", "12", "--double", "1", "--single", "1", "--folder", str(tmp_path))
    command = [sys.executable, str(MEMORY), *sizes, "--stored", stored, "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, peak in found["peak_bytes"].items():
        assert found["largest_block_bytes"] < peak <= found["allowed_bytes"], f"{name}: at least a block was there"
