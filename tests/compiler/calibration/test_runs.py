"""Full runs in files: what was written is read, across chunks, and weighed as numpy weighs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otcache.compiler.calibration import runs as module
from otcache.compiler.calibration.runs import OUTPUTS, PICTURES, Chunk, Runs, RunWriter, gram_from_rows, new_array

TOTAL = 5


class Written:
    """A chunk beside the arrays that it was written from."""

    def __init__(self, folder, count, seed, shape=(2, 3)):
        random = np.random.default_rng(seed)
        folder.mkdir()
        self.latents = random.normal(size=(count, TOTAL + 1, *shape)).astype(np.float32)
        self.outputs = random.normal(size=(count, TOTAL, *shape)).astype(np.float32)
        self.text = torch.from_numpy(random.normal(size=(2, count, 7, 4))).bfloat16()
        self.mask = torch.from_numpy(random.integers(0, 2, size=(2, count, 7)))
        self.guidance = random.uniform(1, 8, size=count).astype(np.float32)
        self.pictures = random.uniform(size=(count, 4, 4, 3)).astype(np.float32)
        writer = RunWriter(folder, count, TOTAL, shape)
        for index in range(TOTAL):
            for rows in ([*range(1, count)], [0]) if count > 1 else ([0],):  # as groups of guidance come, in any order
                latents, outputs = torch.from_numpy(self.latents), torch.from_numpy(self.outputs)
                writer.write_step(
                    rows, index, 100.0 - index, latents[rows, index], outputs[rows, index], latents[rows, index + 1]
                )
        writer.finish({"text": self.text, "mask": self.mask}, self.guidance.tolist())
        new_array(folder / PICTURES, self.pictures.shape)[:] = self.pictures
        self.chunk = Chunk(folder)

    def gram(self):
        """(n, 2T+1, 2T+1) in numpy."""
        rows = np.concatenate([self.latents, self.outputs], axis=1).astype(np.float64)
        rows = rows.reshape(*rows.shape[:2], -1)
        return np.einsum("nrd,nsd->nrs", rows, rows)


@pytest.fixture
def written(tmp_path):
    return [Written(tmp_path / str(seed), count, seed) for seed, count in enumerate((3, 1, 4))]


def test_a_chunk_holds_what_was_written(written):
    for each in written:
        chunk = each.chunk
        assert np.array_equal(chunk.latents, each.latents) and chunk.latents.dtype == np.float32
        assert np.array_equal(chunk.first_output, each.outputs[:, 0])
        assert np.allclose(chunk.gram, each.gram()) and chunk.gram.dtype == np.float64
        assert np.array_equal(chunk.scalars["guidance"], each.guidance) and chunk.count == len(each.latents)
        assert chunk.scalars["timesteps"].tolist() == [100.0, 99.0, 98.0, 97.0, 96.0]
        assert chunk.conditioning_shapes() == {"text": (7, 4), "mask": (7,)}
        assert not (chunk.folder / OUTPUTS).exists(), "outputs after the first are not kept"
        assert isinstance(chunk.latents, np.memmap) and isinstance(chunk.pictures, np.memmap)


def test_conditioning_keeps_its_dtype(written):
    found = written[0].chunk.conditioning(slice(1, 3))
    assert found["text"].dtype == torch.bfloat16 and torch.equal(found["text"], written[0].text[:, 1:3])
    assert found["mask"].dtype == torch.int64 and torch.equal(found["mask"], written[0].mask[:, 1:3])


def test_chunks_are_one_set(written):
    runs = Runs([each.chunk for each in written])
    assert (runs.count, runs.num_inference_steps, runs.latents_shape) == (8, TOTAL, (2, 3))
    assert runs.timesteps == (100.0, 99.0, 98.0, 97.0, 96.0)
    latents, text, pictures, guidance = (
        np.concatenate([np.asarray(getattr(each, name)) for each in written])
        for name in ("latents", "latents", "pictures", "guidance")
    )
    text = torch.cat([each.text for each in written], dim=1)
    grams = np.concatenate([each.gram() for each in written])
    for start in range(8):
        for stop in range(start + 1, 9):
            rows = slice(start, stop)
            for index in (0, 2, TOTAL, -1):
                assert np.array_equal(runs.latents(rows, index), latents[rows, index])
            assert np.array_equal(runs.pictures(rows), pictures[rows])
            assert np.array_equal(runs.guidance(rows), guidance[rows])
            assert np.allclose(runs.gram(rows), grams[rows])
            assert torch.equal(runs.conditioning(rows)["text"], text[:, rows])
    assert np.array_equal(runs.first_output(slice(None)), np.concatenate([each.outputs[:, 0] for each in written]))


def test_what_is_read_is_the_readers_own(written):
    """Writing to it changes no file."""
    runs = Runs([written[0].chunk])
    runs.latents(slice(0, 2), 0)[:] = 7.0
    assert np.array_equal(runs.latents(slice(0, 2), 0), written[0].latents[:2, 0])


@given(st.integers(1, 5), st.integers(0, 4), st.integers(1, 30), st.integers(0, 999), st.sampled_from([1, 4, 1 << 16]))
def test_inner_products_are_numpys_whatever_the_blocks(rows, others, elements, seed, block):
    random = np.random.default_rng(seed)
    first = random.normal(size=(rows, elements)).astype(np.float32)
    second = random.normal(size=(others, elements)).astype(np.float32)
    with patch.object(module, "GRAM_VALUES", block):
        found = gram_from_rows(first, second)
    both = np.concatenate([first, second]).astype(np.float64)
    assert found == pytest.approx(both @ both.T, rel=1e-12, abs=1e-12)


FULL_DISK = """
import sys
from pathlib import Path
from otcache.compiler.calibration.runs import new_array
from otcache.compiler.workspace.workspace import Workspace

def fill(folder):
    new_array(folder / "latents.npy", (1 << 20,))[:] = 1.0

try:
    Workspace(Path(sys.argv[1]) / "w").tree("capture", 1, fill)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_disk_without_room_is_an_error_and_no_signal(tmp_path):
    """A page of a mapped file that finds no room ends the process by SIGBUS: the room is taken before."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0, done
        assert done.stdout.startswith(f"HostError no space left on the disk of {tmp_path / 'w'} ("), done
        assert "goes on where it stopped" in done.stdout and list((tmp_path / "w").iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
