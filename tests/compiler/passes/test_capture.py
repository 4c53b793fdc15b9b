"""Full runs in chunks, on a device that runs out of memory: the runs of one without, or one line."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from command import COMPILE

from otcache.compiler.options import CompileOptions
from otcache.compiler.passes.capture import full_runs
from otcache.compiler.passes.prepare import lower_sampler
from otcache.compiler.passes.session import begin
from otcache.compiler.workspace.progress import Reporter
from otcache.schemas.errors import HostError


class Notes(Reporter):
    def __init__(self):
        super().__init__()
        self.texts = []

    def note(self, text):
        self.texts.append(text)


def captured(model, workspace, room=None, decoder_room=None):
    """Full runs of 6 prompts, with a transformer and a decoder that take so many samples; and what was noted."""
    options = CompileOptions(
        model=str(model),
        workspace=workspace,
        num_inference_steps=3,
        budgets=(2,),
        calibration_prompts=6,
        evaluation_prompts=2,
        trials=1,
        threads=1,
        micro_batch=6,
        engines="none",
    )
    reporter, tried = Notes(), []
    before = torch.get_num_threads()
    session, prompts, _ = begin(options, reporter)
    table = lower_sampler(session)

    def fail_above(most):
        def hook(module, arguments, keywords):
            count = len(keywords["hidden_states"] if "hidden_states" in keywords else arguments[0])
            tried.append(count)
            if most is not None and count > most:
                raise torch.OutOfMemoryError(f"out of memory: {count} samples\nand a second line")

        return hook

    pipeline = session.model.pipeline
    pipeline.transformer.register_forward_pre_hook(fail_above(room), with_kwargs=True)
    if decoder_room is not None:
        pipeline.vae.decoder.register_forward_pre_hook(fail_above(decoder_room), with_kwargs=True)
    try:
        runs = full_runs(session, table, "capture", prompts, 0)
    finally:
        torch.set_num_threads(before)
    return runs, reporter.texts, tried, session


def test_out_of_memory_halves_the_micro_batch(tiny_flux_folder, tmp_path):
    whole, notes, tried, session = captured(tiny_flux_folder, tmp_path / "a")
    assert set(tried) == {6} and session.micro_batch.size == 6
    halved, more, tried, session = captured(tiny_flux_folder, tmp_path / "b", room=2)
    said = [text for text in more if text not in notes]
    assert said == [
        "out of memory on the device: going on with 3 samples at a time",
        "out of memory on the device: going on with 1 samples at a time",
    ]
    assert session.micro_batch.size == 1 and tried[:2] == [6, 3] and set(tried[2:]) == {1}
    assert halved.count == whole.count == 6
    everything = slice(None)
    for index in range(4):
        found, expected = halved.latents(everything, index), whole.latents(everything, index)
        assert np.allclose(found, expected, atol=1e-4)
    assert np.array_equal(halved.latents(everything, 0), whole.latents(everything, 0)), "seeds follow the samples"
    assert np.allclose(halved.gram(), whole.gram(), rtol=1e-3, atol=1e-3)
    assert np.allclose(halved.pictures(everything), whole.pictures(everything), atol=1e-3)
    for name, value in whole.conditioning(everything).items():
        assert torch.allclose(halved.conditioning(everything)[name], value, atol=1e-5), name


@pytest.mark.parametrize("part", [{"room": 0}, {"decoder_room": 0}])
def test_no_room_for_one_sample_is_one_line(part, tiny_flux_folder, tmp_path):
    """For the transformer, and for the decoder."""
    with pytest.raises(HostError, match="one sample at a time: out of memory") as error:
        captured(tiny_flux_folder, tmp_path, **part)
    assert "\n" not in str(error.value)


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
from otcache.runtime.cli.main import main
main(sys.argv[1:], prog_name="otc")
"""


def test_a_disk_without_room_for_full_runs_is_said_in_one_line(tiny_flux_folder, tmp_path):
    """The kernel refuses the files of the capture (a file size limit), in a process of its own."""
    command = [sys.executable, "-c", LIMITED, "compile", str(tiny_flux_folder), *COMPILE, "--engines", "none"]
    environment = {**os.environ, "OTC_CACHE": str(tmp_path / "w")}
    done = subprocess.run([*command, "-o", str(tmp_path / "a")], capture_output=True, text=True, env=environment)
    assert done.returncode == 6, done
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert "no space left on the disk" in line and "it goes on where it stopped" in line, line
    assert not (tmp_path / "a").exists() and not list((tmp_path / "w").glob("*/capture-*"))
