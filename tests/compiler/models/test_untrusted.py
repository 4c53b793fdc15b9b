"""A model's own code does not run: the folders here would leave a marker behind if a line of theirs were executed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from otcache.compiler.models.load import load_model
from otcache.schemas.errors import ModelError


@pytest.fixture
def model(tiny_flux_folder, tmp_path):
    """A copy of the tiny pipeline, and the file that its code would create."""
    return Path(shutil.copytree(tiny_flux_folder, tmp_path / "model")), tmp_path / "marker"


def code(marker):
    return (
        f"open({str(marker)!r}, 'w').close()\n"
        "from diffusers import AutoencoderKL, FluxPipeline\n"
        "class Own(AutoencoderKL): pass\n"
        "class OwnPipeline(FluxPipeline): pass\n"
    )


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def own_component(folder, marker):
    (folder / "vae" / "own.py").write_text(code(marker))
    change(folder / "model_index.json", vae=["own", "Own"])


def own_pipeline(folder, marker):
    (folder / "pipeline.py").write_text(code(marker))
    change(folder / "model_index.json", _class_name=["pipeline", "OwnPipeline"])


def linked_component(folder, marker):
    own_component(folder, marker)
    (folder / "vae").rename(folder.parent / "elsewhere")
    (folder / "vae").symlink_to(folder.parent / "elsewhere")


def mapped_tokenizer(folder, marker):
    change(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Own"]})


def mapped_encoder(folder, marker):
    change(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "nobody/code--own.Own"})


def named_class(folder, marker):
    change(folder / "model_index.json", _class_name=["pipeline", "OwnPipeline"])


def other_library(folder, marker):
    """A module that is importable, as any installed package is: diffusers would import it by its name."""
    change(folder / "model_index.json", vae=["own_library", "Own"])


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (own_component, "vae/own.py"),
        (own_pipeline, "pipeline.py"),
        (linked_component, "vae/own.py"),
        (mapped_tokenizer, "auto_map in tokenizer/tokenizer_config.json"),
        (mapped_encoder, "auto_map in text_encoder/config.json"),
        (named_class, "model_index.json"),
        (other_library, "'vae' from 'own_library'"),
    ],
)
def test_code_is_refused_and_not_run(spoil, named, model, monkeypatch, tmp_path):
    folder, marker = model
    (tmp_path / "own_library.py").write_text(code(marker))
    monkeypatch.syspath_prepend(tmp_path)
    spoil(folder, marker)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder))
    message = str(caught.value)
    assert named in message and "--trust-remote-code" in message and "\n" not in message
    assert not marker.exists()


def test_code_runs_when_it_is_trusted(model):
    folder, marker = model
    own_component(folder, marker)
    loaded = load_model(str(folder), trust_remote_code=True)
    assert marker.exists() and type(loaded.pipeline.vae).__name__ == "Own"


def test_stray_data_is_no_code(model):
    folder, _ = model
    (folder / "README.md").write_text("# a model")
    (folder / "scheduler" / "notes.json").write_text("[1]")
    assert load_model(str(folder)).transformer is not None


def test_pickles_are_refused(model):
    import torch

    folder, _ = model
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    assert load_model(str(folder)).transformer is not None, "a pickle beside safetensors is not read"
    weights.unlink()
    for trusted in (False, True):
        with pytest.raises(ModelError, match=r"vae as a pickle only \(diffusion_pytorch_model.bin\).*save_pretrained"):
            load_model(str(folder), trust_remote_code=trusted)


CACHED = """
import sys
from otcache.compiler.models.find import find_model
from otcache.schemas.errors import ModelError
try:
    print(find_model(sys.argv[1], revision=sys.argv[2] if len(sys.argv) > 2 else None))
except ModelError as error:
    print(f"refused: {error}")
"""


def find_in_cache(home, *arguments, offline=True):
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1" if offline else "0"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", CACHED, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60).stdout.strip()


def test_hub_ids_offline(tmp_path):
    """The cache's own layout, read by huggingface_hub: a branch, a tag and a commit of a model, and one that is not
    there.
    """
    first, second = "a" * 40, "b" * 40
    model = tmp_path / "hub" / "models--org--name"
    for commit in (first, second):
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "model_index.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(first)
    (model / "refs" / "v2").write_text(second)
    assert find_in_cache(tmp_path, "org/name").endswith(first)
    assert find_in_cache(tmp_path, "org/name", "v2").endswith(second)
    assert find_in_cache(tmp_path, "org/name", second).endswith(second)
    assert "at revision 'v3' is not in the local hub cache, and HF_HUB_OFFLINE forbids" in find_in_cache(
        tmp_path, "org/name", "v3"
    )


def test_a_revision_of_a_folder_is_refused(model):
    with pytest.raises(ModelError, match=r"--revision is 'v2', but MODEL .* is no hub id"):
        load_model(str(model[0]), revision="v2")
    with pytest.raises(ModelError, match="--revision is 'v2', but MODEL 'shapes' is no hub id"):
        load_model("shapes", revision="v2")


def test_an_unreachable_hub_ends_in_one_line_and_soon(tmp_path, monkeypatch):
    """A proxy that refuses connections stands in for a host without a network."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    said = find_in_cache(tmp_path, "nobody/nothing", offline=False)
    assert said.startswith("refused: MODEL 'nobody/nothing' is not here and could not be fetched from the hub (")
    assert len(said.splitlines()) == 1
