"""MODEL is found, or refused with what is expected; the bundled model is what the issue of trust asks for."""

from __future__ import annotations

import json

import pytest

from otcache.compiler.models.find import bundled_folder, bundled_models, find_model
from otcache.compiler.models.load import load_model
from otcache.compiler.models.model import CallDefaults, Model, read_prompts
from otcache.schemas.errors import ModelError


def test_the_bundled_model_is_a_small_trained_flux():
    assert "shapes" in bundled_models()
    folder = bundled_folder() / "shapes"
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert weights <= 15e6 and not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pkl"))
    assert json.loads((folder / "check.json").read_text())["both"] >= 0.9
    model = load_model("shapes")
    config = model.transformer.config
    assert config.num_layers + config.num_single_layers >= 8 and config.num_layers and config.num_single_layers
    assert type(model.pipeline).__name__ == "FluxPipeline"
    assert len(set(model.prompts)) >= 56


def test_what_is_no_model_is_refused_with_the_names_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name, message in (("folder", "has no model_index.json"), ("nothing", "was not found")):
        with pytest.raises(ModelError, match=message) as caught:
            find_model(name)
        assert "shapes" in str(caught.value)
    with pytest.raises(ModelError, match="not in the local hub cache, and HF_HUB_OFFLINE"):
        find_model("nobody/nothing")


def test_a_broken_pipeline_says_why(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}')
    with pytest.raises(ModelError, match="could not be loaded by diffusers"):
        load_model(str(tmp_path))


def test_prompts_are_read_line_by_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a\n\n  b \n")
    assert read_prompts(path) == ["a", "b"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="expected UTF-8 text"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"height": "32"}', "height"),
        ('{"hight": 32}', "hight"),
        ("[32]", "call.json"),
        ("{", "call.json"),
        ('{"width": true}', "width"),
    ],
)
def test_a_call_that_is_none_is_refused(tmp_path, text, named):
    (tmp_path / "call.json").write_text(text)
    model = Model(name="m", folder=tmp_path, pipeline=None, config_digest="", weights_digest="", denoiser_digest="")
    with pytest.raises(ModelError, match=named) as raised:
        _ = model.call
    assert "expected an object of height, width" in str(raised.value) and "\n" not in str(raised.value)


def test_a_model_says_how_it_is_called(tmp_path):
    model = Model(name="m", folder=tmp_path, pipeline=None, config_digest="", weights_digest="", denoiser_digest="")
    assert model.call == CallDefaults()
    (tmp_path / "call.json").write_text('{"height": 32, "negative_prompt": " "}')
    assert model.call == CallDefaults(height=32, negative_prompt=" ")
