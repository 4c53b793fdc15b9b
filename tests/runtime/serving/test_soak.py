"""Many requests through one service: memory stays flat, handles and threads come back. In a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def soak(artifact, *options):
    done = subprocess.run([sys.executable, str(SOAK), str(artifact), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    return found


def check(found, count):
    assert found["served"] + found["cancelled"] == count and found["cancelled"] > 0 and found["refused"] > 0
    assert found["growth"] <= 0.02
    assert len(set(found["handles"])) == 1 and found["handles_after_close"] <= found["handles"][0]
    assert found["threads"] == [2, 1]  # main and worker, then main


def test_memory_is_flat(artifact_folder):
    check(soak(artifact_folder, "--requests", "400", "--batches", "1,2,3,5,8"), 400)


@pytest.mark.long
@pytest.mark.parametrize("name", ["artifact_folder", "compiled"])
def test_memory_is_flat_over_2000_requests(name, request):
    check(soak(request.getfixturevalue(name), "--requests", "2000", "--batches", "1,2,3,5,8"), 2000)
