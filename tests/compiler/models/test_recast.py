"""A model that is stored in another dtype is loaded as diffusers loads it, and mapped from files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from otcache.compiler.models import recast as widen
from otcache.compiler.models.load import load_model
from otcache.compiler.models.recast import recast_folder
from otcache.schemas.errors import HostError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nothing is given back elsewhere")


def mapped_files(address: int) -> str:
    """The file that an address is mapped from; nothing for memory."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, *_ = line.split()
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            return line.split(maxsplit=5)[5].strip() if len(line.split()) > 5 else ""
    return ""


@pytest.fixture(scope="module")
def half_folder(tiny_flux_folder, tmp_path_factory):
    """The tiny pipeline as bfloat16."""
    folder = tmp_path_factory.mktemp("stored") / "half"
    DiffusionPipeline.from_pretrained(tiny_flux_folder, torch_dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def test_weights_are_those_that_diffusers_casts(half_folder, tmp_path):
    expected = DiffusionPipeline.from_pretrained(half_folder, torch_dtype=torch.float32)
    model = load_model(str(half_folder), scratch=tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is left"
    for name, component in expected.components.items():
        if isinstance(component, torch.nn.Module):
            found = getattr(model.pipeline, name).state_dict()
            assert found.keys() == component.state_dict().keys()
            for key, value in component.state_dict().items():
                assert torch.equal(found[key], value) and found[key].dtype == value.dtype, key
    for weight in model.transformer.parameters():
        assert str(tmp_path) in mapped_files(weight.data_ptr())
    assert model.weights_digest == load_model(str(half_folder), dtype="bfloat16").weights_digest, "of what is stored"


def test_a_folder_that_is_as_wanted_is_taken_as_it_is(tiny_flux_folder, tmp_path):
    with recast_folder(tiny_flux_folder, torch.float32, tmp_path) as found:
        assert found == tiny_flux_folder and not list(tmp_path.iterdir())


def test_integers_and_shards_stay_what_they_are(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(3, 5).half(),
        "one": torch.tensor(2.0).bfloat16(),
        "none": torch.empty(0, 2),
        "ids": torch.arange(4),
    }
    save_file(tensors, folder / "a.safetensors", metadata={"format": "pt"})
    save_file({"kept": torch.ones(2)}, folder / "b.safetensors")
    (folder / "config.json").write_text(json.dumps({"a": 1}))
    with recast_folder(folder, torch.float32, tmp_path) as found:
        made = load_file(found / "a.safetensors")
        assert (found / "b.safetensors").is_symlink() and load_file(found / "b.safetensors")["kept"].sum() == 2
        assert json.loads((found / "config.json").read_text()) == {"a": 1}
    assert made.keys() == tensors.keys() and not found.exists()
    for name, value in tensors.items():
        wide = value.float() if value.is_floating_point() else value
        assert torch.equal(made[name], wide) and made[name].dtype == wide.dtype


def test_a_broken_file_leaves_nothing(half_folder, tmp_path):
    folder = shutil.copytree(half_folder, tmp_path / "model")
    path = next((folder / "transformer").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])
    scratch = tmp_path / "scratch"
    with pytest.raises(Exception, match="could not be loaded by diffusers"):
        load_model(str(folder), scratch=scratch)
    assert not scratch.exists() or not list(scratch.iterdir())


def test_what_a_killed_process_left_is_removed(half_folder, tmp_path):
    left = tmp_path / f".{half_folder.name}.abcdefgh.part"
    (left / "transformer").mkdir(parents=True)
    with recast_folder(half_folder, torch.float32, tmp_path) as found:
        assert not left.exists() and found.parent.parent == tmp_path


def test_a_full_disk_and_a_folder_that_is_none_are_named(half_folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "file").touch()
    with pytest.raises(HostError, match=r"workspace .*file/cache cannot be written to .*OTC_CACHE"):
        load_model(str(half_folder), scratch=tmp_path / "file" / "cache")
    monkeypatch.setattr(widen, "_cast", full)
    with pytest.raises(HostError, match=r"no space left on the disk of .*OTC_CACHE"):
        load_model(str(half_folder), scratch=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
