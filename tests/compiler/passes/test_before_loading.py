"""What is wrong with a size, a length or the memory is said from configs alone: the model has no weights here."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("torch")

import torch
from command import COMPILE, otc

from otcache.compiler.models.hollow import hollow_pipeline, weight_bytes
from otcache.compiler.passes import before_loading
from otcache.compiler.pipelines.placement import Placement
from otcache.compiler.workspace.progress import QuietReporter
from otcache.schemas.errors import HostError


@pytest.fixture(scope="module")
def configs(tiny_flux_folder, tmp_path_factory):
    """The tiny pipeline's folder without its weights."""
    folder = tmp_path_factory.mktemp("configs") / "tiny"
    shutil.copytree(tiny_flux_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--height", "17"], "--height 17: FluxPipeline says: `height` and `width` have to be divisible by 4"),
        (["--sizes", "16x16,16x33"], "--sizes 16x33: FluxPipeline says"),
        (["--search-size", "9x9"], "--search-size 9x9: FluxPipeline says"),
        (["--max-sequence-length", "513"], "`max_sequence_length` cannot be greater than 512 but is 513"),
        (["--text-lengths", "12:600:12"], "--text-lengths 600 tokens: FluxPipeline says"),
        (["--num-frames", "9"], "--num-frames is 9, but FluxPipeline draws pictures"),
    ],
)
def test_sizes_and_lengths_are_checked_before_weights_are_read(configs, tmp_path, options, said, dry):
    result = otc("compile", str(configs), *COMPILE, *options, *dry, "-o", str(tmp_path / "a"))
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ") and not (tmp_path / "a").exists()


def test_what_is_right_goes_on_to_the_weights(configs, tmp_path):
    result = otc("compile", str(configs), *COMPILE, "--height", "32", "--sizes", "48x16", "-o", str(tmp_path / "a"))
    assert result.exit_code == 3 and "could not be loaded by diffusers" in result.stderr, result.output


def test_memory_is_checked_before_weights_are_read(configs, monkeypatch, capsys):
    weights = weight_bytes(hollow_pipeline(configs, "tiny"), torch.bfloat16)
    gigabytes = {name: size * 10**5 for name, size in weights.items()}
    monkeypatch.setattr(before_loading, "free_bytes", lambda device: 10**10)
    cuda = Placement(device=torch.device("cuda", 0), precision=torch.bfloat16)
    with pytest.raises(HostError, match=r"weights take \d+\.\d GB in bfloat16, and 10.0 GB are free on cuda:0: give"):
        before_loading._check_memory(gigabytes, cuda, QuietReporter())
    before_loading._check_memory(weights, cuda, QuietReporter())
    cpu = Placement(device=torch.device("cpu"), precision=torch.bfloat16)
    before_loading._check_memory(gigabytes, cpu, QuietReporter())
    assert "read from the disk again at every evaluation" in capsys.readouterr().err


def test_weights_are_counted_as_they_are_loaded(tiny_flux_folder):
    from safetensors import safe_open

    (path,) = (tiny_flux_folder / "transformer").glob("*.safetensors")
    with safe_open(path, "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118  # it is no dict
    assert weight_bytes(hollow_pipeline(tiny_flux_folder, "tiny"), torch.float32)["transformer"] == 4 * stored


def test_a_pipeline_that_configs_do_not_make_is_left_to_loading(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "OwnPipeline", "vae": ["own", "Vae"]}')
    assert hollow_pipeline(tmp_path, "own") is None
